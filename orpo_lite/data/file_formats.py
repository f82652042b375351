"""Rows of one file, in small batches, so that a file may be larger than memory.

Whatever is wrong with a file is a RequestError that names the place.
"""

from __future__ import annotations

import ast
import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, Any

from orpo_lite.common.errors import RequestError
from orpo_lite.common.safe_yaml import UTF_BOMS
from orpo_lite.data.messages import kind

Batches = Iterator[list[Any]]
BATCH_ROWS = 1000
BATCH_BYTES = 4_000_000
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
BOM = b"\xef\xbb\xbf"
OPENINGS = {b"PAR1": ("a parquet file", "name it .parquet"), b"\x1f\x8b": ("compressed with gzip", "name it .gz"),
            b"BZh": ("compressed with bzip2", "name it .bz2"), b"\xfd7zXZ": ("compressed with xz", "name it .xz"),
            b"\x28\xb5\x2f\xfd": ("compressed with zstd", "name it .zst")} | {
            bom: (f"{name} text", "convert it to UTF-8") for bom, name in UTF_BOMS.items()}  # fmt: skip
AGAIN = "copy or download it again, and name it by its format"
DOCUMENT = "expected a JSON array of rows, or one object per line"
TORN = "holds NUL bytes, as where a file was not written to its end; fix or remove the line, or copy it again"
SEPARATORS = {",": ".csv", "\t": ".tsv"}


def file_format(name: str) -> str | None:
    """Return the format's suffix without compression, or None if the name is not that of a data file."""
    name = name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return next((suffix for suffix in FORMATS if name.endswith(suffix)), None)


def open_bytes(file: str) -> IO[bytes]:
    """Open a file to read its decompressed bytes."""
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


def read_file(file: str) -> Batches:
    """Yield the rows of one file in batches.

    Raises:
        RequestError: the file is broken; the message names the line or place.
    """
    readers = {".csv": read_csv, ".tsv": read_csv, ".parquet": read_parquet}
    try:
        if file_format(file) != ".parquet":
            check_opening(file)
        yield from readers.get(str(file_format(file)), read_json)(file)
    except RequestError:
        raise
    except UnicodeDecodeError as error:
        raise RequestError(not_utf8(f"{file}{line_of_bad_text(file)}", error)) from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
        raise RequestError(f"{file}: cannot be read ({' '.join(str(error).split())[:200]}): {AGAIN}") from None


def check_opening(file: str) -> None:
    """Raise RequestError for a file whose first bytes show that it is not UTF-8 text."""
    with open_bytes(file) as stream:
        head = stream.read(64)
    found = next((words for opening, words in OPENINGS.items() if head.startswith(opening)), None)
    if not found and any(head) and not (any(head[::2]) and any(head[1::2])) and len(head) > 1:
        found = ("UTF-16 text", "convert it to UTF-8")
    if found:
        raise RequestError(f"{file}: found {found[0]}, expected text in UTF-8: {found[1]}")


def not_utf8(place: str, error: UnicodeDecodeError) -> str:
    """Return the message for text that is not UTF-8."""
    return f"{place}: not UTF-8 text (byte {error.start}: {error.reason}); convert it to UTF-8"


def line_of_bad_text(file: str) -> str:
    """Return ':3' where the third line of a text file is the first that is not UTF-8, or ''."""
    if file_format(file) == ".parquet":
        return ""
    number = 1
    try:
        with open_bytes(file) as stream:
            for line in stream:
                line.decode()
                number += 1
    except UnicodeDecodeError:
        return f":{number}"
    except (OSError, EOFError, zlib.error, lzma.LZMAError):  # torn as well
        pass
    return ""


def in_batches(rows: Iterable[tuple[Any, int]]) -> Batches:
    """Yield (row, size in bytes) tuples as batches of rows, each up to BATCH_ROWS rows or BATCH_BYTES."""
    batch, total = [], 0
    for row, size in rows:
        batch.append(row)
        total += size
        if len(batch) == BATCH_ROWS or total > BATCH_BYTES:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


# ---- JSON ------------------------------------------------------------------------------------------------------------


def read_json(file: str) -> Batches:
    """Yield the rows of JSON lines, or of one JSON document; the content decides, whatever the suffix."""
    with open_bytes(file) as stream:
        head = [stream.readline().removeprefix(BOM)]
        while head[-1] and not head[-1].strip():
            head.append(stream.readline())
        array = head[-1].lstrip().startswith(b"[")
        if array or file_format(file) == ".json" and not is_json_line(head[-1]):
            yield from in_batches((row, 0) for row in document_rows(file, b"".join([*head, stream.read()])))
        else:
            yield from in_batches(json_lines(file, itertools.chain(head, stream)))


def is_json_line(line: bytes) -> bool:
    """Return whether the line is a row by itself."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and rows_inside(row) is None


def rows_inside(document: dict[str, Any]) -> list[Any] | None:
    """Return the rows of a document such as {"data": [...]}; None if it is a row itself."""
    lists = [value for value in document.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
    return lists[0] if len(lists) == 1 and not {"chosen", "rejected", "conversations"} & document.keys() else None


def json_lines(file: str, lines: Iterable[bytes]) -> Iterator[tuple[Any, int]]:
    """Yield the rows of JSON lines with their sizes; empty lines are skipped."""
    remedy = "each line must be one JSON object; fix or remove it"
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield parse_json(line, f"{file}:{number}", remedy), len(line)


def document_rows(file: str, text: bytes) -> list[Any]:
    """Return the rows of a JSON document, which is held in memory as a whole."""
    rows = parse_json(text, file, DOCUMENT) if text.strip() else []
    if isinstance(rows, dict):
        return rows_inside(rows) or [rows]
    if not isinstance(rows, list):
        raise RequestError(f"{file}: found {kind(rows)}, {DOCUMENT}")
    return rows


class RepeatedKey(ValueError):
    """A key that appears twice in one JSON object."""


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs as a dict, or raise RepeatedKey."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RepeatedKey(next(key for key in keys if keys.count(key) > 1))
    return found


DECODER = json.JSONDecoder(object_pairs_hook=unique)


def parse_json(text: bytes, place: str, remedy: str) -> Any:
    """Parse JSON text.

    Raises:
        RequestError: it is broken; the message says where and how, and what to do.
    """
    try:
        # a line's own end would count as a second line
        return DECODER.decode(text.decode("utf-8").rstrip())
    except UnicodeDecodeError as error:
        raise RequestError(not_utf8(place, error)) from None
    except RepeatedKey as error:
        raise RequestError(f"{place}: {str(error)[:80]!r} appears twice in one object; keep one") from None
    except json.JSONDecodeError as error:
        if b"\0" in text:
            raise RequestError(f"{place}: {TORN}") from None
        where = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise RequestError(f"{place}: broken JSON at {where} ({error.msg}); {remedy}") from None
    except (RecursionError, ValueError) as error:
        raise RequestError(f"{place}: JSON that is nested too deeply or too large ({error}); {remedy}") from None


# ---- tables ----------------------------------------------------------------------------------------------------------


def read_csv(file: str) -> Batches:
    """Yield the rows of a file with comma- or tab-separated values, whose first line names the columns."""
    return in_batches(csv_rows(file))


def csv_rows(file: str) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the rows with their sizes."""
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if file_format(file) == ".tsv" else ","
    with open_bytes(file) as stream, io.TextIOWrapper(stream, "utf-8-sig", newline="") as text:
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        line = 1
        try:
            header = next((cells for cells in reader if cells), [])
            check_header(file, reader.line_num, header, delimiter)
            line = reader.line_num + 1
            for cells in reader:
                if cells:
                    yield csv_row(f"{file}:{line}", header, cells), sum(map(len, cells))
                line = reader.line_num + 1
        except csv.Error as error:
            raise RequestError(
                f'{file}:{line}: a quote is not closed, or text follows it ({error}): close it with ", and write a quote '
                'inside a cell as ""'
            ) from None


def check_header(file: str, line: int, header: list[str], delimiter: str) -> None:
    """Raise RequestError if the columns have another separator, or two of them the same name."""
    other = next((mark for mark in (";", "\t", ",", "|") if len(header) == 1 and mark in header[0]), None)
    if other:
        name = SEPARATORS.get(other)
        remedy = f"name it {name}" if name else f"save it with {'tabs' if delimiter != ',' else 'commas'}"
        shown = "a tab" if other == "\t" else repr(other)
        raise RequestError(f"{file}:{line}: found {shown} between the columns, expected {delimiter!r}: {remedy}")
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise RequestError(f"{file}:{line}: the column {twice[:80]!r} appears twice; rename or remove one")


def csv_row(place: str, header: list[str], cells: list[str]) -> dict[str, Any]:
    """Return a line's cells by column, None where there are fewer cells than columns."""
    if any("\0" in cell for cell in cells):
        raise RequestError(f"{place}: {TORN}")
    if len(cells) > len(header):
        raise RequestError(
            f"{place}: found {len(cells)} cells, expected {len(header)} columns: put cells with commas in quotes"
        )
    return dict.fromkeys(header) | {name: cell_value(cell) for name, cell in zip(header, cells, strict=False)}


def cell_value(cell: str) -> Any:
    """Parse messages that a table holds as JSON, or as Python writes them; any other cell stays as it is."""
    if not cell.lstrip().startswith(("[", "{")) or not ("role" in cell or "from" in cell):
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
    """Yield the rows of a parquet file; a compressed one is held in memory, since parquet is read from its end."""
    import pyarrow
    from pyarrow import parquet

    try:
        with open_bytes(file) as stream:
            whole = parquet.ParquetFile(stream if file.endswith(".parquet") else io.BytesIO(stream.read()))
            for batch in whole.iter_batches(batch_size=BATCH_ROWS):
                yield without_nulls(batch.to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # of the disk, not of the content
            raise
        raise RequestError(
            f"{file}: not a whole parquet file ({' '.join(str(error).split())[:150]}): {AGAIN}"
        ) from None


def without_nulls(value: Any) -> Any:
    """Remove the nulls that Arrow adds: it gives every struct of a column the fields of all the others."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
