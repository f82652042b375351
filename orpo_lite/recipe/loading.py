"""Where recipes come from: shipped ones, files and run folders; overrides on the command line; paths in the package."""

import functools
import importlib.util
import os
import re
import shlex
from pathlib import Path
from typing import Any

from orpo_lite.common import safe_yaml
from orpo_lite.common.errors import RequestError
from orpo_lite.common.text import nearest, shown

PACKAGE = Path(__file__).parent.parent

BUILTIN = "builtin:"  # a path inside the installed package, for example builtin:quickstart/model

PAIR = re.compile(r"(.*?\w):(.+)", re.DOTALL)
"""A key and its value without the space by which YAML would tell them apart."""


class RecipeError(RequestError):
    """A recipe that cannot be run; the message lists every problem found, one per line."""

    def __init__(self, source: str, problems: list[str]):
        self.problems = problems
        several = "\n  - ".join([f"{len(problems)} problems", *problems])
        super().__init__(f"{source}: {problems[0] if len(problems) == 1 else several}")


def resolve_path(value: str) -> str:
    """Return the path of builtin:quickstart/model in the installed package; anything else is returned as it is."""
    return str(PACKAGE / "data" / value.removeprefix(BUILTIN)) if value.startswith(BUILTIN) else value


ADDRESS = ("http://", "https://")
MODEL_FOLDER = "a run folder, the folder of an adapter or of a model, or a hub id USER/NAME"
"""What chat and evaluate take."""
FINISHED_FOLDER = "a run, adapter or model folder"
ADAPTER_FOLDER = "a run folder, the folder of an adapter, or a hub id USER/NAME"


def looks_local(name: str) -> bool:
    """Return True for a model's name that can only be a path, never a hub id (user/name)."""
    return name.startswith((".", "/", "~", BUILTIN)) or name.count("/") > 1 or "\\" in name or Path(name).is_absolute()


def check_model_path(name: str) -> None:
    """Raise RequestError for a model that can only be a local path, if nothing is there."""
    path = resolve_path(name)
    if looks_local(name) and not os.path.exists(os.path.expanduser(path)):
        raise RequestError(
            f"model.name_or_path: there is no folder {path}: give the path of a model folder, or a hub id USER/NAME"
        )


def check_folder(path: str | Path, expected: str, on_hub: bool = True, field: str = "") -> None:
    """Raise RequestError for a folder that does not exist; not for what may be a hub id instead, if `on_hub`.

    Args:
        field: of the recipe that names it, for the message.
    """
    folder, asked = Path(os.path.expanduser(resolve_path(str(path)))), str(path)
    near = nearest(folder.name, [one.name for one in folder.parent.glob("*/")])
    hub_id = (
        on_hub and not looks_local(asked) and asked.count("/") == 1 and folder.parent.name != "outputs" and not near
    )
    if os.path.exists(folder) or hub_id:
        return
    neither = ", and it is no hub id" if on_hub and "/" not in asked else ""
    asked = f"{field}: {asked}" if field else asked
    raise RequestError(f"{asked}: there is no such folder{near}{neither}: expected {expected}")


@functools.cache
def chat_templates() -> dict[str, Path]:
    """Map the name of every known chat template to its Jinja file: ours, and TRL's where TRL is installed."""
    trl = importlib.util.find_spec("trl")  # located, not imported
    found: dict[str, Path] = {}
    for folder in (trl and trl.submodule_search_locations) or ():
        # TRL's *_training variants only add marks for its SFT loss mask
        found = {p.stem: p for p in Path(folder, "chat_templates").glob("*.jinja") if not p.stem.endswith("_training")}
    return dict(sorted(found.items())) | {p.stem: p for p in sorted((PACKAGE / "model" / "templates").glob("*.jinja"))}


def find_template(name: str) -> str | None:
    """Return the known chat template that a name stands for, however it is punctuated (Llama-3: llama3), or None."""
    known = {_letters(stem): stem for stem in chat_templates()}
    return known.get(_letters(name))


def _letters(name: str) -> str:
    return re.sub(r"[-_. ]", "", name.lower())


def recipes_folder() -> Path:
    """Return the folder of the shipped recipes: inside the installed package, or beside it in a checkout."""
    inside = PACKAGE / "recipe" / "shipped"
    return inside if inside.is_dir() else PACKAGE.parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Map the name of every shipped recipe to its path, sorted."""
    return {path.stem: path for path in sorted(recipes_folder().glob("*.yaml"))}


def is_recipe(word: str) -> bool:
    """Return True for what names a recipe where a model can be named too."""
    return word.endswith((".yaml", ".yml")) or word in shipped_recipes()


def find_recipe(source: str | Path) -> Path:
    """Return the YAML file of a shipped name, a path or a run folder.

    Raises:
        RecipeError: there is no such recipe; the message lists the shipped ones.
    """
    path, shipped = Path(source), shipped_recipes()
    if str(source) in shipped:  # before the folders, so that a run folder called quickstart does not hide the recipe
        return shipped[str(source)]
    if os.path.isdir(path):  # unlike Path.is_dir, false for what can be no path
        path = path / "recipe.yaml"
        if not path.is_file():
            raise RecipeError(str(source), ["this folder holds no recipe.yaml: is it a run folder?"])
        return path
    if path.suffix in (".yaml", ".yml"):
        if not os.path.isfile(path):
            there = (str(one) for one in path.parent.glob(f"*{path.suffix}"))
            why = f"there is no such file{nearest(str(path), there)}; `orpo-lite recipes` lists the shipped ones"
            raise RecipeError(shown(source), [why])
        return path
    why = f"no recipe of this name{nearest(str(source), shipped)}; shipped: {', '.join(shipped)}"
    if os.path.isfile(path):
        why = f"this is no recipe: for a file of pairs, `orpo-lite new {source}` makes one"
    raise RecipeError(shown(source), [why])


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a recipe's YAML mapping.

    Raises:
        RecipeError: the file cannot be read, see `safe_yaml`, or holds something other than a mapping.
    """
    try:
        content = safe_yaml.read(path)
    except safe_yaml.YamlError as error:
        raise RecipeError(f"{path}, line {error.line}" if error.line else str(path), [str(error)]) from None
    if not isinstance(content, dict):
        found = "a list" if isinstance(content, list) else shown(content)
        found = f"found {found} at the top" if content is not None else "the file is empty"
        raise RecipeError(str(path), [f"{found}, expected sections such as model: and data:"])
    return content


def apply_override(content: dict[str, Any], word: str) -> str:
    """Set one dotted key=value in place and return the key; the value is read as YAML (`null`, lists and numbers work)."""
    key, equals, value = word.partition("=")
    if not equals or not key:
        raise RecipeError(
            "command line", [f"found {shown(word)}, expected key=value, for example training.learning_rate=5e-6"]
        )
    *parents, leaf = key.split(".")
    place = content
    for parent in parents:
        if place.get(parent) is None:
            place[parent] = {}
        if not isinstance(place[parent], dict):
            raise RecipeError(
                "command line", [f"{shown(word)}: {parent} is not a section; {parent} is {shown(place[parent])}"]
            )
        place = place[parent]
    try:
        place[leaf] = safe_yaml.parse(value)
    except safe_yaml.YamlError as error:
        cut = value.startswith("{") and value.count("{") > value.count("}")
        hint = "; a shell splits words at spaces: put the whole of it in quotes" if cut else ""
        raise RecipeError("command line", [f"{word[:200]}: value {error}{hint}"]) from None
    if isinstance(place[leaf], dict | list) and (empty := safe_yaml.keys_without_value(value)):
        raise RecipeError("command line", [f"{word[:200]}: {without_value(key, value, empty)}"])
    return key


def without_value(key: str, value: str, empty: list[str]) -> str:
    """Say how a mapping is written in which some keys have no value, most often for lack of a space after the colon."""
    for name in empty:
        value = value.replace(name, PAIR.sub(r"\1: \2", name, count=1), 1)
    keys = " and ".join(map(shown, empty))
    keys += " is a key without a value" if len(empty) == 1 else " are keys without a value"
    if not any(map(PAIR.match, empty)):
        return f"{keys}: write 'key: value' (null stands for none)"
    return f"{keys}, since YAML wants a space after the colon: write {shlex.quote(f'{key}={value}')}, quotes included"
