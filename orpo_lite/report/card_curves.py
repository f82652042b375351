"""curves.png: loss parts, rewards, accuracy and learning rate of a run, from metrics.jsonl."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple


class Series(NamedTuple):
    metric: str
    label: str
    colour: str
    scale: float = 1.0


BLUE, ORANGE, GREEN, RED, GREY = "#0b68cb", "#c2560c", "#1a7f37", "#cf222e", "#6e7781"
PANELS: tuple[tuple[str, tuple[Series, ...]], ...] = (
    ("Loss", (Series("loss", "ORPO loss", BLUE), Series("nll_loss", "NLL", ORANGE))),
    ("Odds-ratio term, before beta", (Series("log_odds_ratio", "-log sigmoid(log odds)", BLUE, -1.0),)),
    ("Rewards", (Series("rewards/chosen", "chosen", GREEN), Series("rewards/rejected", "rejected", RED))),
    ("Reward margin", (Series("rewards/margins", "chosen - rejected", BLUE),)),
    ("Reward accuracy", (Series("rewards/accuracies", "training pairs", BLUE),)),
    ("Learning rate", (Series("learning_rate", "learning rate", BLUE),)),
)
SMOOTHED = 80
"""From this many points on, a running mean is drawn over the values themselves."""
WIDTH, HEIGHT = 1500, 840  # pixels


def draw_curves(lines: list[dict[str, Any]], path: Path, length_baseline: float | None = None) -> bool:
    """Draw metrics.jsonl's lines as a PNG of 1500 x 840 pixels on an opaque light ground; the same lines, the same bytes.

    Lines are training, squares the evaluations on held-out pairs. Values that are not finite are left out, and the
    panel says how many.

    Args:
        length_baseline: accuracy of always preferring the longer answer, drawn across the accuracy panel.

    Returns:
        False where no line holds any of the metrics: then nothing is written.
    """
    names = [series.metric for _, panel in PANELS for series in panel]
    if not any(points(lines, prefix + name)[0] for name in names for prefix in ("", "eval_")):
        return False
    # not pyplot: it keeps figures and a backend for the whole process, which may be a user's notebook
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    last = max(1, *(line["step"] for line in lines))
    with matplotlib.style.context("default"):  # whatever the user's own style is
        figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=100, facecolor="white")
        FigureCanvasAgg(figure)
        # a layout engine would draw everything twice
        figure.subplots_adjust(left=0.06, right=0.985, bottom=0.075, top=0.955, wspace=0.19, hspace=0.3)
        for axes, (title, panel) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
            draw_panel(axes, title, panel, lines, length_baseline)
            axes.set_xlim(-0.03 * last, 1.03 * last)
        figure.savefig(path, format="png", metadata={"Software": None})
    return True


def draw_panel(
    axes: Any, title: str, panel: tuple[Series, ...], lines: list[dict[str, Any]], baseline: float | None
) -> None:
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color="#1c2024")
    left_out = 0
    for series in panel:
        trained, gone = points(lines, series.metric, series.scale)
        held, gone_held = points(lines, f"eval_{series.metric}", series.scale)
        left_out += gone + gone_held
        if trained:
            steps, values = zip(*trained, strict=True)
            many = len(trained) >= SMOOTHED and title != "Learning rate"
            axes.plot(steps, values, color=series.colour, linewidth=1 if many else 1.8, alpha=0.3 if many else 1,
                      marker="o" if len(trained) <= 40 else None, markersize=3.5,
                      label=None if many else series.label)  # fmt: skip
            if many:
                width = len(trained) // 25
                label = f"{series.label} (mean of {width})"
                axes.plot(
                    steps[width - 1 :], running_mean(values, width), color=series.colour, linewidth=2, label=label
                )
        if held:
            name = "held-out pairs" if len(panel) == 1 else f"{series.label}, held out"
            steps, values = zip(*held, strict=True)
            dark = series.colour if len(panel) > 1 else ORANGE
            axes.plot(steps, values, color=dark, linewidth=1.2, linestyle=(0, (4, 2)), marker="s", markersize=6,
                      markeredgecolor="white", markeredgewidth=0.8, label=name)  # fmt: skip
    if title == "Reward accuracy":
        axes.set_ylim(-0.04, 1.04)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        if baseline is not None and math.isfinite(baseline):
            axes.axhline(baseline, color=GREY, linewidth=1.2, linestyle=":", label="always the longer answer")
    if title == "Learning rate":
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        axes.set_ylim(bottom=0)
    if left_out:
        axes.text(0.98, 0.02, f"{left_out} values that are not finite left out", transform=axes.transAxes, ha="right",
                  fontsize=9, color=RED)  # fmt: skip
    axes.set_xlabel("optimizer step", fontsize=10, color="#424a53")
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.tick_params(labelsize=10, colors="#424a53")
    axes.grid(color="#d8dee4", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#afb8c1")
    if axes.get_legend_handles_labels()[0]:
        if title != "Learning rate":  # it would say the title again
            axes.legend(fontsize=9.5, framealpha=0.85, edgecolor="#d8dee4")
    else:
        axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", va="center", fontsize=11, color=GREY)


def points(lines: list[dict[str, Any]], name: str, scale: float = 1.0) -> tuple[list[tuple[int, float]], int]:
    """(step, value) of one metric, and how many of its values are not finite."""
    values = [(line["step"], line[name] * scale) for line in lines if isinstance(line.get(name), int | float)]
    finite = [(step, value) for step, value in values if math.isfinite(value)]
    return finite, len(values) - len(finite)


def running_mean(values: tuple[float, ...], width: int) -> list[float]:
    """Means of the last `width` values, from the first place that has as many."""
    return [math.fsum(values[i - width + 1 : i + 1]) / width for i in range(width - 1, len(values))]
