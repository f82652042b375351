"""Attention over packed pairs: no padding, the prompt once for both completions, and no length x length mask.

A row holds pairs end to end, each as [common prefix | rest of chosen | rest of rejected]. Two calls per pair of
the model's own attention function are exact: prefix+chosen attend causally to themselves, and the rejected branch
attends to prefix+rejected, causal from the bottom right. The cost grows with the sum of the squared lengths, and soft
caps, sinks, windows and scales are the model's own, since its function computes every segment. Where a kernel takes all
pairs in one call (one_call.py), it stands for sdpa.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from orpo_lite.model.precision import FLASH_WIDTH
from orpo_lite.objective.one_call import PairCalls, takes

INNER = {"orpo_lite_sdpa": "sdpa", "orpo_lite_sdpa_repeated": "sdpa", "orpo_lite_eager": "eager"}
"""Names of wrapped attention functions in transformers, and the plain ones that compute the segments."""

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

    def window(self, longest: int) -> int | None:
        """Return how many keys a query of such a sequence sees, itself included, 0 for all; None for any other rule."""
        if self.rule is causal_mask_function or (self.local is not None and self.local >= longest):
            return 0
        if self.local is None:
            return None
        zero, keys = torch.zeros((), dtype=torch.int64), torch.arange(2 * self.local + 1)
        try:  # a window slides; in a chunk the first query sees only itself
            seen = self.rule(zero, zero, keys[-1], keys)
            return self.local if torch.equal(seen, keys > self.local) else None
        except RuntimeError:  # a rule over tensors of the batch, which are elsewhere
            return None

    def _build(self, first: int, length: int, additive: bool) -> Any:
        causal = self.rule is causal_mask_function or (self.local is not None and self.local >= length)
        if causal and not additive and first == 0:
            return None
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


def _attend(inner: str, repeats: bool) -> Callable[..., Any]:
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        pairs: PairCalls | None = kwargs.pop("orpo_segments", None)
        # a model's own eager function is in the module of its attention class
        plain = ALL_ATTENTION_FUNCTIONS.get(inner) or sys.modules[type(module).__module__].eager_attention_forward
        owner: Any = module
        if pairs is not None:
            if not isinstance(attention_mask, PairMask):
                raise TypeError(f"{type(module).__name__} brings its own mask, which does not cover packed pairs")
            kwargs.pop("position_ids", None)  # of the whole row, and rotary embeddings are applied already
            query, key, value = lowered(query, key, value)
            window = attention_mask.window(pairs.sizes[-1]) if pairs.run else None
            if inner == "sdpa" and takes(pairs.run, query, value, window, kwargs):
                q, k, v = (one.squeeze(0).transpose(0, 1) for one in (query, key, value))
                if len(pairs.key_rows) != len(k):  # else no prefix is shared, and the rows lie as the kernel reads them
                    k, v = (one.index_select(0, pairs.key_rows) for one in (k, v))
                assert pairs.run is not None
                return pairs.run(q, k, v, pairs, kwargs.get("scaling"), window)[None], None
        if inner == "sdpa" and (repeats or query.shape[-1] > FLASH_WIDTH):
            key, value = (one.repeat_interleave(query.shape[1] // key.shape[1], 1) for one in (key, value))
            owner = SimpleNamespace(is_causal=getattr(module, "is_causal", True))  # and no groups of heads
        if pairs is None:
            return plain(owner, query, key, value, attention_mask, **kwargs)
        additive = inner == "eager"
        parts = []
        for start, prefix, chosen, rejected in pairs.segments:
            length, middle = prefix + chosen, start + prefix + chosen
            if length:
                rows = slice(start, middle)
                mask = attention_mask.block(0, length, additive)
                parts.append(plain(owner, query[:, :, rows], key[:, :, rows], value[:, :, rows], mask, **kwargs)[0])
            if rejected:
                branch, shared = slice(middle, middle + rejected), slice(start, start + prefix)
                k = torch.cat([key[:, :, shared], key[:, :, branch]], 2) if prefix else key[:, :, branch]
                v = torch.cat([value[:, :, shared], value[:, :, branch]], 2) if prefix else value[:, :, branch]
                mask = attention_mask.block(prefix, prefix + rejected, additive)
                parts.append(plain(owner, query[:, :, branch], k, v, mask, **kwargs)[0])
        return torch.cat(parts, 1), None

    return attend


def lowered(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast tensors as autocast would in every call that takes them."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(one if one.dtype == torch.float64 else one.to(dtype) for one in tensors)


for _name, _inner in INNER.items():
    AttentionInterface.register(_name, _attend(_inner, _name.endswith("repeated")))
    AttentionMaskInterface.register(_name, _build_mask(_inner))


def inner_attention(model: PreTrainedModel) -> str | None:
    """Return the attention function for packed pairs: the model's own if it is plain, else sdpa if supported, or None."""
    now = model.config._attn_implementation
    now = INNER.get(now or "", now)
    if now in INNER.values():
        return now
    return "sdpa" if model._supports_sdpa else None


def own_attention(model: PreTrainedModel, repeats: bool) -> None:
    """Give the model the wrapped version of its attention function; `plain_attention` takes it back.

    Without segments it computes what the plain one does, which with `repeats` never sees grouped heads.
    """
    inner = inner_attention(model)
    name = "orpo_lite_sdpa_repeated" if repeats else f"orpo_lite_{inner}"
    if model.config._attn_implementation != name:
        set_attention(model, name)


@contextlib.contextmanager
def packed_attention(model: PreTrainedModel, repeats: bool = False) -> Iterator[None]:
    """Run forwards of packed rows in this block; a `PairCalls` goes to the model as `orpo_segments=`.

    The wrapped attention stays on the model after the block, since checkpointed layers are recomputed in the backward pass.
    """
    own_attention(model, repeats)
    token = _in_packed_forward.set(True)
    try:
        yield
    finally:
        _in_packed_forward.reset(token)


def plain_attention(model: PreTrainedModel) -> None:
    """Restore the model's plain attention function."""
    if plain := INNER.get(model.config._attn_implementation or ""):
        set_attention(model, plain)


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Set the attention function of a model's decoder; what text never passes through keeps its own."""
    text = model.config.get_text_config(decoder=True)
    inside = {key: name for key in model.config.sub_configs if getattr(model.config, key, None) is text}
    model.set_attn_implementation({"": name} | inside)
