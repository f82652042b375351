"""What must not leave the machine in a bug report: secrets, the user's and the machine's name, where home is."""

from __future__ import annotations

import contextlib
import getpass
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|API_?KEY|ACCESS_?KEY|CREDENTIAL", re.IGNORECASE)
TOKEN = re.compile(r"\b(hf|api)_[A-Za-z0-9]{16,}")
CREDENTIALS = re.compile(r"(?<=//)[^/\s@]+@")
"""In an address: user:password@."""
SHORTEST = 8
"""Secrets shorter than this would take words out of the text."""


class Scrubber:
    """Takes private words out of text.

    Args:
        report: for a bug report, where the name of the user's own hub is private as well.
    """

    def __init__(self, report: bool = False) -> None:
        self.secrets = sorted(set(_secrets()), key=len, reverse=True)
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
        """The same value, every text in it scrubbed."""
        if isinstance(value, dict):
            return {self(key): self(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [self(each) for each in value]
        return self._text(value) if isinstance(value, str) else value

    def _text(self, text: str) -> str:
        for secret in self.secrets:
            text = text.replace(secret, "<secret>")
        text = CREDENTIALS.sub("", TOKEN.sub("<secret>", text))
        for home in self.homes:
            text = re.sub(rf"{re.escape(home)}(?=[/\\]|\b|$)", "~", text)
        for pattern, word in self.words:
            text = pattern.sub(word, text)
        return text


def without_secrets(text: str) -> str:
    """The text without this machine's tokens, anything shaped like one, or passwords in addresses."""
    for secret in sorted(set(_secrets()), key=len, reverse=True):
        text = text.replace(secret, "<secret>")
    return CREDENTIALS.sub("<secret>@", TOKEN.sub("<secret>", text))


def _secrets() -> Iterator[str]:
    for name, value in os.environ.items():
        if SECRET_NAME.search(name) and not name.endswith(("PATH", "FILE")) and len(value.strip()) >= SHORTEST:
            yield value.strip()
    for path in token_files():
        with contextlib.suppress(OSError):
            for word in re.split(r"[\s=]+", path.read_text("utf-8", errors="replace")):
                if len(word) >= SHORTEST:
                    yield word


def token_files() -> list[Path]:
    """Where huggingface_hub keeps the token that is used, and all that it knows; asked of the environment, not of the
    library, which may be what is broken."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"))
    home = Path(os.environ.get("HF_HOME") or cache / "huggingface")
    used = Path(os.environ.get("HF_TOKEN_PATH") or home / "token")
    return [path.expanduser() for path in (used, used.with_name("stored_tokens"))]
