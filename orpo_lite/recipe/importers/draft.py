"""A recipe in the making from another trainer's file, with an account of every field of that file."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from orpo_lite.common import safe_yaml
from orpo_lite.common.errors import RequestError
from orpo_lite.common.text import shown
from orpo_lite.recipe.training_fields import HUB_WORD, check_training_field, training_fields
from orpo_lite.recipe.values import unfit

PRIVATE = re.compile(r"(^|_)(token|api_key|secret|password)$")
SPELLED = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}

DTYPE = "model.dtype: auto takes bfloat16 where the card has it, float16 on older ones, float32 on a CPU"
ATTENTION = (
    "model.attention: auto takes sdpa, and the layouts need no padding; set model.attention=flash_attention_2 where that "
    "is installed"
)


def table(name: str) -> dict[str, Any]:
    """Read the table of a trainer's fields that is beside this file."""
    return safe_yaml.read(Path(__file__).with_name(f"{name}.yaml"))


class Note(NamedTuple):
    """A field of the other file, its value, and what to know about it."""

    field: str
    value: Any
    why: str


@dataclass
class RecipeDraft:
    """Takes fields off `source` one by one; whatever remains at the end has no equivalent and is listed as such."""

    source: dict[str, Any]
    folder: Path
    """The file's folder, for the paths in it."""
    file: str = "the file"
    """The file's name, for error messages."""
    recipe: dict[str, Any] = field(default_factory=dict)
    carried: list[tuple[str, Any, str]] = field(default_factory=list)
    """Field, value, and its place in the recipe."""
    differs: list[Note] = field(default_factory=list)
    """Carried over, with another meaning or value."""
    left: list[Note] = field(default_factory=list)
    """Without an equivalent."""
    unset: list[str] = field(default_factory=list)
    """Fields without a value, which change nothing."""

    def __post_init__(self) -> None:
        self.unset = [name for name, value in self.source.items() if value is None]
        self.source = {name: spelled(name, value) for name, value in self.source.items() if value is not None}
        self.given = dict(self.source)

    def put(self, place: str, value: Any) -> None:
        """Set a dotted place of the recipe."""
        *parents, leaf = place.split(".")
        section = self.recipe
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = value

    def take(self, name: str, default: Any = None) -> Any:
        """Remove a field from the source and return its value; the caller accounts for it."""
        return self.source.pop(name, default)

    def flag(self, name: str) -> bool | None:
        """Take a field that is true or false.

        Raises:
            RequestError: it is neither.
        """
        value = self.take(name)
        if value is not None and value not in (True, False):  # 1 and 0 are in it, too
            raise RequestError(f"{self.file}: {name}: found {shown(value)}, expected true or false")
        return value

    def names(self, name: str, place: str) -> list[str]:
        """Take a field that holds one name, several with commas between them, or a list, and account for it."""
        value = self.take(name)
        if value is None:
            return []
        self.note(name, value, place)
        return (
            [word.strip() for word in value.split(",")]
            if isinstance(value, str)
            else [str(one) for one in as_list(value)]
        )

    def carry(self, name: str, place: str, change: Callable[[Any], Any] | None = None) -> None:
        """Carry a field over to a place of the recipe, if the file has it."""
        if name in self.source:
            value = self.take(name)
            self.note(name, value, place)
            self.put(place, change(value) if change else value)

    def carry_all(self, places: Mapping[str, str], silent: Mapping[str, Any]) -> None:
        """Carry over every field of a table; `silent` has the other trainer's defaults by their place in the recipe."""
        for place, value in silent.items():
            self.put(place, value)
        for name, place in places.items():
            self.carry(name, place)

    def note(self, name: str, value: Any, place: str) -> None:
        """Account for a field that is carried over."""
        self.carried.append((name, displayable(name, value), place))

    def differ(self, name: str, value: Any, why: str) -> None:
        """Account for a field that means something else in the recipe."""
        self.differs.append(Note(name, displayable(name, value), why))

    def leave(self, name: str, why: str) -> None:
        """Take a field that has no equivalent, if the file has it."""
        if name in self.source:
            self.leave_value(name, self.take(name), why)

    def leave_value(self, name: str, value: Any, why: str) -> None:
        """Account for a value that has no equivalent."""
        self.left.append(Note(name, displayable(name, value), why))

    def held_out(self, name: str) -> None:
        """Carry over the size of the held-out split: a share of the rows, or from 1 on their number."""
        given = self.take(name)
        size = number(given) or 0
        if given is not None:
            self.note(name, given, "data.eval_fraction")
        if size >= 1:
            self.put("data.max_eval_rows", int(size))
            self.differ(name, given, f"data.eval_fraction is 0.05, of which at most {int(size)} pairs are kept (data.max_eval_rows)")  # fmt: skip
        self.put("data.eval_fraction", 0.05 if size >= 1 else size)

    def dtypes(self, *names: str) -> None:
        """Account for mixed-precision flags: the recipe chooses by the device."""
        for name in names:
            if wanted := self.take(name):
                self.differ(name, wanted, DTYPE)
            elif wanted is not None:
                self.note(name, wanted, "model.dtype")

    def training(self, defaults: Mapping[str, Any], known: Mapping[str, str]) -> None:
        """Carry over what transformers has by the same name, but for `known` fields; `defaults` are the other trainer's."""
        for name in [name for name in self.source if name.startswith(("hub_", "push_to_hub"))]:
            self.leave(name, HUB_WORD)
        for name in [name for name in self.source if name in training_fields() and name not in known]:
            try:
                clean = check_training_field(name, self.source[name])
            except ValueError as error:
                self.leave(name, f"not taken: {error}")
                continue
            self.take(name)
            self.note(name, clean, f"training.{name}")
            self.put(f"training.{name}", clean)
        self.recipe["training"] = {**defaults, **self.recipe.get("training", {})}

    def rest(self, known: Mapping[str, str]) -> None:
        """List what remains, with what is known about it, and fields that were read without effect."""
        for name in list(self.source):
            self.leave(name, known.get(name, "no equivalent here"))
        named = {name.partition(".")[0] for name, *_ in [*self.carried, *self.differs, *self.left]}
        for name, value in self.given.items():
            if name not in named:
                self.leave_value(name, value, "without effect beside the other fields")

    def place_of(self, path: Any) -> str:
        """Return a path of the file as seen from the working directory; a name that is on no disk stays as it is."""
        plain = os.path.expanduser(str(path))
        if os.path.exists(plain) or os.path.isabs(plain):
            return str(path)
        beside = self.folder / plain
        return str(beside) if beside.exists() else str(path)


def spelled(name: str, value: Any) -> Any:
    """Return a truth value that is written as text, `"false"`, as what it says; a strategy may be "no"."""
    plain = isinstance(value, str) and not name.endswith("_strategy")
    return SPELLED.get(value.strip().lower(), value) if plain else value


def displayable(name: str, value: Any) -> Any:
    """Return a value that may be shown: no token, and no more than a line."""
    if isinstance(value, str) and (PRIVATE.search(name) or unfit(value)):
        return "(not shown)"
    plain = isinstance(value, int | float | bool) or isinstance(value, str) and value.isprintable()
    return value if plain and len(str(value)) <= 100 else shown(value)


def as_list(value: Any) -> list[Any]:
    """Return a list as it is, and anything else as its only item."""
    return value if isinstance(value, list) else [value]


def number(value: Any) -> float | None:
    """Return a finite number, also where YAML reads 2e-4 as text; None for anything else."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None
