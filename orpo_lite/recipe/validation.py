"""Checks that hold for every value in a recipe or a row of data; pydantic's errors in words."""

import difflib
import functools
import math
import re
import shlex
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from orpo_lite.common import safe_yaml
from orpo_lite.common.credentials import looks_like_secret
from orpo_lite.common.text import shown
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


UNION_MEMBER = re.compile(
    r"(literal|list|dict|function|constrained|nullable)[\w-]*(\[.*\])?|\[key\]|str|bool|[A-Z]\w*Section|DataSource",
    re.DOTALL,
)
"""Parts of an error's place that pydantic adds to the user's own keys."""
OTHER_NAMES: dict[str, list[str]] = safe_yaml.read(Path(__file__).with_suffix(".yaml"))
UNKNOWN_KEY = ": unknown key"
MEANT = re.compile(r"(?<=\(did you mean )([a-z]+\.[\w.]+)(=\w+)?(?=\?\)$)")
"""The field in a hint, and the value that a name implies."""


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
            lines.append(unknown_key(recipe, place, item["input"]))
        elif item["type"] == "missing":
            inside = section_at(recipe, place).model_fields
            about = f", expected a section with {', '.join(inside)}" if len(place) == 1 else ""
            lines.append(f"{field}: missing, and it has no default{about}")
        elif item["type"] == "value_error":
            for line in str(item.get("ctx", {})["error"]).split("\n"):
                key = line.removesuffix(UNKNOWN_KEY)
                line = unknown_key(recipe, key.split(".")) if key != line else line
                lines.append(line if line.startswith(field) else f"{field}: {line}")
        elif item["type"] in ("model_type", "model_attributes_type"):
            keys, meant = ", ".join(section_at(recipe, place).model_fields), fields_by_name(recipe).get(field)
            line = f"{field}: found {shown(item['input'])}, expected a section with some of the keys {keys}"
            lines.append(f"{line} (did you mean {meant}?)" if meant else line)
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


def section_at(recipe: type[BaseModel], place: list[str]) -> Any:
    """Return the section at this path."""
    section = recipe
    for part in place:  # an index of a list stays in the section that stands in the list
        if part in section.model_fields:
            section = next(iter(sections_in(section.model_fields[part])), section)
    return section


@functools.cache
def fields_by_name(recipe: type[BaseModel]) -> dict[str, str]:
    """Map the names of fields, here and in other tools, to the dotted fields that they stand for.

    `model.quantization=nf4` stands for a name that implies a value, such as load_in_4bit.
    """
    found = {name: f"training.{name}" for name in training_fields()}
    for section, field in recipe.model_fields.items():
        found |= {name: f"{section}.{name}" for kind in sections_in(field) for name in kind.model_fields}
    return found | {name: field for field, names in OTHER_NAMES.items() for name in names}


def unknown_key(recipe: type[BaseModel], place: list[str], value: Any = None) -> str:
    """Say that a place is no field, and which was meant: by its name here or in another tool, or the nearest."""
    line, names = f"{'.'.join(place)}{UNKNOWN_KEY}", fields_by_name(recipe)
    section = section_at(recipe, place[:-1])
    if place[-1] in getattr(section, "removed", ()):
        return f"{line} since an older version: remove it (a trained adapter needs it no more); CHANGELOG.md says what to use instead"
    while isinstance(value, dict) and len(value) == 1:  # a section that is none, with the field in it
        place, value = [*place, str(next(iter(value)))], next(iter(value.values()))
    parts = ["_".join(place[start:]).lower().strip("-").replace("-", "_") for start in range(len(place))]
    keys = list(section.model_fields)
    near = difflib.get_close_matches(place[-1], training_fields() if place[0] == "training" else keys, n=1)
    far = difflib.get_close_matches(place[-1], names, n=1, cutoff=0.75)
    meant = [names[part] for part in parts if part in names]
    meant += [".".join([*place[:-1], *near]) for _ in near] + [names[name] for name in far]
    return f"{line} (did you mean {meant[0]}?)" if meant else f"{line}, expected one of {', '.join(keys)}"


def of_a_word(line: str, words: typing.Sequence[str]) -> str | None:
    """Return a problem with what the key=value of the command line that it is about should be; None where it is about none."""
    place, _, rest = line.partition(": ")
    for word in reversed(words):
        key, _, value = word.partition("=")
        if f"{key}.".startswith(f"{place}."):
            if meant := MEANT.search(rest):
                field, implied = meant.groups()
                right = field + implied * (value.lower() != "false") if implied else shlex.quote(f"{field}={value}")
                rest = rest.replace(meant[0], right)
            return f"{place}: {rest}"
        if re.search(rf"(?<![\w.]){re.escape(key)}(?!\w)", line):
            return line
    return None
