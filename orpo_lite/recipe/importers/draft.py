"""A recipe in the making out of another trainer's file, with an account of every field of that file."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from orpo_lite.common.errors import RequestError
from orpo_lite.common.text import shown
from orpo_lite.recipe.training_fields import HUB_WORD, check_training_field, training_fields
from orpo_lite.recipe.values import unfit

PRIVATE = re.compile(r"(^|_)(token|api_key|secret|password)$")
NOTHING = object()
SPELT = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class Note(NamedTuple):
    """A field of the other file, its value, and what is to be known about it."""

    field: str
    value: Any
    why: str


@dataclass
class Draft:
    """Takes fields off `source` one by one; what is left at the end has no equal and is listed as such."""

    source: dict[str, Any]
    folder: Path
    """Where the file lies, for the paths in it."""
    recipe: dict[str, Any] = field(default_factory=dict)
    carried: list[tuple[str, Any, str]] = field(default_factory=list)
    """Field, value, and its place in the recipe."""
    differs: list[Note] = field(default_factory=list)
    """Carried over, with another meaning or value."""
    left: list[Note] = field(default_factory=list)
    """Without an equal."""
    unset: list[str] = field(default_factory=list)
    """Fields without a value, which change nothing."""
    file: str = "the file"
    """Its name, for what is refused of it."""

    def __post_init__(self) -> None:
        self.unset = [name for name, value in self.source.items() if value is None]
        self.source = {name: spelt(name, value) for name, value in self.source.items() if value is not None}
        self.given = dict(self.source)

    def put(self, place: str, value: Any) -> None:
        """Set a dotted place of the recipe."""
        *parents, leaf = place.split(".")
        section = self.recipe
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = value

    def take(self, name: str, default: Any = None) -> Any:
        """A field's value, off the source; the caller accounts for it."""
        return self.source.pop(name, default)

    def flag(self, name: str) -> bool | None:
        """As `take`, of a field that is true or false.

        Raises:
            RequestError: it is neither.
        """
        value = self.take(name)
        if value is not None and value not in (True, False):  # 1 and 0 are, too
            raise RequestError(f"{self.file}: {name}: found {shown(value)}, expected true or false")
        return value

    def carry(self, name: str, place: str, default: Any = NOTHING, change: Callable[[Any], Any] | None = None) -> None:
        """A field that has an equal; its default where it is not there but the recipe's own would differ."""
        if name in self.source:
            value = self.take(name)
            self.carried.append((name, visible(name, value), place))
            self.put(place, change(value) if change else value)
        elif default is not NOTHING:
            self.put(place, default)

    def carried_as(self, name: str, value: Any, place: str) -> None:
        self.carried.append((name, visible(name, value), place))

    def differ(self, name: str, value: Any, why: str) -> None:
        self.differs.append(Note(name, visible(name, value), why))

    def leave(self, name: str, why: str) -> None:
        """A field without an equal, where it is there."""
        if name in self.source:
            self.leave_value(name, self.take(name), why)

    def leave_value(self, name: str, value: Any, why: str) -> None:
        self.left.append(Note(name, visible(name, value), why))

    def training(self, defaults: dict[str, Any]) -> None:
        """Fields that transformers has by the same name; `defaults` are the other trainer's where ours differ."""
        fields = training_fields()
        for name in [name for name in self.source if name.startswith(("hub_", "push_to_hub"))]:
            self.leave(name, HUB_WORD)
        for name in [name for name in self.source if name in fields]:
            try:
                clean = check_training_field(name, self.source[name])
            except ValueError as error:
                self.leave(name, f"not taken: {error}")
                continue
            self.take(name)
            self.carried_as(name, clean, f"training.{name}")
            self.put(f"training.{name}", clean)
        section = self.recipe.setdefault("training", {})
        self.recipe["training"] = {name: value for name, value in defaults.items() if name not in section} | section

    def rest(self, known: dict[str, str]) -> None:
        """List what is left, with what is known about it, and what was read and led to nothing."""
        for name in list(self.source):
            self.leave(name, known.get(name, "nothing here answers to it"))
        named = {name.partition(".")[0] for name, *_ in [*self.carried, *self.differs, *self.left]}
        for name, value in self.given.items():
            if name not in named:
                self.leave_value(name, value, "without effect beside the other fields")

    def place_of(self, path: str) -> str:
        """A path of the file as this folder sees it; what is on no disk is a hub id, or for the loader to refuse."""
        plain = os.path.expanduser(path)
        if os.path.exists(plain) or os.path.isabs(plain):
            return path
        beside = self.folder / plain
        return str(beside) if beside.exists() else path


def spelt(name: str, value: Any) -> Any:
    """A truth value that is written as text, `"false"`, as what it says; "no" is a strategy, too."""
    plain = isinstance(value, str) and not name.endswith("_strategy")
    return SPELT.get(value.strip().lower(), value) if plain else value


def visible(name: str, value: Any) -> Any:
    """A value that may be shown: no token, and no more than a line."""
    if isinstance(value, str) and (PRIVATE.search(name) or unfit(value)):
        return "(not shown)"
    plain = isinstance(value, int | float | bool) or isinstance(value, str) and value.isprintable()
    return value if plain and len(str(value)) <= 100 else shown(value)


def number(value: Any) -> float | None:
    """A finite number, also where YAML reads 2e-4 as text; None for anything else."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


PACKING = "the packed and shared layouts (orpo.layout: auto) leave no padding without it"
"""Words about fields that both have."""
