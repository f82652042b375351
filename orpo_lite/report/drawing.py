"""Charts as figures: inline SVG that needs no script, its numbers as a table, and names for screen readers."""

from __future__ import annotations

import math
from html import escape

from orpo_lite.report.charts import Chart, Line, Point, plain, ticks

DASHES = {"dashed": "7 4", "marks": "2 4"}
ROWS = 12
"""Of the table beneath a chart."""


def figure(chart: Chart) -> str:
    """One chart. Its script, where it runs, adds reading, zooming and keys to what is here already."""
    x0, x1, y0, y1 = chart.domain

    def across(x: float) -> float:
        return (x - x0) / (x1 - x0)

    def up(y: float) -> float:
        return (y - y0) / (y1 - y0)

    def place(point: Point) -> str:
        return f"{across(point[0]) * 1000:.0f} {1000 - up(point[1]) * 1000:.0f}"

    marks, labels = [], []
    for y in ticks(y0, y1, 4):
        marks.append(f"M0 {1000 - up(y) * 1000:.0f}H1000")
        labels.append(f"<span class=y style='bottom:{up(y):.2%}'>{plain(y, chart.form)}</span>")
    for x in ticks(x0, x1, 6):
        labels.append(f"<span class=x style='left:{across(x):.2%}'>{plain(x)}</span>")
    drawn = [f"<path class=grid d='{''.join(marks)}'/><g class=lines>"]
    if chart.across and y0 <= chart.across[0] <= y1:
        drawn.append(f"<path class=level d='M0 {1000 - up(chart.across[0]) * 1000:.0f}H1000'/>")
    if chart.upright and x0 <= chart.upright[0] <= x1:
        drawn.append(f"<path class=level d='M{across(chart.upright[0]) * 1000:.0f} 0V1000'/>")
    for i, line in enumerate(chart.lines):
        drawn.append(f"<g data-line={i} class='{classes(line)}'>")
        if line.band:
            bars = zip(line.points, line.band, strict=True)
            drawn.append(
                "<path class=band d='"
                + "".join(f"M{place((x, low))}L{place((x, high))}" for (x, _), (low, high) in bars if low == low)
                + "'/>"
            )
        if line.fill:
            drawn.append(f"<path class=area d='{path(line, place, chart.stairs, up(0.0))}'/>")
        drawn.append(f"<path class=line d='{path(line, place, chart.stairs)}'/>")
        if line.look == "marks" or len(line.finite()) <= 30 and not chart.stairs:
            drawn.append(f"<path class=dots d='{''.join(f'M{place(p)}h0' for p in line.finite())}'/>")
        drawn.append("</g>")
    drawn.append("</g><path class=guide /><path class=reading /><rect class=pick height=1000 />")
    legend = "".join(
        f"<li data-line={i}>{key(line)}<span>{escape(line.label)}</span> <b>{'' if chart.stairs else plain(last(line), chart.form)}</b></li>"
        for i, line in enumerate(chart.lines)
    )
    if chart.across:
        legend += f"<li>{KEY.format('level', '')}<span>{escape(chart.across[1])}</span> <b>{plain(chart.across[0], chart.form)}</b></li>"
    notes = "".join(f"<p class=warn>{escape(note)}</p>" for note in chart.notes)
    unit = f" <span class=dim>{escape(chart.y)}</span>" if chart.y else ""
    hint = f"<p class=hint>{escape(chart.hint)}</p>" if chart.hint else ""
    return (
        f"<figure class=chart id='chart-{chart.key}'><figcaption><h3>{escape(chart.title)}{unit}</h3><div class=tools></div>{hint}"
        f"</figcaption><ul class=legend>{legend}</ul><div class=plot>"
        f"<svg viewBox='0 0 1000 1000' preserveAspectRatio=none role=img tabindex=0 aria-label='{escape(summary(chart), True)}'>"
        f"{''.join(drawn)}</svg>{''.join(labels)}</div><p class=axis>{escape(chart.x)}</p>{notes}{table(chart)}</figure>"
    )


KEY = "<svg class='key {}' viewBox='0 0 26 10' aria-hidden=true><path class=line d='M1 5H25'/>{}</svg>"


def key(line: Line) -> str:
    return KEY.format(classes(line), "<path class=dots d='M13 5h0'/>" if line.look == "marks" else "")


def classes(line: Line) -> str:
    return f"c{line.colour % 6} {line.look}"


def path(line: Line, place, stairs: bool, floor: float | None = None) -> str:  # noqa: ANN001
    """A line with gaps where values are not finite; as an area, closed at the floor."""
    parts, pen = [], "M"
    for i, point in enumerate(line.points):
        if not math.isfinite(point[1]):
            pen = "M"
            continue
        if stairs and pen == "L":
            parts.append(f"H{place(point).split()[0]}")
        parts.append(f"{pen}{place(point)}" if not (stairs and i and pen == "L") else f"V{place(point).split()[1]}")
        pen = "L"
    if floor is not None and parts:
        bottom = 1000 - floor * 1000
        first, final = place(line.points[0]).split()[0], place(line.points[-1]).split()[0]
        parts.append(f"L{final} {bottom:.0f}L{first} {bottom:.0f}Z")
    return "".join(parts)


def last(line: Line) -> float:
    """What stands beside a line while nothing is read."""
    finite = line.finite()
    return finite[-1][1] if finite else math.nan


def summary(chart: Chart) -> str:
    """The chart in words."""
    if chart.stairs:
        said = []
        for line in chart.lines:
            total = sum(y for _, y in line.finite())
            fullest = max(range(len(line.points) - 1), key=lambda i: line.points[i][1])
            said.append(
                f"{line.label}: {total:,.0f} pairs, from {plain(line.points[0][0])} to {plain(line.points[-1][0])}, most from "
                f"{plain(line.points[fullest][0])} to {plain(line.points[fullest + 1][0])}"
            )
    else:
        said = []
        for line in chart.lines:
            if finite := line.finite():
                low, high = min(y for _, y in finite), max(y for _, y in finite)
                said.append(
                    f"{line.label} from {plain(finite[0][1], chart.form)} at {finite[0][0]:g} to {plain(finite[-1][1], chart.form)} "
                    f"at {finite[-1][0]:g}, lowest {plain(low, chart.form)}, highest {plain(high, chart.form)}"
                )
    return f"{chart.title} by {chart.x}. {'; '.join(said)}."


def table(chart: Chart) -> str:
    """Some of the numbers, for who does not see the lines."""
    lines = [line for line in chart.lines if line.look != "faint"] or chart.lines
    xs = sorted({x for line in lines for x, _ in line.points})
    if chart.stairs:
        xs = xs[:-1]  # where the last bin ends
    shown = xs if len(xs) <= ROWS else [xs[i * (len(xs) - 1) // (ROWS - 1)] for i in range(ROWS)]
    if chart.stairs and len(xs) > ROWS:  # counts of some bins alone would mislead
        filled = [x for x in xs if any(y for line in lines for at, y in line.points if at == x)]
        shown = filled if len(filled) <= 60 else shown
    found = [dict(line.points) for line in lines]
    head = "".join(f"<th scope=col>{escape(line.label)}</th>" for line in lines)
    rows = "".join(
        f"<tr><th scope=row>{plain(x)}</th>"
        + "".join(f"<td>{plain(one[x], chart.form) if x in one else ''}</td>" for one in found)
        + "</tr>"
        for x in shown
    )
    some = f", {len(shown)} of {len(xs):,}" if len(shown) < len(xs) else ""
    return (
        f"<details class=numbers><summary>Numbers{some}</summary><div class=wide><table><thead><tr><th scope=col>{escape(chart.x)}"
        f"</th>{head}</tr></thead><tbody>{rows}</tbody></table></div></details>"
    )
