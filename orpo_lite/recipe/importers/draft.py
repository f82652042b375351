"""A recipe in the making from another trainer's file, with an account of every field of that file."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from orpo_lite.common import safe_yaml
from orpo_lite.common.errors import RequestError
from orpo_lite.common.text import shown
from orpo_lite.recipe.loading import find_template
from orpo_lite.recipe.training_fields import HUB_WORD, check_training_field, training_fields
from orpo_lite.recipe.validation import unfit

PRIVATE = re.compile(r"(^|_)(token|api_key|secret|password)$")
SPELLED = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


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
    prefix: str = ""
    """Path of `source` in the file, put before each name in the account."""
    recipe: dict[str, Any] = field(default_factory=dict)
    carried: list[str] = field(default_factory=list)
    """Fields carried over."""
    differs: list[Note] = field(default_factory=list)
    """Carried over, with another meaning or value."""
    left: list[Note] = field(default_factory=list)
    """Without an equivalent."""

    def __post_init__(self) -> None:
        known = {str(name): value for name, value in self.source.items() if value is not None}
        self.source = {name: spelled(name, value) for name, value in known.items()}
        self.given = dict(self.source)

    def inside(self, source: dict[str, Any], where: str) -> RecipeDraft:
        """Return a draft of a mapping inside the file, whose account goes into this one's."""
        return RecipeDraft(source, self.folder, self.file, f"{where}.", {}, self.carried, self.differs, self.left)

    def flatten(self, name: str) -> None:
        """Put the fields of a mapping, `trl: {beta: 0.1}`, beside the others, as `trl.beta`."""
        if isinstance(self.source.get(name), dict):
            inner = self.source.pop(name)
            self.source |= {f"{name}.{key}": value for key, value in inner.items() if value is not None}

    def put(self, place: str, value: Any) -> None:
        """Set a dotted place of the recipe."""
        *parents, leaf = place.split(".")
        section = self.recipe
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = value

    def take(self, name: str, default: Any = None) -> Any:
        """Remove a field from the source and return its value; it is accounted for as carried over."""
        if name not in self.source:
            return default
        self.carried.append(self.prefix + name)
        return self.source.pop(name)

    def flag(self, name: str) -> bool | None:
        """Take a field that is true or false.

        Raises:
            RequestError: it is neither.
        """
        value = self.take(name)
        if value is not None and value not in (True, False):  # 1 and 0 are in it, too
            raise RequestError(f"{self.file}: {name}: found {shown(value)}, expected true or false")
        return value

    def names(self, name: str) -> list[str]:
        """Take a field that holds one name, several with commas between them, or a list."""
        value = self.take(name, [])
        if isinstance(value, str):
            return [word.strip() for word in value.split(",")]
        return [str(one) for one in as_list(value)]

    def carry(self, name: str, place: str, change: Callable[[Any], Any] = lambda value: value) -> None:
        """Carry a field over to a place of the recipe, if the file has it."""
        if name in self.source:
            self.put(place, change(self.take(name)))

    def carry_all(self, places: Mapping[str, str]) -> None:
        """Carry over every field of a table: the other trainer's name, and the place in the recipe."""
        for name, place in places.items():
            self.carry(name, place)

    def fill(self, fields: Mapping[str, Any]) -> None:
        """Put what the other trainer does where the file is silent, then carry over the places and switches of its table."""
        for place, value in fields["silent"].items():
            self.put(place, value)
        self.carry_all(fields["places"])
        for name, cases in fields["switches"].items():
            if name in self.source:
                self._switch(name, cases)

    def _switch(self, name: str, cases: Mapping[Any, Any]) -> None:
        """Take a field of which each value means something else: places and their values, or a text on what is different."""
        means = {value: as_list(case) for value, case in cases.items()}
        value = self.flag(name) if means.keys() <= {True, False} else self.take(name)
        plain = value if isinstance(value, str | bool) else str(value)
        for part in means.get(plain, means.get("other", []) if value else []):
            if isinstance(part, str):
                self.differ(name, value, part)
            else:
                for place, wanted in part.items():
                    before = self.recipe.get("training", {}).get(place.removeprefix("training."))
                    both = isinstance(before, list) and isinstance(wanted, list)
                    self.put(place, [*dict.fromkeys(before + wanted)] if both else wanted)

    def differ(self, name: str, value: Any, why: str) -> None:
        """Account for a field that means something else in the recipe."""
        self._note(self.differs, name, value, why)

    def leave(self, name: str, why: str) -> None:
        """Take a field that has no equivalent, if the file has it."""
        if name in self.source:
            self.leave_value(name, self.source.pop(name), why)

    def leave_value(self, name: str, value: Any, why: str) -> None:
        """Account for a value that has no equivalent."""
        self._note(self.left, name, value, why)

    def _note(self, notes: list[Note], name: str, value: Any, why: str) -> None:
        place = self.prefix + name
        self.carried[:] = [one for one in self.carried if one != place]
        notes.append(Note(place, displayable(name, value), why))

    def rest(self, known: Mapping[str, str], same: Collection[str] = ()) -> None:
        """List what remains: what is known about it, or that it changes nothing.

        Args:
            known: fields without an equivalent, and what to do instead; switched off, they change nothing.
            same: fields of which nothing is lost, whatever their value.
        """
        for name in list(self.source):
            root = name.partition(".")[0]
            if {root, name} & {*same} or root in known and not self.source[name]:
                del self.source[name]
            else:
                self.leave(name, known.get(name) or known.get(root, "no equivalent here"))

    def template(self, name: str, template: str, unknown: str) -> None:
        """Put a chat template that is known by its name into the recipe; the field is taken already."""
        if known := find_template(template):
            self.put("model.chat_template", known)
        else:
            self.leave_value(name, template, unknown)

    def held_out(self, name: str, no_pairs: str) -> None:
        """Carry over the size of the held-out split: a share of the rows, or from 1 on their number."""
        given = self.take(name)
        size = number(given) or 0
        if size >= 1:
            self.put("data.max_eval_rows", int(size))
            self.differ(name, given, f"data.eval_fraction is 0.05, of which at most {int(size)} pairs are kept (data.max_eval_rows)")  # fmt: skip
        self.put("data.eval_fraction", 0.05 if size >= 1 else size)
        if size == 0 and "eval" not in self.recipe["data"]:
            for evaluating in ("eval_strategy", "evaluation_strategy", "eval_steps", "evals_per_epoch"):
                self.leave(evaluating, no_pairs)

    def training(self, fields: dict[str, Any]) -> None:
        """Carry over what transformers has, by the same name or the one under `training` in the trainer's table."""
        for name in [name for name in self.source if name.startswith(("hub_", "push_to_hub"))]:
            self.leave(name, HUB_WORD)
        if self.source.get("warmup_steps"):
            self.leave("warmup_ratio", "warmup_steps takes precedence")
        elif "warmup_ratio" in self.source:
            self.take("warmup_steps")
            self.carry("warmup_ratio", "training.warmup_steps")  # below 1 it is a share of all steps
        same = {name: name for name in training_fields() if name not in fields["left"] and name not in fields["same"]}
        for theirs, ours in (same | fields["training"]).items():
            if theirs not in self.source:
                continue
            try:
                self.carry(theirs, f"training.{ours}", lambda value, ours=ours: check_training_field(ours, value))
            except ValueError as error:
                why = str(error).partition(", expected one of")[0]
                self.leave_value(theirs, self.given[theirs], f"not taken: {why}")
        self.recipe["training"] = {**fields["defaults"], **self.recipe.get("training", {})}

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
