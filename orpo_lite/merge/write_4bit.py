"""A merged model in bitsandbytes' 4 bits, and how much of the adapter's change is left in it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from orpo_lite.common.errors import RequestError
from orpo_lite.merge.plan import Plan
from orpo_lite.merge.quantised_base import BLOCKSIZE, quantise_4bit, quantised_modules
from orpo_lite.merge.safetensors_blocks import Block, Slot
from orpo_lite.merge.workers import each_block
from orpo_lite.merge.write import Job, exact, first

NESTED = 256
"""Scales that share a scale of their own."""
STATE_BYTES = 512
"""Of the JSON that describes a weight, padded with spaces, so that the file's header can be written first."""
LEAST = 0.1
"""Share of the adapter's change that has to be left."""


@dataclass
class Survival:
    """How much of the change that the adapter made is left after rounding to 4 bits.

    Measured as the projection of the change of the rounded weights on the change of the exact ones:
    <Q(W + D) - Q(W), D> / <D, D>.
    """

    kind: str
    along: float = 0.0
    whole: float = 0.0
    same: int = 0
    count: int = 0
    layers: int = 0

    def add(self, before: Tensor, after: Tensor, delta: Tensor) -> None:
        moved = after - before
        self.along += (moved * delta).sum(dtype=torch.float64).item()
        self.whole += delta.pow(2).sum(dtype=torch.float64).item()
        self.same += int((moved == 0).sum())
        self.count += delta.numel()

    def report(self) -> list[str]:
        """The figures in words.

        Raises:
            RuntimeError: next to nothing is left.
        """
        if not self.whole:
            return [f"{self.layers} linear layers in {self.kind}; the adapter changes none of them"]
        share = self.along / self.whole
        words = (
            f"{self.kind} keeps {share:.0%} of the adapter's change ({self.same / self.count:.1%} of the weights that it "
            "moves round to the value that they have without it)"
        )
        if share < LEAST:
            raise RuntimeError(
                f"{words}: the adapter would be all but gone, so nothing was written. Are the base's weights 4-bit values "
                "already? Serve the 16-bit merge, or base and adapter unmerged"
            )
        return [words]


@dataclass(frozen=True)
class FourBitJob(Job):
    """A linear layer's weight, written as bitsandbytes' packed 4-bit values with their scales."""

    kind: str = "nf4"
    survival: Survival = field(default_factory=lambda: Survival("nf4"))

    @property
    def slots(self) -> list[Slot]:
        count = math.prod(self.source.shape)
        scales = -(-count // BLOCKSIZE)
        nested = -(-scales // NESTED)
        return [
            Slot(self.key, "U8", ((count + 1) // 2, 1), (count + 1) // 2),
            Slot(f"{self.key}.absmax", "U8", (scales,), scales),
            Slot(f"{self.key}.nested_absmax", "F32", (nested,), nested * 4),
            Slot(f"{self.key}.nested_quant_map", "F32", (256,), 256 * 4),
            Slot(f"{self.key}.quant_map", "F32", (16,), 16 * 4),
            Slot(f"{self.key}.quant_state.bitsandbytes__{self.kind}", "U8", (STATE_BYTES,), STATE_BYTES),
        ]

    def parts(self) -> Iterator[Tensor]:
        from bitsandbytes import functional

        read, scales, state = self.source.reader(), [], None
        self.measure_norms(read)

        def rounded(block: Block) -> tuple[Tensor, Any, tuple[Tensor, Tensor, Tensor] | None]:
            base = exact(read(block)).float()
            weights = base.clone()
            self.change(weights, first(block, base.dim()))
            packed, state = quantise_4bit(weights, self.kind)
            if not self.changes:
                return packed, state, None
            before = functional.dequantize_4bit(*quantise_4bit(base, self.kind))
            return packed, state, (before, functional.dequantize_4bit(packed, state), weights - base)

        for _, (packed, state, change) in each_block(rounded, self.source.shape):
            if change is not None:
                self.survival.add(*change)
            scales.append(state.absmax)
            yield packed
        assert state is not None
        absmax = torch.cat(scales)
        offset = absmax.mean()
        held, nested = functional.quantize_blockwise(absmax - offset, blocksize=NESTED)
        whole = functional.QuantState(
            absmax=held,
            shape=torch.Size(self.source.shape),
            code=state.code,
            blocksize=BLOCKSIZE,
            quant_type=self.kind,
            dtype=self.dtype,
            offset=offset,
            state2=nested,
        )
        facts = whole.as_dict(packed=True)
        for slot in self.slots[1:]:
            tensor = facts[slot.key.removeprefix(f"{self.key}.")]
            if slot.nbytes == STATE_BYTES and "quant_state" in slot.key:
                tensor = nn.functional.pad(tensor, (0, STATE_BYTES - len(tensor)), value=ord(" "))
            yield tensor


def quantise_plan(plan: Plan, kind: str) -> Survival:
    """Let a plan write its linear layers in 4 bits; what becomes of the adapter's change is counted as it is written.

    Raises:
        RequestError: a model whose layers bitsandbytes keeps in another order (GPT-2).
    """
    compute = plan.dtype
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    if any(isinstance(module, Conv1D) for module in plan.base.skeleton().modules()):
        raise RequestError(f"--quantize {kind}: the layers of {type(plan.base.model).__name__} are stored transposed")
    skeleton = plan.base.skeleton()
    skeleton.config.tie_word_embeddings = plan.config.tie_word_embeddings
    names = quantised_modules(skeleton, settings)
    survival = Survival(kind)
    for jobs in plan.shards.values():
        for place, job in enumerate(jobs):
            links = plan.base.keys.links.get(job.key, [])
            path, _, leaf = links[0].parameter.rpartition(".") if len(links) == 1 else ("", "", "")
            if leaf == "weight" and path in names and not links[0].fixed:
                jobs[place] = FourBitJob(job.key, job.source, job.changes, compute, kind, survival)
                survival.layers += 1
    plan.config.quantization_config = settings
    return survival
