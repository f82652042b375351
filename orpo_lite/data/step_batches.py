"""Whole optimizer steps: which pairs each process computes, in which micro-batches.

The pairs of a step are the next ones of a seeded permutation, whatever the layout, the budget or the number of
processes. They are dealt to the processes by cost, and each process's share is cut into micro-batches of nearly equal
cost. Every process computes the same plan, so nothing is communicated. All processes have the same number of
micro-batches; where one has fewer, a filler that weighs nothing takes the place of the missing ones. No pair is
repeated to fill up a step, as a sharded sampler would do.

A plan holds three integers per pair (24 bytes) on each process. The pairs themselves stay memory-mapped.
"""

from __future__ import annotations

import heapq
import logging
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from orpo_lite.data.lengths import pair_costs

if TYPE_CHECKING:
    from orpo_lite.trainer.config import ORPOConfig

logger = logging.getLogger(__name__)

MicroBatches = list[list[int]]
"""The pairs of each micro-batch, by index."""


def deal(costs: np.ndarray, bins: int, max_items: int | None = None) -> list[list[int]]:
    """Spread items over bins so that the costliest bin costs little more than the mean; return the items of each by index.

    The costliest item goes first into the bin that is cheapest so far (Graham 1969, at most 4/3 of the optimum).

    Args:
        costs: (N,) int64.
        max_items: the most items of a bin; bins x max_items must hold all of them.
    """
    order = np.argsort(-costs, kind="stable")
    heap = [(0, b) for b in range(bins)]
    dealt: list[list[int]] = [[] for _ in range(bins)]
    for item in order.tolist():
        load, b = heapq.heappop(heap)
        dealt[b].append(item)
        if max_items is None or len(dealt[b]) < max_items:
            heapq.heappush(heap, (load + int(costs[item]), b))
    return dealt


def micro_batches(costs: np.ndarray, budget: int, count: int = 1, padded: bool = False) -> MicroBatches:
    """Cut pairs into at least `count` micro-batches, as few as the budget allows.

    A pair that costs more than the budget stands alone. Padded pairs are cut in the order of their length, so that
    pairs of similar length are padded to each other; others into micro-batches of nearly equal cost.
    """
    parts: MicroBatches = []
    if padded:
        for item in np.argsort(-costs, kind="stable").tolist():
            # the first pair of a micro-batch is its longest
            if parts and (len(parts[-1]) + 1) * costs[parts[-1][0]] <= budget:
                parts[-1].append(item)
            else:
                parts.append([item])
    else:
        count = max(count, min(len(costs), -(-int(costs.sum()) // budget)))
        parts = deal(costs, count)
        while any(len(part) > 1 and costs[part].sum() > budget for part in parts):
            count += 1
            parts = deal(costs, count)
    return [sorted(part) for part in parts] + [[]] * (count - len(parts))


def cut_step(
    costs: np.ndarray, processes: int, tokens: int | None, pairs: int = 1, padded: bool = False, in_order: bool = False
) -> list[MicroBatches]:
    """Deal the pairs of one optimizer step to processes, and cut each share into micro-batches, as few as hold it.

    Args:
        costs: tokens of each pair, (N,) int64.
        tokens: the most tokens of a micro-batch of several pairs; None goes by `pairs`, the most pairs.
        padded: whether the layout pads the pairs of a micro-batch to each other.
        in_order: by pairs, cut a share in the order of its pairs, as TRL does, rather than by their costs.

    Returns:
        The micro-batches of each process: the same number on all, some of them empty.
    """

    def cut(share: np.ndarray, count: int) -> MicroBatches:
        if tokens:
            return micro_batches(costs[share], tokens, count, padded)
        if in_order:
            return [list(range(len(share)))[start : start + pairs] for start in range(0, len(share), pairs)]
        return deal(costs[share], max(count, -(-len(share) // pairs)), pairs)

    most = None if tokens else -(-len(costs) // (processes * pairs)) * pairs
    shares = [np.array(sorted(share), dtype=np.int64) for share in deal(costs, processes, most)]
    count = max(len(cut(share, 1)) for share in shares)
    batches = [[sorted(share[part].tolist()) for part in cut(share, count)] for share in shares]
    count = max(map(len, batches))
    return [mine + [[]] * (count - len(mine)) for mine in batches]


@dataclass
class StepPlan:
    """All steps of every epoch, computed one at a time.

    Args:
        costs: tokens of each pair in the layout, (N,) int64.
        pairs_per_step: pairs per optimizer step on all processes together.
        tokens_per_batch: the most tokens of a micro-batch of several pairs; None goes by pairs.
        seed: of the permutation; None keeps the pairs in their order.
        padded: whether the layout pads the pairs of a micro-batch to each other, which a budget counts.
        drop_last: leave out the pairs that do not fill a last step.
        pairs_per_batch: pairs per micro-batch without a budget.
        in_order: keep the pairs of a process in their order, without a budget: a mean of micro-batch means depends on it.

    As the batch sampler of a loader it yields the keys of an epoch's steps, each a batch of one, so that accelerate's
    skip_first_batches skips whole steps; the epoch travels in the keys, so that workers and resuming need no state.
    """

    costs: np.ndarray
    pairs_per_step: int
    tokens_per_batch: int | None
    processes: int = 1
    seed: int | None = 0
    padded: bool = False
    drop_last: bool = False
    pairs_per_batch: int = 1
    in_order: bool = False
    epoch: int = 0

    batch_size: ClassVar = 1
    """Steps that a batch of keys holds."""

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose steps come next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(len(self)):
            yield [(self.epoch, step)]

    def __len__(self) -> int:
        """Count the optimizer steps of an epoch."""
        whole, rest = divmod(len(self.costs), self.pairs_per_step)
        return whole + bool(rest and not (self.drop_last and whole))

    def order(self, epoch: int) -> np.ndarray:
        """Return the pairs of an epoch in the order of training, the same as that of transformers' Trainer."""
        if self.seed is None:
            return np.arange(len(self.costs))
        # as accelerate's SeedableRandomSampler draws it
        return torch.randperm(len(self.costs), generator=torch.Generator().manual_seed(self.seed + epoch)).numpy()

    def step(self, epoch: int, step: int) -> list[MicroBatches]:
        """Return the micro-batches of each process in one optimizer step; the same number on all of them."""
        pairs = self.order(epoch)[step * self.pairs_per_step : (step + 1) * self.pairs_per_step]
        by = self.tokens_per_batch, self.pairs_per_batch, self.padded, self.in_order
        cut = cut_step(self.costs[pairs], self.processes, *by)
        return [[pairs[batch].tolist() if batch else [] for batch in batches] for batches in cut]


class StepDataset(Dataset):
    """Optimizer steps of one process: (epoch, step) -> {"micro_batches": [batch, ...]}.

    Args:
        plan: of all processes.
        collator: makes the batches; it may be a user's own.
        own_collator: makes the fillers; by default `collator`.
    """

    def __init__(self, pairs: Any, plan: StepPlan, collator: Any, process: int, own_collator: Any = None):
        self.pairs, self.plan, self.collator, self.process = pairs, plan, collator, process
        self.own_collator = own_collator or collator

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        batches = self.plan.step(*key)[self.process]
        return {"micro_batches": [self._collate(batch) for batch in batches]}

    def _collate(self, batch: list[int]) -> dict[str, Any]:
        if batch:
            return self.collator([self.pairs[i] for i in batch])
        # a backward pass has to run on every process: take one short pair, of which no label counts
        filler = self.own_collator([self.pairs[int(self.plan.costs.argmin())]])
        for name in ("chosen_pair", "rejected_pair", "nll_pair"):
            filler[name] = torch.full_like(filler[name], -1)
        return filler | {"pair_rows": filler["pair_rows"][:0]}


class StepLoader(DataLoader):
    """One item per optimizer step."""

    def __init__(self, dataset: StepDataset, **options: Any):
        super().__init__(dataset, batch_sampler=dataset.plan, collate_fn=operator.itemgetter(0), **options)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose steps come next."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


def step_loader(
    pairs: Any, args: ORPOConfig, layout: str, collator: Any, own_collator: Any = None, accumulation: int = 1
) -> StepLoader:
    """Return the training loader for `tokens_per_batch` or several processes, from a trainer's arguments.

    Args:
        layout: shared, packed or padded.
        collator, own_collator: see `StepDataset`.
        accumulation: micro-batches that `args.train_batch_size` holds, without a budget.
    """
    budget = args.tokens_per_batch
    costs = pair_costs(pairs, layout)
    alone = int((costs > budget).sum()) if budget else 0
    if alone:
        words = "%d of %d pairs have more than tokens_per_batch=%d tokens (up to %d): each is a micro-batch of its own"
        logger.warning(words, alone, len(costs), budget, costs.max())
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
        in_order=args.nll_mean == "micro",
    )
    return StepLoader(
        StepDataset(pairs, plan, collator, args.process_index, own_collator),
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        prefetch_factor=args.dataloader_prefetch_factor if args.dataloader_num_workers else None,
        persistent_workers=args.dataloader_persistent_workers,
    )
