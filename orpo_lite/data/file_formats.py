"""Rows of one file, one after the other, so that a file may be larger than memory.

Whatever is wrong with a file is a RequestError that names the place.
"""

import ast
import csv
import gzip
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, Any

from orpo_lite.common.errors import RequestError
from orpo_lite.data.messages import kind

FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
AGAIN = "copy or download it again, and name it by its format"
DOCUMENT = "expected a JSON array of rows, or one object per line"
LINE = "each line must be one JSON object; fix or remove it, or name the file by its format"


def file_format(name: str) -> str | None:
    """Return the format's suffix without .gz, or None if the name is not that of a data file."""
    name = name.lower().removesuffix(".gz")
    return next((suffix for suffix in FORMATS if name.endswith(suffix)), None)


def open_bytes(file: str) -> IO[bytes]:
    """Open a file to read its decompressed bytes."""
    return gzip.open(file, "rb") if file.lower().endswith(".gz") else open(file, "rb")  # type: ignore[return-value]


def read_file(file: str) -> Iterator[Any]:
    """Yield the rows of one file.

    Raises:
        RequestError: the file is broken; the message names the line or place.
    """
    readers = {".csv": csv_rows, ".tsv": csv_rows, ".parquet": parquet_rows}
    try:
        yield from readers.get(str(file_format(file)), json_rows)(file)
    except RequestError:
        raise
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise RequestError(f"{file}: cannot be read ({' '.join(str(error).split())[:200]}): {AGAIN}") from None


def text_lines(file: str, stream: Iterable[bytes]) -> Iterator[str]:
    """Yield the lines of a text file.

    Raises:
        RequestError: a line is not UTF-8 or holds NUL bytes.
    """
    for number, line in enumerate(stream, 1):
        if b"\0" in line:
            raise RequestError(
                f"{file}:{number}: holds NUL bytes, as UTF-16 text does (convert it to UTF-8), a file of another format (name it "
                ".parquet or .gz), or one that was not written to its end: fix or remove the line, or copy it again"
            )
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            problem = f"not UTF-8 text (byte {error.start}: {error.reason}); convert it to UTF-8, or name the file by its format"
            raise RequestError(f"{file}:{number}: {problem}") from None


def json_rows(file: str) -> Iterator[Any]:
    """Yield the rows of JSON lines, or of one JSON document; the content decides, whatever the suffix."""
    with open_bytes(file) as stream:
        lines = text_lines(file, stream)
        blank, head = 0, next(lines, "")
        while head.isspace():
            blank, head = blank + 1, next(lines, "")
        if head.lstrip().startswith("[") or file_format(file) == ".json" and not is_json_line(head):
            text = "".join(["\n" * blank, head, *lines])  # held in memory as a whole
            rows = parse_json(text, file, DOCUMENT) if text.strip() else []
            if not isinstance(rows, list | dict):
                raise RequestError(f"{file}: found {kind(rows)}, {DOCUMENT}")
            yield from rows if isinstance(rows, list) else [rows]
            return
        for number, line in enumerate(itertools.chain([head], lines), blank + 1):
            if line.strip():
                yield parse_json(line.rstrip(), f"{file}:{number}", LINE)


def is_json_line(line: str) -> bool:
    """Return whether the line is a row by itself."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict)


def parse_json(text: str, place: str, remedy: str) -> Any:
    """Parse JSON text.

    Raises:
        RequestError: it is broken; the message says where and how, and what to do.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        problem = f"at {line}column {error.colno} ({error.msg})"
    except RecursionError:
        problem = "(nested too deeply)"
    except ValueError as error:  # a number of thousands of digits
        problem = f"({error})"
    raise RequestError(f"{place}: broken JSON {problem}; {remedy}")


def csv_rows(file: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file with comma- or tab-separated values, whose first line names the columns."""
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if file_format(file) == ".tsv" else ","
    with open_bytes(file) as stream:
        reader = csv.reader(text_lines(file, stream), delimiter=delimiter, strict=True)
        line = 1
        try:
            header = next((cells for cells in reader if cells), [])
            check_header(f"{file}:{reader.line_num}", header, delimiter)
            line = reader.line_num + 1
            for cells in reader:
                if cells:
                    yield csv_row(f"{file}:{line}", header, cells)
                line = reader.line_num + 1
        except csv.Error as error:
            raise RequestError(
                f'{file}:{line}: a quote is not closed, or text follows it ({error}): close it with ", and write a quote '
                'inside a cell as ""'
            ) from None


def check_header(place: str, header: list[str], delimiter: str) -> None:
    """Raise RequestError if the columns have another separator, or two of them the same name."""
    other = next((mark for mark in ";\t,|" if len(header) == 1 and mark in header[0]), None)
    if other:
        found = "a tab" if other == "\t" else repr(other)
        raise RequestError(
            f"{place}: found {found} between the columns, expected {delimiter!r}: save it with commas and name it .csv, "
            "or with tabs and name it .tsv"
        )
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise RequestError(f"{place}: the column {twice[:80]!r} appears twice; rename or remove one")


def csv_row(place: str, header: list[str], cells: list[str]) -> dict[str, Any]:
    """Return a line's cells by column, None where there are fewer cells than columns."""
    if len(cells) > len(header):
        raise RequestError(
            f"{place}: found {len(cells)} cells, expected {len(header)} columns: put cells with commas in quotes"
        )
    return dict.fromkeys(header) | dict(zip(header, map(cell_value, cells), strict=False))


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


def parquet_rows(file: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a parquet file."""
    import pyarrow
    from pyarrow import parquet

    try:
        with open_bytes(file) as stream:
            for batch in parquet.ParquetFile(stream).iter_batches(batch_size=250):
                yield from without_nulls(batch.to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # of the disk, not of the content
            raise
        problem = " ".join(str(error).split())[:150]
        raise RequestError(f"{file}: not a whole parquet file ({problem}): {AGAIN}") from None


def without_nulls(value: Any) -> Any:
    """Remove the nulls that Arrow adds: it gives every struct of a column the fields of all the others."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
