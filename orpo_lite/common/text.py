"""Words and numbers for messages, and text that can neither act on a screen nor break out of a Markdown page."""

import difflib
import math
import re
import shlex
import sys
import textwrap
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


def counted(number: int, noun: str) -> str:
    """Write a count with its noun, for example `1 pair` or `2,000 pairs`."""
    return f"{number:,} {noun}{'' if number == 1 else 'es' if noun.endswith('s') else 's'}"


def next_command(name: str, *words: Any) -> str:
    """Write the line that starts another command, as a shell takes it and as this process was started."""
    script = Path(sys.argv[0]).name.startswith("orpo-lite")
    return shlex.join([*(["orpo-lite", name] if script else ["python", "-m", f"orpo_lite.{name}"]), *map(str, words)])


def at_words(text: str, indent: str = "", width: int = 80) -> str:
    """Indent and break text between words only: a path stays whole, and a line that begins with a space, a command, too."""
    fill = textwrap.TextWrapper(width, initial_indent=indent, subsequent_indent=indent, break_long_words=False,
                                break_on_hyphens=False).fill  # fmt: skip
    return "\n".join(line if line.startswith(" ") else fill(line) for line in text.split("\n"))


def format_gb(size: float, digits: int = 1) -> str:
    """Format a number of bytes in GB (10^9 bytes), for example `7.3 GB`."""
    return f"{size / 1e9:.{digits}f} GB"


def duration(seconds: float) -> str:
    """Write a time in its two largest units."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, hours = round(seconds / 60), int(seconds // 3600)
    return f"{minutes} min" if minutes < 100 else f"{hours} h {round((seconds - hours * 3600) / 60)} min"


def cut(text: str, longest: int = 4000) -> str:
    """Return a text, or the beginning of a very long one."""
    return text if len(text) <= longest else f"{text[:longest]}\n[{counted(len(text) - longest, 'more character')}]"


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


def number(value: Any, form: str = ".4f") -> str:
    """Format a number, or say in words what stands in its place."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "not known" if value is None else inline(str(value))
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite" if value > 0 else "minus infinite"
    return format(value, form)


def measured(result: dict[str, Any], key: str) -> str:
    """Write one metric of an evaluation with its interval, accuracy in percent; empty where it is not known."""
    value, ends = result.get(key), result.get(f"{key}_interval")
    form = ".1%" if key == "rewards/accuracies" else ".4f"
    interval = ""
    if isinstance(ends, list | tuple) and len(ends) == 2:  # a run's file may hold anything
        interval = " ({} to {})".format(*(number(end, form) for end in ends))
    return "" if value is None else number(value, form) + interval
