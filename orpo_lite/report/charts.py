"""Charts as plain values: lines, their ranges, and how a long one is thinned out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Point = tuple[float, float]
TINY = 1e-100
"""What is nearer to 0 is drawn as 0: its steps and widths would be too small for a float."""


@dataclass
class Line:
    label: str
    points: list[Point]
    """In the order of x; a value that is not finite is a gap."""
    colour: int = 0
    look: Literal["solid", "dashed", "marks", "faint"] = "solid"
    """marks: the points themselves, joined by a dashed line; faint: behind its own running mean."""
    band: list[Point] | None = None
    """Lowest and highest at each point: an interval."""
    fill: bool = False

    def finite(self) -> list[Point]:
        return [(x, y) for x, y in self.points if math.isfinite(y)]


@dataclass
class Chart:
    key: str
    """Letters and hyphens, unique on its page."""
    title: str
    lines: list[Line]
    hint: str = ""
    """What it tells, in a sentence."""
    x: str = "optimizer step"
    y: str = ""
    """Unit of the values."""
    form: Literal["g", "%", "count"] = "g"
    stairs: bool = False
    """Whether each point is a bin that reaches to the next: a histogram."""
    limits: tuple[float | None, float | None] = (None, None)
    """What the y axis begins and ends at, where that is not the data's."""
    across: tuple[float, str] | None = None
    """A level drawn across, and its name."""
    upright: tuple[float, str] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def domain(self) -> tuple[float, float, float, float]:
        """x from and to, y from and to, with some air."""
        points = [p for line in self.lines for p in line.finite()]
        xs = [x for x, _ in points]
        ys = [y for _, y in points]
        ys += [y for line in self.lines for pair in line.band or () for y in pair if math.isfinite(y)]
        if self.across:
            ys.append(self.across[0])
        low, high = min(xs), max(xs)
        if level(low, high):
            low, high = low - max(0.5, abs(low) * 1e-3), high + max(0.5, abs(low) * 1e-3)
        elif not self.stairs:  # room for half a mark
            low, high = low - (high - low) * 0.015, high + (high - low) * 0.015
        return low, high, *spread(min(ys), max(ys), self.limits)


def spread(low: float, high: float, limits: tuple[float | None, float | None]) -> tuple[float, float]:
    """A range with air above and below, but where a limit is given."""
    low, high = (
        (low if limits[0] is None else min(low, limits[0])),
        (high if limits[1] is None else max(high, limits[1])),
    )
    air = abs(high) * 0.1 if abs(high) > TINY else 1.0
    if not level(low, high):
        air = (high - low) * 0.06
    return (low - air if limits[0] is None else low), (high + air if limits[1] is None else high)


def level(low: float, high: float) -> bool:
    """Whether two values are too near to each other for an axis from one to the other."""
    return high - low <= 1e-9 * max(abs(low), abs(high)) + TINY


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers between two others, at most `most` and one."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) + 0.0 for i in range(first, math.floor(high / step + 1e-9) + 1)]


def thinned(points: list[Point], most: int) -> list[Point]:
    """At most `most` points: the lowest and the highest of each stretch, the first and the last."""
    if len(points) <= most:
        return points
    ys = np.array([y for _, y in points])
    finite = np.isfinite(ys)
    low, high = np.where(finite, ys, np.inf), np.where(finite, ys, -np.inf)
    edges = np.linspace(0, len(points), max(1, (most - 2) // 2) + 1).astype(int)
    kept = {0, len(points) - 1}
    for start, end in zip(edges, edges[1:], strict=False):
        if finite[start:end].any():
            kept |= {start + int(low[start:end].argmin()), start + int(high[start:end].argmax())}
    return [points[place] for place in sorted(kept)]


def running_mean(points: list[Point], width: int) -> list[Point]:
    """Means of the last `width` finite values, from the first place that has as many."""
    finite = np.array([(x, y) for x, y in points if math.isfinite(y)]).reshape(-1, 2)
    sums = np.concatenate([[0.0], finite[:, 1].cumsum()])
    means = (sums[width:] - sums[:-width]) / width
    return list(zip(finite[width - 1 :, 0].tolist(), means.tolist(), strict=False))


def histogram(values: dict[str, list[float]], bins: int = 40) -> tuple[list[float], dict[str, list[int]]]:
    """Edges at multiples of a round width, 0 among them where it lies inside, and counts of each group's finite values."""
    finite = {name: [v for v in some if math.isfinite(v)] for name, some in values.items()}
    everything = [v for some in finite.values() for v in some]
    low, high = min(everything), max(everything)
    if level(low, high):
        half = (abs(low) if abs(low) > TINY else 1) / 2
        low, high = low - half, high + half
    raw = (high - low) / bins
    power = 10.0 ** math.floor(math.log10(raw))
    width = next(s * power for s in (1, 2, 5, 10) if s * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / width), math.floor(high / width) + 1
    counts = {name: [0] * (last - first) for name in finite}
    for name, some in finite.items():
        for value in some:
            counts[name][min(last - first - 1, math.floor(value / width) - first)] += 1
    return [i * width for i in range(first, last + 1)], counts


def plain(value: float, form: str = "g") -> str:
    """A value as it is written on axes and beside lines."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite" if value > 0 else "minus infinite"
    if form == "%":
        return f"{value:.1%}".replace(".0%", "%")
    if form == "count" or value == int(value) and abs(value) < 1e6:
        return f"{value:,.0f}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}"


def as_data(charts: list[Chart]) -> dict[str, Any]:
    """The charts as JSON for the page's script; lines with the same x share them."""
    shared: dict[tuple[float, ...], int] = {}
    found = []
    for chart in charts:
        lines = []
        for line in chart.lines:
            xs = tuple(short(x) for x, _ in line.points)
            one: dict[str, Any] = {"n": line.label, "x": shared.setdefault(xs, len(shared)),  # type: ignore[arg-type]
                                   "y": [short(y) for _, y in line.points], "look": line.look}  # fmt: skip
            if line.band:
                one["band"] = [[short(low), short(high)] for low, high in line.band]
            lines.append(one)
        # the group that zooms and reads together
        one = {"key": chart.key, "x": chart.x, "form": chart.form, "stairs": chart.stairs, "lines": lines}
        one |= {"domain": list(chart.domain), "limits": list(chart.limits), "title": chart.title, "unit": chart.y}
        found.append(one | {"across": chart.across and chart.across[0], "upright": chart.upright and chart.upright[0]})
    return {"xs": list(shared), "charts": found}


def short(value: float) -> float | int | None:
    """Five digits, which no screen shows more of; None where it is not finite."""
    if not math.isfinite(value):
        return None
    value = float(f"{value:.5g}") if abs(value) < 1e5 else round(value, 3)
    return int(value) if value == int(value) else value
