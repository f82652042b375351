"""A stream's optimizer steps: the next good rows, in micro-batches; what was dropped on the way is told and counted."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from orpo_lite.data.steps import MicroBatches, cut_by_pairs, cut_step, filler
from orpo_lite.data.streaming import News, PairStream, Place, Row, StreamReport, fingerprint
from orpo_lite.data.work import pair_cost
from orpo_lite.errors import RequestError

if TYPE_CHECKING:
    from orpo_lite.config import ORPOConfig

logger = logging.getLogger(__name__)

DECIDED = 1000
"""Rows after which a stream of which more than half was dropped is given up before its end."""


class StepStream(IterableDataset):
    """One item an optimizer step, pass after pass: {"micro_batches": [batch, ...], "news": News}.

    Args:
        stream: of pairs.
        pairs: of a micro-batch, without a budget; on one process they keep their order.
        accumulation: micro-batches of a step and process, without a budget.
        budget: tokens of a micro-batch.
        process, processes: which of how many computes these items; the step's pairs are dealt by cost.
        whole: keep the micro-batches of one process, see `cut_by_pairs`.
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
        drop_last: bool = False,
        whole: bool = False,
    ):
        self.stream, self.collator, self.layout, self.whole = stream, collator, layout, whole
        self.pairs, self.accumulation, self.budget = pairs, accumulation, budget
        self.process, self.processes, self.drop_last = process, processes, drop_last
        self.step_pairs = pairs * accumulation * processes
        self.start, self.behind = Place(), 0

    def resume(self, place: Place, behind: int) -> None:
        """Begin at a place. transformers skips the items that are behind: empty ones stand in for them."""
        self.start, self.behind = place, behind

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from ({} for _ in range(self.behind))
        try:
            for window, news in self.windows():
                yield {"micro_batches": self.batches(window), "news": news}
        except RequestError as error:  # a worker process would wrap it in its traceback
            yield {"micro_batches": [], "news": News(error=str(error))}

    def windows(self) -> Iterator[tuple[list[Row], News]]:
        """The pairs of each step, and what became of the rows read for them."""
        place = self.start
        while True:
            window: list[Row] = []
            news, steps = News(), place != Place(place.passes)
            for event in self.stream.events(place):
                # a step is given away with the pair that follows it, so that drops behind the last one are told as well
                if event.pair is not None and len(window) == self.step_pairs:
                    yield window, replace(news, place=event.place, fingerprint=fingerprint(window))
                    window, news, steps = [], News(), True
                if event.pair is not None:
                    window.append(event.pair)
                news.add(event)
                if news.counts.total() >= DECIDED:  # told without a step: there may be none for long
                    yield [], replace(news, place=event.place)
                    news = News()
            place = Place(place.passes + 1)
            if self.drop_last and len(window) < self.step_pairs and steps:
                window = []
            if not window and not steps and not news.counts:
                raise RequestError(
                    f"{self.stream.sources[0].label}: the stream holds no rows on pass {place.passes}"
                    + (": it can be read once only; give one that begins anew, or fewer steps (max_steps)" if place.passes > 1 else ": write at least one with chosen and rejected")
                )  # fmt: skip
            yield window, replace(news, place=place, ended=True, fingerprint=fingerprint(window))

    def batches(self, window: list[Row]) -> list[dict[str, Any]]:
        """This process's micro-batches of a step's pairs; as many as on the others."""
        if not window:
            return []
        cut = self.cut(window)[self.process]
        cheapest = min(window, key=lambda pair: len(pair["chosen_ids"]) + len(pair["rejected_ids"]))
        return [
            self.collator([window[i] for i in batch]) if batch else filler(self.collator, cheapest) for batch in cut
        ]

    def cut(self, window: list[Row]) -> list[MicroBatches]:
        costs = np.array([pair_cost(pair, self.layout) for pair in window], dtype=np.int64)
        if self.budget:
            return cut_step(costs, self.processes, self.budget, self.layout == "padded")
        whole = self.whole or self.processes == 1
        return cut_by_pairs(costs, self.processes, self.pairs, self.layout == "padded", whole)


def stream_loader(stream: PairStream, args: ORPOConfig, layout: str, collator: Any, accumulation: int) -> DataLoader:
    """The training loader of a stream, from a trainer's arguments; one worker process reads ahead if any is asked for."""
    if not hasattr(collator, "nll_scope"):
        raise RequestError("data_collator: a stream takes the trainer's own collator only: leave data_collator out")
    dataset = StepStream(
        stream, collator, layout, pairs=args.train_batch_size // accumulation, accumulation=accumulation,
        budget=args.tokens_per_batch, process=args.process_index, processes=args.world_size,
        drop_last=args.dataloader_drop_last, whole=args.nll_mean == "micro",
    )  # fmt: skip
    workers = min(1, args.dataloader_num_workers)  # each would read all of the stream
    if workers and multiprocessing.get_start_method() != "fork":
        logger.warning(
            "dataloader_num_workers: a stream is read in the training process, since this system cannot fork"
        )
        workers = 0
    return DataLoader(
        dataset, batch_size=None, num_workers=workers, pin_memory=args.dataloader_pin_memory,
        prefetch_factor=args.dataloader_prefetch_factor if workers else None, worker_init_fn=start_worker,
    )  # fmt: skip


def start_worker(_: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork


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
            RequestError: the stream cannot be read on.
            TooManyDropped: more than half of what was read is dropped: at the end of a pass, or from 1,000 rows on.
        """
        news: News = item["news"]
        if news.error:
            raise RequestError(news.error)
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
