"""Checks that hold for every value in a recipe or a row of data, whatever its field."""

from __future__ import annotations

import math
import re
import typing
from typing import Any

from orpo_lite.common.credentials import looks_like_secret
from orpo_lite.common.text import shown


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
