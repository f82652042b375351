"""A whole model's peaks from short ones, exactly, where layers repeat.

A decoder is a stack of layers that checkpoint and a stack of layers that do not, one of which may be empty. Between
stacks of n and n + p layers, p being the layers' period, every moment of the step gains the same bytes: what one more
period holds. So a segment's peak is linear in the height of either stack, and, counted from the first and from the last
layer of its stack, so is every layer's between: the fullest is one of those that were run, moved to the full height.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from orpo_lite.plan.allocations import Segment
from orpo_lite.plan.step import Traced

Run = Callable[[int, int], Traced]
"""A step of so many layers, the first so many of which checkpoint."""


def period(signatures: list[str]) -> int:
    """The fewest layers after which the stack repeats itself; all of them where it does not."""
    count = len(signatures)
    return next(
        (p for p in range(1, count) if all(a == b for a, b in zip(signatures, signatures[p:], strict=False))), count
    )


@dataclass
class Stacks:
    """Steps of a model whatever number of its layers checkpoints, each short model run once.

    Args:
        run: a step of a model with the first so many of its layers.
        layers: layers of the whole model.
        each: their period.
        lag: periods that a layer's memory reaches back, beside the one before it.
    """

    run: Run
    layers: int
    each: int
    lag: int = 0
    _made: dict[tuple[int, int], Traced] = field(default_factory=dict)

    @property
    def edge(self) -> int:
        """Layers of a stack that are like no others: from there on a taller one is worked out from two shorter ones."""
        return (3 + self.lag) * self.each

    def __call__(self, recomputed: int) -> Traced:
        """The whole model's step with the first `recomputed` layers checkpointed."""
        whole = (recomputed, self.layers - recomputed)
        short = tuple(map(self._short, whole))
        start = self._of(short)
        grown: list[tuple[int, Traced, int]] = []
        for stack in (0, 1):
            times = (whole[stack] - short[stack]) // self.each
            if times:
                taller = tuple(n + self.each * (i == stack) for i, n in enumerate(short))
                grown.append((stack, self._of(taller), times))
        facts = Counter(start.facts)
        for _, taller, times in grown:
            facts = _moved(facts, start.facts, taller.facts, times)

        def moved(segment: Segment, shifts: tuple[int, int]) -> Counter[str]:
            """A segment's peak, its layer being so many periods further on where the one or the other stack has grown."""
            phase, place = segment
            found = Counter(start.peaks[segment])
            for stack, taller, times in grown:
                there = place + self.each * shifts[stack] if isinstance(place, int) else place
                found = _moved(found, start.peaks[segment], taller.peaks[phase, there], times)
            return found

        peaks: dict[Segment, Counter[str]] = {}
        for segment in start.peaks:
            phase, place = segment
            if not isinstance(place, int):
                peaks[segment] = moved(segment, (0, 0))
                continue
            stack = int(place >= short[0])
            within, added = place - short[0] * stack, whole[stack] - short[stack]
            below = (whole[0] - short[0]) * stack
            # the same layer counted from the front of its stack, and from the back
            if not added or within < short[stack] - self.each:
                peaks[phase, place + below] = moved(segment, (stack, 0))
            if added and within >= (1 + self.lag) * self.each:
                peaks[phase, place + below + added] = moved(segment, (1, stack))
        return Traced(peaks, facts, start.optimizer)

    def _short(self, height: int) -> int:
        """A height from which the stack's can be worked out: first, inner and last layers differ by what is next to them."""
        return min(height, self.edge + height % self.each)

    def _of(self, heights: tuple[int, ...]) -> Traced:
        first, second = heights
        if (first, second) not in self._made:
            self._made[first, second] = self.run(first + second, first)
        return self._made[first, second]


def _moved(start: Counter[str], less: Counter[str], more: Counter[str], times: int) -> Counter[str]:
    return Counter({key: start[key] + times * (more[key] - less[key]) for key in less.keys() | more.keys()})
