"""What of a recipe may be published: everything but the places of files on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from orpo_lite.recipe import Recipe
from orpo_lite.recipe.loading import BUILTIN, looks_local


def hub_id(name: str) -> str | None:
    """The name if it can only be a repository on the hub, else None (a local folder, builtin:...)."""
    if looks_local(name) or Path(name).is_dir():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def base_name(name: str, on_hub: bool) -> str:
    """A base as others may see it: hub id or builtin name as it is, a local folder by its last part."""
    return name if on_hub or name.startswith(BUILTIN) else last_part(name)


def last_part(path: str) -> str:
    """Name of the file or folder; of `.` and `..` too."""
    return Path(path.replace("\\", "/")).expanduser().resolve().name if path.strip("./\\") == "" else (
        path.replace("\\", "/").rstrip("/").rpartition("/")[2]
    )  # fmt: skip


def shareable(recipe: Recipe, facts: dict[str, Any]) -> str:
    """The recipe as YAML that loads, local paths cut to their last part; output folder and hub tokens left out."""
    content = recipe.model_dump(mode="json")
    model, data, training = content["model"], content["data"], content["training"]
    model["name_or_path"] = base_name(model["name_or_path"], facts["base_model"]["hub_id"] is not None)
    for section, key in ((model, "gguf_file"), (model, "chat_template"), (content["adapter"] or {}, "init_from")):
        if section.get(key) and hub_id(section[key]) is None and not section[key].startswith(BUILTIN):
            section[key] = last_part(section[key])
    local = {source["path"] for source in facts["data"]["sources"].values() if source["files"]}
    for source in [*data["train"], *(data["eval"] or [])]:
        if source["path"] in local:
            source["path"] = base_name(source["path"], on_hub=False)
    for key in ("output_dir", "hub_token", "push_to_hub_token"):
        training.pop(key, None)
    for key, value in training.items():
        if isinstance(value, str) and looks_local(value):
            training[key] = last_part(value)
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def without_places(text: str, recipe: Recipe, facts: dict[str, Any]) -> str:
    """A sentence of the run, with the local paths that it may quote cut to their last part."""
    sources = facts["data"]["sources"].values()
    places = [place for source in sources if source["files"] for place in (source["path"], *source["files"])]
    if facts["base_model"]["hub_id"] is None:
        places.append(recipe.model.name_or_path)
    for place in sorted(places, key=len, reverse=True):
        if not place.startswith(BUILTIN) and ("/" in place or "\\" in place):
            text = text.replace(place, last_part(place))
    return text
