"""Paths of this machine out of the texts that are published: they name its user, and no reader has them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

from orpo_lite.common import safe_yaml
from orpo_lite.export.publish import Entry, Parcel, read_json
from orpo_lite.recipe.loading import BUILTIN

LOCAL = "local:"
"""Stands before the name of a base that only this machine has, so that no loader mistakes it for a hub id."""

TEXTS = (
    "README.md",
    "Modelfile",
    "recipe.yaml",
    "adapter_config.json",
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
)
PATH_SECTIONS = ("model", "adapter", "data", "training")


def take_out_paths(parcel: Parcel, run: Path, base_repo: str | None = None) -> None:
    """Replace this machine's paths in the parcel's texts; a note names each file and what was replaced.

    The base becomes `base_repo`, or the hub id that the recipe or the download cache knows it by, or `local:` and its
    name. Of every other path the last name stays. Files on disk stay as they are.

    Args:
        run: the folder whose recipe.yaml and adapter_config.json name the base and the data.
        base_repo: hub id to name as the base, whatever the run says.
    """
    recipe = recipe_of(run)
    base, names = base_names(run, recipe, base_repo)
    output = recipe.get("training", {}).get("output_dir") or ""
    paths = [str(run.resolve()), *filter(is_absolute, strings([recipe.get(section) for section in PATH_SECTIONS]))]
    for entry in parcel.entries:
        if entry.name.endswith(".json") and entry.name in TEXTS:
            fields = json.loads(entry.read())
            paths += [value for key, value in fields.items() if re.search("path|file|dir", key) and is_absolute(value)]
    swaps = {path: last(path) for path in paths}
    if is_absolute(output):
        swaps[output] = f"outputs/{last(output)}"  # where a run of this recipe would go without it
    swaps |= {name: base for name in names if name != base}
    if len(Path.home().parts) > 1:
        swaps[str(Path.home())] = "~"
    for entry in [e for e in parcel.entries if e.name in TEXTS]:
        text, done = entry.read().decode("utf-8"), []
        for path in sorted(swaps, key=len, reverse=True):
            text, count = pattern(path).subn(lambda _, new=swaps[path]: new, text)
            done += [f"{path} -> {swaps[path]}"] * bool(count)
        if done:
            parcel.put(Entry(entry.name, text.encode("utf-8"), entry.what))
            parcel.notes.append(f"{entry.name} goes without this machine's paths: {'; '.join(done)}")
    if base.startswith(LOCAL):
        parcel.notes.append(
            f"WARNING: the base is a folder of this machine ({base.removeprefix(LOCAL)}), which nobody else has: if the "
            "hub has that model, name it with --base-repo USER/NAME"
        )


def base_names(run: Path, recipe: dict[str, Any], base_repo: str | None = None) -> tuple[str, set[str]]:
    """What readers should know the base by ('' where nothing says), and every name that the run has for it."""
    trained_on = recipe.get("model", {}).get("name_or_path") or ""
    adapter = read_json(run / "adapter_config.json") if (run / "adapter_config.json").is_file() else {}
    names = {name for name in (trained_on, adapter.get("base_model_name_or_path")) if name}
    known = [cached_id(name) or name for name in sorted(names)]
    public = sorted((name for name in known if not is_local(name)), key=lambda name: name.startswith(BUILTIN))
    return base_repo or (public[0] if public else LOCAL + last(known[0]) if known else ""), names


def recipe_of(run: Path) -> dict[str, Any]:
    file = run / "recipe.yaml"
    return safe_yaml.read(file) or {} if file.is_file() else {}


def cached_id(path: str) -> str | None:
    """Hub id of a folder in the hub's download cache."""
    found = re.search(r"models--([^/\\]+)[/\\]snapshots[/\\]", path)
    return found[1].replace("--", "/", 1) if found else None


def is_absolute(value: Any) -> bool:
    """True for a path from the root, at least two names deep, of this or the other kind of system."""
    return isinstance(value, str) and (
        bool(re.match(r"(file:/)?/[^/\s]+/", value))
        or bool(re.match(r"[A-Za-z]:[\\/]", value))
        or value.startswith("\\\\")
    )


def is_local(name: str) -> bool:
    return not name.startswith(BUILTIN) and (
        is_absolute(name) or name.startswith((".", "/", "~")) or Path(name).expanduser().is_dir()
    )


def last(path: str) -> str:
    return (PureWindowsPath(path) if "\\" in path else PurePath(path)).name


def strings(value: Any) -> Iterator[str]:
    """Every string in nested lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings(inner)


def pattern(path: str) -> re.Pattern[str]:
    """The path as a text holds it, also with JSON's doubled backslashes, and not the end of a longer one."""
    forms = "|".join(re.escape(form) for form in dict.fromkeys((path, json.dumps(path)[1:-1])))
    tail = r"(?![\w-])" if is_absolute(path) else r"(?![\w/-])"
    return re.compile(rf"(?<![\w/.-])(?:{forms}){tail}")
