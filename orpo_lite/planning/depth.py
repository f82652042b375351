"""A whole model's peaks from two short ones, exactly, where layers repeat.

Between models of n and n + p layers, p being the layers' period, every moment of the step gains the same bytes: what one
more period holds. So a segment's peak is linear in the depth, and, with two depths and both counted from the first and
from the last layer, so is every layer's between: the fullest is one of those that were run, moved to the full depth.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from orpo_lite.planning.ledger import Segment
from orpo_lite.planning.step import Traced


def period(signatures: list[str]) -> int:
    """The fewest layers after which the stack repeats itself; all of them where it does not."""
    count = len(signatures)
    return next(
        (p for p in range(1, count) if all(a == b for a, b in zip(signatures, signatures[p:], strict=False))), count
    )


def extrapolated(run: Callable[[int | None], Traced], signatures: list[str]) -> Traced:
    """A step of the whole model, from two of fewer layers where that is less work.

    Args:
        run: a step of the first so many layers; None takes all.
        signatures: what each layer is like.
    """
    layers, each = len(signatures), period(signatures) if signatures else 0
    # first, inner and last layers differ by what is next to them: a period of each, and the odd ones of the whole
    short = 3 * each + layers % each if each else 0
    if not each or 2 * short + each >= layers:
        return run(None)
    less, more = run(short), run(short + each)
    times = (layers - short) // each
    facts = _moved(less.facts, less.facts, more.facts, times)
    peaks: dict[Segment, Counter[str]] = {}
    for segment, found in less.peaks.items():
        phase, place = segment
        if not isinstance(place, int):
            peaks[segment] = _moved(found, found, more.peaks[segment], times)
            continue
        # the same layer counted from the front, and from the back
        if place < short - each:
            peaks[segment] = _moved(found, found, more.peaks[segment], times)
        if place >= each:
            peaks[phase, layers - short + place] = _moved(found, found, more.peaks[phase, place + each], times)
    return Traced(peaks, facts, less.optimizer)


def _moved(start: Counter[str], less: Counter[str], more: Counter[str], times: int) -> Counter[str]:
    return Counter({key: start[key] + times * (more[key] - less[key]) for key in less.keys() | more.keys()})
