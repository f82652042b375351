"""Numbers of tokenised pairs as arrays, without the pairs: token lists stay on disk, a batch of them in memory at most."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

GATHERED = 1000
"""Rows of a small selection that are brought together at a time."""


def per_row(rows: Any, names: list[str], compute: Callable[..., np.ndarray]) -> np.ndarray:
    """One number a row of a `datasets.Dataset` or an Arrow table, (N,) int64.

    Args:
        names: the columns that `compute` takes, as Arrow arrays of the same rows, a batch at a time; it gives (rows,).
    """
    mapping, data = getattr(rows, "_indices", None), getattr(rows, "_data", rows)
    table = getattr(data, "table", data)
    if mapping is not None and 10 * len(mapping) < len(table):
        parts = rows.with_format("arrow").iter(GATHERED)
        batches = [part.combine_chunks().to_batches() for part in parts]
        found = [compute(*(batch.column(name) for name in names)) for part in batches for batch in part]
        return _joined(found)
    found = [compute(*(batch.column(name) for name in names)) for batch in table.select(names).to_batches()]
    every = _joined(found)
    return every if mapping is None else every[mapping.column(0).to_numpy()]


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts).astype(np.int64, copy=False) if parts else np.empty(0, dtype=np.int64)


def list_lengths(rows: Any, name: str) -> np.ndarray:
    """Items of a column's lists, (N,) int64; their values are not read."""
    import pyarrow.compute as pc

    return per_row(rows, [name], lambda lists: pc.list_value_length(lists).to_numpy(zero_copy_only=False))  # pyright: ignore


def numbers(rows: Any, name: str) -> np.ndarray:
    """A column of whole numbers, (N,) int64."""
    return per_row(rows, [name], lambda values: values.to_numpy(zero_copy_only=False))


def common_prefixes(rows: Any, one: str, other: str) -> np.ndarray:
    """Length of the longest common prefix of two columns of lists, (N,) int64."""
    return per_row(rows, [one, other], _common_prefixes)


def _common_prefixes(one: Any, other: Any) -> np.ndarray:
    import pyarrow.compute as pc

    lengths = [pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int64) for lists in (one, other)]  # pyright: ignore
    starts = [np.cumsum(length) - length for length in lengths]
    values = [lists.flatten().to_numpy(zero_copy_only=False) for lists in (one, other)]
    shared = np.minimum(*lengths)
    begin = np.cumsum(shared) - shared
    within = np.arange(int(shared.sum())) - np.repeat(begin, shared)
    differ = values[0][np.repeat(starts[0], shared) + within] != values[1][np.repeat(starts[1], shared) + within]
    places = np.flatnonzero(differ)
    # the first difference at or behind each row's begin, if it lies inside of the row
    next_place = np.append(places, len(differ))[np.searchsorted(places, begin)]
    return np.minimum(next_place - begin, shared)
