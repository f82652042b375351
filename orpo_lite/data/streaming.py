"""Training on a stream: rows are read, checked and tokenised while the model trains, and none is kept.

The rows are shared out to all processes, and to each one's workers, in rounds: a share is every n-th row, which is decoded,
checked and tokenised by its owner alone. What the others own has to be read past, as cheaply as its format allows. Put
together again, a round is the same whatever the number of shares. A pass over the stream follows the last one without
an end, until `max_steps`.
"""

from __future__ import annotations

import itertools
import json
import sys
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from torch.utils.data import IterableDataset

from orpo_lite.common.errors import RequestError
from orpo_lite.data.dropped_rows import NO_LABELS, Drop, DropReport
from orpo_lite.data.sources import Source
from orpo_lite.data.tables import BATCH_ROWS, EVERY, Batches, Wanted, stream_batches
from orpo_lite.data.token_cache import TokenizeOptions, source_shape
from orpo_lite.data.tokenize import PairTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 200
"""Rows of a round, and as many more for every eight shares."""
LISTED = 1000
"""Dropped rows that a stream's report lists; all are counted."""
ENDLESS = sys.maxsize
ITSELF = "pairs tokenised already"

Row = dict[str, Any]


class Place(NamedTuple):
    """A place in the stream: that many passes, sources of the pass and rows of the source are behind it."""

    passes: int = 0
    source: int = 0
    row: int = 0


BEGINNING = Place()


class Entry(NamedTuple):
    """What became of a row: a pair, or why there is none."""

    pair: Row | None
    drop: Drop | None
    counts: Mapping[str, int]
    """What was counted while it was tokenised."""


class Part(NamedTuple):
    """One share of a round; the first fields are the same in all of its shares."""

    place: Place
    """Of the round's first row."""
    rows: int = 0
    """Of the round, in all shares; none where a pass ends, `place` being where the next begins."""
    shape: str = ""
    seen: int = 0
    """Hash of rows that every share decodes, by which streams that differ are found out."""
    entries: Mapping[int, Entry] = {}
    """This share's rows of the round, in their order, by their number in the source."""
    error: str = ""
    """Why there is nothing to be read on."""


@dataclass
class News:
    """What became of the rows that were read for an optimizer step."""

    kept: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    drops: list[Drop] = field(default_factory=list)
    cuts: Counter[str] = field(default_factory=Counter)
    place: Place = Place()
    """Where the next step begins."""
    ended: bool = False
    """Whether a pass ends here."""

    def add(self, entry: Entry) -> None:
        self.cuts.update(entry.counts)
        if entry.pair is not None:
            self.kept += 1
        if entry.drop is not None:
            self.counts[entry.drop.reason] += 1
            if len(self.drops) < LISTED:
                self.drops.append(entry.drop)


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
        return (entry.pair for entry in self._entries() if entry.pair is not None)

    def first(self, rows: int) -> tuple[list[Row], DropReport]:
        """The pairs among the first rows, and what became of those rows."""
        report, pairs = StreamReport(self), []
        for entry in itertools.islice(self._entries(), rows):
            news = News()
            news.add(entry)
            report.add(news)
            pairs += [entry.pair] if entry.pair is not None else []
        return pairs, report.report

    def _entries(self) -> Iterator[Entry]:
        return itertools.chain.from_iterable(part.entries.values() for part in self.rounds())

    def rounds(self, start: Place = BEGINNING, share: int = 0, shares: int = 1) -> Iterator[Part]:
        """One share of every round of a pass, from a place in it on; what lies before it is read past.

        Args:
            share: that of the rows whose number, modulo `shares`, it is.
        """
        if self.set_epoch:
            self.set_epoch(start.passes)
        left, size = self.limit, CHUNK * -(-shares // 8)
        for number, source in enumerate(self.sources):
            behind = number < start.source
            if left == 0 or behind and left is None:
                continue
            begin = ENDLESS if behind else start.row if number == start.source else 0
            wanted = mine(begin, size, share, shares)
            rows = itertools.islice(itertools.chain.from_iterable(source.batches(wanted)), left)
            if behind:
                left = left and left - sum(1 for _ in rows)
                continue
            rows = self._detected(number, rows)
            deque(itertools.islice(rows, begin), maxlen=0)
            while block := list(itertools.islice(rows, size)):
                place, begin = Place(start.passes, number, begin), begin + len(block)
                yield self._part(place, block, share, shares)
            left = left and left - begin

    def _detected(self, number: int, rows: Iterator[Any]) -> Iterator[Any]:
        """The rows, once the first of them have told their shape."""
        if number in self.works:
            return rows
        head = list(itertools.islice(rows, BATCH_ROWS))
        tokenised = head and isinstance(head[0], dict) and "chosen_ids" in head[0]
        self.know(number, ITSELF if tokenised else source_shape(head, self.sources[number].label, self.options))
        return itertools.chain(head, rows)

    def know(self, number: int, shape: str) -> None:
        """Get ready for a source's rows of that shape."""
        if number not in self.works:
            self.shapes[number] = shape
            self.works[number] = None if shape == ITSELF else PairTokenizer(self.tokenizer, self.options, shape)

    def _part(self, place: Place, block: list[Any], share: int, shares: int) -> Part:
        label, work, numbered = self.sources[place.source].label, self.works[place.source], enumerate(block, place.row)
        rows = [(number, row) for number, row in numbered if number % shares == share]
        counts: Mapping[int, Mapping[str, int]] = {}
        if work is None:
            pairs, drops = tokenised(rows, label)
        else:
            chunk = work(rows)
            names = [*work.names, "row"]
            columns = zip(*(chunk.columns[name] for name in names), strict=True)
            pairs = {values[-1]: dict(zip(names, values, strict=True)) | {"source": place.source} for values in columns}
            drops = {row: Drop(label, row, reason, detail) for row, reason, detail in chunk.drops}
            counts = chunk.row_counts
        entries = {row: Entry(pairs.get(row), drops.get(row), counts.get(row, {})) for row, _ in rows}
        common = block[: max(1, BATCH_ROWS - place.row)] if shares > 1 else []
        return Part(place, len(block), self.shapes[place.source], hashed(common), entries)


def mine(begin: int, size: int, share: int, shares: int) -> Wanted:
    """Which rows of a source a share decodes: its own from `begin` on, and with all others the first ones, which tell
    the shape of the rows, and the first of each round, by which the processes see that they read the same."""
    for row in itertools.count():
        yield row < BATCH_ROWS or row >= begin and (row % shares == share or (row - begin) % size == 0)


def hashed(rows: Iterable[Any]) -> int:
    """Hash of the plain values in some rows."""
    value = 0
    for row in rows:
        try:
            text = json.dumps(row, default=lambda other: type(other).__name__)
        except (TypeError, ValueError, RecursionError):
            text = type(row).__name__
        value = zlib.crc32(text.encode("utf-8", "surrogatepass"), value)
    return value


def tokenised(rows: list[tuple[int, Row]], label: str) -> tuple[dict[int, Row], dict[int, Drop]]:
    """Rows that are pairs already: kept as they are, but for those without a label on either side."""
    pairs, drops = {}, {}
    for number, row in rows:
        alone = "prompt_ids" in row
        empty = [side for side in ("chosen", "rejected")
                 if len(row[f"{side}_ids"]) <= (0 if alone else max(row[f"{side}_start"], 1))]  # fmt: skip
        if empty:
            drops[number] = Drop(label, number, NO_LABELS, f"{empty[0]} has no token that could be trained on")
        else:
            pairs[number] = {"row": number} | row
    return pairs, drops


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


def rows_of(stream: Any, name: str) -> tuple[Source, Callable[[int], None] | None]:
    """A `datasets.IterableDataset` or a torch one as a source, and its `set_epoch`.

    Raises:
        RequestError: it was split by node, so that no process could read all of it.
    """
    if getattr(stream, "_distributed", None) is not None:
        raise RequestError(
            f"{name}: the stream was split by node (split_dataset_by_node), but every process is to read on in all of it, "
            "tokenises its own rows and takes its own share of every step: give the stream as it was before"
        )
    passes = 0

    def tell(epoch: int) -> None:
        nonlocal passes
        passes = epoch

    def opened(wanted: Wanted = EVERY) -> Batches:
        # a copy, since `datasets` keeps the epoch in memory that workers share: one may be a pass ahead of another
        plain = stream.with_format(None) if hasattr(stream, "with_format") else stream
        if hasattr(plain, "set_epoch"):
            plain.set_epoch(passes)
        return stream_batches(plain, wanted, size=CHUNK)

    return Source(name, [], "", opened), tell
