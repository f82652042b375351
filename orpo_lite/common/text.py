"""Words and numbers for messages: nearest names, values cut to a line, sizes, and text that cannot act on a screen."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# control and direction characters, half surrogates and zero-width marks; line breaks, tabs and joiners stay
ACTIVE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff]"
)


def visible(text: str) -> str:
    """Write out control and direction characters, so that the text can neither act on a terminal nor reorder a page."""
    return ACTIVE.sub(lambda match: match.group().encode("unicode_escape", "surrogatepass").decode(), text)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ' (did you mean X?)' where a known name is close, else an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def shown(value: Any, width: int = 100) -> str:
    """Return a value as Python writes it, cut to `width` characters: what a file holds can be of any size."""
    text = repr(str(value) if isinstance(value, Path) else value)
    return text if len(text) <= width else f"{text[:width]}..."


def format_gb(size: float, digits: int = 1) -> str:
    """Format a number of bytes in GB (10^9 bytes), for example `7.3 GB`."""
    return f"{size / 1e9:.{digits}f} GB"
