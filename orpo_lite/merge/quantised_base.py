"""Weights as quantised training saw them: rounded to 4 or 8 bits and back, block by block."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from orpo_lite.common.errors import RequestError
from orpo_lite.merge.safetensors_blocks import Block, Source, Stored, blocks
from orpo_lite.model.precision import default_device

BLOCKSIZE = 64
"""Weights that share a scale in bitsandbytes' 4-bit formats, its default and transformers'."""
MARK = ".quant_state.bitsandbytes__"


def quantised_modules(model: PreTrainedModel, settings: Any) -> set[str]:
    """Names of the linear layers that transformers would load in 4 or 8 bits. Consumes the skeleton it is given."""
    from transformers.quantizers.auto import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map={"": "cpu"}, dtype=torch.float32)
    kinds = ("Linear4bit", "Linear8bitLt")
    return {name for name, module in model.named_modules() if type(module).__name__ in kinds}


@dataclass(frozen=True)
class RoundTrip:
    """A stored weight, quantised as training did and dequantised again."""

    stored: Stored
    method: str
    """nf4, fp4 or int8."""
    double_quant: bool
    trained: torch.dtype
    """What training read the weight as before it quantised it."""
    turned: bool = False
    """True for GPT-2's Conv1D, which is quantised transposed."""

    @property
    def key(self) -> str:
        return self.stored.key

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.dtype

    def reader(self) -> Callable[[Block], Tensor]:
        if self.turned:
            weight = self.stored.read().to(self.trained).T.contiguous()
            whole = self.restore(weight, self.scales([weight])).T.contiguous()
            return lambda block: whole[block].clone()
        scales = self.scales(self.stored.read(block).to(self.trained) for block in blocks(self.shape))
        return lambda block: self.restore(self.stored.read(block).to(self.trained), scales, block)

    def scales(self, parts: Any) -> Tensor | None:
        """The 4-bit blocks' scales after their own quantisation, which needs all of them; None where each stands alone."""
        if self.method == "int8" or not self.double_quant:
            return None
        found = []
        for part in parts:
            flat = part.float().flatten()
            found.append(nn.functional.pad(flat, (0, -len(flat) % BLOCKSIZE)).view(-1, BLOCKSIZE).abs().amax(1))
        return rounded_scales(torch.cat(found))

    def restore(self, weight: Tensor, scales: Tensor | None, block: Block | None = None) -> Tensor:
        from bitsandbytes import functional

        weight = weight.to(default_device())  # a card does in seconds what takes a processor minutes
        if self.method == "int8":
            held, rows, _ = functional.int8_vectorwise_quant(weight.half())
            return functional.int8_vectorwise_dequant(held, rows).cpu()
        packed, state = quantise_4bit(weight, self.method)
        if scales is not None:
            first = block[0].start * math.prod(self.shape[1:]) // BLOCKSIZE if block else 0
            state.absmax = scales[first : first + len(state.absmax)].to(weight.device)
        return functional.dequantize_4bit(packed, state).cpu()


def quantise_4bit(weight: Tensor, method: str) -> tuple[Tensor, Any]:
    """bitsandbytes' 4-bit weights and state of some whole blocks, the scales not quantised themselves."""
    from bitsandbytes import functional

    return functional.quantize_4bit(weight.contiguous(), blocksize=BLOCKSIZE, quant_type=method)


def rounded_scales(absmax: Tensor) -> Tensor:
    """Scales after double quantisation: 8 bits around their mean, as bitsandbytes' compress_statistics."""
    from bitsandbytes import functional

    mean = absmax.mean()
    held, state = functional.quantize_blockwise(absmax - mean, blocksize=256)
    return functional.dequantize_blockwise(held, state) + mean


@dataclass(frozen=True)
class Prequantised:
    """A weight of a repository that ships in bitsandbytes' 4 or 8 bits, dequantised."""

    stored: Stored
    aside: dict[str, Stored]
    """Its scales and state, by the last part of their keys."""
    target: torch.dtype

    @property
    def key(self) -> str:
        return self.stored.key

    @property
    def dtype(self) -> torch.dtype:
        return self.target

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape if "SCB" in self.aside else tuple(self.state().shape)

    def state(self) -> Any:
        from bitsandbytes.functional import QuantState

        return QuantState.from_dict(
            {name: part.read() for name, part in self.aside.items()}, device=torch.device("cpu")
        )

    def reader(self) -> Callable[[Block], Tensor]:
        from bitsandbytes import functional

        if "SCB" in self.aside:
            scale = self.aside["SCB"].read()
            return lambda block: functional.int8_vectorwise_dequant(self.stored.read(block), scale[block])
        state = self.state()
        scales = state.absmax
        if state.nested:
            scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        return partial(self.rows, state, scales.float())

    def rows(self, state: Any, scales: Tensor, block: Block) -> Tensor:
        from bitsandbytes import functional

        width = math.prod(state.shape[1:])
        first, last = block[0].start * width, block[0].stop * width
        if first % state.blocksize or first % 2:
            raise ValueError(f"{self.key}: rows of {width} weights do not begin where scales do ({state.blocksize})")
        packed = self.stored.read((slice(first // 2, (last + 1) // 2),))
        own = functional.QuantState(
            absmax=scales[first // state.blocksize : -(-last // state.blocksize)],
            shape=torch.Size((block[0].stop - block[0].start, *state.shape[1:])),
            code=state.code,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dtype=state.dtype,
        )
        return functional.dequantize_4bit(packed, own)


def dequantised(tensors: dict[str, Stored], target: torch.dtype) -> dict[str, Source]:
    """The tensors of a repository in bitsandbytes' format, its quantised weights as they compute.

    Raises:
        RequestError: another kind of quantisation.
    """
    four = {key.partition(MARK)[0] for key in tensors if MARK in key}
    eight = {f"{key.removesuffix('.SCB')}.weight" for key in tensors if key.endswith(".SCB")}
    if not four | eight:
        raise RequestError(
            "--onto quantized: the base is not quantised by bitsandbytes: name its 16-bit original by --base"
        )
    aside: dict[str, dict[str, Stored]] = {owner: {} for owner in four | eight}
    plain: dict[str, Stored] = {}
    for key, stored in tensors.items():
        path, _, leaf = key.rpartition(".")
        if MARK in key:
            aside[key.partition(MARK)[0]][f"quant_state.{leaf}"] = stored
        elif path in four:
            aside[path][leaf] = stored
        elif leaf in ("SCB", "weight_format") and f"{path}.weight" in eight:
            aside[f"{path}.weight"][leaf] = stored
        else:
            plain[key] = stored
    return {key: Prequantised(one, aside[key], target) if key in aside else one for key, one in plain.items()}
