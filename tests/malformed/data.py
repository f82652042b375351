"""Data files that cannot be trained on."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from tests.malformed.case import Case

CSV = "prompt,chosen,rejected\n"


def rows(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"What is {n} plus {n}?", "chosen": f"It is {2 * n}.", "rejected": f"Who knows {n}."}
        for n in range(count)
    ]


def lines(given: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in given).encode()


def table(columns: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    parquet.write_table(pa.table(columns), stream)
    return stream.getvalue()


def held(name: str, content: bytes, *overrides: str) -> Callable[[Path], list[str]]:
    """The command that trains the quickstart's model on a file of this content."""

    def make(folder: Path) -> list[str]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        return ["train", "--recipe", "quickstart", f"data.train={name}", "data.eval=null", *overrides]

    return make


def case(name: str, file: str, content: bytes, place: str, found: str, remedy: str, *overrides: str) -> Case:
    return Case(name, held(file, content, *overrides), place, found, remedy)


def asked(*words: str) -> Callable[[Path], list[str]]:
    """The quickstart with overrides, and no file."""
    return lambda _: ["train", "--recipe", "quickstart", "data.eval=null", *words]


def dropped(name: str, row: Any, found: str, remedy: str = "orpo-lite data", *overrides: str) -> Case:
    """A file of rows that open well (so that its shape is known) and are mostly like this one."""
    good = (
        rows(2)
        if not isinstance(row.get("chosen") if isinstance(row, dict) else "", list)
        else [talk(n) for n in range(2)]
    )
    content = lines(good) + lines([row] * 3)
    return case(name, "rows.jsonl", content, "row 2 of rows.jsonl", found, remedy, *overrides)


def talk(n: int) -> dict[str, Any]:
    """A row of messages."""
    said = [{"role": "user", "content": f"What is {n}?"}]
    return {"prompt": said, "chosen": [{"role": "assistant", "content": f"Number {n}."}],
            "rejected": [{"role": "assistant", "content": "Who knows."}]}  # fmt: skip


GOOD = lines(rows(3))
HH = [{"chosen": f"\n\nHuman: {a}\n\nAssistant: yes", "rejected": f"\n\nHuman: {b}\n\nAssistant: no"}
      for a, b in (("one", "one"), ("two", "three"), ("four", "five"))]  # fmt: skip
CASES = [
    case("json-broken", "a.jsonl", GOOD + b'{"prompt": "x", \n', "a.jsonl:4", "broken JSON at column", "fix or remove"),
    case("json-cut", "a.jsonl", GOOD[:-20], "a.jsonl:3", "broken JSON", "fix or remove"),
    case("json-document-cut", "a.json", json.dumps(rows(3), indent=1).encode()[:-30], "a.json", "broken JSON at line 15",
         "array of rows"),
    case("json-single-quotes", "a.jsonl", str(rows(1)[0]).encode(), "a.jsonl:1", "broken JSON at column 2", "fix or remove"),
    case("json-deep", "a.jsonl", GOOD + b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "a.jsonl:4",
         "nested too deeply", "fix or remove"),
    case("json-number-without-end", "a.jsonl", GOOD + b'{"a": ' + b"9" * 5000 + b"}\n", "a.jsonl:4", "4300 digits",
         "fix or remove"),
    case("utf-16", "a.jsonl", GOOD.decode().encode("utf-16"), "a.jsonl", "UTF-16", "convert it to UTF-8"),
    case("utf-16-big-end", "a.csv", (CSV + "a,b,c\n").encode("utf-16-be"), "a.csv", "UTF-16", "convert it to UTF-8"),
    case("utf-32", "a.jsonl", GOOD.decode().encode("utf-32"), "a.jsonl", "NUL bytes", "convert it to UTF-8"),
    case("latin-1", "a.jsonl", GOOD + '{"prompt": "caf\xe9"}\n'.encode("latin-1"), "a.jsonl:4", "not UTF-8 text (byte 15",
         "convert it to UTF-8"),
    case("latin-1-csv", "a.csv", (CSV + "a,b,c\ncaf\xe9,b,c\n").encode("latin-1"), "a.csv:3", "not UTF-8 text",
         "convert it to UTF-8"),
    case("nul-bytes", "a.jsonl", GOOD + b"\0" * 4096, "a.jsonl:4", "NUL bytes", "written to its end"),
    case("nul-bytes-csv", "a.csv", (CSV + "a,b,c\n").encode() + b"\0" * 512, "a.csv:3", "NUL bytes", "written to its end"),
    case("empty", "a.jsonl", b"", "a.jsonl", "holds no rows", "write at least one"),
    case("empty-lines", "a.jsonl", b"\n\n \n", "a.jsonl", "holds no rows", "write at least one"),
    case("header-only", "a.csv", CSV.encode(), "a.csv", "holds no rows", "write at least one"),
    case("empty-parquet", "a.parquet", b"", "a.parquet", "0 bytes", "copy or download it again"),
    case("parquet-half-written", "a.parquet", table({k: ["x"] * 500 for k in ("prompt", "chosen", "rejected")})[:-200],
         "a.parquet", "not a whole parquet file", "copy or download it again"),
    case("parquet-torn-inside", "a.parquet", (lambda b: b[:60] + b"\xff" * 60 + b[120:])(
        table({k: [f"{k} {n}" for n in range(500)] for k in ("prompt", "chosen", "rejected")})),
         "a.parquet", "not a whole parquet file", "copy or download it again"),
    case("parquet-by-name", "a.parquet", GOOD, "a.parquet", "not a whole parquet file", "copy or download it again"),
    case("json-of-parquet", "a.jsonl", table({"chosen": ["a"]}), "a.jsonl:1", "broken JSON", "by its format"),
    case("json-of-gzip", "a.jsonl", gzip.compress(GOOD), "a.jsonl:1", "UTF-8", "format"),
    case("parquet-numbers", "a.parquet", table({"prompt": ["a"], "chosen": [1], "rejected": [2]}), "a.parquet: row 0",
         "chosen is a number", "text or messages"),
    case("gzip-truncated", "a.jsonl.gz", gzip.compress(lines(rows(500)))[:-300], "a.jsonl.gz", "ended before the end-of-stream marker",
         "copy or download it again"),
    case("gzip-by-name", "a.jsonl.gz", GOOD, "a.jsonl.gz", "Not a gzipped file", "name it by its format"),
    case("wrong-columns", "a.jsonl", lines([{"question": "a", "good": "b", "bad": "c"}]), "a.jsonl",
         "found columns question, good, bad", "map other names with data.columns"),
    case("mapped-column-absent", "a.jsonl", GOOD, "a.jsonl", "maps chosen to 'best'", "found: chosen, prompt, rejected",
         "data.columns={chosen: best}"),
    case("csv-semicolons", "a.csv", b"prompt;chosen;rejected\na;b;c\n", "a.csv", "';' between", "save it with commas"),
    case("csv-tabs", "a.csv", b"prompt\tchosen\trejected\na\tb\tc\n", "a.csv", "tab", "name it .tsv"),
    case("tsv-commas", "a.tsv", CSV.encode() + b"a,b,c\n", "a.tsv", "','", "name it .csv"),
    case("csv-too-many-cells", "a.csv", CSV.encode() + b"a,b,c\na,b,c,d\n", "a.csv:3", "4 cells", "3 columns"),
    case("csv-too-few-cells", "a.csv", CSV.encode() + b"a,b\n" * 3, "row 0 of a.csv", "rejected is missing", "orpo-lite data"),
    case("csv-open-quote", "a.csv", CSV.encode() + b'a,b,c\na,"b,c\n' + b"a,b,c\n" * 50, "a.csv:3", "quote",
         'close it with "'),
    case("csv-duplicate-column", "a.csv", b"prompt,chosen,chosen\na,b,c\n", "a.csv:1", "'chosen' appears twice", "rename"),
    case("json-a-number", "a.json", b"5", "a.json", "found a number", "array of rows"),
    case("json-numbers", "a.jsonl", b"1\n2\n", "a.jsonl", "rows that are int", "chosen and rejected"),
    case("chosen-is-a-number", "a.jsonl", lines([{"prompt": "a", "chosen": 1, "rejected": 2}]), "a.jsonl: row 0",
         "chosen is a number", "text or messages"),
    case("prompt-is-a-number", "a.jsonl", lines([{"prompt": 5, "chosen": "b", "rejected": "c"}]), "a.jsonl: row 0",
         "prompt is a number", "text or messages"),
    case("nested-garbage", "a.jsonl", lines([{"prompt": "a", "chosen": [[[{}]]], "rejected": [[]]}]), "row 0 of a.jsonl",
         "chosen[0] is a list, expected a message", "fix the data"),
    case("message-without-role", "a.jsonl", lines([talk(0) | {"chosen": [{"content": "b"}]}]), "row 0 of a.jsonl",
         "chosen[0] has no role (found content)", "fix the data"),
    case("message-with-picture", "a.jsonl",
         lines([talk(0) | {"chosen": [{"role": "assistant", "content": [{"type": "image"}]}]}]), "row 0 of a.jsonl",
         "chosen[0] has a list as content", "expected text"),
    case("mixed-shapes", "a.jsonl", lines(rows(2) + [talk(n) for n in range(2)] + [{"x": 1}]), "row 2 of a.jsonl",
         "the source is strings, explicit prompt", "fix the data"),
    case("lone-surrogate", "a.jsonl", lines([{"prompt": "a", "chosen": "b \ud83d", "rejected": "c"}]), "row 0 of a.jsonl",
         "chosen holds half a character ('\\ud83d')", "fix the data"),
    case("prompts-differ", "a.jsonl", lines(HH), "row 1 of a.jsonl", "prompts differ: they differ from 'wo", "fix the data"),
    case("sides-equal", "a.jsonl", lines([row | {"rejected": row["chosen"]} for row in rows(3)]), "row 0 of a.jsonl",
         "chosen equal to rejected", "fix the data"),
    case("side-null", "a.jsonl", lines([row | {"rejected": None} for row in rows(3)]), "row 0 of a.jsonl",
         "rejected is missing", "fix the data"),
    case("blank-prompt", "a.jsonl", lines([row | {"prompt": " "} for row in rows(3)]), "row 0 of a.jsonl",
         "the prompt is empty", "fix the data"),
    case("last-turn-of-user", "a.jsonl", lines([talk(0) | {"chosen": [{"role": "user", "content": "b"}]}]),
         "row 0 of a.jsonl", "chosen ends with a user turn", "expected assistant"),
    case("tools-broken", "a.jsonl", lines([talk(0) | {"tools": "[{"}]), "row 0 of a.jsonl", "tools is not readable as JSON",
         "fix the data"),
    case("variable-nan", "a.jsonl", lines([talk(0) | {"chat_template_kwargs": {"date": float("nan")}}]), "row 0 of a.jsonl",
         "chat_template_kwargs.date: found nan", "finite number"),
    case("row-of-10-mb", "a.jsonl", lines([rows(1)[0] | {"chosen": "word " * 2_000_000}]), "row 0 of a.jsonl",
         "completion does not fit", "raise max_length"),
    case("prompts-too-long", "a.jsonl", lines([rows(1)[0] | {"prompt": "word " * 2000}]), "row 0 of a.jsonl",
         "there is room for 255", "raise max_length"),
    Case("no-such-file", asked("data.train=gone/a.jsonl"), "gone/a.jsonl", "no such file or folder", ".parquet"),
    Case("no-such-pattern", asked("data.train=gone/*.jsonl"), "gone/*.jsonl", "matches no file", "expected"),
    Case("no-such-user", asked("data.train=~nobody-here/a.jsonl"), "~nobody-here/a.jsonl", "no such file", ".parquet"),
    Case("endless-name", asked(f"data.train={'a' * 5000}.jsonl"), "aaaa", "no such file", ".parquet"),
    Case("under-a-file", held("file", b"text", "data.train=file/a.jsonl"), "file/a.jsonl", "no such file or folder", ".parquet"),
    Case("no-data-file", held("notes.txt", b"text"), "notes.txt", "not a data file by its name", ".parquet"),
    Case("folder-without-data", held("folder/notes.pkl", b"text", "data.train=folder"), "folder", "No (supported) data files found",
         ".parquet"),
    Case("split-of-a-file", held("a.jsonl", GOOD, "data.train={path: a.jsonl, split: test}"), "a.jsonl",
         "split is 'test'", "leave it out"),
    Case("folder-without-split", held("set/test.jsonl", GOOD, "data.train=set"), "set", "Unknown split \"train\"",
         "['test']"),
]  # fmt: skip
