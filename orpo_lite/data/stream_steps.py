"""A stream's optimizer steps: the next good rows, in micro-batches; what was dropped on the way is told and counted."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from orpo_lite.common.errors import RequestError
from orpo_lite.data.dealing import MicroBatches, cut_by_pairs, cut_step
from orpo_lite.data.shares import TOKENS, SharedRounds
from orpo_lite.data.step_batches import filler
from orpo_lite.data.streaming import News, PairStream, Place, Row, StreamReport
from orpo_lite.data.work import pair_costs, pair_work

if TYPE_CHECKING:
    from orpo_lite.trainer.config import ORPOConfig

logger = logging.getLogger(__name__)

DECIDED = 1000
"""Rows after which a stream of which more than half was dropped is given up before its end."""


class StepStream(IterableDataset):
    """One item an optimizer step, pass after pass: {"micro_batches": [batch, ...], "news": News}.

    Every process knows all pairs of a step, deals them as the others do and keeps its own.

    Args:
        stream: of pairs.
        pairs: of a micro-batch, without a budget; on one process they keep their order.
        accumulation: micro-batches of a step and process, without a budget.
        budget: tokens of a micro-batch.
        process, processes: which of how many computes these items; the step's pairs are dealt by their work.
        workers, prefetch: see `SharedRounds`.
        whole: keep the micro-batches of one process, see `cut_by_pairs`.
        weight: tokens that a place of attention costs, see `work.place_weight`.
    """

    def __init__(
        self,
        stream: PairStream,
        collator: Any,
        layout: str,
        *,
        pairs: int,
        accumulation: int = 1,
        budget: int | None = None,
        process: int = 0,
        processes: int = 1,
        workers: int = 0,
        prefetch: int | None = None,
        drop_last: bool = False,
        whole: bool = False,
        weight: float = 0.0,
    ):
        self.stream, self.collator, self.layout, self.whole = stream, collator, layout, whole
        self.pairs, self.accumulation, self.budget, self.weight = pairs, accumulation, budget, weight
        self.process, self.processes, self.drop_last = process, processes, drop_last
        self.shared = SharedRounds(stream, process, processes, workers, prefetch)
        self.step_pairs = pairs * accumulation * processes
        self.start, self.behind = Place(), 0

    def resume(self, place: Place, behind: int) -> None:
        """Begin at a place. transformers skips the items that are behind: empty ones stand in for them."""
        self.start, self.behind = place, behind

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from ({} for _ in range(self.behind))
        for window, news in self.windows():
            yield {"micro_batches": self.batches(window), "news": news}

    def windows(self) -> Iterator[tuple[list[Row], News]]:
        """The pairs of each step, and what became of the rows read for them."""
        window: list[Row] = []
        news, steps = News(), self.start != Place(self.start.passes)
        for parts in self.shared.rounds(self.start):
            first, entries = parts[0], {}
            if first.rows:
                self.stream.know(first.place.source, first.shape)
                entries = {row: entry for part in parts for row, entry in part.entries.items()}
            for row in sorted(entries):
                entry, place = entries[row], first.place._replace(row=row)
                # a step is given away with the pair that follows it, so that drops behind the last one are told as well
                if entry.pair is not None and len(window) == self.step_pairs:
                    yield window, replace(news, place=place)
                    window, news, steps = [], News(), True
                if entry.pair is not None:
                    window.append(entry.pair)
                news.add(entry)
                if news.counts.total() >= DECIDED:  # told without a step: there may be none for long
                    yield [], replace(news, place=place)
                    news = News()
            if not first.rows:
                if self.drop_last and len(window) < self.step_pairs and steps:
                    window = []
                self._check_pass(first.place.passes, bool(window or steps or news.counts))
                yield window, replace(news, place=first.place, ended=True)
                window, news, steps = [], News(), False

    def _check_pass(self, number: int, rows: bool) -> None:
        if not rows:
            once = "it can be read once only; give one that begins anew, or fewer steps (max_steps)"
            raise RequestError(
                f"{self.stream.sources[0].label}: the stream holds no rows on pass {number}: "
                + (once if number > 1 else "write at least one with chosen and rejected")
            )

    def batches(self, window: list[Row]) -> list[dict[str, Any]]:
        """This process's micro-batches of a step's pairs; as many as on the others."""
        if not window:
            return []
        cut = self.cut(window)[self.process]
        cheapest = min(window, key=lambda pair: len(pair["chosen_ids"]) + len(pair["rejected_ids"]))
        return [
            self.collator([listed(window[i]) for i in batch]) if batch else filler(self.collator, listed(cheapest))
            for batch in cut
        ]

    def cut(self, window: list[Row]) -> list[MicroBatches]:
        import pyarrow as pa

        table = pa.table({name: pa.array([pair[name] for pair in window]) for name in TOKENS if name in window[0]})
        costs = pair_costs(table, self.layout)
        work = pair_work(table, self.layout, self.weight) if self.processes > 1 else None
        padded = self.layout == "padded"
        if self.budget:
            return cut_step(costs, self.processes, self.budget, padded, work)
        whole = self.whole or self.processes == 1
        return cut_by_pairs(costs if work is None else work, self.processes, self.pairs, padded, whole)


def listed(pair: Row) -> Row:
    """A pair with lists of tokens, as collators take it."""
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in pair.items()}


def stream_loader(
    stream: PairStream, args: ORPOConfig, layout: str, collator: Any, accumulation: int, weight: float
) -> DataLoader:
    """The training loader of a stream, from a trainer's arguments.

    Args:
        accumulation, weight: see `step_loader`.
    """
    if not hasattr(collator, "nll_scope"):
        raise RequestError("data_collator: a stream takes the trainer's own collator only: leave data_collator out")
    workers = args.dataloader_num_workers
    if workers and sys.platform != "linux":
        logger.warning(
            "dataloader_num_workers: a stream is read in the training process, since this system cannot fork safely"
        )
        workers = 0
    dataset = StepStream(
        stream, collator, layout, pairs=args.train_batch_size // accumulation, accumulation=accumulation,
        budget=args.tokens_per_batch, process=args.process_index, processes=args.world_size,
        drop_last=args.dataloader_drop_last, whole=args.nll_mean == "micro", weight=weight, workers=workers,
        prefetch=args.dataloader_prefetch_factor if workers else None,
    )  # fmt: skip
    # the workers are the stream's own: what they read is exchanged with other processes, which workers cannot do
    return DataLoader(dataset, batch_size=None, pin_memory=args.dataloader_pin_memory)


class StreamWatch(TrainerCallback, ExportableState):
    """Where a stream stands and what it dropped: told on screen, and kept in checkpoints, so that a run resumes exactly.

    Args:
        name: what messages call the stream.
        shown: whether this process is the one that speaks.
    """

    def __init__(self, stream: PairStream, name: str, shown: bool = True):
        self.name, self.shown, self.watched = name, shown, StreamReport(stream)
        self.place, self.told, self.reasons = Place(), 0, set[str]()

    def take(self, item: dict[str, Any]) -> bool:
        """Count what an item tells of; whether it holds a step.

        Raises:
            TooManyDropped: more than half of what was read is dropped: at the end of a pass, or from 1,000 rows on.
        """
        news: News = item["news"]
        self.watched.add(news)
        self.place = news.place
        report = self.watched.report
        for drop in news.drops:
            if self.shown and drop.reason not in self.reasons:
                self.reasons.add(drop.reason)
                logger.warning("%s: row %d dropped, %s: %s (further ones are counted)", drop.source, drop.row, drop.reason, drop.detail)  # fmt: skip
        if news.ended or report.rows >= DECIDED:
            report.check(self.name)
        if news.ended and self.shown:
            logger.info("%s: pass %d ended; over all %s", self.name, news.place.passes, report)
        return bool(item["micro_batches"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Resume: the checkpoint holds the place of the next step and the counts up to it."""
        dataset = kwargs["train_dataloader"].dataset
        saved = state.stateful_callbacks.get(type(self).__name__)
        self.place, self.told, self.reasons = Place(), 0, set()
        self.watched = StreamReport(self.watched.stream)
        dataset.resume(Place(), 0)
        if state.global_step and isinstance(saved, dict) and saved.get("attributes"):
            found = saved["attributes"]
            self.place = Place(*found["place"])
            self.watched.restore(found["report"])
            self.reasons = set(self.watched.report.counts)
            dataset.resume(self.place, 0 if args.ignore_data_skip else state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        report = self.watched.report
        dropped = report.counts.total()
        if self.shown and dropped > self.told:
            counts = ", ".join(f"{count:,} {reason}" for reason, count in report.dropped.items())
            logger.warning("%s: %d of %d rows read so far were dropped (%s)", self.name, dropped, report.rows, counts)
            self.told = dropped

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        report = self.watched.report
        if self.shown:
            logger.log(
                logging.WARNING if report.counts or report.truncated else logging.INFO, "%s: %s", self.name, report
            )

    def state(self) -> dict[str, Any]:
        """For trainer_state.json."""
        return {"args": {}, "attributes": {"place": list(self.place), "report": self.watched.state()}}
