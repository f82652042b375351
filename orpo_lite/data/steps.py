"""Whole optimizer steps: which pairs each process computes, in which micro-batches.

A step's pairs are the next of a seeded permutation, whatever the layout, the budget or the number of processes. They
are dealt to the processes by cost, and each process's share is cut into micro-batches of nearly equal cost. Every
process plans the same, so nothing is communicated; all have the same number of micro-batches, with a filler that
weighs nothing where one has fewer. No pair is repeated to fill a step up, as a sharded sampler does.

A plan holds three integers a pair, 24 bytes, on each process: 24 MB for a million pairs. The pairs themselves are
memory-mapped, one copy a node.
"""

from __future__ import annotations

import bisect
import heapq
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from orpo_lite.data.batching import PackedCollator, PaddedCollator
from orpo_lite.data.work import pair_costs, pair_work

if TYPE_CHECKING:
    from orpo_lite.config import ORPOConfig

logger = logging.getLogger(__name__)

MicroBatches = list[list[int]]
"""Pairs, by index, of each micro-batch."""
PARTNERS = 32
"""Bins that an exchange looks for its partner in."""


def deal(costs: np.ndarray, bins: int, most: int | None = None) -> list[list[int]]:
    """Spread items over bins so that the costliest bin costs little more than the mean.

    Longest first into the bin that is cheapest so far (Graham 1969, at most 4/3 of the optimum), then exchanges between
    the costliest and the cheapest bins for as long as they help and the costliest is 0.1% above the mean.

    Args:
        most: items of a bin, at most; bins x most hold all of them.
    """
    order = np.argsort(-costs, kind="stable")
    heap = [(0, b) for b in range(bins)]
    dealt: list[list[int]] = [[] for _ in range(bins)]
    for item in order.tolist():
        load, b = heapq.heappop(heap)
        dealt[b].append(item)
        if most is None or len(dealt[b]) < most:
            heapq.heappush(heap, (load + int(costs[item]), b))
    _exchange(dealt, costs, most)
    return dealt


def _exchange(dealt: list[list[int]], costs: np.ndarray, most: int | None) -> None:
    """Swap an item of the costliest bin for a cheaper one elsewhere, or for none where there is room for it, as long as
    that lowers the larger of the two bins."""
    loads = np.array([costs[items].sum() for items in dealt], dtype=np.int64)
    enough = 1.001 * loads.mean()
    for _ in range(4 * len(dealt)):
        top = int(np.argmax(loads))
        if loads[top] <= enough:
            return
        best = (0, -1, -1, -1)
        # the cheapest ones have the most room, and are as many as a step of a thousand processes has time for
        for b in np.argsort(loads, kind="stable")[:PARTNERS].tolist():
            gap = loads[top] - loads[b]
            if b == top or gap <= 1:
                continue
            # moving d = cost(a) - cost(other) leaves the pair at max(top - d, b + d): best at half the gap
            mine, theirs = costs[dealt[top]], costs[dealt[b]]
            if most is None or len(dealt[b]) < most:
                theirs = np.append(theirs, 0)
            difference = mine[:, None] - theirs[None]
            gain = np.where((difference > 0) & (difference < gap), np.minimum(difference, gap - difference), 0)
            i, j = divmod(int(gain.argmax()), len(theirs))
            if gain[i, j] > best[0]:
                best = (int(gain[i, j]), b, i, j)
        gain, b, i, j = best
        if gain == 0:
            return
        item = dealt[top].pop(i)
        other = dealt[b].pop(j) if j < len(dealt[b]) else None
        dealt[b].append(item)
        if other is not None:
            dealt[top].append(other)
        moved = int(costs[item]) - (0 if other is None else int(costs[other]))
        loads[top] -= moved
        loads[b] += moved


def micro_batches(costs: np.ndarray, budget: int, count: int = 1, padded: bool = False) -> MicroBatches:
    """Cut pairs into at least `count` micro-batches of nearly equal cost, as few as the budget allows.

    A pair that costs more than the budget stands alone. Padded pairs are cut in the order of their length, so that those
    of like length are padded to each other.
    """
    if padded:
        count = max(count, len(_runs(costs, budget)))
        limits = range(1, budget + 1)
        limit = limits[bisect.bisect_left(limits, True, key=lambda limit: len(_runs(costs, limit)) <= count)]
        parts = _runs(costs, limit)
    else:
        count = max(count, min(len(costs), -(-int(costs.sum()) // budget)))
        parts = deal(costs, count)
        while any(len(part) > 1 and costs[part].sum() > budget for part in parts):
            count += 1
            parts = deal(costs, count)
    return [sorted(part) for part in parts] + [[]] * (count - len(parts))


def _runs(costs: np.ndarray, limit: int) -> MicroBatches:
    """Runs of neighbours in length, longest first, each as long as padding it to its longest stays within the limit."""
    runs: MicroBatches = []
    longest = 0
    for item in np.argsort(-costs, kind="stable").tolist():
        if runs and (len(runs[-1]) + 1) * longest <= limit:
            runs[-1].append(item)
        else:
            runs.append([item])
            longest = int(costs[item])
    return runs


def cut_step(
    costs: np.ndarray, processes: int, budget: int, padded: bool = False, work: np.ndarray | None = None
) -> list[MicroBatches]:
    """The pairs of one optimizer step, by index, as micro-batches of each process: as many on all, some of them empty.

    Args:
        costs: tokens, which the budget counts.
        work: time of each pair, by which processes get their share; tokens where it is None.
    """
    dealt = [np.array(d, dtype=np.int64) for d in deal(costs if work is None else work, processes)]
    cut = [micro_batches(costs[d], budget, 1, padded) for d in dealt]
    count = max(map(len, cut))
    cut = [
        c if len(c) == count else micro_batches(costs[d], budget, count, padded)
        for c, d in zip(cut, dealt, strict=True)
    ]
    count = max(map(len, cut))
    return [[d[batch].tolist() for batch in c] + [[]] * (count - len(c)) for c, d in zip(cut, dealt, strict=True)]


def cut_by_pairs(
    costs: np.ndarray, processes: int, pairs: int, padded: bool = False, whole: bool = False
) -> list[MicroBatches]:
    """`cut_step` into micro-batches of at most `pairs` pairs, as few as hold them all.

    Args:
        costs: time of each pair, or tokens.
        whole: keep the micro-batches that one process would make of the step, and deal those: a mean of micro-batch
            means depends on them.
    """
    if whole:
        parts = [list(range(len(costs)))[i : i + pairs] for i in range(0, len(costs), pairs)]
        sums = np.array([costs[part].sum() for part in parts], dtype=np.int64)
        count = -(-len(parts) // processes)
        return [
            [parts[i] for i in sorted(bin)] + [[]] * (count - len(bin)) for bin in deal(sums, processes, most=count)
        ]
    rounds = -(-len(costs) // (processes * pairs))
    dealt = [np.array(d, dtype=np.int64) for d in deal(costs, processes, most=rounds * pairs)]
    count = max(-(-len(d) // pairs) for d in dealt)
    cut: list[MicroBatches] = []
    for mine in dealt:
        if padded:  # those of like length are padded to each other
            size = max(1, -(-len(mine) // count))
            mine = mine[np.argsort(-costs[mine], kind="stable")]
            parts = [mine[i : i + size].tolist() for i in range(0, len(mine), size)]
        else:
            parts = [mine[part].tolist() for part in deal(costs[mine], count, most=pairs)]
        cut.append([sorted(part) for part in parts] + [[]] * (count - len(parts)))
    return cut


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
