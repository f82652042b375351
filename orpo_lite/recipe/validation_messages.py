"""Pydantic's errors in words: field, what was found, what was expected, and what was meant."""

from __future__ import annotations

import re
import typing
from typing import Any

from pydantic import ValidationError

from orpo_lite.common.text import nearest, shown
from orpo_lite.recipe.training_fields import training_fields, wanted

UNION_MEMBER = re.compile(
    r"(literal|list|dict|function|constrained|nullable)[\w-]*(\[.*\])?|\[key\]|str|[A-Z]\w*Section|DataSource",
    re.DOTALL,
)
"""What pydantic puts into the place of an error beside the user's own keys."""


def describe(error: ValidationError) -> list[str]:
    """Pydantic's errors in words: field, what was found, what was expected."""
    lines: list[str] = []
    for item in error.errors():
        # a key that is no field is the user's own word, whatever it looks like
        last = [str(item["loc"][-1])] if item["type"] in ("extra_forbidden", "missing") else []
        rest = item["loc"][:-1] if last else item["loc"]
        place = [str(part) for part in rest if not UNION_MEMBER.fullmatch(str(part))] + last
        field = ".".join(place)
        if item["type"] == "extra_forbidden":
            homes = [] if place[:-1] else sections_with(place[-1].lower())
            hint = f" (did you mean {' or '.join(homes)}?)" if homes else nearest(place[-1], known_keys(place[:-1]))
            lines.append(f"{field}: unknown key{hint}")
        elif item["type"] == "invalid_key":
            lines.append(f"{field}: unknown key, expected one of {', '.join(known_keys(place[:-1]))}")
        elif item["type"] == "missing":
            inside = known_keys(place)
            about = f", expected a section with {', '.join(inside)}" if len(place) == 1 else ""
            lines.append(f"{field}: missing, and it has no default{about}")
        elif item["type"] == "value_error":
            told = str(item.get("ctx", {})["error"]).split("\n")
            lines += [line if line.startswith(field) else f"{field}: {line}" for line in told]
        elif item["type"] in ("model_type", "model_attributes_type"):
            keys = ", ".join(known_keys(place))
            lines.append(f"{field}: found {shown(item['input'])}, expected a section with some of the keys {keys}")
        else:
            line = f"{field}: found {shown(item['input'])}, expected: "
            if lines and lines[-1].startswith(line):  # the other members of a union
                lines[-1] += f" or {wanted(item)}"
            else:
                lines.append(line + wanted(item))
    return list(dict.fromkeys(lines))


def known_keys(place: list[str]) -> list[str]:
    """Keys of the section at this path, for the nearest-key hint."""
    from orpo_lite.recipe import DataSource, Recipe, Section

    section: Any = Recipe
    for part in place:
        field = section.model_fields.get(part)
        options = (field.annotation, *typing.get_args(field.annotation)) if field else ()
        # a list index, or the list itself, leads to the one section that stands in lists
        section = next((t for t in options if isinstance(t, type) and issubclass(t, Section)), DataSource)
    return list(section.model_fields)


def sections_with(key: str) -> list[str]:
    """`section.key` for every section that has this key: what a field given without its section was meant to be."""
    from orpo_lite.recipe import Recipe, Section

    kinds = {name: (f.annotation, *typing.get_args(f.annotation)) for name, f in Recipe.model_fields.items()}
    found = [
        name
        for name, options in kinds.items()
        if any(isinstance(t, type) and issubclass(t, Section) and key in t.model_fields for t in options)
    ]
    return [f"{name}.{key}" for name in found + ["training"] * (key in training_fields())]
