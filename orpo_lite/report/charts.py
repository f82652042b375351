"""The charts of a run: which metrics are drawn, and which of them together; for page, comparison and model card."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import yaml
from matplotlib.ticker import MaxNLocator

from orpo_lite.common.text import counted
from orpo_lite.evaluate.held_out import wilson_interval
from orpo_lite.report.drawing import BLUE, ORANGE, Chart, Line, Point, apart, is_finite, running_mean, save_png

if TYPE_CHECKING:
    from orpo_lite.trainer.run_record import LoadedRun

SMOOTHED = 80
"""From this many points on, a running mean is drawn over the values themselves."""


@dataclass(frozen=True)
class Metric:
    key: str
    label: str
    color: int = BLUE
    is_odds_term: bool = False
    """Logged as the odds term before it is scaled by -beta."""
    dashed: bool = False
    smoothed: bool = True


@cache
def panels() -> list[tuple[Chart, list[Metric]]]:
    """Return the charts of a run, without their lines, and the metrics that each draws."""
    content = yaml.safe_load((Path(__file__).parent / "charts.yaml").read_text("utf-8"))
    return [(Chart(**one["chart"]), [Metric(**metric) for metric in one["metrics"]]) for one in content]


ON_CARD = 6
"""Panels on the model card: the first ones."""


def curves(runs: Sequence[tuple[str, LoadedRun]]) -> list[Chart]:
    """Return the charts of one run, or of several over one another.

    Args:
        runs: name and run; of several each metric gets a chart of its own.
    """
    shown = panels() if len(runs) == 1 else [one for panel in panels() for one in split(*panel)]
    return [chart for panel in shown if (chart := draw(*panel, runs)).drawable]


def draw_card_curves(run: LoadedRun, path: Path) -> bool:
    """Draw curves.png for the model card.

    Returns:
        False where no line of metrics.jsonl holds any of the metrics: then nothing is written.
    """
    charts = [draw(*panel, [("", run)]) for panel in panels()[:ON_CARD]]
    if not any(chart.lines for chart in charts):
        return False
    save_png(charts, path)
    return True


def split(panel: Chart, metrics: list[Metric]) -> list[tuple[Chart, list[Metric]]]:
    """Return a panel for each metric of a panel."""
    if len(metrics) == 1:
        return [(panel, metrics)]
    titles = ["ORPO loss" if metric.key == "loss" else f"{panel.title}: {metric.label}" for metric in metrics]
    return [
        (replace(panel, key=f"{panel.key}-{place}", hint="", title=titles[place]), [metric])
        for place, metric in enumerate(metrics)
    ]


def draw(panel: Chart, metrics: list[Metric], runs: Sequence[tuple[str, LoadedRun]]) -> Chart:
    """Return a panel with its lines: for every run and metric one of training and one of the held-out pairs."""
    chart = replace(panel, lines=[], notes=[])
    for place, (name, run) in enumerate(runs):
        for metric in metrics:
            if len(runs) > 1:  # dashes, so that runs do not differ by color alone
                metric = replace(metric, color=place, dashed=bool(place % 2))
            add_lines(chart, run, metric, name, alone=len(metrics) == len(runs) == 1)
    baseline = runs[0][1].last_evaluation.get("length_baseline")
    if panel.key == "accuracy" and len(runs) == 1 and is_finite(baseline) and chart.lines:
        chart.across = (baseline, "always the longer answer")
    return chart


def add_lines(chart: Chart, run: LoadedRun, metric: Metric, name: str, alone: bool) -> None:
    """Add the lines of one metric of one run to a chart.

    Args:
        name: the run's, where there are several.
        alone: no other metric is on the chart, so the held-out line may have a color of its own.
    """
    trained, held = values(run, metric), values(run, metric, "eval_")
    if gone := [x for x, y in trained + held if not math.isfinite(y)]:
        first = ", ".join(f"{x:g}" for x in gone[:5]) + (", ..." if len(gone) > 5 else "")
        of = f"{name}: " if name else ""
        chart.notes.append(f"{of}not finite, of {metric.label}: {counted(len(gone), 'value')} (step {first})")
    if trained:
        chart.lines += training_lines(trained, metric, name)
    if held:
        label = f"{name}: held out" if name else f"{metric.label}, held out"
        line = Line(label, held, ORANGE if alone else metric.color, "marks")
        pairs = run.last_evaluation.get("pairs")
        if metric.key == "rewards/accuracies" and pairs:
            line.band = [accuracy_interval(y, pairs) for _, y in line.points]
        chart.lines.append(line)


def accuracy_interval(share: float, pairs: int) -> Point:
    """Return the 95% interval of a share of so many pairs; NaN for one that is not finite."""
    return wilson_interval(min(1.0, max(0.0, share)) * pairs, pairs) if math.isfinite(share) else (math.nan, math.nan)


def training_lines(points: list[Point], metric: Metric, name: str) -> list[Line]:
    """Return the line of a metric; where it is long, its running mean, and the line itself behind it."""
    look = "dashed" if metric.dashed else "solid"
    label = f"{name}: training" if name else metric.label
    if len(points) < SMOOTHED or not metric.smoothed:
        return [Line(label, points, metric.color, look)]
    width = len(points) // 25
    mean = Line(f"{label}, mean of {width:,}", running_mean(points, width), metric.color, look)
    if name:  # of several runs the means alone, to be told apart
        return [mean]
    return [Line(label, points, metric.color, "faint"), mean]


def values(run: LoadedRun, metric: Metric, of: str = "") -> list[Point]:
    """Return step and value of a metric at each log line that has it; values that are not finite stay, as gaps."""
    key, scale = of + metric.key, -run.beta if metric.is_odds_term else 1.0
    return [(line["step"], line[key] * scale) for line in run.metrics if key in line]


def margins(run: LoadedRun, when: Literal["before", "after"], scale: float | None = None) -> list[float]:
    """Return the reward margin of every held-out pair; empty where the run did not keep them.

    Args:
        scale: of the log-probs; default: the run's beta.
    """
    kept = run.pairs.before if when == "before" else run.pairs.after
    chosen, rejected = kept.get("logps/chosen", []), kept.get("logps/rejected", [])
    if len(chosen) != len(rejected):
        return []
    scale = run.beta if scale is None else scale
    return [scale * (a - b) for a, b in zip(chosen, rejected, strict=True)]


def margin_chart(groups: dict[str, list[float]], title: str, x: str, hint: str) -> Chart | None:
    """Return distributions of margins over one another, or None where there is no finite margin."""
    groups = {name: some for name, some in groups.items() if any(map(math.isfinite, some))}
    if not groups:
        return None
    edges, counts = histogram(groups)
    colors = [ORANGE, BLUE] if set(groups) == {"before", "after"} else list(range(len(groups)))
    chart = Chart(
        "margins", title, hint=hint, x=x, y="pairs", form="count", stairs=True, limits=(0.0, None), upright=0.0
    )
    for place, (name, some) in enumerate(counts.items()):
        last = place == len(counts) - 1
        points = list(zip(edges, [*some, 0.0], strict=True))
        chart.lines.append(Line(name, points, colors[place], "solid" if last else "dashed", fill=last))
        if gone := sum(not math.isfinite(value) for value in groups[name]):
            chart.notes.append(f"not finite, and left out: {counted(gone, 'margin')} {name}")
    return chart


def histogram(groups: dict[str, list[float]]) -> tuple[list[float], dict[str, list[float]]]:
    """Return edges at multiples of a round width, one at 0 if it lies inside, and counts of each group's finite values."""
    finite = {name: [v for v in some if math.isfinite(v)] for name, some in groups.items()}
    everything = [v for some in finite.values() for v in some]
    low, high = apart(everything, 0.5)
    bins = min(40, max(8, len(everything) // 4))
    edges = [float(f"{edge:.12g}") for edge in MaxNLocator(bins, steps=[1, 2, 5, 10]).tick_values(low, high)]
    return edges, {
        name: np.histogram(np.clip(some, edges[0], edges[-1]), edges)[0].astype(float).tolist()
        for name, some in finite.items()
    }
