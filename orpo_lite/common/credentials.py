"""What may leave this machine: credentials, found in texts and removed from printed ones, and the files that may be published."""

import io
import json
import os
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from orpo_lite.common import safe_yaml
from orpo_lite.common.errors import RequestError

SHAPES: dict[str, str] = safe_yaml.read(Path(__file__).with_suffix(".yaml"))
PATTERNS = {kind: re.compile(shape, re.ASCII) for kind, shape in SHAPES.items()}
"""Shapes of credentials by kind: for the check of recipes, the search before an upload, and printed text."""
SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|API_?KEY|ACCESS_?KEY|CREDENTIAL", re.IGNORECASE)
"""Environment variables that hold a secret."""
USER_IN_ADDRESS = re.compile(r"(?<=//)[^/\s@]+@")
"""In an address: user:password@."""
SHORTEST = 8
"""Characters; removing shorter secrets would remove words of the text."""


def looks_like_secret(text: str) -> bool:
    """Return True if the text holds anything shaped like a credential, or an address with a password."""
    users = USER_IN_ADDRESS.findall(text)
    return any(":" in user for user in users) or any(pattern.search(text) for pattern in PATTERNS.values())


def find_secrets(content: Path | bytes, token: str | None = None) -> list[str]:
    """Return 'line N: looks like a KIND' for every credential in a text file, the user's own token included; nothing for
    a binary file."""
    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        head = file.read(1 << 16)
        if b"\0" in head:
            return []
        text = (head + file.read()).decode("utf-8", "replace")
    found = [(match.start(), kind) for kind, pattern in PATTERNS.items() for match in pattern.finditer(text)]
    if token and token in text:
        found.append((text.index(token), "Hugging Face token: your own"))
    lines = [(text.count("\n", 0, start) + 1, kind) for start, kind in sorted(found)]
    return list(dict.fromkeys(f"line {line}: looks like a {kind}" for line, kind in lines))


def without_secrets(text: str) -> str:
    """Return text without secrets of the environment, anything shaped like a token, or users and passwords in addresses."""
    named = {
        value.strip()
        for name, value in os.environ.items()
        if SECRET_NAME.search(name) and not name.endswith(("PATH", "FILE"))
    }
    named |= {json.dumps(secret)[1:-1] for secret in named}
    for secret in sorted(named, key=len, reverse=True):
        text = text.replace(secret, "<secret>") if len(secret) >= SHORTEST else text
    text = USER_IN_ADDRESS.sub("<secret>@", text)
    for pattern in PATTERNS.values():
        text = pattern.sub("<secret>", text)
    return text


Table = dict[str, list[str]]
"""What a file is, or why it stays -> patterns of its name."""

TABLES: dict[str, Table] = safe_yaml.read(Path(__file__).with_name("published_files.yaml"))
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
    """Search what would be uploaded for credentials: `files` by their names in the repository, as paths or content.

    Raises:
        RequestError: there are some; file and line of each are named, and they are not shown.
    """
    found = [f"{name}, {line}" for name, content in files.items() for line in find_secrets(content, token)]
    if found:
        raise RequestError(
            "\n  - ".join([f"{place} holds what is not to be published, so nothing was uploaded:", *found])
            + "\ntake credentials out of the text (revoke them if the folder was ever shared); then push again"
        )
