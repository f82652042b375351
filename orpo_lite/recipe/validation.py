"""Checks that hold for every value in a recipe or a row of data; pydantic's errors in words."""

from __future__ import annotations

import math
import re
import typing
from typing import Any

from pydantic import BaseModel, ValidationError

from orpo_lite.common.credentials import looks_like_secret
from orpo_lite.common.text import nearest, shown
from orpo_lite.recipe.training_fields import training_fields, wanted


def leaves(value: Any, place: str = "") -> typing.Iterator[tuple[str, Any]]:
    """Yield every value that is neither mapping nor list, and every unfit key, with its dotted place."""
    if isinstance(value, dict):
        for key, item in value.items():
            inside = f"{place}.{key}".removeprefix(".")
            if isinstance(key, str) and unfit(key):
                yield f"{place or 'recipe'}, key {shown(key)}", key
            else:
                yield from leaves(item, inside)
    elif isinstance(value, list | tuple | set):
        for number, item in enumerate(value):
            yield from leaves(item, f"{place}.{number}")
    else:
        yield place, value


def unfit(value: Any) -> str | None:
    """Return what is wrong with a value wherever it stands, or None."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"found {value}, expected a finite number"
    if isinstance(value, str) and "\0" in value:
        return f"found {shown(value)}, which holds a NUL character: leave it out"
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        return f"found {shown(value)}, which holds half a character: write the character itself, not its escapes"
    if isinstance(value, str) and looks_like_secret(value):
        return (
            "holds what looks like a token or password, and recipes are kept, shown and published: leave it out, and log in "
            "with `hf auth login` or set HF_TOKEN (WANDB_API_KEY) instead"
        )
    return None


def checked_pattern(pattern: Any) -> Any:
    """Return the value unchanged, or raise ValueError if it is text but no regular expression."""
    try:
        if isinstance(pattern, str):
            re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"found {shown(pattern)}, which is no regular expression: {error}") from None
    return pattern


# ---- pydantic's errors ---------------------------------------------------------------------------------------------------

UNION_MEMBER = re.compile(
    r"(literal|list|dict|function|constrained|nullable)[\w-]*(\[.*\])?|\[key\]|str|bool|[A-Z]\w*Section|DataSource",
    re.DOTALL,
)
"""Parts of an error's place that pydantic adds to the user's own keys."""


def describe(error: ValidationError, recipe: type[BaseModel]) -> list[str]:
    """Put pydantic's errors into words, one line each: field, what was found, what was expected."""
    lines: list[str] = []
    for item in error.errors():
        # a key that is no field is the user's own word, whatever it looks like
        last = [str(item["loc"][-1])] if item["type"] in ("extra_forbidden", "missing") else []
        rest = item["loc"][:-1] if last else item["loc"]
        place = [str(part) for part in rest if not UNION_MEMBER.fullmatch(str(part))] + last
        field = ".".join(place)
        if item["type"] in ("extra_forbidden", "invalid_key"):
            homes = sections_with(recipe, field.lower()) if len(place) == 1 else []
            keys = known_keys(recipe, place[:-1])
            hint = f" (did you mean {' or '.join(homes)}?)" if homes else nearest(place[-1], keys)
            lines.append(f"{field}: unknown key{hint or ', expected one of ' + ', '.join(keys)}")
        elif item["type"] == "missing":
            inside = known_keys(recipe, place)
            about = f", expected a section with {', '.join(inside)}" if len(place) == 1 else ""
            lines.append(f"{field}: missing, and it has no default{about}")
        elif item["type"] == "value_error":
            reasons = str(item.get("ctx", {})["error"]).split("\n")
            lines += [line if line.startswith(field) else f"{field}: {line}" for line in reasons]
        elif item["type"] in ("model_type", "model_attributes_type"):
            keys = ", ".join(known_keys(recipe, place))
            lines.append(f"{field}: found {shown(item['input'])}, expected a section with some of the keys {keys}")
        else:
            line = f"{field}: found {shown(item['input'])}, expected: "
            if lines and lines[-1].startswith(line):  # the other members of a union
                lines[-1] += f" or {wanted(item)}"
            else:
                lines.append(line + wanted(item))
    return list(dict.fromkeys(lines))


def sections_in(field: Any) -> list[type[BaseModel]]:
    """Return the sections that a field's annotation names, also inside a union or a list."""
    found, hints = [], [field.annotation]
    for hint in hints:
        if isinstance(hint, type) and issubclass(hint, BaseModel):
            found.append(hint)
        hints += typing.get_args(hint)
    return found


def known_keys(recipe: type[BaseModel], place: list[str]) -> list[str]:
    """Return the keys of the section at this path, for the nearest-key hint."""
    section = recipe
    for part in place:  # an index of a list stays in the section that stands in the list
        if part in section.model_fields:
            section = next(iter(sections_in(section.model_fields[part])), section)
    return list(section.model_fields)


def sections_with(recipe: type[BaseModel], key: str) -> list[str]:
    """Return `section.key` for every section that has this key: what a field given without its section was meant to be."""
    fields = recipe.model_fields.items()
    found = [name for name, field in fields if any(key in section.model_fields for section in sections_in(field))]
    return [f"{name}.{key}" for name in found + ["training"] * (key in training_fields())]
