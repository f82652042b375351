"""A stream's rows shared out to processes and their workers, and exchanged again once they are tokenised.

A worker process of a DataLoader cannot communicate with those of other processes: it reads and tokenises ahead, and the
training process exchanges what it gave.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from orpo_lite.common.errors import RequestError
from orpo_lite.data.streaming import Entry, PairStream, Part, Place

TOKENS = ("prompt_ids", "chosen_ids", "rejected_ids")


class SharedRounds:
    """Rounds of a stream's rows, tokenised by all processes together, each of which gets all of a round.

    Args:
        process, processes: which of how many this is.
        workers: processes that read ahead and share this one's rows among them.
        prefetch: rounds that each of them is ahead.
    """

    def __init__(
        self, stream: PairStream, process: int = 0, processes: int = 1, workers: int = 0, prefetch: int | None = None
    ):
        self.stream, self.process, self.processes = stream, process, processes
        self.workers, self.prefetch = workers, prefetch

    def rounds(self, start: Place) -> Iterator[list[Part]]:
        """All shares of each round, pass after pass without an end.

        Raises:
            RequestError: on all processes, where one of them cannot read on, or they read different rows.
        """
        label, each = self.stream.sources[0].label, max(1, self.workers)
        share = Share(self.stream, start, self.process * each, self.processes * each)
        loader = iter(DataLoader(
            share, batch_size=None, num_workers=self.workers, prefetch_factor=self.prefetch,
            collate_fn=lambda part: part, worker_init_fn=start_worker if self.workers else None,
            multiprocessing_context="fork" if self.workers else None,  # a stream may be what cannot be pickled
            generator=torch.Generator(),  # training's random numbers are not to depend on the workers
        ))  # fmt: skip
        while True:
            failure = None
            try:
                parts = [next(loader) for _ in range(each)]
            except Exception as error:  # told before it is raised: the others wait for this share
                failure = error
                parts = [Part(Place(), error=f"{label}: process {self.process} cannot read on ({in_a_line(error)})")]
            every: list[Part] = gather_object(parts) if self.processes > 1 else parts
            if failure is not None:
                raise failure
            if said := next((part.error for part in every if part.error), None):
                raise RequestError(said)
            if len({part[:4] for part in every}) > 1:
                raise RequestError(
                    f"{label}: the processes read different rows of the stream: it must give every row on every process and "
                    "in every worker, which take their own share of them (leave out what splits it by rank or shuffles "
                    "without a seed)"
                )
            yield every


class Share(IterableDataset):
    """One share of the rounds, pass after pass; in a DataLoader's worker that many shares further on as is its number."""

    def __init__(self, stream: PairStream, start: Place, share: int, shares: int):
        self.stream, self.start, self.share, self.shares = stream, start, share, shares

    def __iter__(self) -> Iterator[Part]:
        place = self.start
        try:
            while True:
                for part in self.stream.rounds(place, self.share, self.shares):
                    yield part._replace(entries={row: compact(entry) for row, entry in part.entries.items()})
                place = Place(place.passes + 1)
                yield Part(place)
        except RequestError as error:  # a worker would wrap it in its traceback
            yield Part(place, error=str(error))


def in_a_line(error: Exception) -> str:
    """The kind of an error and what it says: of one in a worker, at the end of the traceback that it brings along."""
    kind, said = type(error).__name__, (str(error).strip().splitlines() or [""])[-1]
    return said if said.startswith(kind) else f"{kind}: {said}"


def compact(entry: Entry) -> Entry:
    """With arrays of int32 in place of lists of tokens, which travel faster."""
    if entry.pair is None:
        return entry
    arrays = {name: np.asarray(entry.pair[name], dtype=np.int32) for name in TOKENS if name in entry.pair}
    return entry._replace(pair=entry.pair | arrays)


def start_worker(number: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    worker: Any = get_worker_info()
    worker.dataset.share += number
    # it reads the stream as an only worker would: some, as those of `datasets`, split themselves by worker
    object.__setattr__(worker, "id", 0)
    object.__setattr__(worker, "num_workers", 1)
