"""Raw rows -> tokenized pairs in a memory-mapped `datasets.Dataset`, made once per content, and the report of drops."""

from __future__ import annotations

import atexit
import collections
import contextlib
import functools
import hashlib
import itertools
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from filelock import FileLock

from orpo_lite.common.console import progress_bar
from orpo_lite.common.errors import RequestError
from orpo_lite.data.dropped_rows import DropReport, TooManyDropped
from orpo_lite.data.quality import COLUMNS, without_numbers
from orpo_lite.data.row_formats import Numbered, paired_by_prompt
from orpo_lite.data.row_shapes import source_shape
from orpo_lite.data.sources import Source, dataset_batches, stream_source
from orpo_lite.data.tokenize import PairTokenizer, TokenizeOptions

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

__all__ = ["DropReport", "TokenizeOptions", "Tokenized", "TooManyDropped", "tokenize_rows", "tokenize_source"]

DECIDED = 1000
"""Rows after which a stream of which more than half was dropped is read no further: it may have no end."""


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
    rows: Any,
    tokenizer: PreTrainedTokenizerBase,
    options: TokenizeOptions,
    source: str = "train",
    enough: int | None = None,
) -> tuple[datasets.Dataset, DropReport]:
    """Tokenize preference rows of any shape.

    Args:
        rows: raw rows. A stream (of `datasets` or torch) is read once to disk.
        source: names the rows in the report and in errors.
        enough: usable pairs after which a stream is read no further; None reads it to its end.

    Returns:
        `chosen_ids` and `rejected_ids` (lists of int32, prompt and completion), `chosen_start` and
        `rejected_start` (int32, index of the completion's first token), `row` (int64, index in `rows`), `source`
        (int32, 0); where completions have several turns, `chosen_context` and `rejected_context` (lists of int32: begin
        and end of each run of tokens that is no label).

    Raises:
        RequestError: not a table of preference rows, no chat template, or more than half of the rows dropped.
    """
    import datasets
    from torch.utils.data import IterableDataset

    if isinstance(rows, datasets.IterableDataset | IterableDataset):
        given = stream_source(rows, source, enough)
    elif isinstance(rows, datasets.Dataset):
        given = Source(source, [], rows._fingerprint, functools.partial(dataset_batches, rows))
    else:
        raise RequestError(
            f"{source}: found a {type(rows).__name__}, expected a datasets.Dataset: choose one split of a DatasetDict, "
            "or build one from a list with Dataset.from_list"
        )
    done = tokenize_source(given, tokenizer, options)
    if problem := done.report.problem(source):
        raise TooManyDropped(problem, done.report)
    pairs = without_numbers(done.rows)
    if given.enough is not None:
        pairs = pairs.select(range(min(len(pairs), given.enough)))
        done.report.notes.append(f"{done.report.rows:,} rows of the stream were read for {len(pairs):,} pairs")
    return pairs, done.report


def tokenize_source(
    source: Source, tokenizer: PreTrainedTokenizerBase, options: TokenizeOptions, number: int = 0
) -> Tokenized:
    """Tokenize one source, or take its tokens from the cache.

    The cache is a folder beside that of `datasets`. Its keys hold the source's content, the tokenizer with its template,
    the options and this package's code, so that nothing outdated is ever found. What a stream yields is not known before
    it is read, so its tokens are not cached. `number` is the value of the column `source`.
    """
    import datasets

    if source.content and datasets.is_caching_enabled():
        folder = cache_root() / cache_key(source.content, tokenizer, options, number)
    else:
        folder = temporary_root() / uuid.uuid4().hex
    with one_at_a_time(folder.with_suffix(".lock")):
        cached = folder.is_dir()
        if not cached:
            with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as unfinished:
                write_tokens(Path(unfinished), source, tokenizer, options, number)
                with contextlib.suppress(OSError):  # without locks another process may be faster: with the same result
                    Path(unfinished).rename(folder)
    about = json.loads((folder / "report.json").read_text("utf-8"))
    counts = {"counts": collections.Counter(about["report"]["counts"])}
    report = DropReport(**about["report"] | counts, files=[(folder / "drops.jsonl", source.label)], cached=cached)
    rows = datasets.Dataset.from_file(str(folder / "pairs.arrow"))
    if not about["several"]:  # which is nearly always so
        rows = rows.remove_columns([name for name in rows.column_names if name.endswith("_context")])
    return Tokenized(rows, report, about["shape"], about["digest"], source.label)


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Let one process of this machine tokenize while the others, such as those of the same run, wait for it."""
    lock = FileLock(path, fallback_to_soft=False)
    with contextlib.suppress(OSError, NotImplementedError):  # a file system without locks: each tokenizes the same
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
        path.unlink(missing_ok=True)


def write_tokens(
    folder: Path, source: Source, tokenizer: PreTrainedTokenizerBase, options: TokenizeOptions, number: int
) -> None:
    """Write pairs.arrow, drops.jsonl and report.json."""
    import pyarrow as pa

    numbered = paired_by_prompt(number_rows(source.batches()))
    first = next(numbered, [])
    shape = source_shape([row for _, row in first], source.label, options.apply_template)
    tokenize = PairTokenizer(tokenizer, options, shape)
    schema = pa.schema([(name, arrow_type(name)) for name in [*tokenize.names, "source"]])
    report, counts, digest = DropReport(), collections.Counter[str](), hashlib.sha256()
    with (
        pa.OSFile(str(folder / "pairs.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as arrow,
        (folder / "drops.jsonl").open("w", encoding="utf-8") as drops,
        progress_bar(f"tokenizing {source.label}", None) as advance,
    ):
        for chunk in map(tokenize, itertools.chain([first], numbered)):
            columns = chunk.columns | {"source": [number] * len(chunk.columns["row"])}
            arrow.write_batch(pa.record_batch([pa.array(columns[f.name], f.type) for f in schema], schema=schema))
            drops.writelines(json.dumps(drop) + "\n" for drop in chunk.drops)
            report.kept += len(columns["row"])
            report.counts.update(reason for _, reason, _ in chunk.drops)
            counts.update(chunk.counts)
            digest.update(chunk.digest.encode())
            advance(len(columns["row"]) + len(chunk.drops))
            hopeless = report.rows >= DECIDED and report.mostly_dropped()
            if source.enough is not None and (report.kept >= source.enough or hopeless):
                break
    cut = {"prompt_cut": counts["prompt cut"], "completion_cut": counts["completion cut"]}
    found = {"kept": report.kept, "counts": report.counts, "notes": tokenize.notes(counts)} | cut
    about = {"report": found, "shape": shape, "digest": digest.hexdigest(), "several": counts["several turns"]}
    (folder / "report.json").write_text(json.dumps(about), "utf-8")


def arrow_type(name: str) -> Any:
    """Return the Arrow type of a column of pairs."""
    import pyarrow as pa

    if name.endswith(("_ids", "_context")):
        return pa.list_(pa.int32())
    return pa.int64() if name in ("row", "key", *COLUMNS) else pa.int32()


def number_rows(batches: Iterator[list[Any]]) -> Iterator[list[Numbered]]:
    """Yield the batches with each row's index in its source."""
    start = 0
    for batch in batches:
        yield list(enumerate(batch, start))
        start += len(batch)


# ---- the cache's place and keys --------------------------------------------------------------------------------------


def cache_root() -> Path:
    """Return the folder of cached tokens, or a temporary one if that cannot be written."""
    from datasets import config

    root = Path(config.HF_DATASETS_CACHE) / "orpo_lite"
    with contextlib.suppress(OSError):
        root.mkdir(parents=True, exist_ok=True)
        if os.access(root, os.W_OK):
            return root
    return temporary_root()


@functools.cache
def temporary_root() -> Path:
    """Return a folder that is removed when this process ends."""
    folder = tempfile.mkdtemp(prefix="orpo_lite_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def cache_key(content: str, tokenizer: PreTrainedTokenizerBase, options: TokenizeOptions, number: int) -> str:
    """Return the name of the cache's folder for a source."""
    import tokenizers
    import transformers

    parts = asdict(options) | {"content": content, "number": number, "code": code_hash()}
    parts |= {"tokenizer": tokenizer_hash(tokenizer), "versions": [transformers.__version__, tokenizers.__version__]}
    if "strftime_now" in str(tokenizer.chat_template):
        parts["today"] = time.strftime("%Y-%m-%d")  # such templates may write the date
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:40]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of everything that decides the tokens: vocabulary, rules, special tokens, template."""
    if tokenizer.is_fast:
        backend: Any = tokenizer.backend_tokenizer
        # truncation and padding come before the rest and are left over from the last call
        rules = backend.to_str().partition('"added_tokens":')[2]
    else:
        rules = {"vocab": tokenizer.get_vocab(), "init": tokenizer.init_kwargs}
    parts = [type(tokenizer).__name__, rules, tokenizer.special_tokens_map, tokenizer.chat_template,
             {n: str(token) for n, token in tokenizer.added_tokens_decoder.items()}]  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


@functools.cache
def code_hash() -> str:
    """Return a hash of this package's code: a developer's edits change no version number."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
