"""Pairs of an optimizer step dealt to processes, and cut into micro-batches, of nearly equal cost."""

from __future__ import annotations

import bisect
import heapq

import numpy as np

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
