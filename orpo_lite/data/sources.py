"""The sources of a recipe: local files in any common form, or a hub data set through `datasets`.

Each has a hash of its content, so that its tokens can be cached.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo_lite.common.errors import RequestError
from orpo_lite.data.file_formats import COMPRESSIONS, FORMATS, file_format, read_file
from orpo_lite.data.row_shapes import COLUMNS
from orpo_lite.data.tables import BATCH_ROWS, EVERY, Batches, Wanted, dataset_batches, stream_batches
from orpo_lite.data.throughput import Throughput
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


@dataclass
class Source:
    """What can be read of one entry of data.train or data.eval."""

    label: str
    files: list[str]
    content: str
    """Hash of the content, the column map included."""
    batches: Callable[..., Batches]
    """Opens the source anew and yields lists of rows, columns renamed; takes `files.Wanted`, or decodes every row."""
    rows: int | None = None
    """How many there are, for a progress bar: about, or unknown."""
    enough: int | None = None
    """Usable pairs after which no more is read; None reads to the end."""


def open_source(
    source: DataSource,
    split: str,
    default: Columns | None,
    limit: int | None = None,
    field: str = "data.train / data.eval",
    streaming: bool = False,
) -> Source:
    """Find a source's files or its hub data set.

    Args:
        source: as in the recipe.
        split: data.split, of a hub data set or folder, where the source names none.
        default: column map (standard name -> name in the data) where the source has none.
        limit: read only the first rows.
        field: where the path was given, for the error.
        streaming: look at no more than the names: no hash of the content, no download of a hub data set.

    Raises:
        RequestError: nothing there, or not readable as what it says it is.
    """
    columns = {str(name): actual for name, actual in (source.columns or default or {}).items()}
    path = os.path.expanduser(resolve_path(source.path))
    # unlike Path's, these are false for what can be no path
    where, asked = ("split", source.split) if source.split else ("data.split", split)
    if any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json")):
        if asked != "train" and not os.path.isfile(os.path.join(path, "dataset_dict.json")):
            raise RequestError(no_splits(source, where, asked, "one table"))
        files, rows = [path], load_saved(path, source.split or split)
        content, count, batches = rows._fingerprint, len(rows), lambda wanted: dataset_batches(rows, columns, wanted)
    elif files := local_files(path, source.split or split):
        folder = os.path.isdir(path)
        if asked != "train" and not (folder and any(splits_named(Path(path), files).values())):
            what = "a folder in which no file's name tells its split" if folder else "a local file"
            raise RequestError(no_splits(source, where, asked, what))
        content, count = ("", None) if streaming else hash_files(files)
        batches = lambda wanted: itertools.chain.from_iterable(read_file(file, wanted) for file in files)  # noqa: E731 (a closure over files)
    elif is_local(source.path):
        raise RequestError(f"{shorten(source.path)}: no such file or folder ({field}); expected {formats_in_words()}")
    elif streaming:
        files, content, count = [], "", None
        stream = load_hub(source, source.split or split, streaming=True)
        names = frozenset((*COLUMNS, *columns.values()))
        batches = lambda wanted: stream_batches(stream, wanted, names)  # noqa: E731 (as above)
    else:
        files, rows = [], load_hub(source, source.split or split)
        content, count, batches = rows._fingerprint, len(rows), lambda wanted: dataset_batches(rows, columns, wanted)
    key = content and hashlib.sha256(json.dumps([content, columns, limit], sort_keys=True).encode()).hexdigest()
    count = limit if limit is not None and (count or limit) >= limit else count

    def opened(wanted: Wanted = EVERY) -> Batches:
        return shaped(batches(wanted), columns, limit, source.path)

    return Source(source.path, files, key, opened, count)


def stream_source(stream: Any, name: str, enough: int | None = None) -> Source:
    """Return a `datasets.IterableDataset` or a torch one as a source that can be read once.

    Raises:
        RequestError: it was split by node, so that each process would train on other rows.
    """
    if getattr(stream, "_distributed", None) is not None:
        raise RequestError(
            f"{name}: the stream was split by node (split_dataset_by_node), but every process reads the same rows and takes "
            "its own share of every step: give the stream as it was before"
        )
    plain = stream.with_format(None) if hasattr(stream, "with_format") else stream
    size = min(BATCH_ROWS, enough or BATCH_ROWS)
    return Source(name, [], "", lambda wanted=EVERY: stream_batches(plain, wanted, size=size), enough=enough)


def is_local(path: str) -> bool:
    """Whether a path that does not exist was meant as a file rather than as a hub id."""
    name = Path(path).name.lower()
    return path.startswith((".", "/", "~", "builtin:")) or not HUB_ID.fullmatch(path) or file_format(name) is not None


def formats_in_words() -> str:
    return (
        f"{' '.join(FORMATS)}, each also as {' '.join(COMPRESSIONS)}, a glob, a folder of these, or a hub id owner/name"
    )


def local_files(path: str, split: str) -> list[str]:
    """The data files behind a path, glob or folder, sorted; empty if it is none of these."""
    place = Path(path)
    if os.path.isfile(path):
        found = [path]
    elif os.path.isdir(path):
        every = sorted(str(file) for file in place.rglob("*") if file.is_file() and file_format(file.name))
        found = of_split(place, every, split)
    elif glob.has_magic(path):
        found = sorted(file for file in glob.glob(path, recursive=True) if os.path.isfile(file))
        if not found:
            raise RequestError(f"{shorten(path)}: the pattern matches no file; expected {formats_in_words()}")
    else:
        return []
    for file in found:
        if file_format(Path(file).name) is None:
            raise RequestError(f"{file}: not a data file by its name; expected {formats_in_words()}")
    return found


def no_splits(source: DataSource, where: str, asked: str, what: str) -> str:
    """Why a split cannot be taken of a source, of which all rows would be read."""
    hub = (
        "" if where == "split" else " (a source of the hub beside it can have its own: {path: owner/name, split: ...})"
    )
    return f"{shorten(source.path)}: {where} is {asked!r}, but {what} has no splits; leave it out{hub}, and set data.max_rows for the first rows only"  # fmt: skip


def splits_named(folder: Path, files: list[str]) -> dict[str, str | None]:
    """The split that each file's name tells, or None."""
    return {file: next((SPLITS[word] for word in re.split(r"[^a-z]+", str(Path(file).relative_to(folder)).lower())
                        if word in SPLITS), None) for file in files}  # fmt: skip


def of_split(folder: Path, files: list[str], split: str) -> list[str]:
    """A folder's files of one split by their names (train, test, ...); all of them where no name tells a split."""
    if not files:
        raise RequestError(f"{folder}: holds no data files; expected {formats_in_words()}")
    named = splits_named(folder, files)
    if not any(named.values()):
        return files
    found = [file for file in files if named[file] == SPLITS.get(split, split)]
    if not found:
        names = ", ".join(sorted({name for name in named.values() if name}))
        raise RequestError(f"{folder}: no file of the split {split!r}; by their names the files are: {names}")
    return found


def hash_files(files: list[str]) -> tuple[str, int | None]:
    """Hash of some files' bytes, and about how many rows they hold where a line is a row."""
    digest, lines = hashlib.sha256(), 0
    counted = all(file.lower().endswith((".jsonl", ".ndjson", ".csv", ".tsv")) for file in files)
    total = sum(os.path.getsize(file) for file in files if os.path.isfile(file))
    with Throughput("checking " + (shorten(files[0]) if len(files) == 1 else f"{len(files)} files"), "bytes", total) as shown:  # fmt: skip
        for file in files:
            own = hashlib.sha256()
            try:
                with open(file, "rb") as stream:
                    while block := stream.read(BLOCK):
                        own.update(block)
                        lines += block.count(b"\n") if counted else 0
                        shown.add(len(block))
            except OSError as error:
                raise RequestError(f"{file}: cannot be read: {error.strerror}") from None
            digest.update(f"{file_format(file)}{own.hexdigest()}".encode())
    return digest.hexdigest(), lines if counted else None


def load_saved(path: str, split: str) -> datasets.Dataset:
    """A folder written by `datasets`' save_to_disk."""
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
    """Raise RequestError for a saved data set whose state.json names files outside of its folder."""
    for state in folder.rglob("state.json"):
        try:
            names = [file["filename"] for file in json.loads(state.read_text("utf-8"))["_data_files"]]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # datasets says what is wrong
        for name in names:
            place = (state.parent / str(name)).resolve()
            if not place.is_relative_to(folder.resolve()):
                raise RequestError(f"{state} names {name!r}, outside of its folder: save the data set again")


def load_hub(source: DataSource, split: str, streaming: bool = False) -> Any:
    """A hub data set; never runs code that it ships."""
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    try:
        options: dict[str, Any] = {"streaming": True} if streaming else {}
        rows = datasets.load_dataset(source.path, source.name, split=split, revision=source.revision, **options)
    except DatasetNotFoundError as error:
        raise RequestError(
            f"{source.path}: neither a local file nor a data set that the hub shows you ({first_line(error)}). Is it "
            "spelt owner/name? For a gated or private one accept its terms at "
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
    return path if len(path) <= 300 else f"{path[:300]}..."


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def shaped(batches: Batches, columns: dict[str, str], limit: int | None, label: str) -> Batches:
    """Apply the column map and the row limit."""
    seen = 0
    for batch in batches:
        if limit is not None:
            batch = batch[: limit - seen]
        if not seen and columns:
            found = sorted({str(key) for row in batch if isinstance(row, dict) for key in row})
            for standard, actual in columns.items():
                if actual not in found:
                    raise RequestError(
                        f"{label}: data.columns maps {standard} to {actual!r}, which is no column here; found: "
                        f"{', '.join(found[:20])}"
                    )
        if columns:
            batch = [
                row | {standard: row.get(actual) for standard, actual in columns.items()}
                if isinstance(row, dict)
                else row
                for row in batch
            ]
        if batch:
            yield batch
        seen += len(batch)
        if limit is not None and seen >= limit:
            return
