"""Rows of one file or table, in small batches, so that they never pile up.

Every way in which a file can be broken is a RequestError that names the place.
"""

from __future__ import annotations

import ast
import bz2
import contextlib
import csv
import gzip
import io
import itertools
import json
import lzma
import zlib
from collections.abc import Iterable
from typing import IO, Any

from orpo_lite.common.errors import RequestError
from orpo_lite.common.safe_yaml import UTF_BOMS
from orpo_lite.data.json_array import JsonArray
from orpo_lite.data.messages import kind
from orpo_lite.data.tables import BATCH_ROWS, EVERY, SKIPPED, Batches, Wanted, without_nulls

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
BATCH_BYTES = 4_000_000
BOM = b"\xef\xbb\xbf"
OPENINGS = {b"PAR1": ("a parquet file", "name it .parquet"), b"\x1f\x8b": ("compressed with gzip", "name it .gz"),
            b"BZh": ("compressed with bzip2", "name it .bz2"), b"\xfd7zXZ": ("compressed with xz", "name it .xz"),
            b"\x28\xb5\x2f\xfd": ("compressed with zstd", "name it .zst")} | {
            bom: (f"{name} text", "convert it to UTF-8") for bom, name in UTF_BOMS.items()}  # fmt: skip
AGAIN = "copy or download it again, and name it by what it is"
SEPARATORS = {",": ".csv", "\t": ".tsv"}


def file_format(name: str) -> str | None:
    """The format's suffix without compression, or None if the name is not that of a data file."""
    name = name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return next((suffix for suffix in FORMATS if name.endswith(suffix)), None)


def open_bytes(file: str) -> IO[bytes]:
    """The decompressed bytes of a file."""
    name = file.lower()
    if name.endswith(".gz"):
        return gzip.open(file, "rb")  # pyright: ignore[reportReturnType] (GzipFile is a binary stream)
    if name.endswith(".bz2"):
        return bz2.open(file, "rb")
    if name.endswith(".xz"):
        return lzma.open(file, "rb")
    if name.endswith(".zst"):
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(file, compression="zstd"))
    return open(file, "rb")


def read_file(file: str, wanted: Wanted = EVERY) -> Batches:
    """Batches of one file's rows; every way in which it can be broken is a RequestError that names the place."""
    readers = {".csv": read_csv, ".tsv": read_csv, ".parquet": read_parquet}
    try:
        if file_format(file) != ".parquet":
            check_opening(file)
        yield from readers.get(str(file_format(file)), read_json)(file, wanted)
    except RequestError:
        raise
    except UnicodeDecodeError as error:
        raise RequestError(not_utf8(f"{file}{line_of_bad_text(file)}", error)) from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
        raise RequestError(f"{file}: cannot be read ({' '.join(str(error).split())[:200]}): {AGAIN}") from None


def check_opening(file: str) -> None:
    """Raise RequestError for a file that is no UTF-8 text by its first bytes."""
    with open_bytes(file) as stream:
        head = stream.read(64)
    found = next((words for opening, words in OPENINGS.items() if head.startswith(opening)), None)
    if not found and any(head) and not (any(head[::2]) and any(head[1::2])) and len(head) > 1:
        found = ("UTF-16 text", "convert it to UTF-8")
    if found:
        raise RequestError(f"{file}: found {found[0]}, expected text in UTF-8: {found[1]}")


def not_utf8(place: str, error: UnicodeDecodeError) -> str:
    return f"{place}: not UTF-8 text (byte {error.start}: {error.reason}); convert it to UTF-8"


def line_of_bad_text(file: str) -> str:
    """':3' where the third line of a text file is the first that is not UTF-8."""
    if file_format(file) == ".parquet":
        return ""
    with contextlib.suppress(OSError, EOFError, zlib.error, lzma.LZMAError):  # torn as well
        with open_bytes(file) as stream:
            for number, line in enumerate(stream, 1):
                try:
                    line.decode()
                except UnicodeDecodeError:
                    return f":{number}"
    return ""


def read_json(file: str, wanted: Wanted) -> Batches:
    """JSON lines, or one JSON document; told by the content, whatever the suffix."""
    with open_bytes(file) as stream:
        head = [stream.readline().removeprefix(BOM)]
        while head[-1] and not head[-1].strip():
            head.append(stream.readline())
        if head[-1].lstrip().startswith(b"["):
            yield from chosen(read_json_array(file, b"".join(head), stream), wanted)
        elif file_format(file) == ".json" and not is_json_line(head[-1]):
            yield from chosen(read_json_document(file, b"".join([*head, stream.read()])), wanted)
        else:
            yield from read_json_lines(file, itertools.chain(head, stream), wanted)


def chosen(batches: Batches, wanted: Wanted) -> Batches:
    """Rows of a format that has to be decoded to be read."""
    return ([row if next(wanted) else SKIPPED for row in batch] for batch in batches)


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


def read_json_lines(file: str, lines: Iterable[bytes], wanted: Wanted = EVERY) -> Batches:
    batch, size = [], 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if next(wanted):
            batch.append(parse_json(line, f"{file}:{number}", "each line must be one JSON object; mend or remove it"))
        else:
            batch.append(SKIPPED)
        size += len(line)
        if len(batch) == BATCH_ROWS or size > BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


DOCUMENT = "expected a JSON array of rows, or one object a line"


def read_json_array(file: str, head: bytes, stream: IO[bytes]) -> Batches:
    array = None
    try:
        array = JsonArray(head, stream, DECODER)
        rows = iter(array)
        while batch := list(itertools.islice(rows, BATCH_ROWS)):
            yield batch
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        nul = isinstance(error, json.JSONDecodeError) and array is not None and (array.nul or has_nul(stream))
        raise broken_json(error, file, DOCUMENT, nul) from None


def has_nul(stream: IO[bytes]) -> bool:
    return any(b"\0" in block for block in iter(lambda: stream.read(BATCH_BYTES), b""))


def read_json_document(file: str, text: bytes) -> Batches:
    remedy = DOCUMENT
    rows = parse_json(text, file, remedy) if text.strip() else []
    if isinstance(rows, dict):
        rows = rows_inside(rows) or [rows]
    elif not isinstance(rows, list):
        raise RequestError(f"{file}: found {kind(rows)}, {remedy}")
    for start in range(0, len(rows), BATCH_ROWS):
        yield rows[start : start + BATCH_ROWS]


class RepeatedKey(ValueError):
    """A key that stands twice in one JSON object."""


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RepeatedKey(next(key for key in keys if keys.count(key) > 1))
    return found


DECODER = json.JSONDecoder(object_pairs_hook=unique)


def parse_json(text: bytes, place: str, remedy: str) -> Any:
    try:
        return DECODER.decode(text.decode("utf-8").rstrip())  # a line's own end would count as a second line
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        raise broken_json(error, place, remedy, b"\0" in text) from None


def broken_json(error: Exception, place: str, remedy: str, nul: bool) -> RequestError:
    """What is wrong with JSON text, in words; `nul`: whether it holds NUL bytes."""
    if isinstance(error, UnicodeDecodeError):
        return RequestError(not_utf8(place, error))
    if isinstance(error, RepeatedKey):
        return RequestError(f"{place}: {str(error)[:80]!r} stands twice in one object; keep one")
    if not isinstance(error, json.JSONDecodeError):
        return RequestError(f"{place}: JSON that is nested too deeply or too large ({error}); {remedy}")
    if nul:
        return RequestError(f"{place}: {torn()}")
    where = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
    return RequestError(f"{place}: broken JSON at {where} ({error.msg}); {remedy}")


def torn() -> str:
    return "holds NUL bytes, as where a file was not written to its end; mend or remove the line, or copy it again"


def read_csv(file: str, wanted: Wanted) -> Batches:
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if file_format(file) == ".tsv" else ","
    with open_bytes(file) as stream, io.TextIOWrapper(stream, "utf-8-sig", newline="") as text:
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        line = 1
        try:
            header = next((cells for cells in reader if cells), [])
            check_header(file, reader.line_num, header, delimiter)
            batch, size = [], 0
            line = reader.line_num + 1
            for cells in reader:
                if cells:
                    batch.append(csv_row(f"{file}:{line}", header, cells) if next(wanted) else SKIPPED)
                    size += sum(map(len, cells))
                line = reader.line_num + 1
                if len(batch) == BATCH_ROWS or size > BATCH_BYTES:
                    yield batch
                    batch, size = [], 0
        except csv.Error as error:
            raise RequestError(
                f'{file}:{line}: a quote is not closed, or text follows it ({error}): close it with ", and write a quote '
                'inside of a cell as ""'
            ) from None
        if batch:
            yield batch


def check_header(file: str, line: int, header: list[str], delimiter: str) -> None:
    """Raise RequestError for columns that are parted by something else, or have one name twice."""
    other = next((mark for mark in (";", "\t", ",", "|") if len(header) == 1 and mark in header[0]), None)
    if other:
        name = SEPARATORS.get(other)
        mend = f"name it {name}" if name else f"save it with {'tabs' if delimiter != ',' else 'commas'}"
        shown = "a tab" if other == "\t" else repr(other)
        raise RequestError(f"{file}:{line}: found {shown} between the columns, expected {delimiter!r}: {mend}")
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise RequestError(f"{file}:{line}: the column {twice[:80]!r} stands twice; rename or remove one")


def csv_row(place: str, header: list[str], cells: list[str]) -> dict[str, Any]:
    if any("\0" in cell for cell in cells):
        raise RequestError(f"{place}: {torn()}")
    if len(cells) > len(header):
        raise RequestError(
            f"{place}: found {len(cells)} cells, expected {len(header)} columns: put cells with commas in quotes"
        )
    return dict.fromkeys(header) | {name: cell_value(cell) for name, cell in zip(header, cells, strict=False)}


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


def read_parquet(file: str, wanted: Wanted) -> Batches:
    import pyarrow
    from pyarrow import parquet

    try:
        with open_bytes(file) as stream:
            # parquet is read from its end: a compressed one has to be whole in memory
            whole = parquet.ParquetFile(stream if file.endswith(".parquet") else io.BytesIO(stream.read()))
            columns = whole.schema_arrow.names
            for batch in whole.iter_batches(batch_size=BATCH_ROWS, columns=columns):
                flags = list(itertools.islice(wanted, batch.num_rows))
                taken = batch if all(flags) else batch.filter(pyarrow.array(flags, pyarrow.bool_()))
                rows = iter(taken.to_pylist())
                yield [without_nulls(next(rows)) if flag else SKIPPED for flag in flags]
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # not of the content
            raise
        raise RequestError(
            f"{file}: not a whole parquet file ({' '.join(str(error).split())[:150]}): {AGAIN}"
        ) from None
