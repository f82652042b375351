"""Credentials: the one list of their shapes, the search for them in files, and their removal from printed text."""

from __future__ import annotations

import contextlib
import getpass
import io
import os
import platform
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PATTERNS = {
    kind: re.compile(pattern, re.ASCII)
    for kind, pattern in {
        "Hugging Face token": r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}",
        "API key": r"(?<![A-Za-z0-9])sk-[A-Za-z0-9_-]{20,}|(?<![A-Za-z0-9])[rs]k_live_[A-Za-z0-9]{16,}",
        "AWS key": r"(?<![A-Za-z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])",
        "GitHub token": r"\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_[A-Za-z0-9_]{20,}",
        "GitLab token": r"\bglpat-[A-Za-z0-9_-]{16,}",
        "Slack token": r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}",
        "Google key": r"\bAIza[A-Za-z0-9_-]{35}",
        "PyPI or npm token": r"\bpypi-AgE[A-Za-z0-9_-]{16,}|\bnpm_[A-Za-z0-9]{30,}",
        "private key": r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY",
        "signed web token": r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
        "password in an address": r"\b[a-z][a-z0-9+.-]*://[^\s/:@'\"<>]+:[^\s/:@'\"<>{}$]{3,}@",
        "secret": r"(?i)(?:api_?key|(?:hub|hf|auth|access|refresh|bearer)_token|secret_(?:access_)?key|client_secret)"
        r"[\"']?\s*[:=]\s*[\"']?(?=[^\s\"']*\d)(?=[^\s\"']*[a-z])[A-Za-z0-9_/+=.-]{16,}",
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
    """Return True if the text holds anything shaped like a credential."""
    return any(pattern.search(text) for pattern in PATTERNS.values())


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


class Scrubber:
    """A function that removes secrets and the names of user, machine and home folder from text.

    Args:
        report: for a bug report, where the address of a private hub is removed as well.
    """

    def __init__(self, report: bool = False) -> None:
        self.secrets = known_secrets()
        self.homes = sorted({str(Path.home()), str(Path.home().resolve())} - {"/"}, key=len, reverse=True)
        self.words: list[tuple[re.Pattern[str], str]] = []
        with contextlib.suppress(Exception):  # a container's user may have no name
            self.words.append((re.compile(rf"(?<=[/\\]){re.escape(getpass.getuser())}(?=[/\\]|\b)"), "<user>"))
        host = platform.node().partition(".")[0]
        if len(host) > 2 and host != "localhost":
            self.words.append((re.compile(rf"\b{re.escape(host)}\b"), "<host>"))
        endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "")).hostname
        if report and endpoint and endpoint != "huggingface.co":
            self.words.append((re.compile(re.escape(endpoint)), "<endpoint>"))

    def __call__(self, value: Any) -> Any:
        """Return the value with every text in it scrubbed."""
        if isinstance(value, dict):
            return {self(key): self(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [self(each) for each in value]
        return self._text(value) if isinstance(value, str) else value

    def _text(self, text: str) -> str:
        text = hide_secrets(text, self.secrets, user="")
        for home in self.homes:
            text = re.sub(rf"{re.escape(home)}(?=[/\\]|\b|$)", "~", text)
        for pattern, word in self.words:
            text = pattern.sub(word, text)
        return text


def without_secrets(text: str) -> str:
    """Return text without this machine's tokens, anything shaped like one, or passwords in addresses."""
    return hide_secrets(text, known_secrets(), user="<secret>@")


def hide_secrets(text: str, secrets: list[str], user: str) -> str:
    """Replace known secrets and anything shaped like one; `user` stands in for user:password@ in addresses."""
    for secret in secrets:
        text = text.replace(secret, "<secret>")
    text = USER_IN_ADDRESS.sub(user, text)
    for pattern in PATTERNS.values():
        text = pattern.sub("<secret>", text)
    return text


def known_secrets() -> list[str]:
    """Return the secrets in this process's environment and in token files, longest first."""
    found = {
        value.strip()
        for name, value in os.environ.items()
        if SECRET_NAME.search(name) and not name.endswith(("PATH", "FILE"))
    }
    for path in token_files():
        with contextlib.suppress(OSError):
            found.update(re.split(r"[\s=]+", path.read_text("utf-8", errors="replace")))
    return sorted((word for word in found if len(word) >= SHORTEST), key=len, reverse=True)


def token_files() -> list[Path]:
    """Return the files in which huggingface_hub keeps its tokens.

    They are found by the environment, not by the library, which may be what is broken.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"))
    home = Path(os.environ.get("HF_HOME") or cache / "huggingface")
    used = Path(os.environ.get("HF_TOKEN_PATH") or home / "token")
    return [path.expanduser() for path in (used, used.with_name("stored_tokens"))]
