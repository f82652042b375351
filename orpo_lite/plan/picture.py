"""A plan as stacked bars, one a phase, and how the cards stand to it; here on the screen, elsewhere as files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.columns import Columns
from rich.console import Console
from rich.style import Style
from rich.text import Text

from orpo_lite.common.text import visible
from orpo_lite.plan.allocations import (
    ADAPTER,
    BASE,
    BUFFERS,
    CONSTANTS,
    ENDS,
    GATHERED,
    GRADIENTS,
    HEAD,
    KEPT,
    LAYER,
    LOADING,
    OPTIMIZER,
    WORKSPACE,
)
from orpo_lite.plan.gpus import FITS, NOT, TIGHT
from orpo_lite.plan.predict import CONTEXT, LIBRARIES, MARGIN

MEASURED, RESERVED = "measured in tensors", "reserved beside them"
NEEDED = "needed"
# letters, as not everybody sees colours and not every terminal has them; the colours of parts stay a CIE76 distance of
# 18 and more from each other also to readers who lack one of the three kinds of cones (Machado, 2009)
LOOKS = {
    BASE: ("B", "#2E46A1"),
    CONSTANTS: ("q", "#7587FA"),
    ENDS: ("E", "#B3E0F7"),
    ADAPTER: ("A", "#009E73"),
    GRADIENTS: ("G", "#FAFA55"),
    OPTIMIZER: ("O", "#4A8614"),
    KEPT: ("K", "#E8AC14"),
    LAYER: ("R", "#FA3C2A"),
    HEAD: ("H", "#AB76C6"),
    WORKSPACE: ("W", "#A73D40"),
    LOADING: ("L", "#B56C9B"),
    GATHERED: ("g", "#10FFA9"),
    BUFFERS: ("b", "#471647"),
    LIBRARIES: ("l", "#6E7781"),
    MARGIN: ("m", "#AFB8C1"),
    CONTEXT: ("c", "#8C959F"),
    MEASURED: ("M", "#0E7C86"),
    RESERVED: ("r", "#9FD3D6"),
    # verdicts: greys, as the parts' colours are taken; the words stand beside them
    FITS: ("#", "#57606A"),
    TIGHT: ("+", "#AFB8C1"),
    NOT: ("x", "#0B0E12"),
}
UNKNOWN = ("?", "#8A8F98")
"""A part in the plan of a run that another version of the kit has made."""
WIDEST = 100
"""Columns of the longest bar on the screen."""


@dataclass(frozen=True)
class Segment:
    part: str
    size: int
    """Bytes."""

    @property
    def letter(self) -> str:
        return LOOKS.get(self.part, UNKNOWN)[0]

    @property
    def colour(self) -> str:
        return LOOKS.get(self.part, UNKNOWN)[1]

    @property
    def ink(self) -> str:
        """Black or white, whichever has the higher contrast on its colour (WCAG 2)."""
        channels = (int(self.colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        return "#000000" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else "#ffffff"


@dataclass(frozen=True)
class Bar:
    name: str
    segments: tuple[Segment, ...]
    room: int | None = None
    """Bytes of the card that it is held against."""
    words: str = ""

    @property
    def total(self) -> int:
        return sum(segment.size for segment in self.segments)

    @property
    def ending(self) -> str:
        return f"{gigabytes(self.total)} {self.words}".rstrip()


@dataclass(frozen=True)
class Picture:
    title: str
    note: str
    phases: list[Bar]
    """Each phase's fullest moment by part, what is needed of the card, and what was measured, where it was."""
    cards: list[Bar]
    """One for each size of card, where there are several."""
    edge: str
    """What the lines across the bars stand for; empty where there are none."""

    @property
    def groups(self) -> list[list[Bar]]:
        return [self.phases, self.cards] if self.cards else [self.phases]

    @property
    def scale(self) -> float:
        """Bytes that the width of the picture stands for: a card of twice the need and more is not drawn to its end."""
        bars = [bar for group in self.groups for bar in group]
        largest = max(bar.total for bar in bars)
        return max(largest, *(bar.room for bar in bars if bar.room and bar.room <= 2 * largest), 1)

    @property
    def ticks(self) -> list[float]:
        """Round numbers of GB along the scale."""
        return ticks(self.scale / 1e9)

    @property
    def legend(self) -> list[Segment]:
        """Every part of the phases' bars, once."""
        found = {segment.part: segment for bar in self.phases for segment in bar.segments}
        known = [part for part in LOOKS if part in found]
        return [found.pop(part) for part in known] + list(found.values())


def gigabytes(size: float) -> str:
    """Bytes as GB, 10^9."""
    return f"{size / 1e9:.2f}"


def ticks(largest: float) -> list[float]:
    """0 and the multiples, three to eight, of a round step up to `largest`."""
    power = 1e-9
    while power * 10 <= largest:
        power *= 10
    step = next(s * power for s in (0.2, 0.5, 1, 2) if largest / (s * power) < 8)
    return [i * step for i in range(int(largest / step * (1 + 1e-9)) + 1)]


def picture(plan: dict[str, Any], cards: Sequence[dict[str, Any]] = ()) -> Picture:
    """The bars of a plan.

    Args:
        plan: as `Plan.as_dict` gives it and run.json keeps it, there with what was `measured`.
        cards: verdicts, as `show.as_dict` gives them. A single card's edge is drawn across all phases.
    """
    room = cards[0]["total_bytes"] if len(cards) == 1 else None
    edge = sized(cards[0]) if room else "the card's memory" if cards else ""
    phases = [
        Bar(name, segments({part: size for part, size in parts.items() if part != "total"}), room)
        for name, parts in plan["phases"].items()
    ]
    note = f"peak {gigabytes(plan['peak_bytes'])} GB in tensors, in the {plan['fullest_phase']} phase"
    if plan["assumed"]:
        fullest = next(bar for bar in phases if bar.name == plan["fullest_phase"])
        words = cards[0]["verdict"] if room else ""
        phases.append(Bar(NEEDED, fullest.segments + segments(plan["assumed"]), room, words))
        note += f"; {gigabytes(plan['needed_bytes'])} GB with what is assumed"
    measured = plan.get("measured")
    if measured:
        allocated = measured["allocated_bytes"]
        beside = measured.get("reserved_bytes", allocated) - allocated
        phases.append(Bar("measured", segments({MEASURED: allocated, RESERVED: beside})))
    title = visible(f"{plan['recipe']}: {plan['model']}")
    return Picture(title, note, phases, [] if room else sizes(cards), edge)


def segments(parts: dict[str, int]) -> tuple[Segment, ...]:
    return tuple(Segment(part, size) for part, size in parts.items() if size > 0)


def sizes(cards: Sequence[dict[str, Any]]) -> list[Bar]:
    """Cards of a size that need the same are one bar, under the size's name or that of the first of them."""
    found: dict[tuple[int, int], Bar] = {}
    for card in cards:
        room, needed = card["total_bytes"], card["needed_bytes"]
        bar = Bar(sized(card), (Segment(card["verdict"], needed),), room, card["verdict"])
        found.setdefault((room, needed), bar)
    return list(found.values())


def sized(card: dict[str, Any]) -> str:
    size = f"{card['total_bytes'] / 1e9:g} GB"
    return size if card["card"] == size else f"{size}, {card['card']}"


# ---- on the screen -------------------------------------------------------------------------------------------------


def bars(console: Console, drawn: Picture) -> None:
    """The bars in a terminal's columns, in letters under the colours: they are there too where colours are not.

    A card's edge is `|`, what it has left `.`; `>` where its edge lies further out.
    """
    everything = [bar for group in drawn.groups for bar in group]
    names = max(len(bar.name) for bar in everything)
    endings = max(len(bar.ending) for bar in everything)
    width = min(WIDEST, max(10, console.width - names - endings - 5))  # 2 at each gap, 1 for an edge
    used = ""
    for group in drawn.groups:
        console.print()
        for bar in group:
            row = cells(bar, drawn.scale, width)
            used += row.plain
            number, _, words = bar.ending.partition(" ")
            line = Text.assemble(f"{bar.name:<{names}}  ", row, f"  {number} ", (words, LOOKS.get(words, UNKNOWN)[1]))
            line.rstrip()
            console.print(line, no_wrap=True, overflow="crop")
        console.print(Text(" " * (names + 2) + axis(drawn, width), style="dim"), no_wrap=True, overflow="crop")
        if group is drawn.phases:
            items = [
                Text.assemble((segment.letter, f"{segment.ink} on {segment.colour}"), f" {segment.part}")
                for segment in drawn.legend
                if segment.letter in used
            ]
            items += [Text(f"| {drawn.edge}")] if drawn.edge else []
            console.print(Columns(items, padding=(0, 2)))
        elif group:
            console.print("# fits, + tight, x does not, | the card's edge, . room left, > beyond", style="dim")


def cells(bar: Bar, scale: float, width: int) -> Text:
    """A bar of `width` columns for `scale` bytes, and one column more, for an edge at its end."""
    row: list[tuple[str, Style]] = []
    reached = 0
    for segment in bar.segments:
        start, reached = len(row), reached + segment.size
        columns = round(reached / scale * width) - start
        row += [(segment.letter, Style(color=segment.colour, bgcolor=segment.colour))] * columns
        if columns:
            row[start] = (segment.letter, Style(color=segment.ink, bgcolor=segment.colour))
    filled = len(row)
    if bar.room is not None:
        edge = round(bar.room / scale * width)
        if bar.room < bar.total:
            edge = max(0, min(edge, filled - 1))  # what is over must be seen to be
        dim = Style(dim=True)
        row += [(".", dim)] * (min(edge, width) - filled)
        if edge > width:
            row.append((">", dim))
        elif edge < filled:
            row[edge] = ("|", Style(bold=True, color="#ffffff", bgcolor="#000000"))
        else:
            row.append(("|", Style(bold=True)))
    row += [(" ", Style())] * (width + 1 - len(row))
    return Text.assemble(*row)


def axis(drawn: Picture, width: int) -> str:
    """Numbers under the bars, each beginning where it stands for; those that would touch another are left out."""
    line = ""
    for tick in drawn.ticks:
        place = round(tick * 1e9 / drawn.scale * width)
        if place == 0 or place > len(line):
            line = f"{line:<{place}}{tick:g}"
    return f"{line} GB"
