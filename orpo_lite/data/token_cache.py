"""Raw rows -> a tokenised, memory-mapped `datasets.Dataset` and the drop report, once per content."""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from orpo_lite.common.errors import RequestError
from orpo_lite.common.text import visible
from orpo_lite.data.dropped_rows import DropList, DropReport, TooManyDropped
from orpo_lite.data.lengths import list_lengths, numbers
from orpo_lite.data.messages import describe_columns, kind
from orpo_lite.data.row_shapes import BARE_STRINGS, detect
from orpo_lite.data.sources import Source, stream_source
from orpo_lite.data.tables import dataset_batches
from orpo_lite.data.throughput import Throughput
from orpo_lite.data.tokenize import Chunk, PairTokenizer

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

__all__ = ["DropReport", "TokenizeOptions", "Tokenized", "TooManyDropped", "tokenize_rows", "tokenize_source"]


DECIDED = 1000
"""Rows after which a stream of which more than half was dropped is read no further."""


@dataclass(kw_only=True)
class TokenizeOptions:
    """How rows become tokens. The defaults are TRL's."""

    max_length: int | None = 1024
    """Tokens of prompt and completion together; None is no limit."""
    max_prompt_length: int | None = None
    """Tokens of the prompt; None leaves it to max_length."""
    max_completion_length: int | None = None
    """Tokens of the completion; encoder-decoders take 128 if None, decoders read it only if `strict`, as in TRL."""
    overlong: Literal["drop", "truncate"] = "truncate"
    """drop: leave out pairs that do not fit; truncate: cut the completion's end and, if `strict` or with a
    max_prompt_length, the prompt's oldest content."""
    completion_end: Literal["trl", "turn"] = "trl"
    """trl: all that the template writes, then EOS if it is not last; turn: cut after the first end-of-turn token."""
    apply_template: bool = False
    """Turn plain strings into messages."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables for the chat template."""
    encoder_decoder: bool = False
    """Tokenise prompt and completions apart, special tokens added."""
    strict: bool = False
    """A recipe's rules instead of TRL's: rows with empty turns, equal sides or prompts that differ are dropped."""
    num_proc: int | None = None
    """Processes; None or 1 works in this one (fast tokenizers use several threads anyway)."""


class Tokenized(NamedTuple):
    """One source's pairs."""

    rows: datasets.Dataset
    """Columns of `tokenize_rows`, and `key`: int64 hash of the prompt's words."""
    report: DropReport
    shape: str
    digest: str
    """Hash of all rows as converted."""


def tokenize_rows(
    rows: Any,
    tokenizer: PreTrainedTokenizerBase,
    options: TokenizeOptions,
    source: str = "train",
    enough: int | None = None,
) -> tuple[datasets.Dataset, DropReport]:
    """Tokenise preference rows of any shape.

    Args:
        rows: raw rows; columns that are not part of a preference row are left out. A stream (of `datasets` or torch)
            is read once, to disk.
        enough: usable pairs after which a stream is read no further; None reads it to its end.
        source: names the rows in the report and in errors.

    Returns:
        Decoder-only: `chosen_ids` and `rejected_ids` (lists of int32, prompt and completion), `chosen_start` and
        `rejected_start` (int32, index of the completion's first token), `row` (int64, index in `rows`), `source`
        (int32, 0). Encoder-decoder: `prompt_ids`, `chosen_ids`, `rejected_ids` (the completions), `row`, `source`.

    Raises:
        RequestError: not a table of preference rows, no chat template, or more than half of the rows dropped.
    """
    import datasets
    from torch.utils.data import IterableDataset

    if isinstance(rows, datasets.IterableDataset | IterableDataset):
        given = stream_source(rows, source, enough)
    elif isinstance(rows, datasets.Dataset):
        given = Source(source, [], rows._fingerprint, functools.partial(dataset_batches, rows), len(rows))
    else:
        raise RequestError(
            f"{source}: found a {type(rows).__name__}, expected a datasets.Dataset: choose one split of a DatasetDict, "
            "or make one of a list with Dataset.from_list"
        )
    done = tokenize_source(given, tokenizer, options)
    done.report.check(source)
    pairs = done.rows.remove_columns("key")
    if given.enough is not None:
        pairs = pairs.select(range(min(len(pairs), given.enough)))
        done.report.notes.append(f"{done.report.rows:,} rows of the stream were read for {len(pairs):,} pairs")
    return pairs, done.report


def check_same_stream(pairs: datasets.Dataset, name: str, processes: int) -> None:
    """Raise RequestError on all processes if they read different pairs of a stream."""
    if processes == 1:
        return
    from accelerate.utils import gather_object

    found = [numbers(pairs, "row"), list_lengths(pairs, "chosen_ids"), list_lengths(pairs, "rejected_ids")]
    digest = hashlib.sha256(b"".join(values.tobytes() for values in found)).hexdigest()
    if len(set(gather_object([digest]))) > 1:
        raise RequestError(
            f"{name}: the processes read different rows of the stream, but each must be given all of it in the same order: "
            "leave out what splits it by rank or shuffles it without a seed"
        )


def tokenize_source(
    source: Source, tokenizer: PreTrainedTokenizerBase, options: TokenizeOptions, number: int = 0
) -> Tokenized:
    """Tokenise one source, or take its tokens from the cache.

    The cache lies beside that of `datasets` and is keyed by the content of the source, the tokenizer, its template, the
    options and this package's code, so that nothing stale is ever found.
    """
    import datasets

    caching = datasets.is_caching_enabled()
    lasting = caching and bool(source.content)  # what a stream will give is not known before it is read
    key = cache_key(source.content, tokenizer, options, number) if lasting else uuid.uuid4().hex
    root = cache_root() if lasting else Path(temporary_root())
    folder = root / key
    cached = folder.is_dir()
    if not cached and lasting:
        with one_at_a_time(folder.with_suffix(".lock")):
            return made_or_cached(folder, source, tokenizer, options, number)
    return made_or_cached(folder, source, tokenizer, options, number)


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Let one process of this machine tokenise and the others wait for it, such as the processes of a run.

    A lock of the file system goes with its process, so that nobody waits for one that is gone.
    """
    with path.open("a") as file:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # file systems without locks: each tokenises, with the same result
                fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()


def made_or_cached(
    folder: Path, source: Source, tokenizer: PreTrainedTokenizerBase, options: TokenizeOptions, number: int
) -> Tokenized:
    """Tokens from the cache's folder, made first where it is not there."""
    import datasets

    root, cached = folder.parent, folder.is_dir()
    if not cached:
        made = Path(tempfile.mkdtemp(dir=root))
        try:
            write(made, source, tokenizer, options, number)
            with contextlib.suppress(OSError):  # another process was quicker: its result is the same
                made.rename(folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    about = json.loads((folder / "report.json").read_text("utf-8"))
    drops = DropList([(folder / "drops.jsonl", source.label, about["report"]["rows"] - about["report"]["kept"])])
    report = DropReport.from_dict(about["report"], drops)
    report.cached = cached
    return Tokenized(datasets.Dataset.from_file(str(folder / "pairs.arrow")), report, about["shape"], about["digest"])


def write(
    folder: Path, source: Source, tokenizer: PreTrainedTokenizerBase, options: TokenizeOptions, number: int
) -> None:
    """Tokenise a source into `folder`: pairs.arrow, drops.jsonl and report.json."""
    import pyarrow as pa

    batches = source.batches()
    first = next(batches, [])
    shape = source_shape(first, source.label, options)
    work = PairTokenizer(tokenizer, options, shape)
    schema = pa.schema([(name, arrow_type(name)) for name in [*work.names, "row", "key", "source"]])
    report, counts, digest = DropReport(), collections.Counter[str](), hashlib.sha256()
    numbered = itertools.chain([first], batches)
    with (
        pa.OSFile(str(folder / "pairs.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as arrow,
        (folder / "drops.jsonl").open("w", encoding="utf-8") as drops,
        Throughput(visible(f"tokenising {source.label}"), "rows", source.rows) as shown,
    ):
        for chunk in in_order(work, numbered, options.num_proc):
            columns = chunk.columns | {"source": [number] * len(chunk.columns["row"])}
            arrow.write_batch(pa.record_batch([pa.array(columns[f.name], f.type) for f in schema], schema=schema))
            report.kept += len(columns["row"])
            drops.writelines(json.dumps(drop) + "\n" for drop in chunk.drops)
            report.counts.update(reason for _, reason, _ in chunk.drops)
            found = chunk.counts
            counts.update(found)
            digest.update(chunk.digest.encode())
            shown.add(len(columns["row"]) + len(chunk.drops), found["tokens"])
            if source.enough is not None and (report.kept >= source.enough or hopeless(report)):
                break
    report.prompt_cut, report.completion_cut = counts["prompt cut"], counts["completion cut"]
    report.notes = work.notes(counts)
    about = {"report": report.as_dict(), "shape": shape, "digest": digest.hexdigest()}
    (folder / "report.json").write_text(json.dumps(about), "utf-8")


def hopeless(report: DropReport) -> bool:
    """Return whether so much of a stream is dropped that reading on, perhaps without an end, makes no sense."""
    return report.rows >= DECIDED and report.kept < report.rows / 2


def source_shape(rows: list[Any], label: str, options: TokenizeOptions) -> str:
    if not rows:
        raise RequestError(f"{label}: holds no rows: write at least one with chosen and rejected")
    shape = detect(rows[:200]) or detect(rows)
    there = [any(isinstance(row, dict) and side in row for row in rows) for side in ("chosen", "rejected")]
    if shape is None or sum(there) == 1:
        check_kinds(rows[0], label)
        found = describe_columns(rows[0]) if isinstance(rows[0], dict) else f"rows that are {type(rows[0]).__name__}"
        raise RequestError(
            f"{label}: found columns {found}, expected chosen and rejected (text or messages) and most often a prompt; "
            "map other names with data.columns, for example {prompt: question, chosen: good, rejected: bad}"
        )
    if shape == BARE_STRINGS and options.apply_template:
        raise RequestError(
            f"{label}: data.apply_template is set, but the rows are strings without a prompt column, so nothing says "
            "where the answers start; name the prompt's column with data.columns.prompt or leave apply_template out"
        )
    return shape


def check_kinds(row: Any, label: str) -> None:
    """Raise RequestError for a row with the right columns and the wrong values in them."""
    if isinstance(row, dict) and {"chosen", "rejected"} <= row.keys():
        for side in ("chosen", "rejected", "prompt"):
            if side in row and not isinstance(row[side], str | list | dict):
                raise RequestError(
                    f"{label}: row 0: {side} is {kind(row[side])}, expected text or messages: mend the data"
                )


def in_order(work: PairTokenizer, batches: Iterator[list[Any]], num_proc: int | None) -> Iterator[Chunk]:
    """Tokenised chunks of the batches, in their order, a few ahead in other processes if asked for."""
    numbered = number_rows(batches)
    if not num_proc or num_proc == 1:
        yield from map(work, numbered)
        return
    # fork needs no guard in the user's script; the others have nothing else
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() and sys.platform == "linux" else "spawn"
    context = multiprocessing.get_context(method)
    waiting: collections.deque[Future[Chunk]] = collections.deque()
    with ProcessPoolExecutor(num_proc, context, initializer=start_worker, initargs=(work,)) as pool:
        for chunk in numbered:
            waiting.append(pool.submit(run_worker, chunk))
            if len(waiting) > 2 * num_proc:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def number_rows(batches: Iterator[list[Any]]) -> Iterator[list[tuple[int, Any]]]:
    start = 0
    for batch in batches:
        yield list(enumerate(batch, start))
        start += len(batch)


WORKER: dict[str, PairTokenizer] = {}


def start_worker(work: PairTokenizer) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    WORKER["work"] = work


def run_worker(chunk: list[tuple[int, Any]]) -> Chunk:
    return WORKER["work"](chunk)


def arrow_type(name: str) -> Any:
    import pyarrow as pa

    return pa.list_(pa.int32()) if name.endswith("_ids") else pa.int64() if name in ("row", "key") else pa.int32()


def cache_root() -> Path:
    """The folder of cached tokens; one that goes with this process if caching is off or its place not writable."""
    from datasets import config, is_caching_enabled

    root = Path(config.HF_DATASETS_CACHE) / "orpo_lite"
    if is_caching_enabled():
        with contextlib.suppress(OSError):
            root.mkdir(parents=True, exist_ok=True)
            if os.access(root, os.W_OK):
                return root
    return Path(temporary_root())


@functools.cache
def temporary_root() -> str:
    import atexit

    folder = tempfile.mkdtemp(prefix="orpo_lite_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def cache_key(content: str, tokenizer: PreTrainedTokenizerBase, options: TokenizeOptions, number: int) -> str:
    import tokenizers
    import transformers

    parts = asdict(options) | {"num_proc": None, "content": content, "number": number, "code": code_hash()}
    parts |= {"tokenizer": tokenizer_hash(tokenizer), "versions": [transformers.__version__, tokenizers.__version__]}
    if "strftime_now" in str(tokenizer.chat_template):
        parts["today"] = time.strftime("%Y-%m-%d")  # such templates may write the date
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:40]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of whatever decides the tokens: vocabulary, rules, special tokens, template."""
    if tokenizer.is_fast:
        backend: Any = tokenizer.backend_tokenizer
        # truncation and padding stand before the rest and are left over from the last call
        rules = backend.to_str().partition('"added_tokens":')[2]
    else:
        rules = {"vocab": tokenizer.get_vocab(), "init": tokenizer.init_kwargs}
    parts = [type(tokenizer).__name__, rules, tokenizer.special_tokens_map, tokenizer.chat_template,
             {n: str(token) for n, token in tokenizer.added_tokens_decoder.items()}]  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


@functools.cache
def code_hash() -> str:
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
