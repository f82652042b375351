"""Attention over packed pairs: no padding, the prompt once for both completions, and no length x length mask.

A row holds pairs end to end, each as [common prefix | rest of chosen | rest of rejected]. Two calls per pair of
the model's own attention function are exact: prefix+chosen attend causally to themselves, and the rejected branch
attends to prefix+rejected, causal from the bottom right. The cost grows with the sum of the squared lengths, and soft
caps, sinks, windows and scales are the model's own, since its function computes every segment.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PLAIN, PACKED = ("sdpa", "eager"), {"sdpa": "orpo_lite_sdpa", "eager": "orpo_lite_eager"}
"""Attention functions that compute the segments, and the names of their wrapped versions in transformers."""

LOWER_RIGHT = {"cuda"}
"""Devices whose flash kernels compute bottom-right causal attention without a mask."""

_in_packed_forward: ContextVar[bool] = ContextVar("in_packed_forward", default=False)
"""True while masks are built for a packed row. Only the model's own forward builds masks, never the recomputation of a
checkpointed layer, so this cannot read another batch's; the segments themselves travel as a keyword."""


class PairMask:
    """Mask of a layer, kept as the model's own rule over positions until a segment's size is known.

    Positions restart at each pair and the rejected branch continues from the prefix, so the rule (causal, sliding
    window, chunked) holds over positions as it does over the indices of a sequence alone in its row.
    """

    def __init__(self, rule: Callable[..., Any], local: int | None, device: torch.device, dtype: torch.dtype):
        self.rule, self.local, self.device, self.dtype = rule, local, device, dtype
        self.blocks: dict[tuple[int, int, bool], Any] = {}

    def block(self, first: int, length: int, additive: bool) -> Any:
        """Return the mask for queries at first to length-1 over keys 0 to length-1; None means causal and square."""
        key = (first, length, additive)
        if key not in self.blocks:
            self.blocks[key] = self._build(first, length, additive)
        return self.blocks[key]

    def _build(self, first: int, length: int, additive: bool) -> Any:
        causal = self.rule is causal_mask_function or (self.local is not None and self.local >= length)
        if causal and not additive:
            if first == 0:
                return None
            if self.device.type in LOWER_RIGHT:
                return causal_lower_right(length - first, length)
        # a rule may index tensors with batch and head
        zero = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        queries = torch.arange(first, length, device=self.device)[:, None]
        keys = torch.arange(length, device=self.device)[None]
        allowed = self.rule(zero, zero, queries, keys).expand(length - first, length)
        if not additive:
            return allowed[None, None]
        mask = torch.zeros(allowed.shape, dtype=self.dtype, device=self.device)
        return mask.masked_fill_(~allowed, torch.finfo(self.dtype).min)[None, None]


def _build_mask(inner: str) -> Callable[..., Any]:
    def build(
        *, mask_function: Callable[..., Any] = causal_mask_function, local_size: int | None = None, **kwargs: Any
    ) -> Any:
        if _in_packed_forward.get():
            # transformers 5.2 and 5.3 give no device, but positions that are on it
            device = kwargs["device"] if "device" in kwargs else kwargs["cache_position"].device
            return PairMask(mask_function, local_size, torch.device(device), kwargs.get("dtype", torch.float32))
        return ALL_MASK_ATTENTION_FUNCTIONS[inner](mask_function=mask_function, local_size=local_size, **kwargs)

    return build


def _attend(inner: str) -> Callable[..., Any]:
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        segments = kwargs.pop("orpo_segments", None)
        # a model's own eager function is in the module of its attention class
        plain = ALL_ATTENTION_FUNCTIONS.get(inner) or sys.modules[type(module).__module__].eager_attention_forward
        if segments is None:
            return plain(module, query, key, value, attention_mask, **kwargs)
        if not isinstance(attention_mask, PairMask):
            raise TypeError(f"{type(module).__name__} brings its own mask, which does not cover packed pairs")
        kwargs.pop("position_ids", None)  # of the whole row, and rotary embeddings are applied already
        additive = inner == "eager"
        parts = []
        for start, prefix, chosen, rejected in segments:
            length, middle = prefix + chosen, start + prefix + chosen
            if length:
                rows = slice(start, middle)
                mask = attention_mask.block(0, length, additive)
                parts.append(plain(module, query[:, :, rows], key[:, :, rows], value[:, :, rows], mask, **kwargs)[0])
            if rejected:
                branch, shared = slice(middle, middle + rejected), slice(start, start + prefix)
                k = torch.cat([key[:, :, shared], key[:, :, branch]], 2) if prefix else key[:, :, branch]
                v = torch.cat([value[:, :, shared], value[:, :, branch]], 2) if prefix else value[:, :, branch]
                mask = attention_mask.block(prefix, prefix + rejected, additive)
                parts.append(plain(module, query[:, :, branch], k, v, mask, **kwargs)[0])
        return torch.cat(parts, 1), None

    return attend


for _inner in PLAIN:
    AttentionInterface.register(PACKED[_inner], _attend(_inner))
    AttentionMaskInterface.register(PACKED[_inner], _build_mask(_inner))


def inner_attention(model: PreTrainedModel) -> str | None:
    """Return the attention function for packed pairs: the model's own if it is plain, else sdpa if supported, or None."""
    now = model.config._attn_implementation
    now = next((plain for plain, packed in PACKED.items() if packed == now), now)
    if now in PLAIN:
        return now
    return "sdpa" if model._supports_sdpa else None


@contextlib.contextmanager
def packed_attention(model: PreTrainedModel) -> Iterator[None]:
    """Run forwards of packed rows in this block; the segments go to the model as `orpo_segments=`.

    The wrapped attention stays on the model after the block, since checkpointed layers are recomputed in the backward
    pass; without segments it does exactly what the plain one does. `plain_attention` removes it.
    """
    inner = inner_attention(model)
    assert inner is not None
    if model.config._attn_implementation != PACKED[inner]:
        model.set_attn_implementation(PACKED[inner])
    token = _in_packed_forward.set(True)
    try:
        yield
    finally:
        _in_packed_forward.reset(token)


def plain_attention(model: PreTrainedModel) -> None:
    """Restore the model's plain attention function."""
    for plain, packed in PACKED.items():
        if model.config._attn_implementation == packed:
            model.set_attn_implementation(plain)
