"""Whole optimizer steps: which pairs each process computes, in which micro-batches.

A step's pairs are the next of a seeded permutation, whatever the layout, the budget or the number of processes. They
are dealt to the processes by cost, and each process's share is cut into micro-batches of nearly equal cost. Every
process plans the same, so nothing is communicated; all have the same number of micro-batches, with a filler that
weighs nothing where one has fewer. No pair is repeated to fill a step up, as a sharded sampler does.

A plan holds three integers a pair, 24 bytes, on each process: 24 MB for a million pairs. The pairs themselves are
memory-mapped, one copy a node.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from orpo_lite.data.collate import PackedCollator, PaddedCollator
from orpo_lite.data.dealing import MicroBatches, cut_by_pairs, cut_step
from orpo_lite.data.work import pair_costs, pair_work

if TYPE_CHECKING:
    from orpo_lite.trainer.config import ORPOConfig

logger = logging.getLogger(__name__)


@dataclass
class StepPlan:
    """All steps of every epoch, worked out one at a time.

    Args:
        costs: tokens of each pair in the layout, (N,) int64.
        pairs_per_step: pairs of an optimizer step on all processes together.
        tokens_per_batch: tokens of a micro-batch, at most, where it holds more than one pair; None goes by pairs.
        processes: number of processes.
        seed: of the permutation; None keeps the pairs in their order.
        padded: whether the layout pads the pairs of a micro-batch to each other.
        drop_last: leave out the pairs that do not fill a last step, or, without a budget, micro-batches on all processes.
        pairs_per_batch: pairs of a micro-batch without a budget.
        whole: keep the micro-batches of one process, see `cut_by_pairs`.
        work: time of each pair, (N,) int64, by which processes get their share; tokens where it is None.
    """

    costs: np.ndarray
    pairs_per_step: int
    tokens_per_batch: int | None
    processes: int = 1
    seed: int | None = 0
    padded: bool = False
    drop_last: bool = False
    pairs_per_batch: int = 1
    whole: bool = False
    work: np.ndarray | None = None
    _order: tuple[int, np.ndarray] | None = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        """Optimizer steps of an epoch."""
        if self.drop_last and not self.tokens_per_batch:
            return -(-self.used // self.pairs_per_step)
        whole, rest = divmod(len(self.costs), self.pairs_per_step)
        return whole + bool(rest and (not self.drop_last or not whole))

    @property
    def used(self) -> int:
        """Pairs of an epoch, the last of its order left out where `drop_last` and no budget say so."""
        count, at_once = len(self.costs), self.pairs_per_batch * self.processes
        return count // at_once * at_once if self.drop_last and not self.tokens_per_batch else count

    def order(self, epoch: int) -> np.ndarray:
        """The pairs of an epoch in the order of training, that of transformers' Trainer: the same with and without budget."""
        if self._order is None or self._order[0] != epoch:  # drawn once an epoch, not once a step
            self._order = epoch, self._draw(epoch)
        return self._order[1]

    def _draw(self, epoch: int) -> np.ndarray:
        if self.seed is None:
            return np.arange(len(self.costs))
        # as accelerate's SeedableRandomSampler draws it
        return torch.randperm(len(self.costs), generator=torch.Generator().manual_seed(self.seed + epoch)).numpy()

    def step(self, epoch: int, step: int) -> list[MicroBatches]:
        """Micro-batches of each process in one optimizer step; the same number on all of them."""
        mine = self.order(epoch)[: self.used][step * self.pairs_per_step : (step + 1) * self.pairs_per_step]
        work = self.costs[mine] if self.work is None else self.work[mine]
        if self.tokens_per_batch:
            cut = cut_step(self.costs[mine], self.processes, self.tokens_per_batch, self.padded, work)
        else:
            cut = cut_by_pairs(work, self.processes, self.pairs_per_batch, self.padded, self.whole)
        return [[mine[batch].tolist() if batch else [] for batch in batches] for batches in cut]


class StepDataset(Dataset):
    """Optimizer steps of one process: (epoch, step) -> {"micro_batches": [batch, ...]}.

    Args:
        collator: makes the batches, a user's own perhaps.
        ours: makes the fillers.
    """

    def __init__(
        self,
        pairs: Any,
        plan: StepPlan,
        collator: Any,
        process: int,
        ours: PaddedCollator | PackedCollator | None = None,
    ):
        self.pairs, self.plan, self.collator, self.process = pairs, plan, collator, process
        self.ours = ours or collator

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        batches = self.plan.step(*key)[self.process]
        return {"micro_batches": [self._collate(batch) for batch in batches]}

    def _collate(self, batch: list[int]) -> dict[str, Any]:
        if batch:
            return self.collator([self.pairs[i] for i in batch])
        # a backward pass has to run on every process: one short pair
        return filler(self.ours, self.pairs[int(self.plan.costs.argmin())])


def filler(collator: PaddedCollator | PackedCollator, pair: dict[str, Any]) -> dict[str, Any]:
    """A micro-batch that weighs nothing: one pair, none of whose labels count."""
    batch = collator([pair])
    for name in ("chosen_pair", "rejected_pair", "nll_pair"):
        batch[name] = torch.full_like(batch[name], -1)
    return batch | {"pair_rows": batch["pair_rows"][:0]}


class StepSampler:
    """Keys of an epoch's steps; each is a batch of one, so that accelerate's skip_first_batches skips whole steps."""

    batch_size, drop_last = 1, False

    def __init__(self, steps: int):
        self.steps, self.epoch = steps, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.steps):
            yield [(self.epoch, step)]


class StepLoader(DataLoader):
    """One item an optimizer step; the epoch travels in the keys, so that workers and resuming need no state."""

    def __init__(self, dataset: StepDataset, **options: Any):
        super().__init__(dataset, batch_sampler=StepSampler(len(dataset.plan)), collate_fn=_only, **options)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


def _only(items: list[dict[str, Any]]) -> dict[str, Any]:
    return items[0]


def step_loader(
    pairs: Any,
    args: ORPOConfig,
    layout: str,
    collator: Any,
    ours: Any = None,
    accumulation: int = 1,
    weight: float = 0.0,
) -> StepLoader:
    """The training loader of `tokens_per_batch`, and of several processes, from a trainer's arguments.

    Args:
        collator, ours: see `StepDataset`.
        accumulation: micro-batches that `args.train_batch_size` holds, without a budget.
        weight: tokens that a place of attention costs, see `work.place_weight`.
    """
    budget = args.tokens_per_batch
    costs = pair_costs(pairs, layout)
    alone = int((costs > budget).sum()) if budget else 0
    if alone:
        logger.warning(
            "%d of %d pairs have more than tokens_per_batch=%d tokens (up to %d): each is a micro-batch of its own",
            alone,
            len(costs),
            budget,
            costs.max(),
        )
    seed = args.data_seed if args.data_seed is not None else args.seed
    plan = StepPlan(
        costs,
        pairs_per_step=args.train_batch_size * args.world_size,
        tokens_per_batch=budget,
        processes=args.world_size,
        seed=seed if args.train_sampling_strategy == "random" else None,
        padded=layout == "padded",
        drop_last=args.dataloader_drop_last,
        pairs_per_batch=args.train_batch_size // accumulation,
        whole=args.nll_mean == "micro",
        work=pair_work(pairs, layout, weight) if args.world_size > 1 else None,
    )
    return StepLoader(
        StepDataset(pairs, plan, collator, args.process_index, ours),
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        prefetch_factor=args.dataloader_prefetch_factor if args.dataloader_num_workers else None,
        persistent_workers=args.dataloader_persistent_workers,
    )
