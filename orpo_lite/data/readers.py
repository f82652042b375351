"""Rows of a source, in batches: local files in any common form, or a hub data set through `datasets`.

Rows never pile up: every reader is a generator of small batches, and each source has a hash of its content, so that
its tokens can be cached.
"""

from __future__ import annotations

import ast
import bz2
import csv
import glob
import gzip
import hashlib
import io
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any

from orpo_lite.data.formats import COLUMNS, kind
from orpo_lite.errors import RequestError
from orpo_lite.recipe import Columns, DataSource, resolve_path

if TYPE_CHECKING:
    import datasets

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
}
BATCH_ROWS = 1000
BATCH_BYTES = 4_000_000
BOM = b"\xef\xbb\xbf"

Batches = Iterator[list[Any]]


@dataclass
class Source:
    """What can be read of one entry of data.train or data.eval."""

    label: str
    files: list[str]
    content: str
    """Hash of the content, the column map included."""
    batches: Callable[[], Batches]
    """Opens the source anew and yields lists of rows, columns renamed."""


def open_source(source: DataSource, split: str, default: Columns | None, limit: int | None = None) -> Source:
    """Find a source's files or its hub data set.

    Args:
        source: as in the recipe.
        split: split of a hub data set or folder, where the source names none.
        default: column map (standard name -> name in the data) where the source has none.
        limit: read only the first rows.

    Raises:
        RequestError: nothing there, or not readable as what it says it is.
    """
    columns = {str(name): actual for name, actual in (source.columns or default or {}).items()}
    path = str(Path(resolve_path(source.path)).expanduser())
    if Path(path).is_dir() and (Path(path) / "state.json").is_file() or (Path(path) / "dataset_dict.json").is_file():
        files, rows = [path], load_saved(path, source.split or split)
        content, batches = rows._fingerprint, lambda: dataset_batches(rows, columns)
    elif files := local_files(path, source.split or split):
        if source.split and not Path(path).is_dir():
            raise RequestError(
                f"{source.path}: split is {source.split!r}, but a local file has no splits; leave it out"
            )
        content = hash_files(files)
        batches = lambda: itertools.chain.from_iterable(map(read_file, files))  # noqa: E731 (a closure over files)
    elif is_local(source.path):
        raise RequestError(
            f"{source.path}: no such file or folder (data.train / data.eval); expected {formats_in_words()}"
        )
    else:
        files, rows = [], load_hub(source, source.split or split)
        content, batches = rows._fingerprint, lambda: dataset_batches(rows, columns)
    key = hashlib.sha256(json.dumps([content, columns, limit], sort_keys=True).encode()).hexdigest()
    return Source(source.path, files, key, lambda: shaped(batches(), columns, limit, source.path))


def is_local(path: str) -> bool:
    """Whether a path that does not exist was meant as a file rather than as a hub id."""
    name = Path(path).name.lower()
    return path.startswith((".", "/", "~", "builtin:")) or not HUB_ID.fullmatch(path) or file_format(name) is not None


def formats_in_words() -> str:
    return (
        f"{' '.join(FORMATS)}, each also as {' '.join(COMPRESSIONS)}, a glob, a folder of these, or a hub id owner/name"
    )


def file_format(name: str) -> str | None:
    """The format's suffix without compression, or None if the name is not that of a data file."""
    name = name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return next((suffix for suffix in FORMATS if name.endswith(suffix)), None)


def local_files(path: str, split: str) -> list[str]:
    """The data files behind a path, glob or folder, sorted; empty if it is none of these."""
    place = Path(path)
    if place.is_file():
        found = [path]
    elif place.is_dir():
        every = sorted(str(file) for file in place.rglob("*") if file.is_file() and file_format(file.name))
        found = of_split(place, every, split)
    elif glob.has_magic(path):
        found = sorted(file for file in glob.glob(path, recursive=True) if Path(file).is_file())
        if not found:
            raise RequestError(f"{path}: the pattern matches no file")
    else:
        return []
    for file in found:
        if file_format(Path(file).name) is None:
            raise RequestError(f"{file}: not a data file by its name; expected {formats_in_words()}")
    return found


def of_split(folder: Path, files: list[str], split: str) -> list[str]:
    """A folder's files of one split by their names (train, test, ...); all of them where no name tells a split."""
    if not files:
        raise RequestError(f"{folder}: holds no data files; expected {formats_in_words()}")
    named = {file: next((SPLITS[word] for word in re.split(r"[^a-z]+", str(Path(file).relative_to(folder)).lower())
                         if word in SPLITS), None) for file in files}  # fmt: skip
    if not any(named.values()):
        return files
    found = [file for file in files if named[file] == SPLITS.get(split, split)]
    if not found:
        names = ", ".join(sorted({name for name in named.values() if name}))
        raise RequestError(f"{folder}: no file of the split {split!r}; by their names the files are: {names}")
    return found


def hash_files(files: list[str]) -> str:
    digest = hashlib.sha256()
    for file in files:
        try:
            with open(file, "rb") as stream:
                digest.update(f"{file_format(file)}{hashlib.file_digest(stream, 'sha256').hexdigest()}".encode())
        except OSError as error:
            raise RequestError(f"{file}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def open_bytes(file: str) -> IO[bytes]:
    """The decompressed bytes of a file."""
    if file.endswith(".gz"):
        return gzip.open(file, "rb")  # pyright: ignore[reportReturnType] (GzipFile is a binary stream)
    if file.endswith(".bz2"):
        return bz2.open(file, "rb")
    if file.endswith(".xz"):
        return lzma.open(file, "rb")
    if file.endswith(".zst"):
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(file, compression="zstd"))
    return open(file, "rb")


def read_file(file: str) -> Batches:
    """Batches of one file's rows; every way in which it can be broken is a RequestError that names the place."""
    readers = {".csv": read_csv, ".tsv": read_csv, ".parquet": read_parquet}
    try:
        yield from readers.get(str(file_format(file)), read_json)(file)
    except RequestError:
        raise
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{file}: not UTF-8 text (byte {error.start}: {error.reason}); convert it to UTF-8"
        ) from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError, csv.Error) as error:
        raise RequestError(f"{file}: cannot be read: {' '.join(str(error).split())[:200]}") from None


def read_json(file: str) -> Batches:
    """JSON lines, or one JSON document; told by the content, whatever the suffix."""
    with open_bytes(file) as stream:
        head = [stream.readline().removeprefix(BOM)]
        while head[-1] and not head[-1].strip():
            head.append(stream.readline())
        if head[-1].lstrip().startswith(b"[") or file_format(file) == ".json" and not is_json_line(head[-1]):
            yield from read_json_document(file, b"".join([*head, stream.read()]))
        else:
            yield from read_json_lines(file, itertools.chain(head, stream))


def is_json_line(line: bytes) -> bool:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and rows_inside(row) is None


def rows_inside(document: dict[str, Any]) -> list[Any] | None:
    """The rows of a document such as {"data": [...]}; None if it is a row itself."""
    lists = [value for value in document.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
    return lists[0] if len(lists) == 1 and not {"chosen", "rejected", "conversations"} & document.keys() else None


def read_json_lines(file: str, lines: Iterable[bytes]) -> Batches:
    batch, size = [], 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        batch.append(parse_json(line, f"{file}:{number}", "each line must be one JSON object; mend or remove it"))
        size += len(line)
        if len(batch) == BATCH_ROWS or size > BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def read_json_document(file: str, text: bytes) -> Batches:
    remedy = "expected a JSON array of rows, or one object a line"
    rows = parse_json(text, file, remedy) if text.strip() else []
    if isinstance(rows, dict):
        rows = rows_inside(rows) or [rows]
    elif not isinstance(rows, list):
        raise RequestError(f"{file}: found {kind(rows)}, {remedy}")
    for start in range(0, len(rows), BATCH_ROWS):
        yield rows[start : start + BATCH_ROWS]


def parse_json(text: bytes, place: str, remedy: str) -> Any:
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{place}: not UTF-8 text (byte {error.start}: {error.reason}); convert it to UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise RequestError(f"{place}: broken JSON at {where} ({error.msg}); {remedy}") from None
    except (RecursionError, ValueError) as error:
        raise RequestError(f"{place}: JSON that is nested too deeply or too large ({error}); {remedy}") from None


def read_csv(file: str) -> Batches:
    csv.field_size_limit(2**31 - 1)
    with open_bytes(file) as stream, io.TextIOWrapper(stream, "utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, delimiter="\t" if file_format(file) == ".tsv" else ",")
        while rows := list(itertools.islice(reader, BATCH_ROWS)):
            for row in rows:
                if None in row:
                    raise RequestError(
                        f"{file}: a row near line {reader.line_num} has more cells than there are columns"
                    )
            yield [{key: cell_value(cell) for key, cell in row.items()} for row in rows]


def cell_value(cell: str | None) -> Any:
    """Messages that a table holds as JSON, or as Python writes them; any other cell stays the text that it is."""
    if not cell or not cell.lstrip().startswith(("[", "{")) or not ("role" in cell or "from" in cell):
        return cell
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(cell)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        first = value[0] if isinstance(value, list) and value else value
        return value if isinstance(first, dict) and ("role" in first or "from" in first) else cell
    return cell


def read_parquet(file: str) -> Batches:
    import pyarrow
    from pyarrow import parquet

    try:
        with open_bytes(file) as stream:
            # parquet is read from its end: a compressed one has to be whole in memory
            whole = parquet.ParquetFile(stream if file.endswith(".parquet") else io.BytesIO(stream.read()))
            columns = whole.schema_arrow.names
            for batch in whole.iter_batches(batch_size=BATCH_ROWS, columns=columns):
                yield [without_nulls(row) for row in batch.to_pylist()]
    except pyarrow.ArrowException as error:
        raise RequestError(f"{file}: not a whole parquet file ({' '.join(str(error).split())[:150]})") from None


def dataset_batches(rows: datasets.Dataset, columns: Mapping[str, str] = MappingProxyType({})) -> Batches:
    """Batches of a `datasets.Dataset`: the columns that matter, without what Arrow filled in."""
    wanted = {*COLUMNS, *columns.values()}
    used = [name for name in rows.column_names if name in wanted]
    rows = (rows.select_columns(used) if used else rows).with_format(None)
    for start in range(0, len(rows), BATCH_ROWS):
        table = rows[start : start + BATCH_ROWS]
        yield [without_nulls(dict(zip(table, values, strict=True))) for values in zip(*table.values(), strict=True)]


def without_nulls(value: Any) -> Any:
    """Arrow gives every struct of a column the fields of all the others, as nulls: take those away again."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def load_saved(path: str, split: str) -> datasets.Dataset:
    """A folder written by `datasets`' save_to_disk."""
    import datasets

    try:
        saved = datasets.load_from_disk(path)
    except (OSError, ValueError) as error:
        raise RequestError(f"{path}: cannot be read as a saved data set: {error}") from None
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise RequestError(f"{path}: no split {split!r}; there are {', '.join(map(str, saved))} (data.split)")
        return saved[split]
    return saved


def load_hub(source: DataSource, split: str) -> datasets.Dataset:
    """A hub data set; never runs code that it ships."""
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    try:
        rows = datasets.load_dataset(source.path, source.name, split=split, revision=source.revision)
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
    if not isinstance(rows, datasets.Dataset):
        raise RequestError(f"{source.path}: split {split!r} is a {type(rows).__name__}, expected one table of rows")
    return rows


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
