"""Which charts a run's metrics make, alone and beside other runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from orpo_lite.evaluate.held_out import wilson_interval
from orpo_lite.report.charts import Chart, Line, Point, histogram, running_mean, thinned
from orpo_lite.report.panels import BLUE, GREEN, ORANGE, PANELS, PURPLE, RED, Metric, Panel
from orpo_lite.report.run_record import Told
from orpo_lite.report.run_shapes import number

SMOOTHED = 80
"""From this many points on, a running mean is drawn over the values themselves."""
BUDGET, MOST, LEAST = 12_000, 1000, 100
"""Points of all lines on a page, and of one line at most and at least."""


def curves(runs: Sequence[tuple[str, Told]]) -> tuple[list[Chart], list[str]]:
    """Charts of one run, or of several over one another, and what is to be said of how they are drawn.

    Args:
        runs: name and run; of several each metric gets a chart of its own.
    """
    several = len(runs) > 1
    panels = [one for panel in PANELS for one in (split(panel) if several else [panel])]
    # of several runs no line but the mean is drawn, see `add`; held-out ones are short
    lines = sum(len(panel.metrics) for panel in panels) * len(runs) * (1 if several else 2)
    most = max(LEAST, min(MOST, BUDGET // lines))
    charts, longest = [], 0
    for panel in panels:
        chart = Chart(panel.key, panel.title, [], panel.hint, y=panel.unit, form=panel.form, limits=panel.limits)
        for place, (name, run) in enumerate(runs):
            for metric in panel.metrics:
                longest = max(
                    longest, add(chart, run, metric, name if several else "", place, most, len(panel.metrics) == 1)
                )
        if panel.key == "accuracy":
            baseline = runs[0][1].evaluation("after") or runs[0][1].evaluation("before")
            if number(baseline.get("length_baseline")) and not several:
                chart.across = (baseline["length_baseline"], "always the longer answer")
        if any(line.finite() for line in chart.lines):
            charts.append(chart)
    notes = []
    if longest > most:
        notes.append(
            f"{longest:,} log lines: each curve is drawn from at most {most:,} points, the lowest and the highest of every "
            "stretch among them."
        )
    return charts, notes


def split(panel: Panel) -> list[Panel]:
    """A panel for each of its metrics."""
    if len(panel.metrics) == 1:
        return [panel]
    return [
        Panel(f"{panel.key}-{i}", f"{panel.title}: {metric.label}" if metric.label != "ORPO loss" else "ORPO loss", "",
              (metric,), panel.form, panel.unit, panel.limits)
        for i, metric in enumerate(panel.metrics)
    ]  # fmt: skip


def add(chart: Chart, run: Told, metric: Metric, name: str, place: int, most: int, alone: bool) -> int:
    """Put a metric's lines of training and of held-out pairs on a chart, and say how many values it has."""
    colour, scale = (place if name else metric.colour), metric.scale(run)
    dashed = place % 2 if name else metric.dashed  # so that neither runs nor metrics differ by colour alone
    label = f"{name}: {{}}" if name else metric.label + "{}"
    trained, held = values(run.metrics, metric.key, scale), values(run.metrics, f"eval_{metric.key}", scale)
    gone = [x for x, y in trained + held if not math.isfinite(y)]
    if gone:
        first = ", ".join(f"{x:g}" for x in gone[:5]) + (", ..." if len(gone) > 5 else "")
        chart.notes.append(
            f"{name + ': ' if name else ''}{len(gone):,} values of {metric.label} are not finite (step {first})"
        )
    if trained:
        many = len(trained) >= SMOOTHED and metric.key != "learning_rate"
        look = "dashed" if dashed else "solid"
        if not (many and name):  # of several runs the means alone, to be told apart
            drawn = thinned(trained, most)
            chart.lines.append(Line(label.format("training" if name else ""), drawn, colour, "faint" if many else look))
        if many:
            width = len(trained) // 25
            mean, words = thinned(running_mean(trained, width), most), f"mean of {width:,}"
            chart.lines.append(Line(label.format(f"training, {words}" if name else f", {words}"), mean, colour, look))
    if held:
        line = Line(label.format("held out" if name else ", held out"), thinned(held, most), colour, "marks")
        if not name and alone:
            line.colour = ORANGE
        pairs = (run.evaluation("after") or run.evaluation("before")).get("pairs")
        if metric.key == "rewards/accuracies" and number(pairs) and pairs:
            line.band = [
                wilson_interval(min(1.0, max(0.0, y)) * pairs, pairs) if math.isfinite(y) else (math.nan, math.nan)
                for _, y in line.points
            ]
        chart.lines.append(line)
    return max(len(trained), len(held))


def values(metrics: list[dict[str, Any]], key: str, scale: float = 1.0) -> list[Point]:
    """(step, value) of one metric; values that are not finite stay, as gaps."""
    return [(float(line["step"]), float(line[key]) * scale) for line in metrics if line.get(key) is not None]


# ---- distributions -------------------------------------------------------------------------------------------------


def margins(run: Told, when: str, scale: float | None = None) -> list[float]:
    """Reward margin of every held-out pair, by beta or another scale; empty where the run did not keep them."""
    kept = run.pairs.get(when) or {}
    chosen, rejected = kept.get("logps/chosen") or [], kept.get("logps/rejected") or []
    if len(chosen) != len(rejected):
        return []
    scale = run.beta if scale is None else scale
    return [scale * (a - b) if number(a) and number(b) else math.nan for a, b in zip(chosen, rejected, strict=True)]


def margin_chart(groups: dict[str, list[float]], x: str = "reward margin") -> Chart | None:
    """Distributions of margins over one another."""
    groups = {name: some for name, some in groups.items() if any(map(math.isfinite, some))}
    if not groups:
        return None
    edges, counts = histogram(groups)
    colours = [ORANGE, BLUE] if set(groups) == {"before", "after"} else list(range(len(groups)))
    chart = Chart("margins", "Reward margins of the held-out pairs", [], x=x, y="pairs", form="count",
                  stairs=True, limits=(0.0, None), upright=(0.0, "0"))  # fmt: skip
    for place, (name, some) in enumerate(counts.items()):
        last = place == len(counts) - 1
        points = [*zip(edges, map(float, some), strict=False), (edges[-1], 0.0)]
        chart.lines.append(Line(name, points, colours[place], "solid" if last else "dashed", fill=last))
        gone = sum(not math.isfinite(value) for value in groups[name])
        if gone:
            chart.notes.append(f"{gone:,} margins {name} are not finite and left out")
    return chart


def moved(run: Told) -> str:
    """How many pairs changed sides, in a sentence; empty where that is not known."""
    before, after = margins(run, "before"), margins(run, "after")
    if not before or len(before) != len(after):
        return ""
    won = sum(a <= 0 < b for a, b in zip(before, after, strict=True))
    lost = sum(b <= 0 < a for a, b in zip(before, after, strict=True))
    wrong = sum(b <= 0 for b in after)
    return (
        f"Of {len(after):,} pairs, {won:,} went from the wrong side to the right one and {lost:,} the other way; "
        f"on the wrong side now: {wrong:,}."
    )


def length_chart(kept: dict[str, Any], key: str, title: str) -> Chart | None:
    """Tokens of prompts, chosen and rejected answers, from the counts in run.json."""
    chart = Chart(key, title, [], x="tokens", y="pairs", form="count", stairs=True, limits=(0.0, None))
    for place, name in enumerate(("prompt", "chosen", "rejected")):
        one = kept.get(name) or {}
        if not number(one.get("width")) or not one.get("counts") or None in one["counts"]:
            continue
        counts = [float(count) for count in one["counts"]]
        points = [(i * float(one["width"]), count) for i, count in enumerate([*counts, 0.0])]
        look = "dashed" if name == "rejected" else "solid"
        chart.lines.append(Line(f"{name} (median {one.get('median'):g}, longest {one.get('max'):,})" if
                                number(one.get("median")) and number(one.get("max")) else name,
                                points, (PURPLE, GREEN, RED)[place], look))  # fmt: skip
    return chart if chart.lines else None
