"""The allow-list of files that may be published on the hub, and the search of their texts for credentials."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from orpo_lite.common import safe_yaml
from orpo_lite.common.credentials import find_secrets
from orpo_lite.common.errors import RequestError

Table = dict[str, list[str]]
"""What a file is, or why it stays -> patterns of its name."""

TABLES: dict[str, Table] = safe_yaml.read(Path(__file__).with_suffix(".yaml"))
STAYS = TABLES.pop("stays")
"""Everything that is not on the allow-list: not uploaded, and no reason to refuse."""
COMMON = TABLES.pop("every kind")
ALLOWED = {kind: COMMON | files for kind, files in TABLES.items()}
"""What may be uploaded, by kind of upload."""


def walk(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield (name in the repository, path) of everything in a folder; subfolders end in / and are not entered."""
    for path in sorted(folder.iterdir()):
        if path.name == "additional_chat_templates" and path.is_dir() and not path.is_symlink():
            yield from ((f"{path.name}/{inner.name}{'/' * inner.is_dir()}", inner) for inner in sorted(path.iterdir()))
        else:
            yield path.name + "/" * path.is_dir(), path


def match(name: str, table: Table) -> str | None:
    """Return a table's text for the first pattern that fits the name."""
    return next((what for what, names in table.items() if any(fnmatchcase(name, one) for one in names)), None)


def published(folder: Path, allowed: Table) -> dict[str, Path]:
    """Return the files of a folder that may be published, by their names in the repository.

    Raises:
        RequestError: one of them is a link that leads out of the folder.
    """
    files = {name: path for name, path in walk(folder) if match(name, allowed)}
    for name, path in files.items():
        if not path.resolve().is_relative_to(folder.resolve()):
            raise RequestError(
                f"{folder}/{name}: a link that leads out of the folder, so nothing was uploaded: put the file itself there"
            )
    return {name: path for name, path in files.items() if path.is_file()}


def refuse_secrets(place: Path, files: Mapping[str, Path | bytes], token: str | None) -> None:
    """Search what would be uploaded for credentials.

    Args:
        place: the folder that the files are of.
        files: name in the repository -> a file, or its content.
        token: the user's own, to be searched for as well.

    Raises:
        RequestError: there are some; file and line of each are named, and they are not shown.
    """
    found = [f"{name}, {line}" for name, content in files.items() for line in find_secrets(content, token)]
    if found:
        raise RequestError(
            "\n  - ".join([f"{place} holds what is not to be published, so nothing was uploaded:", *found])
            + "\ntake credentials out of the text (revoke them if the folder was ever shared); then push again"
        )
