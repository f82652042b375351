"""Credentials: the one list of their shapes, the search for them in texts, and their removal from printed text."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from pathlib import Path

PATTERNS = {
    kind: re.compile(pattern, re.ASCII)
    for kind, pattern in {
        "Hugging Face token": r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}",
        "API key": r"(?<![A-Za-z0-9])sk-(?:[\w-]*[_-])?(?=[A-Za-z]*\d)[A-Za-z0-9]{16,}[\w-]*|(?<![A-Za-z0-9])[rs]k_live_[A-Za-z0-9]{16,}",
        "AWS key": r"(?<![A-Za-z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])",
        "GitHub token": r"\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_[A-Za-z0-9_]{20,}",
        "GitLab token": r"\bglpat-[A-Za-z0-9_-]{16,}",
        "Slack token": r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}",
        "Google key": r"\bAIza[A-Za-z0-9_-]{35}",
        "PyPI or npm token": r"\bpypi-AgE[A-Za-z0-9_-]{16,}|\bnpm_[A-Za-z0-9]{30,}",
        "private key": r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY",
    }.items()
}
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
    """Return 'line N: looks like a KIND' for every credential in a text file; nothing for a binary file.

    Args:
        content: a file, or its bytes.
        token: the user's own token, to be searched for as well.
    """
    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        head = file.read(1 << 16)
        wide = head.startswith((b"\xff\xfe", b"\xfe\xff"))
        if b"\0" in head and not wide:
            return []
        data = head + file.read()
    text = data.decode("utf-16" if wide else "utf-8", "replace")
    found = [(match.start(), kind) for kind, pattern in PATTERNS.items() for match in pattern.finditer(text)]
    if token and token in text:
        found.append((text.index(token), "Hugging Face token: your own"))
    lines = [(text.count("\n", 0, start) + 1, kind) for start, kind in sorted(found)]
    return list(dict.fromkeys(f"line {line}: looks like a {kind}" for line, kind in lines))


def without_secrets(text: str) -> str:
    """Return text without this machine's tokens, anything shaped like one, or users and passwords in addresses."""
    for secret in known_secrets():
        text = text.replace(secret, "<secret>")
    text = USER_IN_ADDRESS.sub("<secret>@", text)
    for pattern in PATTERNS.values():
        text = pattern.sub("<secret>", text)
    return text


def known_secrets() -> list[str]:
    """Return the secrets in this process's environment and in token files, also as JSON writes them, longest first."""
    found = {
        value.strip()
        for name, value in os.environ.items()
        if SECRET_NAME.search(name) and not name.endswith(("PATH", "FILE"))
    }
    with contextlib.suppress(Exception):  # the library may be what is broken
        from huggingface_hub import constants

        for path in map(Path, (constants.HF_TOKEN_PATH, constants.HF_STORED_TOKENS_PATH)):
            if path.is_file():
                found.update(re.split(r"[\s=]+", path.read_text("utf-8", errors="replace")))
    found |= {json.dumps(secret)[1:-1] for secret in found}
    return sorted((word for word in found if len(word) >= SHORTEST), key=len, reverse=True)
