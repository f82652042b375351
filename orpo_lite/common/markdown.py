"""Markdown that stays what it is, whatever text from recipes, data or models goes into it."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Marks that turn the direction of what follows; right-to-left scripts themselves need none of them."""


def inline(text: str) -> str:
    """Text inside a sentence or a table cell, shown as it is."""
    escaped = "".join(f"\\{c}" if c in "\\`*_{}[]<>|#~$&" else c for c in visible(text))
    # what would open a list or a rule at the start of a line
    return re.sub(r"^(\d{0,9})([-+=.)])(?=[-=\s]|$)", r"\1\\\2", " ".join(escaped.split()))


def fence(text: str, language: str = "text") -> str:
    """A code block that the text cannot end: its fence is longer than any run of backticks inside."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{visible(text)}\n{ticks}"


def visible(text: str) -> str:
    """Control and direction characters and half surrogates as escapes; newlines and tabs stay."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return "".join(
        c if c in "\n\t" or not (unicodedata.category(c) in ("Cc", "Cs") or c in BIDI) else f"\\u{ord(c):04x}"
        for c in text
    )


def table(rows: Iterable[Iterable[str]], head: Iterable[str] = ("", "")) -> str:
    """A table of cells that are Markdown already."""
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: Any, form: str = ".4f") -> str:
    """A number in a format, or in words where it is none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "not known" if value is None else inline(str(value))
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite" if value > 0 else "minus infinite"
    return format(value, form)
