"""Training on a stream: rows are read, checked and tokenised while the model trains, and none is kept.

Every process reads the whole stream in the same order, so that all of them know what the next good rows are without a
word between them, and computes its share of each optimizer step. A pass over the stream follows the last one without
an end, until `max_steps`.
"""

from __future__ import annotations

import itertools
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch.utils.data import IterableDataset

from orpo_lite.data.drops import NO_LABELS, Drop, DropReport
from orpo_lite.data.files import BATCH_ROWS, essential
from orpo_lite.data.pairs import PairTokenizer
from orpo_lite.data.readers import Source
from orpo_lite.data.tokenize import TokenizeOptions, source_shape
from orpo_lite.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 200
"""Rows that are tokenised together."""
LISTED = 1000
"""Dropped rows that a stream's report lists; all are counted."""
ITSELF = "pairs tokenised already"

Row = dict[str, Any]


class Place(NamedTuple):
    """A place in the stream: that many passes, sources, chunks of the source and rows of the chunk are behind it."""

    passes: int = 0
    source: int = 0
    chunk: int = 0
    row: int = 0


BEGINNING = Place()


class Event(NamedTuple):
    """A row that was read: a pair, or why there is none."""

    place: Place
    pair: Row | None
    drop: Drop | None
    counts: Counter[str]
    """What tokenising its chunk counted, on the chunk's first row."""


@dataclass
class News:
    """What became of the rows that were read for an optimizer step; plain values, since it may cross processes."""

    kept: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    drops: list[Drop] = field(default_factory=list)
    cuts: Counter[str] = field(default_factory=Counter)
    place: Place = Place()
    """Where the next step begins."""
    ended: bool = False
    """Whether a pass ends here."""
    error: str = ""
    fingerprint: int = 0
    """Hash of the step's tokens on all processes together."""

    def add(self, event: Event) -> None:
        self.cuts.update(event.counts)
        if event.pair is not None:
            self.kept += 1
        if event.drop is not None:
            self.counts[event.drop.reason] += 1
            if len(self.drops) < LISTED:
                self.drops.append(event.drop)


class PairStream(IterableDataset):
    """Tokenised pairs of a stream of preference rows, pass after pass; tokens and drops are those of `tokenize_source`.

    Args:
        sources: read one after the other. Each must give the same rows in the same order whenever it is opened, on
            every process (a reshuffling by `set_epoch`, as `datasets` does it, is told the pass).
        limit: read only so many rows a pass.
        set_epoch: told the number of the pass before it begins.
    """

    def __init__(
        self,
        sources: list[Source],
        tokenizer: PreTrainedTokenizerBase,
        options: TokenizeOptions,
        limit: int | None = None,
        set_epoch: Callable[[int], None] | None = None,
    ):
        self.sources, self.tokenizer, self.options = sources, tokenizer, options
        self.limit, self.set_epoch = limit, set_epoch
        self.works: dict[int, PairTokenizer | None] = {}
        self.shapes: dict[int, str] = {}

    def __iter__(self) -> Iterator[Row]:
        """The pairs of one pass."""
        return (event.pair for event in self.events() if event.pair is not None)

    def events(self, start: Place = BEGINNING) -> Iterator[Event]:
        """What became of the rows of a pass, from a place in it on, which costs the reading of what lies before it."""
        if self.set_epoch:
            self.set_epoch(start.passes)
        left = self.limit
        for number, source in enumerate(self.sources):
            if left == 0:
                return
            chunks = batched(self._detected(number, itertools.chain.from_iterable(source.batches()), left))
            for place, rows in enumerate(chunks):
                left = None if left is None else left - len(rows)
                if (number, place) < (start.source, start.chunk):
                    continue
                begin = start.row if (number, place) == (start.source, start.chunk) else 0
                for event in self._chunk(start.passes, number, place, rows):
                    if event.place.row >= begin:
                        yield event if event.place.row or not begin else event._replace(counts=Counter())

    def _detected(self, number: int, rows: Iterator[Any], limit: int | None) -> Iterator[Any]:
        """The rows, once the first of them have told their shape."""
        rows = itertools.islice(rows, limit)
        if number in self.works:
            return rows
        head = list(itertools.islice(rows, BATCH_ROWS))
        if head and isinstance(head[0], dict) and "chosen_ids" in head[0]:
            self.shapes[number], self.works[number] = ITSELF, None
        else:
            shape = self.shapes[number] = source_shape(head, self.sources[number].label, self.options)
            self.works[number] = PairTokenizer(self.tokenizer, self.options, shape)
        return itertools.chain(head, rows)

    def _chunk(self, passes: int, number: int, place: int, rows: list[Any]) -> Iterator[Event]:
        label, work, first = self.sources[number].label, self.works[number], place * CHUNK
        if work is None:
            pairs, drops, counts = tokenised(rows, first, label)
        else:
            chunk = work(list(enumerate(rows, first)))
            names = [*work.names, "row"]
            columns = zip(*(chunk.columns[name] for name in names), strict=True)
            pairs = {values[-1]: dict(zip(names, values, strict=True)) | {"source": number} for values in columns}
            drops = {row: Drop(label, row, reason, detail) for row, reason, detail in chunk.drops}
            counts = chunk.counts
        for offset in range(len(rows)):
            row = first + offset
            told = counts if not offset else Counter[str]()
            yield Event(Place(passes, number, place, offset), pairs.get(row), drops.get(row), told)

    def first(self, rows: int) -> tuple[list[Row], DropReport]:
        """The pairs among the first rows, and what became of those rows."""
        report, pairs = StreamReport(self), []
        for event in itertools.islice(self.events(), rows):
            news = News()
            news.add(event)
            report.add(news)
            pairs += [event.pair] if event.pair is not None else []
        return pairs, report.report


def batched(rows: Iterator[Any]) -> Iterator[list[Any]]:
    while batch := list(itertools.islice(rows, CHUNK)):
        yield batch


def tokenised(rows: list[Row], first: int, label: str) -> tuple[dict[int, Row], dict[int, Drop], Counter[str]]:
    """Rows that are pairs already: kept as they are, but for those without a label on either side."""
    pairs, drops = {}, {}
    for number, row in enumerate(rows, first):
        alone = "prompt_ids" in row
        empty = [side for side in ("chosen", "rejected")
                 if len(row[f"{side}_ids"]) <= (0 if alone else max(row[f"{side}_start"], 1))]  # fmt: skip
        if empty:
            drops[number] = Drop(label, number, NO_LABELS, f"{empty[0]} has no token that could be trained on")
        else:
            pairs[number] = {"row": number} | row
    return pairs, drops, Counter()


class StreamReport:
    """What is known of a stream's rows so far, in a DropReport; of those that were dropped the first are listed."""

    def __init__(self, stream: PairStream):
        self.stream, self.cuts = stream, Counter[str]()
        self.report = DropReport(drops=[])

    def add(self, news: News) -> None:
        report = self.report
        report.kept += news.kept
        report.counts.update(news.counts)
        assert isinstance(report.drops, list)
        report.drops += news.drops[: LISTED - len(report.drops)]
        self.cuts.update(news.cuts)
        report.prompt_cut, report.completion_cut = self.cuts["prompt cut"], self.cuts["completion cut"]
        works = [work for work in self.stream.works.values() if work is not None]
        report.notes = list(dict.fromkeys(note for work in works for note in work.notes(self.cuts)))

    def state(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        report = self.report
        return {
            "kept": report.kept,
            "counts": dict(report.counts),
            "cuts": dict(self.cuts),
            "drops": list(report.drops),
        }

    def restore(self, state: dict[str, Any]) -> None:
        drops = [Drop(*drop) for drop in state["drops"]]
        self.report = DropReport(kept=state["kept"], counts=Counter(state["counts"]), drops=drops)
        self.cuts = Counter(state["cuts"])


def fingerprint(pairs: list[Row]) -> int:
    """Hash of the tokens of some pairs."""
    value = 0
    for pair in pairs:
        for side in ("chosen_ids", "rejected_ids"):
            value = zlib.crc32(np.asarray(pair[side], dtype=np.int32).tobytes(), value)
    return value


def rows_of(stream: Any, name: str) -> tuple[Source, Callable[[int], None] | None]:
    """A `datasets.IterableDataset` or a torch one as a source, and its `set_epoch`.

    Raises:
        RequestError: it was split by node, so that no process could read all of it.
    """
    if getattr(stream, "_distributed", None) is not None:
        raise RequestError(
            f"{name}: the stream was split by node (split_dataset_by_node), but each process is to read all of it and "
            "takes its own share of every step: give the stream as it was before"
        )
    plain = stream.with_format(None) if hasattr(stream, "with_format") else stream
    source = Source(name, [], "", lambda: batched(map(essential, plain)))
    return source, getattr(plain, "set_epoch", None)
