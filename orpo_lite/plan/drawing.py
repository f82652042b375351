"""A plan's bars as a file: PNG and SVG for documents, HTML for a browser, and the figure that report.html takes."""

from __future__ import annotations

import io
import textwrap
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo_lite.common.errors import RequestError

if TYPE_CHECKING:  # a file name is checked before torch is loaded
    from matplotlib.figure import Figure

    from orpo_lite.plan.picture import Bar, Picture, Segment

SUFFIXES = (".png", ".svg", ".html")
WIDTH, ROW, LETTER = 900, 30, 6.2
"""Pixels: of the figure, of a bar's row, and of a letter of 11 pixels on the average."""
DARK, SOFT = "#1c2024", "#424a53"
ROOM = "the card's memory"


def check(path: Path) -> None:
    """Find a picture's name wrong before the plan is made.

    Raises:
        RequestError: another kind of file, or a folder that is not there.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise RequestError(f"--picture: found {str(path)!r}, expected a name that ends in {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise RequestError(f"--picture: found no folder {path.parent}; make it, or give another name")


def write(drawn: Picture, path: Path) -> None:
    """Write a picture of the kind that its name says, whole or not at all; one that is there is replaced.

    Raises:
        RequestError: as `check`, or the file cannot be written.
    """
    check(path)
    kind = path.suffix.lower().removeprefix(".")
    content = page(drawn).encode() if kind == "html" else image(drawn, kind)
    aside = path.with_name(f"{path.name}.part")
    try:
        aside.write_bytes(content)
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise RequestError(f"--picture: {path} cannot be written: {error.strerror}") from None


def label(bar: Bar, segment: Segment, pixels: float) -> str:
    """What is written on a segment: the most that it has room for, but what stands behind the bar."""
    number = f"{segment.size / 1e9:.2f}"
    texts = (f"{segment.part} {number}", number) if segment.part != bar.words else ()
    return next((text for text in texts if len(text) * LETTER + 6 < pixels), "")


def ending(bar: Bar, drawn: Picture) -> str:
    """What stands behind a bar; an arrow where the card goes on beyond the picture."""
    return f"→ {bar.ending}" if bar.room and bar.room > drawn.scale else bar.ending


# ---- PNG and SVG -----------------------------------------------------------------------------------------------------


def image(drawn: Picture, kind: str) -> bytes:
    """The figure as PNG or SVG, on an opaque light ground; the same plan, the same bytes."""
    import matplotlib.style

    buffer = io.BytesIO()
    with matplotlib.style.context(["default", {"svg.fonttype": "none", "svg.hashsalt": "orpo_lite"}]):
        metadata = (
            {"Software": None} if kind == "png" else {"Date": None, "Title": drawn.title, "Description": drawn.note}
        )
        figure(drawn).savefig(buffer, format=kind, metadata=metadata)
    return buffer.getvalue()


def figure(drawn: Picture) -> Figure:
    """The bars drawn by matplotlib, phases above, cards below where there are several."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    title = textwrap.wrap(drawn.title, 90)
    rows = sum(len(group) + 1.3 for group in drawn.groups) + len(title) + 3
    made = Figure(figsize=(WIDTH / 100, rows * ROW / 100), dpi=200, facecolor="white", layout="constrained")
    FigureCanvasAgg(made)
    # names may hold what matplotlib would take for formulas
    made.suptitle("\n".join(title), x=0.01, ha="left", fontsize=11, fontweight="bold", color=DARK, parse_math=False)
    ratios = [len(group) + 0.6 for group in drawn.groups]
    panels = made.subplots(len(drawn.groups), 1, squeeze=False, height_ratios=ratios)
    for axes, group in zip(panels.flat, drawn.groups, strict=True):
        draw(axes, group, drawn)
    space = "\n" if drawn.phases[0].room is not None else ""  # for the edge's name
    made.axes[0].set_title(drawn.note + space, loc="left", fontsize=9, color=SOFT)
    swatches = [Patch(color=segment.colour, label=segment.part) for segment in drawn.legend]
    made.legend(handles=swatches, loc="outside lower left", ncols=5, fontsize=8, frameon=False, handlelength=1)
    made.axes[-1].set_xlabel("GB (10^9 bytes)", fontsize=9, color=SOFT)
    return made


def draw(axes: Any, group: list[Bar], drawn: Picture) -> None:
    scale = drawn.scale / 1e9
    for row, bar in enumerate(group):
        left = 0.0
        if bar.room is not None:
            axes.barh(row, min(bar.room / 1e9, scale), height=0.72, color="#eaeef2", label=ROOM)
        for segment in bar.segments:
            size = segment.size / 1e9
            axes.barh(row, size, left=left, height=0.72, color=segment.colour, edgecolor="white", linewidth=0.4,
                      label=segment.part)  # fmt: skip
            text = label(bar, segment, size / scale * WIDTH * 0.7)
            axes.text(left + size / 2, row, text, ha="center", va="center", fontsize=7.5, color=segment.ink)
            left += size
        if bar.room is not None:
            edge = bar.room / 1e9
            if edge <= scale:
                axes.plot([edge, edge], [row - 0.5, row + 0.5], color=DARK, linewidth=1.6, solid_capstyle="butt")
            left = max(left, min(edge, scale))
        axes.text(left + scale * 0.008, row, ending(bar, drawn), va="center", fontsize=8.5, color=DARK)
    if group[0].room is not None and group is drawn.phases:
        axes.text(min(group[0].room / 1e9, scale), -0.6, drawn.edge, ha="center", va="bottom", fontsize=8, color=DARK)
    axes.set_yticks(range(len(group)), [bar.name for bar in group])
    axes.set_ylim(len(group) - 0.5, -0.5)
    axes.set_xlim(0, scale * (1.04 + 0.009 * max(len(ending(bar, drawn)) for group in drawn.groups for bar in group)))
    axes.set_xticks(drawn.ticks)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.tick_params(labelsize=9, colors=SOFT, length=0)
    axes.grid(axis="x", color="#d8dee4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color("#afb8c1")


# ---- HTML ------------------------------------------------------------------------------------------------------------

STYLE = """
.plan{margin:0}.plan svg{min-width:34rem}.plan text{fill:var(--fg);font:11px system-ui,sans-serif}
.plan .edge{stroke:var(--fg);stroke-width:2}.plan .tick{stroke:var(--line)}.plan rect{stroke:var(--bg);stroke-width:.4}.plan .room{fill:var(--line);opacity:.6}
.plan i{display:inline-block;width:.8em;height:.8em;margin-right:.35em}.plan .key span{margin-right:1.2em;white-space:nowrap}
"""


def page(drawn: Picture) -> str:
    """A page that opens offline, light and dark."""
    from orpo_lite.report import document

    numbers = [
        f"<tr><th scope=row>{escape(bar.name)}</th><td>{escape(bar.ending)}</td><td>"
        + ", ".join(f"{escape(s.part)} {s.size / 1e9:.2f}" for s in bar.segments)
        + "</td></tr>"
        for bar in drawn.phases
    ]
    body = (
        f"<h1>{escape(drawn.title)}</h1>{html(drawn)}"
        f"<details><summary>in numbers, GB</summary><div class=wide><table>{''.join(numbers)}</table></div></details>"
    )
    return document(drawn.title, body)


def html(drawn: Picture) -> str:
    """The bars as a figure with inline SVG, values on hover; its colours are the page's (see report.STYLE)."""
    everything = [bar for group in drawn.groups for bar in group]
    left = max(len(bar.name) for bar in everything) * LETTER + 12
    across = (WIDTH - left - max(len(ending(bar, drawn)) for bar in everything) * LETTER - 12) / drawn.scale
    rows, y = [], 0
    if drawn.phases[0].room is not None:
        y = 16
        x = left + min(drawn.phases[0].room, drawn.scale) * across
        rows.append(f"<text x={x:.1f} y=11 text-anchor=middle>{escape(drawn.edge)}</text>")
    for group in drawn.groups:
        rows.append(svg_rows(group, y, left, across, drawn))
        y += len(group) * ROW + 34
    said = "; ".join(f"{bar.name} {bar.ending}" for bar in everything)
    key = "".join(f"<span><i style='background:{s.colour}'></i>{escape(s.part)}</span> " for s in drawn.legend)
    return (
        f"<figure class=plan><style>{STYLE}</style><p>{escape(drawn.note)}</p><div class=wide>"
        f"<svg viewBox='0 0 {WIDTH} {y - 12}' role=img aria-labelledby='plan-title plan-desc'>"
        f"<title id=plan-title>Memory of {escape(drawn.title)}</title><desc id=plan-desc>GB: {escape(said)}</desc>"
        f"{''.join(rows)}</svg></div><div class=key>{key}</div></figure>"
    )


def svg_rows(group: list[Bar], top: float, left: float, across: float, drawn: Picture) -> str:
    bottom = top + len(group) * ROW
    parts = []
    for i, tick in enumerate(drawn.ticks):
        x, unit = left + tick * 1e9 * across, " GB" if i == len(drawn.ticks) - 1 else ""
        parts.append(
            f"<path class=tick d='M{x:.1f},{top}V{bottom + 4}'/><text x={x:.1f} y={bottom + 17} text-anchor=middle>{tick:g}{unit}</text>"
        )
    for row, bar in enumerate(group):
        y, x = top + row * ROW, left
        middle = y + ROW / 2 + 4
        parts.append(f"<text x={left - 8:.1f} y={middle} text-anchor=end>{escape(bar.name)}</text>")
        if bar.room is not None:
            width = min(bar.room, drawn.scale) * across
            parts.append(
                f"<rect class=room x={left:.1f} y={y + 4} width={width:.1f} height={ROW - 8}>"
                f"<title>{ROOM}: {bar.room / 1e9:g} GB</title></rect>"
            )
        for segment in bar.segments:
            width = segment.size * across
            parts.append(
                f"<rect x={x:.1f} y={y + 4} width={width:.1f} height={ROW - 8} fill='{segment.colour}'>"
                f"<title>{escape(bar.name)}: {escape(segment.part)} {segment.size / 1e9:.3f} GB</title></rect>"
            )
            if text := label(bar, segment, width):
                parts.append(
                    f"<text x={x + width / 2:.1f} y={middle} text-anchor=middle pointer-events=none "
                    f"style='fill:{segment.ink}'>{escape(text)}</text>"
                )
            x += width
        if bar.room is not None:
            edge = left + min(bar.room, drawn.scale) * across
            if bar.room <= drawn.scale:
                parts.append(f"<path class=edge d='M{edge:.1f},{y}V{y + ROW}'/>")
            x = max(x, edge)
        parts.append(f"<text x={x + 6:.1f} y={middle}>{escape(ending(bar, drawn))}</text>")
    return "".join(parts)
