"""Lengths of tokenized pairs as arrays, and what a pair costs in time.

The pairs themselves stay on disk, with at most a batch of them in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import datasets

    from orpo_lite.data import Pairs

EFFICIENCY = 0.64
"""Speed of attention's operations relative to that of the linear layers, as `tests.benchmarks.balance --measure` found
it on one CPU core; fused attention on GPUs is reported to reach half to three quarters."""
BATCH_ROWS = 10_000
MAX_BINS = 60
"""The most bins of a histogram."""


def column_batches(rows: Any, *names: str) -> Iterator[list[Any]]:
    """Yield columns of a `datasets.Dataset` as chunked Arrow arrays, a batch of rows at a time."""
    for batch in rows.select_columns(list(names)).with_format("arrow").iter(BATCH_ROWS):
        yield [batch.column(name) for name in names]


def joined(parts: Iterable[np.ndarray]) -> np.ndarray:
    """Return arrays one after the other, (N,) int64."""
    return np.concatenate([np.empty(0, dtype=np.int64), *parts]).astype(np.int64, copy=False)


def list_lengths(rows: Any, name: str) -> np.ndarray:
    """Return the number of items of a column's lists, (N,) int64; their values are not read."""
    import pyarrow.compute as pc

    return joined(pc.list_value_length(lists).to_numpy() for [lists] in column_batches(rows, name))  # pyright: ignore


def numbers(rows: Any, name: str) -> np.ndarray:
    """Return a column of whole numbers, (N,) int64."""
    return joined(values.to_numpy() for [values] in column_batches(rows, name))


def common_prefixes(rows: Any, one: str, other: str) -> np.ndarray:
    """Return the length of the longest common prefix of two columns of lists, (N,) int64."""

    def common(first: Any, second: Any) -> int:
        shared = min(len(first), len(second))
        differ = first.values.to_numpy()[:shared] != second.values.to_numpy()[:shared]
        return int(differ.argmax()) if differ.any() else shared

    return joined(np.array(list(map(common, *lists)), dtype=np.int64) for lists in column_batches(rows, one, other))


def pair_lengths(pairs: datasets.Dataset) -> dict[str, np.ndarray]:
    """Return the tokens of each pair: prompt, chosen and rejected answer, and total, each (N,) int64.

    The prompt is the longer of both, should the boundary differ. The total counts it once.
    """
    chosen, rejected = list_lengths(pairs, "chosen_ids"), list_lengths(pairs, "rejected_ids")
    if "prompt_ids" in pairs.column_names:
        prompt = list_lengths(pairs, "prompt_ids")
    else:
        starts = numbers(pairs, "chosen_start"), numbers(pairs, "rejected_start")
        prompt, chosen, rejected = np.maximum(*starts), chosen - starts[0], rejected - starts[1]
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "total": prompt + chosen + rejected}


def length_histograms(pairs: Pairs) -> dict[str, Any]:
    """Return histograms of the tokens of prompts and answers, to be kept with a run.

    Returns:
        By split (train, eval) and part (prompt, chosen, rejected): `width` of a bin in tokens, `counts` of the bins
        from 0 on, median, p95 and max. A split without rows is left out.
    """
    splits = {"train": pairs.train, "eval": pairs.eval}
    return {name: _histograms(rows) for name, rows in splits.items() if rows is not None and len(rows)}


def _histograms(rows: Any) -> dict[str, Any]:
    counted = {name: tokens for name, tokens in pair_lengths(rows).items() if name != "total"}
    longest = max(int(tokens.max()) for tokens in counted.values())
    widths = (factor * 10**power for power in range(9) for factor in (1, 2, 5))
    width = next(width for width in widths if longest // width < MAX_BINS)
    found = {}
    for name, tokens in counted.items():
        middle, high = np.percentile(tokens, [50, 95]).tolist()
        counts = np.bincount(tokens // width).tolist()
        found[name] = {"width": width, "counts": counts, "median": middle, "p95": high, "max": int(tokens.max())}
    return found


# ---- what a pair costs in time: its tokens, and the places of attention, which grow with their square ------------------


def pair_costs(pairs: Any, layout: str) -> np.ndarray:
    """Return the tokens that each pair costs in a layout, (N,) int64.

    Padded counts the longer side twice; shared counts the common prefix once.
    """
    lengths = list_lengths(pairs, "chosen_ids"), list_lengths(pairs, "rejected_ids")
    if "prompt_ids" in pairs.column_names:  # encoder-decoder: the prompt is not part of the sequences
        return 2 * (list_lengths(pairs, "prompt_ids") + np.maximum(*lengths))
    if layout == "padded":
        return 2 * np.maximum(*lengths)
    if layout == "packed":
        return lengths[0] + lengths[1]
    return lengths[0] + lengths[1] - common_prefixes(pairs, "chosen_ids", "rejected_ids")


def pair_work(pairs: Any, layout: str, weight: float) -> np.ndarray:
    """Return the time of each pair in tokens, (N,) int64: its tokens, and `weight` for each place of its attention."""
    tokens = pair_costs(pairs, layout)
    if "prompt_ids" in pairs.column_names:  # encoder-decoder: its three kinds of attention are not counted
        return tokens
    chosen, rejected = (list_lengths(pairs, f"{side}_ids").astype(np.float64) for side in ("chosen", "rejected"))
    if layout == "shared":
        prompt = common_prefixes(pairs, "chosen_ids", "rejected_ids")
        return tokens + np.round(weight * places(prompt, chosen - prompt, rejected - prompt)).astype(np.int64)
    if layout == "padded":
        chosen = rejected = np.maximum(chosen, rejected)
    return tokens + np.round(weight * (chosen**2 + rejected**2) / 2).astype(np.int64)


def places(prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    """Count the (query, key) places of causal attention over pairs that share their prompt, (N,), from token counts."""
    return (prompt + chosen) ** 2 / 2 + rejected * (prompt + rejected / 2)


def place_weight(config: Any) -> float:
    """Return how many tokens one place of attention costs in LoRA training, by FLOPs and `EFFICIENCY`.

    A frozen matrix of P numbers, such as the output head, takes 2 P per token forward and 2 P backward. A place takes
    4 d forward and 8 d backward per layer, where d is the width of all heads. Models without attention heads: 0.
    """
    text = config.get_text_config(decoder=True)

    def number(name: str, default: float = 0.0) -> float:
        """Return a field, or its mean over the layers where each has its own."""
        return float(np.mean(getattr(text, name, None) or default))

    heads, hidden, layers = number("num_attention_heads"), number("hidden_size"), number("num_hidden_layers")
    if not heads or not layers:
        return 0.0
    size = number("head_dim", hidden / heads)
    matrices = 3 * hidden * number("num_experts_per_tok", 1) * number("intermediate_size", 4 * hidden)
    layer = 2 * hidden * size * (heads + number("num_key_value_heads", heads)) + matrices
    token = 4 * (layers * layer + hidden * text.vocab_size)
    return 12 * layers * heads * size / token / EFFICIENCY
