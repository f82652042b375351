"""The licence of a base model as its own files state it; never a guess."""

from __future__ import annotations

import importlib.metadata
import logging
from pathlib import Path

import yaml
from huggingface_hub import hf_hub_download, metadata_load
from huggingface_hub.errors import EntryNotFoundError

from orpo_lite.recipe.loading import BUILTIN
from orpo_lite.report.published_recipe import hub_id

logger = logging.getLogger(__name__)

FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING")
TITLES = {
    "apache license version 2.0, january 2004": "apache-2.0",
    "mit license": "mit",
    "the mit license (mit)": "mit",
}
"""Opening words of a licence file, in lower case, whose hub identifier is beyond doubt."""


def find_licence(base: str, revision: str | None = None) -> dict[str, str] | None:
    """What a base says of its licence: {"id", "name", "link", "source"}, or None where it says nothing.

    The front matter of its README.md is asked first, then its licence file, in its folder or in its repository on the
    hub (through the cache; a hub that cannot be reached is no error). Of a licence file that is neither Apache's nor
    MIT's only the first line is known, as "title", without "id".

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
    for name in FILES:
        # where even the README cannot be had, the hub is out of reach as a rule: not five more attempts
        if path := file_of(base, revision, name, cached=readme is None):
            return from_text(path)
    return None


def file_of(base: str, revision: str | None, name: str, cached: bool = False) -> Path | None:
    """A file of the base on this disk, fetched if it lies on the hub, that answers, and `cached` is not asked for."""
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
