"""Lengths of tokenized pairs as arrays, and the tokens that a pair costs.

The pairs themselves stay on disk, with at most a batch of them in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import datasets

BATCH_ROWS = 10_000


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

    Those before `first` are left out: the first token of a sequence has none before it that could predict it.
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
