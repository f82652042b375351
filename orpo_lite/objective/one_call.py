"""Attention of all pairs of a micro-batch in one call, where the device has a kernel for it, and which one that is.

Every pair gives two query sequences (prefix+chosen, and rejected) over two key sequences (prefix+chosen, and
prefix+rejected), causal from the bottom right. Queries are the row as it lies, keys and values are gathered by an index
that the collator makes, so that nothing waits for the device and more pairs launch no more kernels.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalVariant

from orpo_lite.data.collate import Segment, call_rows
from orpo_lite.model.precision import FLASH_DTYPES, FLASH_WIDTH, Place, has_flash

AGREES = 3e-2
"""Largest difference, relative to the norm, that counts as rounding of 16 bits where a kernel is tried on the device."""
efficient_attention = torch.ops.aten._efficient_attention_forward
"""torch's memory-efficient kernel, which is xformers' too: from compute capability 5.0 on, any head size, no grouped heads."""


class PairCalls(NamedTuple):
    """The pairs of a packed row as attention takes them, and the kernel that takes all of them in one call, if any."""

    segments: list[Segment]
    key_rows: Tensor
    """Rows of keys and values, sequence after sequence, (K,) int64."""
    sizes: tuple[Tensor, Tensor, int, int]
    """First queries and first keys of the sequences, and the ends of the last, (sequences + 1,) int32 each; queries and keys of
    the longest sequence."""
    run: Kernel | None = None


Kernel = Callable[[Tensor, Tensor, Tensor, PairCalls, float | None, Any], Tensor]
"""(queries (T, heads, width), keys and values (K, key heads, width), pairs, scale, window) -> (T, heads, width).
The window is how many keys a query sees, itself included; 0 for all before it."""


def pair_calls(batch: dict[str, Any], run: Kernel | None) -> PairCalls:
    """Return what attention needs of a packed batch."""
    segments: list[Segment] = batch["segments"]
    queries = max(max(prefix + chosen, rejected) for _, prefix, chosen, rejected in segments)
    keys = max(prefix + max(chosen, rejected) for _, prefix, chosen, rejected in segments)
    return PairCalls(segments, batch["key_rows"], (batch["query_starts"], batch["key_starts"], queries, keys), run)


@functools.cache
def varlen_options() -> frozenset[str] | None:
    """Return the options of torch's varlen attention; None where this torch has none with scale and window."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # before torch 2.10
        return None
    options = frozenset(inspect.signature(varlen_attn).parameters)
    return options if {"scale", "window_size"} <= options else None


def varlen(query: Tensor, key: Tensor, value: Tensor, pairs: PairCalls, scale: float | None, window: int) -> Tensor:
    """Call torch's varlen attention."""
    from torch.nn.attention import varlen as module

    grouped = {"enable_gqa": True} if "enable_gqa" in (varlen_options() or ()) else {}  # before 2.12 always on
    return module.varlen_attn(query, key, value, *pairs.sizes, scale=scale, window_size=(window - 1, 0), **grouped)  # type: ignore[return-value]


def memory_efficient(
    query: Tensor, key: Tensor, value: Tensor, pairs: PairCalls, scale: float | None, window: int
) -> Tensor:
    """Call torch's memory-efficient kernel; `window` must be 0, since its backward pass has none."""
    key, value = (one.repeat_interleave(query.shape[1] // key.shape[1], 1) for one in (key, value))
    kept = torch.is_grad_enabled() and any(one.requires_grad for one in (query, key, value))
    mask = int(CausalVariant.LOWER_RIGHT)
    return efficient_attention(query[None], key[None], value[None], None, *pairs.sizes, 0.0, mask, kept, scale=scale)[
        0
    ][0]


def one_by_one(query: Tensor, key: Tensor, value: Tensor, pairs: PairCalls, scale: float | None, window: int) -> Tensor:
    """Compute the same sequence by sequence with whole masks: the reference for the kernels, on any device."""
    parts = []
    each = zip(*(pairwise(starts.tolist()) for starts in pairs.sizes[:2]), strict=True)
    for (q, q_end), (k, k_end) in each:
        place = torch.arange(k_end - k, device=query.device)
        back = place[place.numel() - (q_end - q) :, None] - place
        seen = (back >= 0) & (back < (window or len(place)))
        one, keys, values = (t.transpose(0, 1)[None] for t in (query[q:q_end], key[k:k_end], value[k:k_end]))
        found = torch.nn.functional.scaled_dot_product_attention(one, keys, values, seen, scale=scale, enable_gqa=True)
        parts.append(found[0].transpose(0, 1))
    return torch.cat(parts)


def takes(run: Kernel | None, query: Tensor, value: Tensor, window: int | None, kwargs: dict[str, Any]) -> bool:
    """Check whether a kernel computes what sdpa would for a layer's call; queries are (1, heads, T, width)."""
    width = query.shape[-1]
    if run is None or window is None:
        return False
    if kwargs.get("dropout") or any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "cache")):
        return False
    if width % 8 or value.shape[-1] != width or kwargs.get("is_causal") is False:
        return False
    if run is varlen:
        return width <= FLASH_WIDTH and query.dtype in FLASH_DTYPES
    return run is not memory_efficient or window == 0


class Attention(NamedTuple):
    """A way to compute the attention of a model on a device, and the reason for it, in words."""

    name: str
    why: str
    run: Kernel | None = None
    """The kernel that takes all pairs in one call; None where each pair takes two calls of the model's own function."""
    repeats: bool = False
    """Keys and values are repeated for each query head: only the kernel that holds length x length takes grouped ones here."""


REPEATED = "; elsewhere keys and values are repeated for each query head, since there is no flash kernel"


def choose_attention(config: Any, inner: str | None, place: Place) -> Attention:
    """Choose how a model's attention is computed.

    Args:
        config: the model's configuration.
        inner: sdpa, or eager where the model has its own function (soft caps, sinks); None where it has neither.
        place: the device that computes, and the dtype; if it is here, the kernel is tried first.
    """
    if inner != "sdpa":
        return Attention(
            inner or config._attn_implementation or "eager", "two calls a pair of the model's own function"
        )
    if place.kind != "cuda":
        return Attention("sdpa", f"two calls a pair: no kernel for {place.kind} takes all pairs at once")
    text = config.get_text_config(decoder=True)
    if getattr(text, "is_heterogeneous", False):
        text = max(text.per_layer_config, key=lambda layer: getattr(layer, "head_dim", None) or 0)
    heads = text.num_attention_heads
    widths = [getattr(text, name, None) for name in ("head_dim", "global_head_dim")]
    width = max(filter(None, widths), default=text.hidden_size // heads)
    flash = has_flash(place, width)
    where = f"{place}, head size {width}{'' if flash else REPEATED}"
    name, run = "torch memory-efficient", memory_efficient
    if flash and varlen_options() is not None:
        name, run = "torch varlen", varlen
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    if place.device and (failure := kernel_failure(run, place.device, place.dtype, heads, key_heads, width)):
        return Attention("sdpa", f"two calls a pair, since {name} attention {failure}, on {where}", None, not flash)
    chunked = "chunked_attention" in (getattr(text, "layer_types", None) or ())
    slides = run is memory_efficient and getattr(text, "sliding_window", None)
    left = {"its chunked layers": chunked, "its windows where they are shorter than a pair": slides,
            "attention with dropout": getattr(text, "attention_dropout", None)}  # fmt: skip
    words = " and ".join(what for what, there in left.items() if there)
    return Attention(name, f"one call for all pairs{words and ', two for ' + words} on {where}", run, not flash)


@functools.cache
def kernel_failure(
    run: Kernel, device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, width: int
) -> str | None:
    """Say what keeps a kernel from computing two small pairs on a device as the reference does; None where it does."""
    segments = [(0, 40, 23, 70), (133, 5, 30, 1)]
    places = {name: tensor.to(device) for name, tensor in call_rows(segments).items()}
    pairs = pair_calls({"segments": segments} | places, run)
    g = torch.Generator().manual_seed(0)
    sizes = [(169, heads), (len(pairs.key_rows), key_heads), (len(pairs.key_rows), key_heads)]
    given = [torch.randn(rows, count, width, generator=g).to(device, dtype).requires_grad_() for rows, count in sizes]
    query, key, value = given
    try:
        outs = [one(query, key, value, pairs, None, 0) for one in (run, one_by_one)]
        got, expected = ((out, *torch.autograd.grad(out.float().square().sum(), given)) for out in outs)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        return f"fails here ({' '.join(str(error).split())[:120]})"
    worst = max(((a - b).float().norm() / b.float().norm()).item() for a, b in zip(got, expected, strict=True))
    return None if worst <= AGREES else f"differs here by {worst:.1g}"
