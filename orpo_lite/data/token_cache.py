"""Raw rows -> tokenized pairs in a memory-mapped `datasets.Dataset`, and the report of drops."""

import collections
import functools
import hashlib
import itertools
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from orpo_lite.common.console import progress
from orpo_lite.common.errors import RequestError
from orpo_lite.data.dropped_rows import Drop, DropReport, TooManyDropped
from orpo_lite.data.quality import COLUMNS, without_numbers
from orpo_lite.data.row_formats import BATCH_ROWS, Numbered, paired_by_prompt
from orpo_lite.data.row_shapes import source_shape
from orpo_lite.data.sources import Source, dataset_rows
from orpo_lite.data.tokenize import PairTokenizer, TokenizeOptions

__all__ = ["DropReport", "TokenizeOptions", "Tokenized", "TooManyDropped", "tokenize_rows", "tokenize_source"]


class Tokenized(NamedTuple):
    """The pairs of one source."""

    rows: datasets.Dataset
    """Columns of `tokenize_rows`, and int64: `key`, a hash of the prompt's words, and in recipes `quality.COLUMNS`."""
    report: DropReport
    shape: str
    digest: str
    """Hash of all rows as converted."""
    label: str
    """The source's name in reports."""


def tokenize_rows(
    rows: Any, tokenizer: PreTrainedTokenizerBase, options: TokenizeOptions, source: str = "train"
) -> tuple[datasets.Dataset, DropReport]:
    """Tokenize preference rows of any shape.

    Args:
        source: names the rows in the report and in errors.

    Returns:
        `chosen_ids` and `rejected_ids` (lists of int32, prompt and completion), `chosen_start` and
        `rejected_start` (int32, index of the completion's first token), `row` (int64, index in `rows`), `source`
        (int32, 0); where completions have several turns, `chosen_context` and `rejected_context` (lists of int32: begin
        and end of each run of tokens that is no label).

    Raises:
        RequestError: not a table of preference rows, no chat template, or more than half of the rows dropped.
    """
    if not isinstance(rows, datasets.Dataset):
        raise RequestError(
            f"{source}: found a {type(rows).__name__}, expected a datasets.Dataset: choose one split of a DatasetDict, "
            "or build one with Dataset.from_list, of a stream by Dataset.from_list(list(stream.take(10_000)))"
        )
    done = tokenize_source(Source(source, [], functools.partial(dataset_rows, rows)), tokenizer, options)
    if problem := done.report.problem(source):
        raise TooManyDropped(problem, done.report)
    return without_numbers(done.rows), done.report


def tokenize_source(
    source: Source, tokenizer: PreTrainedTokenizerBase, options: TokenizeOptions, number: int = 0
) -> Tokenized:
    """Tokenize one source into a temporary file, removed when this process ends; `number` is the column `source`."""
    batches = batched(paired_by_prompt(enumerate(source.rows())))
    first = next(batches, [])
    shape = source_shape([row for _, row in first], source.label, options.apply_template)
    tokenize = PairTokenizer(tokenizer, options, shape)
    lists, large = ("_ids", "_context"), ("row", "key", *COLUMNS)
    schema = pa.schema([(name, pa.list_(pa.int32()) if name.endswith(lists) else pa.int64() if name in large else pa.int32())
                        for name in [*tokenize.names, "source"]])  # fmt: skip
    report, counts, digest = DropReport(), collections.Counter[str](), hashlib.sha256()
    file = Path(temporary_root().name, f"{uuid.uuid4().hex}.arrow")
    with (
        pa.OSFile(str(file), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as arrow,
        progress(f"tokenizing {source.label}") as advance,
    ):
        for chunk in map(tokenize, itertools.chain([first], batches)):
            columns = chunk.columns | {"source": [number] * len(chunk.columns["row"])}
            arrow.write_batch(pa.record_batch([pa.array(columns[f.name], f.type) for f in schema], schema=schema))
            report.kept += len(columns["row"])
            report.drops += [Drop(source.label, *drop) for drop in chunk.drops]
            counts.update(chunk.counts)
            digest.update(chunk.digest.encode())
            advance(len(columns["row"]) + len(chunk.drops))
    report.prompt_cut, report.completion_cut = counts["prompt cut"], counts["completion cut"]
    report.notes = tokenize.notes(counts)
    rows = datasets.Dataset.from_file(str(file))
    if not counts["several turns"]:  # which is nearly always so
        rows = rows.remove_columns([name for name in rows.column_names if name.endswith("_context")])
    return Tokenized(rows, report, shape, digest.hexdigest(), source.label)


def batched(rows: Iterator[Numbered]) -> Iterator[list[Numbered]]:
    """Yield rows as lists of BATCH_ROWS."""
    while batch := list(itertools.islice(rows, BATCH_ROWS)):
        yield batch


@functools.cache
def temporary_root() -> tempfile.TemporaryDirectory[str]:
    """Return a folder that is removed when this process ends."""
    return tempfile.TemporaryDirectory(prefix="orpo_lite_", ignore_cleanup_errors=True)
