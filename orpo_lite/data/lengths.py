"""Lengths of tokenized pairs as arrays, and the tokens that a pair costs.

The pairs themselves stay on disk, with at most a batch of them in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import datasets

    from orpo_lite.data import Pairs

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


def answer_tokens(row: dict[str, Any], side: str, first: int = 0) -> dict[int, None]:
    """Return the places of a sequence whose tokens belong to answers, in order: the completion without its context.

    Args:
        row: a tokenized pair.
        side: chosen or rejected.
        first: leave out places before it: the first token of a sequence has none before it that could predict it.
    """
    places = dict.fromkeys(range(max(row[f"{side}_start"], first), len(row[f"{side}_ids"])))
    context = row.get(f"{side}_context") or []
    for begin, end in zip(context[::2], context[1::2], strict=True):
        for place in range(begin, end):
            places.pop(place, None)
    return places


def pair_lengths(pairs: datasets.Dataset) -> dict[str, np.ndarray]:
    """Return the tokens of each pair: prompt, chosen and rejected answer, and total, each (N,) int64.

    The prompt is the longer of both, should the boundary differ. The total counts it once.
    """
    chosen, rejected = list_lengths(pairs, "chosen_ids"), list_lengths(pairs, "rejected_ids")
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


def pair_costs(pairs: Any, layout: str) -> np.ndarray:
    """Return the tokens that each pair costs in a layout, (N,) int64.

    Padded counts the longer side twice; shared counts the common prefix once.
    """
    lengths = list_lengths(pairs, "chosen_ids"), list_lengths(pairs, "rejected_ids")
    if layout == "padded":
        return 2 * np.maximum(*lengths)
    if layout == "packed":
        return lengths[0] + lengths[1]
    return lengths[0] + lengths[1] - common_prefixes(pairs, "chosen_ids", "rejected_ids")
