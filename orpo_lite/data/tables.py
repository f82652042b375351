"""Rows of data sets and streams, in small batches.

Where several processes share the rows out, each reads all of them and decodes its own: readers take `wanted`, which says of
one row after the other whether it is to be decoded, and give SKIPPED in place of the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from orpo_lite.data.row_shapes import COLUMNS

if TYPE_CHECKING:
    import datasets

BATCH_ROWS = 1000
Batches = Iterator[list[Any]]
Wanted = Iterator[bool]
EVERY: Wanted = itertools.repeat(True)
SKIPPED: Any = object()
"""In place of a row that is not wanted."""


def dataset_batches(
    rows: datasets.Dataset, columns: Mapping[str, str] = MappingProxyType({}), wanted: Wanted = EVERY
) -> Batches:
    """Batches of a `datasets.Dataset`: the columns that matter, without what Arrow filled in."""
    names = {*COLUMNS, *columns.values()}
    used = [name for name in rows.column_names if name in names]
    rows = (rows.select_columns(used) if used else rows).with_format(None)
    for start in range(0, len(rows), BATCH_ROWS):
        flags = list(itertools.islice(wanted, min(BATCH_ROWS, len(rows) - start)))
        some = slice(start, start + BATCH_ROWS) if all(flags) else [n for n, flag in enumerate(flags, start) if flag]
        found = rows_of_columns(rows[some])
        yield [without_nulls(next(found)) if flag else SKIPPED for flag in flags]


def rows_of_columns(columns: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    return (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))


def stream_batches(
    stream: Iterable[Any], wanted: Wanted = EVERY, names: frozenset[str] = frozenset(COLUMNS), size: int = BATCH_ROWS
) -> Batches:
    """Batches of a stream of `datasets` or of torch, as `dataset_batches` gives them.

    `datasets` decodes all rows; those that are not wanted are left at that.
    """
    if hasattr(stream, "iter"):  # of datasets: several times as fast as row by row
        rows = itertools.chain.from_iterable(map(rows_of_columns, stream.iter(size)))  # pyright: ignore
    else:
        rows = iter(stream)
    while batch := [essential(row, names) if next(wanted) else SKIPPED for row in itertools.islice(rows, size)]:
        yield batch


def essential(row: Any, names: frozenset[str] = frozenset(COLUMNS)) -> Any:
    """A row of a stream: the columns that matter, without what Arrow filled in."""
    if not isinstance(row, Mapping) or "chosen_ids" in row:
        return row
    used = {key: value for key, value in row.items() if key in names}
    return without_nulls(used or dict(row))


def without_nulls(value: Any) -> Any:
    """Arrow gives every struct of a column the fields of all the others, as nulls: take those away again."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
