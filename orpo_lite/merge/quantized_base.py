"""Weights as quantized training saw them: rounded to 4 or 8 bits and back, block by block."""

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
from orpo_lite.merge.safetensors_blocks import Block, Derived, Source, Stored, blocks
from orpo_lite.model.precision import default_device

BLOCKSIZE = 64
"""Weights that share a scale in bitsandbytes' 4-bit formats, by its default and transformers'."""
MARK = ".quant_state.bitsandbytes__"


def quantized_modules(model: PreTrainedModel, settings: Any) -> set[str]:
    """Name the linear layers that transformers would load in 4 or 8 bits; `model` is a skeleton, changed in place."""
    from transformers.quantizers.auto import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map={"": "cpu"}, dtype=torch.float32)
    kinds = ("Linear4bit", "Linear8bitLt")
    return {name for name, module in model.named_modules() if type(module).__name__ in kinds}


@dataclass(frozen=True)
class RoundTrip(Derived):
    """A stored weight, quantized as training did and dequantized again."""

    source: Stored
    method: str
    """nf4, fp4 or int8."""
    double_quant: bool
    trained: torch.dtype
    """Dtype in which training read the weight before it quantized it."""
    transposed: bool = False
    """True for GPT-2's Conv1D, which is quantized transposed."""

    def reader(self) -> Callable[[Block], Tensor]:
        if self.transposed:
            weight = self.source.read().to(self.trained).T.contiguous()
            whole = self.restore(weight, self.scales([weight])).T.contiguous()
            return lambda block: whole[block].clone()
        scales = self.scales(self.source.read(block).to(self.trained) for block in blocks(self.shape))
        return lambda block: self.restore(self.source.read(block).to(self.trained), scales, block)

    def scales(self, parts: Any) -> Tensor | None:
        """Return the scales of all 4-bit blocks after double quantization; None where scales are not quantized."""
        if self.method == "int8" or not self.double_quant:
            return None
        found = []
        for part in parts:
            flat = part.float().flatten()
            found.append(nn.functional.pad(flat, (0, -len(flat) % BLOCKSIZE)).view(-1, BLOCKSIZE).abs().amax(1))
        return rounded_scales(torch.cat(found))

    def restore(self, weight: Tensor, scales: Tensor | None, block: Block | None = None) -> Tensor:
        """Quantize some whole rows and dequantize them again."""
        from bitsandbytes import functional

        weight = weight.to(default_device())  # a card does in seconds what takes a processor minutes
        if self.method == "int8":
            held, rows, _ = functional.int8_vectorwise_quant(weight.half())
            return functional.int8_vectorwise_dequant(held, rows).cpu()
        packed, state = functional.quantize_4bit(weight.contiguous(), blocksize=BLOCKSIZE, quant_type=self.method)
        if scales is not None:
            first = block[0].start * math.prod(self.shape[1:]) // BLOCKSIZE if block else 0
            state.absmax = scales[first : first + len(state.absmax)].to(weight.device)
        return functional.dequantize_4bit(packed, state).cpu()


def rounded_scales(absmax: Tensor) -> Tensor:
    """Round scales as double quantization does: 8 bits around their mean (bitsandbytes' compress_statistics)."""
    from bitsandbytes import functional

    mean = absmax.mean()
    held, state = functional.quantize_blockwise(absmax - mean, blocksize=256)
    return functional.dequantize_blockwise(held, state) + mean


@dataclass(frozen=True)
class Prequantized(Derived):
    """A weight that its repository stores in bitsandbytes' 4 or 8 bits, dequantized."""

    source: Stored
    state_parts: dict[str, Stored]
    """Its scales and other state, by the last part of their keys."""
    target: torch.dtype

    @property
    def dtype(self) -> torch.dtype:
        return self.target

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape if "SCB" in self.state_parts else tuple(self.state().shape)

    def state(self) -> Any:
        from bitsandbytes.functional import QuantState

        return QuantState.from_dict(
            {name: part.read() for name, part in self.state_parts.items()}, device=torch.device("cpu")
        )

    def reader(self) -> Callable[[Block], Tensor]:
        from bitsandbytes import functional

        if "SCB" in self.state_parts:
            scale = self.state_parts["SCB"].read()
            return lambda block: functional.int8_vectorwise_dequant(self.source.read(block), scale[block])
        state = self.state()
        scales = state.absmax
        if state.nested:
            scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        return partial(self.rows, state, scales.float())

    def rows(self, state: Any, scales: Tensor, block: Block) -> Tensor:
        """Dequantize some rows of a 4-bit weight; `scales` are all of its scales in float32."""
        from bitsandbytes import functional

        width = math.prod(state.shape[1:])
        first, last = block[0].start * width, block[0].stop * width
        if first % state.blocksize or first % 2:
            raise ValueError(f"{self.key}: rows of {width} weights do not begin where scales do ({state.blocksize})")
        packed = self.source.read((slice(first // 2, (last + 1) // 2),))
        own = functional.QuantState(
            absmax=scales[first // state.blocksize : -(-last // state.blocksize)],
            shape=torch.Size((block[0].stop - block[0].start, *state.shape[1:])),
            code=state.code,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dtype=state.dtype,
        )
        return functional.dequantize_4bit(packed, own)


def dequantized(tensors: dict[str, Stored], target: torch.dtype) -> dict[str, Source]:
    """Turn the tensors of a repository in bitsandbytes' format into sources of dequantized weights.

    Raises:
        RequestError: the repository is quantized in another way.
    """
    four = {key.partition(MARK)[0] for key in tensors if MARK in key}
    eight = {f"{key.removesuffix('.SCB')}.weight" for key in tensors if key.endswith(".SCB")}
    if not four | eight:
        raise RequestError(
            "--onto quantized: the base is not quantized by bitsandbytes: name its 16-bit original with --base"
        )
    state_parts: dict[str, dict[str, Stored]] = {owner: {} for owner in four | eight}
    plain: dict[str, Stored] = {}
    for key, stored in tensors.items():
        path, _, leaf = key.rpartition(".")
        if MARK in key:
            state_parts[key.partition(MARK)[0]][f"quant_state.{leaf}"] = stored
        elif path in four:
            state_parts[path][leaf] = stored
        elif leaf in ("SCB", "weight_format") and f"{path}.weight" in eight:
            state_parts[f"{path}.weight"][leaf] = stored
        else:
            plain[key] = stored
    return {
        key: Prequantized(one, state_parts[key], target) if key in state_parts else one for key, one in plain.items()
    }
