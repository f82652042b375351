"""The sources of a recipe: local files in any common format, or a hub data set through `datasets`.

Each has a hash of its content, so that its tokens can be cached.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from orpo_lite.common.console import progress_bar
from orpo_lite.common.errors import RequestError
from orpo_lite.data.file_formats import (
    BATCH_ROWS,
    COMPRESSIONS,
    FORMATS,
    Batches,
    file_format,
    read_file,
    without_nulls,
)
from orpo_lite.data.row_shapes import COLUMNS
from orpo_lite.recipe import DataSource
from orpo_lite.recipe.loading import resolve_path
from orpo_lite.recipe.schema import Columns

if TYPE_CHECKING:
    import datasets

BLOCK = 4_000_000
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
}
EXPECTED = (
    f"{' '.join(FORMATS)}, each also as {' '.join(COMPRESSIONS)}, a glob, a folder of these, or a hub id owner/name"
)


@dataclass
class Source:
    """One entry of data.train or data.eval, ready to be read."""

    label: str
    files: list[str]
    content: str
    """Hash of the content and the column map; empty where it is not known before the source is read."""
    batches: Callable[[], Batches]
    """Opens the source anew and yields lists of rows, columns renamed."""
    rows: int | None = None
    """Approximate number of rows, for a progress bar; None if unknown."""
    enough: int | None = None
    """Usable pairs after which reading stops; None reads to the end."""


def open_source(
    source: DataSource,
    split: str,
    default: Columns | None,
    limit: int | None = None,
    field: str = "data.train / data.eval",
    hashed: bool = True,
) -> Source:
    """Find a source's files or its hub data set.

    Args:
        source: as in the recipe.
        split: data.split, for a hub data set or folder, where the source names none.
        default: column map (standard name -> name in the data) where the source has none.
        limit: read only the first rows.
        field: where the path was given, for the error.
        hashed: False leaves out the hash of local files, which reads them once more.

    Raises:
        RequestError: nothing is there, or it cannot be read.
    """
    columns = {str(name): actual for name, actual in (source.columns or default or {}).items()}
    path = os.path.expanduser(resolve_path(source.path))
    where, asked = ("split", source.split) if source.split else ("data.split", split)
    files: list[str] = []
    # unlike Path's methods, os.path's are false for a name that no file can have
    if any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json")):
        if asked != "train" and not os.path.isfile(os.path.join(path, "dataset_dict.json")):
            raise RequestError(no_splits(source, where, asked, "one table"))
        files, rows = [path], load_saved(path, asked)
    elif files := local_files(path, asked):
        folder = os.path.isdir(path)
        if asked != "train" and not (folder and any(splits_named(Path(path), files).values())):
            what = "a folder in which no file's name shows its split" if folder else "a local file"
            raise RequestError(no_splits(source, where, asked, what))
        rows = None
    elif is_local(source.path):
        raise RequestError(f"{shorten(source.path)}: no such file or folder ({field}); expected {EXPECTED}")
    else:
        rows = load_hub(source, asked)
    if rows is None:
        content, count = hash_files(files) if hashed else ("", None)
    else:
        content, count = rows._fingerprint, len(rows)

    def batches() -> Batches:
        found = itertools.chain.from_iterable(map(read_file, files)) if rows is None else dataset_batches(rows, columns)
        return with_columns(first_rows(found, limit), columns, source.path)

    key = content and hashlib.sha256(json.dumps([content, columns, limit], sort_keys=True).encode()).hexdigest()
    return Source(source.path, files, key, batches, count if limit is None else min(count or limit, limit))


def stream_source(stream: Any, name: str, enough: int | None = None) -> Source:
    """Return a `datasets.IterableDataset` or a torch one as a source that can be read once.

    Raises:
        RequestError: it was split by node, so that each process would train on other rows.
    """
    if getattr(stream, "_distributed", None) is not None:
        raise RequestError(
            f"{name}: the stream was split by node (split_dataset_by_node), but every process reads the same rows and takes "
            "its own share of every step: give the stream as it was before the split"
        )
    plain = stream.with_format(None) if hasattr(stream, "with_format") else stream
    return Source(name, [], "", lambda: stream_batches(plain, min(BATCH_ROWS, enough or BATCH_ROWS)), enough=enough)


# ---- local files -----------------------------------------------------------------------------------------------------


def is_local(path: str) -> bool:
    """Return whether a path that does not exist was meant as a file rather than as a hub id."""
    name = Path(path).name.lower()
    return path.startswith((".", "/", "~", "builtin:")) or not HUB_ID.fullmatch(path) or file_format(name) is not None


def local_files(path: str, split: str) -> list[str]:
    """Return the data files behind a path, glob or folder, sorted; an empty list if it is none of these."""
    place = Path(path)
    if os.path.isfile(path):
        found = [path]
    elif os.path.isdir(path):
        every = sorted(str(file) for file in place.rglob("*") if file.is_file() and file_format(file.name))
        found = of_split(place, every, split)
    elif glob.has_magic(path):
        found = sorted(file for file in glob.glob(path, recursive=True) if os.path.isfile(file))
        if not found:
            raise RequestError(f"{shorten(path)}: the pattern matches no file; expected {EXPECTED}")
    else:
        return []
    for file in found:
        if file_format(Path(file).name) is None:
            raise RequestError(f"{file}: not a data file by its name; expected {EXPECTED}")
    return found


def no_splits(source: DataSource, where: str, asked: str, what: str) -> str:
    """Return the message for a split of a source that has none, of which all rows would be read."""
    hub = " (a hub source beside it can have its own: {path: owner/name, split: ...})" if where != "split" else ""
    return (
        f"{shorten(source.path)}: {where} is {asked!r}, but {what} has no splits; leave it out{hub}, and set data.max_rows "
        "for the first rows only"
    )


def splits_named(folder: Path, files: list[str]) -> dict[str, str | None]:
    """Return the split that each file's name shows, or None."""
    words = {file: re.split(r"[^a-z]+", str(Path(file).relative_to(folder)).lower()) for file in files}
    return {file: next((SPLITS[word] for word in words[file] if word in SPLITS), None) for file in files}


def of_split(folder: Path, files: list[str], split: str) -> list[str]:
    """Return a folder's files of one split by their names (train, test, ...); all files where no name shows a split."""
    if not files:
        raise RequestError(f"{folder}: holds no data files; expected {EXPECTED}")
    named = splits_named(folder, files)
    if not any(named.values()):
        return files
    found = [file for file in files if named[file] == SPLITS.get(split, split)]
    if not found:
        names = ", ".join(sorted({name for name in named.values() if name}))
        raise RequestError(f"{folder}: no file of the split {split!r}; by their names the files are: {names}")
    return found


def hash_files(files: list[str]) -> tuple[str, int | None]:
    """Return a hash of the files' bytes, and roughly how many rows they hold where a line is a row."""
    digest, lines = hashlib.sha256(), 0
    counted = all(file.lower().endswith((".jsonl", ".ndjson", ".csv", ".tsv")) for file in files)
    total = sum(os.path.getsize(file) for file in files if os.path.isfile(file))
    label = "checking " + (shorten(files[0]) if len(files) == 1 else f"{len(files)} files")
    with progress_bar(label, total, in_bytes=True) as advance:
        for file in files:
            own = hashlib.sha256()
            try:
                with open(file, "rb") as stream:
                    while block := stream.read(BLOCK):
                        own.update(block)
                        lines += block.count(b"\n") if counted else 0
                        advance(len(block))
            except OSError as error:
                raise RequestError(f"{file}: cannot be read: {error.strerror}") from None
            digest.update(f"{file_format(file)}{own.hexdigest()}".encode())
    return digest.hexdigest(), lines if counted else None


# ---- data sets of `datasets`, on disk or on the hub ------------------------------------------------------------------


def load_saved(path: str, split: str) -> datasets.Dataset:
    """Load a folder written by `datasets`' save_to_disk."""
    import datasets

    check_names(Path(path))
    try:
        saved = datasets.load_from_disk(path)
    except Exception as error:  # whatever datasets and pyarrow find wrong
        raise RequestError(
            f"{path}: cannot be read as a saved data set ({type(error).__name__}: {first_line(error)}): save it again"
        ) from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise RequestError(f"{path}: no split {split!r}; there are {', '.join(map(str, saved))} (data.split)")
        return saved[split]
    return saved


def check_names(folder: Path) -> None:
    """Raise RequestError for a saved data set whose state.json names files outside its folder."""
    for state in folder.rglob("state.json"):
        try:
            names = [file["filename"] for file in json.loads(state.read_text("utf-8"))["_data_files"]]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # datasets says what is wrong
        for name in names:
            place = (state.parent / str(name)).resolve()
            if not place.is_relative_to(folder.resolve()):
                raise RequestError(f"{state} names {name!r}, outside its folder: save the data set again")


def load_hub(source: DataSource, split: str, streaming: bool = False) -> Any:
    """Load a hub data set, without ever running code that it ships."""
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    try:
        options: dict[str, Any] = {"streaming": True} if streaming else {}
        rows = datasets.load_dataset(source.path, source.name, split=split, revision=source.revision, **options)
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
        raise RequestError(f"{source.path}: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(rows, datasets.IterableDataset if streaming else datasets.Dataset):
        raise RequestError(f"{source.path}: split {split!r} is a {type(rows).__name__}, expected one table of rows")
    return rows


def shorten(path: str) -> str:
    """Return the path, cut after 300 characters."""
    return path if len(path) <= 300 else f"{path[:300]}..."


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


# ---- batches of rows -------------------------------------------------------------------------------------------------


def dataset_batches(rows: datasets.Dataset, columns: Mapping[str, str] = MappingProxyType({})) -> Batches:
    """Yield the rows of a `datasets.Dataset` in batches: only the columns that matter, without Arrow's nulls."""
    names = {*COLUMNS, *columns.values()}
    used = [name for name in rows.column_names if name in names]
    rows = (rows.select_columns(used) if used else rows).with_format(None)
    for batch in rows.iter(BATCH_ROWS):
        by_row = zip(*batch.values(), strict=True)  # pyright: ignore[reportAttributeAccessIssue] (a dict of columns)
        yield [without_nulls(dict(zip(batch, values, strict=True))) for values in by_row]


def stream_batches(stream: Iterable[Any], size: int = BATCH_ROWS) -> Batches:
    """Yield the rows of a stream of `datasets` or torch in batches, as `dataset_batches` does."""
    rows = iter(stream)
    while batch := list(itertools.islice(rows, size)):
        yield [essential(row) if isinstance(row, Mapping) else row for row in batch]


def essential(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stream's row with only the columns that matter, without Arrow's nulls."""
    return without_nulls({key: value for key, value in row.items() if key in COLUMNS} or dict(row))


def first_rows(batches: Batches, limit: int | None) -> Batches:
    """Yield the batches up to a number of rows, or all of them if it is None."""
    left = limit
    for batch in batches:
        yield batch if left is None else batch[:left]
        left = None if left is None else left - len(batch)
        if left is not None and left <= 0:
            return


def with_columns(batches: Batches, columns: dict[str, str], label: str) -> Batches:
    """Yield the batches with the columns' standard names added.

    Raises:
        RequestError: the first batch lacks a mapped column.
    """
    for number, batch in enumerate(batches):
        if not number and columns:
            found = sorted({str(key) for row in batch if isinstance(row, dict) for key in row})
            for standard, actual in columns.items():
                if actual not in found:
                    raise RequestError(
                        f"{label}: data.columns maps {standard} to {actual!r}, which is no column here; found: "
                        f"{', '.join(found[:20])}"
                    )
        yield [renamed(row, columns) for row in batch] if columns else batch


def renamed(row: Any, columns: dict[str, str]) -> Any:
    """Return a row with its columns' standard names added."""
    return row | {name: row.get(actual) for name, actual in columns.items()} if isinstance(row, dict) else row
