"""The sources of a recipe: local files in any common format, or a hub data set through `datasets`."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo_lite.common.console import progress
from orpo_lite.common.errors import RequestError
from orpo_lite.data.file_formats import FORMATS, file_format, read_file, without_nulls
from orpo_lite.data.row_formats import BATCH_ROWS, COLUMNS
from orpo_lite.recipe import DataSource
from orpo_lite.recipe.loading import resolve_path
from orpo_lite.recipe.schema import Columns

if TYPE_CHECKING:
    import datasets

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
EXPECTED = f"{' '.join(FORMATS)}, each also as .gz, a glob, a folder, or a hub id owner/name"


@dataclass
class Source:
    """One entry of data.train or data.eval, ready to be read."""

    label: str
    files: list[str]
    rows: Callable[[], Iterator[Any]]
    """Opens the source anew and yields its rows, columns renamed."""
    raw: Callable[[], Iterator[Any]] = list[Any]().__iter__
    """Yields all rows of a recipe's source as they are."""


def open_source(
    source: DataSource,
    split: str,
    default: Columns | None,
    limit: int | None = None,
    field: str = "data.train / data.eval",
) -> Source:
    """Find a source's files or its hub data set.

    Args:
        source: as in the recipe.
        split: data.split, for a hub data set or folder, where the source names none.
        default: column map (standard name -> name in the data) where the source has none.
        limit: read only the first rows.
        field: where the path was given, for the error.

    Raises:
        RequestError: nothing is there, or it cannot be read.
    """
    columns = {str(name): actual for name, actual in (source.columns or default or {}).items()}
    path, asked = os.path.expanduser(resolve_path(source.path)), source.split or split
    files: list[str] = []
    table: datasets.Dataset | None = None
    # unlike Path's methods, os.path's are false for a name that no file can have
    if os.path.isdir(path):
        files, table = [path], load_table(source, path, asked)
    elif files := local_files(path):
        if asked != "train":  # all rows would be read
            raise RequestError(
                f"{source.path[:300]}: {'split' if source.split else 'data.split'} is {asked!r}, but a local file has no splits; "
                "leave it out (a hub source beside it can have its own: {path: owner/name, split: ...}), and set data.max_rows for "
                "the first rows only"
            )
    elif is_local(source.path):
        raise RequestError(f"{source.path[:300]}: no such file or folder ({field}); expected {EXPECTED}")
    else:
        table = load_table(source, source.path, asked)

    def raw(named: Iterable[str] | None = None) -> Iterator[Any]:
        if table is None:
            return itertools.chain.from_iterable(map(read_file, files))
        return dataset_rows(table, table.column_names if named is None else named)

    return Source(source.path, files, lambda: standard_rows(raw(columns.values()), columns, limit, source.path), raw)


def is_local(path: str) -> bool:
    """Return whether a path that does not exist was meant as a file rather than as a hub id."""
    name = Path(path).name.lower()
    return path.startswith((".", "/", "~", "builtin:")) or not HUB_ID.fullmatch(path) or file_format(name) is not None


def local_files(path: str) -> list[str]:
    """Return the data files behind a path or glob, sorted; an empty list if it is neither."""
    if os.path.isfile(path):
        found = [path]
    elif glob.has_magic(path):
        found = sorted(file for file in glob.glob(path, recursive=True) if os.path.isfile(file))
        if not found:
            raise RequestError(f"{path[:300]}: the pattern matches no file; expected {EXPECTED}")
    else:
        return []
    for file in found:
        if file_format(Path(file).name) is None:
            raise RequestError(f"{file}: not a data file by its name; expected {EXPECTED}")
    return found


@progress("loading the data set")
def load_table(source: DataSource, path: str, split: str) -> datasets.Dataset:
    """Load a hub data set or a folder of data files, without ever running code that it ships."""
    import datasets
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    try:
        rows = datasets.load_dataset(path, source.name, split=split, revision=source.revision)
    except DatasetNotFoundError as error:
        raise RequestError(
            f"{source.path}: neither a local file nor a data set that the hub shows you ({first_line(error)}). Is it "
            "spelled owner/name? For a gated or private one accept its terms at "
            f"https://huggingface.co/datasets/{source.path} and log in with `hf auth login`"
        ) from None
    except (ConnectionError, TimeoutError) as error:
        raise RequestError(
            f"{source.path}: not a local file, and the hub cannot be reached ({first_line(error)}). Connect once so "
            "that it is cached, or download it and give the path"
        ) from None
    except Exception as error:  # whatever else datasets finds wrong: split, configuration, files
        why = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        raise RequestError(
            f"{source.path}: {type(error).__name__}: {first_line(why or error)}; expected {EXPECTED}"
        ) from error
    if not isinstance(rows, datasets.Dataset):
        raise RequestError(f"{source.path}: split {split!r} is a {type(rows).__name__}, expected one table of rows")
    return rows


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def dataset_rows(rows: datasets.Dataset, columns: Iterable[str] = ()) -> Iterator[Any]:
    """Yield the rows of a `datasets.Dataset`: only the columns that matter, without Arrow's nulls."""
    names = {*COLUMNS, *columns}
    used = [name for name in rows.column_names if name in names]
    rows = (rows.select_columns(used) if {"chosen", "rejected"} <= {*used} else rows).with_format(None)
    for batch in rows.iter(BATCH_ROWS):
        for values in zip(*batch.values(), strict=True):  # pyright: ignore[reportAttributeAccessIssue] (a dict of columns)
            yield without_nulls(dict(zip(batch, values, strict=True)))


def standard_rows(rows: Iterator[Any], columns: dict[str, str], limit: int | None, label: str) -> Iterator[Any]:
    """Yield the first `limit` rows, the columns' standard names added.

    Raises:
        RequestError: the first rows lack a mapped column.
    """
    rows = itertools.islice(rows, limit)
    first = list(itertools.islice(rows, BATCH_ROWS))
    found = sorted({str(key) for row in first if isinstance(row, dict) for key in row})
    for standard, actual in columns.items():
        if first and actual not in found:
            raise RequestError(
                f"{label}: data.columns maps {standard} to {actual!r}, which is no column here; found: {', '.join(found[:20])}"
            )
    for row in itertools.chain(first, rows):
        known = columns if isinstance(row, dict) else {}
        yield row | {name: row.get(actual) for name, actual in known.items()} if known else row
