"""Charts as plain values, for the page's script, and as a PNG for the model card."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeGuard

import numpy as np
from matplotlib.ticker import PercentFormatter

from orpo_lite.common.text import number

Point = tuple[float, float]

BLUE, ORANGE, GREEN, RED, PURPLE, TEAL = range(6)
COLORS = (("#0b68cb", "#6cb4ff"), ("#b45309", "#ffb057"), ("#1a7f37", "#56d364"), ("#cf222e", "#ff8a80"),
          ("#7c3aed", "#cda5ff"), ("#0e7490", "#4dd0e1"))  # fmt: skip
"""On a light and on a dark page; the model card takes the light ones."""
DOTTED = 30
"""Lines of up to this many points have a dot at each."""


def is_finite(value: float | None) -> TypeGuard[float]:
    """Tell whether a value is known, and neither NaN nor infinite."""
    return value is not None and math.isfinite(value)


@dataclass
class Line:
    label: str
    points: list[Point]
    """In the order of x; a value that is not finite is a gap."""
    color: int = BLUE
    look: Literal["solid", "dashed", "marks", "faint"] = "solid"
    """marks: the points themselves, joined by a dashed line; faint: behind its own running mean."""
    band: list[Point] | None = None
    """Lowest and highest at each point: an interval."""
    fill: bool = False

    @cached_property
    def finite(self) -> list[Point]:
        return [(x, y) for x, y in self.points if math.isfinite(y)]

    @property
    def dotted(self) -> bool:
        """True where each point has a dot: held-out values, and short lines."""
        return self.look == "marks" or len(self.finite) <= DOTTED


@dataclass
class Chart:
    key: str
    """Letters and hyphens, unique on its page."""
    title: str
    lines: list[Line] = field(default_factory=list)
    hint: str = ""
    """Sentence about what to look for."""
    x: str = "optimizer step"
    y: str = ""
    """Unit of the values."""
    form: Literal["g", "%", "count"] = "g"
    stairs: bool = False
    """Each point is a bin that reaches to the next: a histogram."""
    limits: tuple[float | None, float | None] = (None, None)
    """Ends of the y axis, where they are not the data's."""
    across: tuple[float, str] | None = None
    """A level drawn across, and its name."""
    upright: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def drawable(self) -> bool:
        return any(line.finite for line in self.lines)

    @property
    def domain(self) -> tuple[float, float, float, float]:
        """Ends of the x and the y axis, with some air."""
        xs, ys = zip(*(point for line in self.lines for point in line.finite), strict=True)
        bands = [y for line in self.lines for pair in line.band or () for y in pair if math.isfinite(y)]
        floor, top = self.limits
        ends = [*ys, *bands, *(y for y in (floor, top, self.across and self.across[0]) if y is not None)]
        left, right = apart(xs, 0.5)
        low, high = apart(ends, 0.1)
        side = 0.0 if self.stairs else (right - left) * 0.015  # room for half a mark
        air = (high - low) * 0.06
        low, high = low - air if floor is None else min(ends), high + air if top is None else max(ends)
        return left - side, right + side, low, high


def apart(values: Sequence[float], share: float) -> tuple[float, float]:
    """Return the lowest and the highest value, moved apart by a share of them where they are the same."""
    low, high = min(values), max(values)
    size = max(abs(low), abs(high)) or 1.0
    return (low, high) if high - low > 1e-9 * size else (low - share * size, high + share * size)


def running_mean(points: list[Point], width: int) -> list[Point]:
    """Average the last `width` finite values, from the first place that has as many."""
    xs, ys = np.array([(x, y) for x, y in points if math.isfinite(y)]).reshape(-1, 2).T
    if len(ys) < width:
        return []
    means = np.convolve(ys, np.full(width, 1 / width), "valid")
    return list(zip(xs[width - 1 :].tolist(), means.tolist(), strict=True))


def written(value: float, form: str = "g") -> str:
    """Write a value as it stands on axes and beside lines."""
    if not math.isfinite(value):
        return number(value)
    if form == "%":
        return f"{value:.1%}".replace(".0%", "%")
    if form == "count" or value == int(value) and abs(value) < 1e6:
        return f"{value:,.0f}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}"


def script_data(charts: list[Chart]) -> dict[str, Any]:
    """Return the charts as JSON values for the page's script; lines with the same x share them."""
    shared: dict[tuple[Any, ...], int] = {}
    found = []
    for chart in charts:
        lines = [
            {
                "n": line.label,
                "x": shared.setdefault(tuple(short(x) for x, _ in line.points), len(shared)),
                "y": [short(y) for _, y in line.points],
                "band": line.band and [[short(low), short(high)] for low, high in line.band],
            }
            for line in chart.lines
        ]
        found.append(
            {"key": chart.key, "title": chart.title, "x": chart.x, "form": chart.form, "stairs": chart.stairs, "lines": lines,
             "domain": chart.domain, "limits": chart.limits, "across": chart.across and chart.across[0],
             "upright": chart.upright}
        )  # fmt: skip
    return {"xs": list(shared), "charts": found}


def short(value: float) -> float | int | None:
    """Round to five digits, as no screen shows more; None for a value that is not finite."""
    if not math.isfinite(value):
        return None
    value = float(f"{value:.5g}") if abs(value) < 1e5 else round(value, 3)
    return int(value) if value == int(value) else value


def save_png(charts: list[Chart], path: Path) -> None:
    """Draw six charts as a PNG on an opaque light ground; the same charts give the same bytes."""
    # not pyplot: it keeps figures and a backend for the whole process, which may be a user's notebook
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", "seaborn-v0_8-whitegrid"]):  # whatever the user's own style is
        figure = Figure(figsize=(15, 8.4), dpi=100)
        FigureCanvasAgg(figure)
        # a layout engine would draw everything twice
        figure.subplots_adjust(left=0.06, right=0.985, bottom=0.075, top=0.955, wspace=0.19, hspace=0.3)
        for axes, chart in zip(figure.subplots(2, 3).flat, charts, strict=True):
            draw_axes(axes, chart)
            for line in chart.lines:
                draw_line(axes, line)
            if chart.drawable and len(chart.lines) > 1:
                axes.legend(frameon=True, framealpha=0.85)
        figure.savefig(path, format="png", metadata={"Software": None})


def draw_axes(axes: Any, chart: Chart) -> None:
    """Draw everything of a chart but its lines."""
    axes.set_title(chart.title, loc="left", fontsize=13, fontweight="bold")
    axes.set_xlabel(chart.x)
    note = {"transform": axes.transAxes, "fontsize": 9}
    axes.text(0.98, 0.02, "\n".join(chart.notes), ha="right", color=COLORS[RED][0], **note)
    if not chart.drawable:
        axes.text(0.5, 0.5, "no finite value" if chart.notes else "not logged", ha="center", **note)
        axes.set(xticks=[], yticks=[])
        return
    x0, x1, y0, y1 = chart.domain
    axes.set(xlim=(x0, x1), ylim=(y0, y1))
    axes.locator_params(nbins=6)
    if chart.form == "%":
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    if chart.across:
        axes.axhline(chart.across[0], color="gray", linewidth=1.2, linestyle=":", label=chart.across[1])


LOOKS: dict[str, dict[str, Any]] = {
    "solid": {"linewidth": 1.8},
    "dashed": {"linewidth": 1.8, "linestyle": (0, (4, 2))},
    "faint": {"linewidth": 1, "alpha": 0.3},
    "marks": {"linewidth": 1.2, "linestyle": (0, (1, 2)), "marker": "s", "markersize": 6, "markeredgecolor": "white"},
}  # fmt: skip
"""matplotlib's arguments for `Line.look`."""


def draw_line(axes: Any, line: Line) -> None:
    """Draw one line of a chart, and its intervals."""
    color = COLORS[line.color % len(COLORS)][0]
    dots = {"marker": "o", "markersize": 3.5} if line.dotted else {}
    axes.plot(*zip(*line.points, strict=True), color=color, label=line.label, **(dots | LOOKS[line.look]))
    if line.band:
        bars = [(x, *ends) for (x, _), ends in zip(line.points, line.band, strict=True) if math.isfinite(ends[0])]
        axes.vlines(*zip(*bars, strict=True), color=color, linewidth=1.2, alpha=0.6)
