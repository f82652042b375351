"""One malformed input: what lies in the folder, the command, and what its message must name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Case(NamedTuple):
    """Every command runs in an empty folder of its own and must leave it as `make` did."""

    name: str
    make: Callable[[Path], list[str]]
    """Fills the folder and returns the command's words, its name first."""
    place: str
    """The file, row or field that the message must name."""
    found: str
    """What it must say was found there."""
    remedy: str
    """What it must say to do, or what was expected."""
