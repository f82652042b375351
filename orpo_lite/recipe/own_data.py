"""Training data other than a recipe's own: what the recipe says about its own data does not describe it, and is dropped."""

import os
import re
from collections.abc import Iterable
from typing import Any

from orpo_lite.common.text import shown
from orpo_lite.recipe.schema import as_sources

ABOUT_DATA = ("name", "description", "data.eval", "data.split", "data.columns", "data.max_rows", "evaluation.rule",
              "training.max_steps", "training.run_name")  # fmt: skip
"""Fields that a recipe sets for the data it names: what they are, how they are read, judged, counted and called."""
DEFAULTS = (None, "", "train")
"""Values of these fields that say nothing."""
NOTHING = re.compile(r"(\.(jsonl?|ndjson|csv|tsv|parquet|gz|bz2|xz|zst|zip))+$|[/\\]+(model)?$", re.IGNORECASE)
"""Ends of a path that name nothing: kinds of file, and a folder called model."""


def sources_of(content: dict[str, Any]) -> set[tuple[str, str]]:
    """Return path and configuration of each training source of a recipe that need not be valid; none where it is not."""
    data = content.get("data")
    sources = as_sources(data.get("train")) if isinstance(data, dict) else None
    entries = [one for one in sources if isinstance(one, dict)] if isinstance(sources, list) else []
    return {(os.path.normpath(str(one.get("path"))), str(one.get("name"))) for one in entries}


def drop_about_data(content: dict[str, Any], own: set[tuple[str, str]], given: Iterable[str]) -> list[str]:
    """Remove in place what a recipe says about its own data, if overrides have named other data; and name the run anew.

    Args:
        content: the recipe, overrides applied.
        own: `sources_of` the recipe before them.
        given: dotted keys of the overrides, which stay.

    Returns:
        The fields removed; none where the data is the recipe's own.
    """
    if not own or sources_of(content) in (own, set()):
        return []
    keys, dropped = list(given), list[str]()
    inside = content["data"]["train"]
    moved = "data.train.path" in keys and isinstance(inside, dict)
    siblings = [f"data.train.{key}" for key in inside if key != "path"] if moved else []
    for place in (*ABOUT_DATA, *siblings):
        asked = any(f"{place}.".startswith(f"{key}.") or key.startswith(f"{place}.") for key in keys)
        if not asked and remove(content, place) not in DEFAULTS:
            dropped.append(place)
    if "name" in dropped:
        model = content.get("model")
        content["name"] = run_name(next(iter(sources_of(content)))[0], model.get("name_or_path") if isinstance(model, dict) else "")  # fmt: skip
    return dropped


def remove(content: dict[str, Any], place: str) -> Any:
    """Remove a dotted place and return its value; None where it is not there."""
    *parents, leaf = place.split(".")
    for parent in parents:
        content = content.get(parent)  # type: ignore[assignment]
        if not isinstance(content, dict):
            return None
    return content.pop(leaf, None)


def run_name(data: str, model: Any) -> str:
    """Name a run by its model and data, for example `qwen2-0.5b-my` for Qwen/Qwen2-0.5B and my.jsonl."""
    words = [
        re.split(r"^builtin:|[/\\]", NOTHING.sub("", str(path).rstrip("/\\")))[-1].lower()
        for path in (model or "", data)
    ]
    plain = [re.sub(r"[^a-z0-9._-]+", "-", word).strip("-._")[:60] for word in words]
    return "-".join(word for word in plain if word) or "own-data"


def account(dropped: list[str], name: str) -> str:
    """Say in a line what was dropped, and what the run is called now."""
    epochs = "; the steps follow from training.num_train_epochs" if "training.max_steps" in dropped else ""
    return (
        f"data.train is not the recipe's own data, so what the recipe says about that is dropped: {', '.join(dropped)} (the run "
        f"is called {shown(name)[1:-1]}{epochs}). To keep a field, give it in the same command"
    )
