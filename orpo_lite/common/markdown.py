"""Markdown that no text from recipes, data or models can break out of."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from orpo_lite.common.text import visible


def inline(text: str) -> str:
    """Escape text for a sentence or a table cell, so that it is shown as it is."""
    escaped = "".join(f"\\{c}" if c in "\\`*_{}[]<>|#~$&" else c for c in shown_lines(text))
    # what would open a list or a rule at the start of a line
    return re.sub(r"^(\d{0,9})([-+=.)])(?=[-=\s]|$)", r"\1\\\2", " ".join(escaped.split()))


def fence(text: str, language: str = "text") -> str:
    """Put text into a code block that it cannot end: the fence is longer than any run of backticks inside."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{shown_lines(text)}\n{ticks}"


def shown_lines(text: str) -> str:
    """Make text visible with every kind of line break as a newline."""
    return visible(text.replace("\r\n", "\n").replace("\r", "\n"))


def table(rows: Iterable[Iterable[str]], head: Iterable[str] = ("", "")) -> str:
    """Build a table of cells that are Markdown already."""
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: Any, form: str = ".4f") -> str:
    """Format a number, or say in words what stands in its place."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "not known" if value is None else inline(str(value))
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite" if value > 0 else "minus infinite"
    return format(value, form)
