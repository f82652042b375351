"""Where a model comes from, as far as it may be published: hub ids, licenses, and the recipe without local paths."""

from __future__ import annotations

import importlib.metadata
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from huggingface_hub import hf_hub_download, metadata_load
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from orpo_lite.recipe import Recipe
from orpo_lite.recipe.loading import BUILTIN, looks_local

if TYPE_CHECKING:
    from orpo_lite.report.run_record import RunRecord

logger = logging.getLogger(__name__)

LICENSE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING")
TITLES = {
    "apache license version 2.0, january 2004": "apache-2.0",
    "mit license": "mit",
    "the mit license (mit)": "mit",
}
"""Opening words of a license file, in lower case, whose hub identifier is beyond doubt."""


def hub_id(name: str) -> str | None:
    """Return the name if it can only be a repository on the hub, else None (a local folder, builtin:...)."""
    if looks_local(name) or Path(name).is_dir():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def public_name(name: str, on_hub: bool) -> str:
    """Return a base or data set as others may see it: a hub id or builtin name as it is, a local path by its last part."""
    return name if on_hub or name.startswith(BUILTIN) else last_part(name)


def last_part(path: str) -> str:
    """Return the name of the file or folder, of `.` and `..` too."""
    path = path.replace("\\", "/")
    return path.rstrip("/").rpartition("/")[2] if path.strip("./") else Path(path or ".").resolve().name


# ---- licenses ------------------------------------------------------------------------------------------------------------


def find_license(base: str, revision: str | None = None) -> dict[str, str] | None:
    """Read which license a base model states: {"id", "name", "link", "source"}, or None where it states none.

    The front matter of its README.md is asked first, then its license file, in its folder or in its repository on the
    hub (through the cache; a hub that cannot be reached is no error). Of a license file that is neither Apache's nor
    MIT's only the first line is known, as "title", without "id": a license is never guessed.

    Args:
        base: hub id, folder, or builtin:...
        revision: commit of a hub id.
    """
    if base.startswith(BUILTIN):
        stated = importlib.metadata.metadata("orpo-lite")["License-Expression"]
        return {"id": stated.lower(), "source": "orpo-lite, which ships it"} if stated else None
    readme = file_of(base, revision, "README.md")
    if readme and (found := from_readme(readme)):
        return found
    for name in LICENSE_FILES:
        # where even the README cannot be had, the hub is most likely out of reach: no five more attempts
        if path := file_of(base, revision, name, cached=readme is None):
            return from_text(path)
    return None


def file_of(base: str, revision: str | None, name: str, cached: bool = False) -> Path | None:
    """Return a file of the base on this disk, downloaded where it lies on the hub, unless only `cached` files are wanted."""
    if hub_id(base) is None:
        path = Path(base).expanduser() / name
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(base, name, revision=revision, local_files_only=cached))
    except (EntryNotFoundError, OSError, ValueError) as error:
        logger.debug("%s of %s: %s", name, base, error)
        return None


def from_readme(path: Path) -> dict[str, str] | None:
    try:
        data = metadata_load(path) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        logger.debug("%s: %s", path, error)
        return None
    stated = data.get("license")
    if isinstance(stated, list) and len(stated) == 1:
        stated = stated[0]
    if not stated or not isinstance(stated, str):
        return None
    more = {key: str(data[f"license_{key}"]) for key in ("name", "link") if data.get(f"license_{key}")}
    return {"id": stated, "source": path.name} | more


def from_text(path: Path) -> dict[str, str] | None:
    lines = [" ".join(line.split()) for line in path.read_text("utf-8", errors="replace")[:4000].splitlines()]
    lines = [line.strip("# ") for line in lines if line.strip("# ")]
    opening = " ".join(lines[:2]).lower()
    known = next((TITLES[title] for title in TITLES if opening.startswith(title)), None)
    if known:
        return {"id": known, "source": path.name}
    return {"title": lines[0][:200], "source": path.name} if lines else None


# ---- the recipe ----------------------------------------------------------------------------------------------------------


def published_recipe(recipe: Recipe, record: RunRecord) -> str:
    """Return the recipe as YAML that loads, local paths cut to their last part; output folder and hub tokens left out."""
    content = recipe.model_dump(mode="json")
    model, data, training = content["model"], content["data"], content["training"]
    model["name_or_path"] = public_name(model["name_or_path"], record.base_model.hub_id is not None)
    for section, key in ((model, "gguf_file"), (model, "chat_template"), (content["adapter"] or {}, "init_from")):
        if section.get(key):
            section[key] = public_name(section[key], hub_id(section[key]) is not None)
    local = {source.path for source in record.data.sources.values() if source.files}
    for source in [*data["train"], *(data["eval"] or [])]:
        if source["path"] in local:
            source["path"] = public_name(source["path"], on_hub=False)
    for key in ("output_dir", "hub_token", "push_to_hub_token"):
        training.pop(key, None)
    for key, value in training.items():
        if isinstance(value, str) and looks_local(value):
            training[key] = last_part(value)
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def without_paths(text: str, recipe: Recipe, record: RunRecord) -> str:
    """Return a sentence of the run with the local paths that it may quote cut to their last part."""
    paths = [
        path for source in record.data.sources.values() if source.files for path in (source.path or "", *source.files)
    ]
    if record.base_model.hub_id is None:
        paths.append(recipe.model.name_or_path)
    for path in sorted(paths, key=len, reverse=True):
        if not path.startswith(BUILTIN) and ("/" in path or "\\" in path):
            text = text.replace(path, last_part(path))
    return text
