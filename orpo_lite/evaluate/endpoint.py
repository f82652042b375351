"""A chat model behind an OpenAI-compatible address."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from orpo_lite import __version__
from orpo_lite.common.errors import RequestError

KEY = "OPENAI_API_KEY"
TOGETHER = 4
"""Requests at a time."""
AGAIN = (408, 409, 429, 500, 502, 503, 504, 529)
"""Status that may pass."""
LONGEST_PAUSE = 60.0
LARGEST = 10_000_000
"""Bytes of a response that are read."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Another address is another party: the key is not for it."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Endpoint:
    """Answers conversations through POST .../chat/completions.

    The key is taken from OPENAI_API_KEY, sent to this address alone, and kept out of every message.

    Args:
        url: the base (http://host:8000/v1, or http://host:8000) or the whole address.
        model: its name there.
        max_tokens: of an answer.
        tries: how often a request is made that fails in a way that may pass.
        timeout: seconds that an answer may take.
        pause: seconds before the second try; each next pause is twice as long, unless the server names one.
    """

    def __init__(
        self, url: str, model: str, max_tokens: int, tries: int = 6, timeout: float = 180.0, pause: float = 1.0
    ):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RequestError(f"--judge: {url[:200]} is no address, expected such as http://127.0.0.1:8000/v1")
        if parts.username or parts.password:
            raise RequestError(f"--judge: the address names a user or password: give a key in {KEY} instead")
        path = parts.path.rstrip("/")
        if not path.endswith("/chat/completions"):
            path += "/chat/completions" if path else "/v1/chat/completions"
        self.url = urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))
        self.model, self.tries, self.timeout, self.pause = model, tries, timeout, pause
        self.options: dict[str, Any] = {"temperature": 0, "max_tokens": max_tokens}
        self.opener = urllib.request.build_opener(NoRedirect)
        self.sleep: Callable[[float], None] = time.sleep

    def __str__(self) -> str:
        return f"{self.model} at {self.url}"

    def answers(self, conversations: list[list[dict[str, str]]]) -> list[str]:
        """The answer to each, a few asked at a time; "" where the model gives none.

        Raises:
            RequestError: the address refuses: no such model, a wrong key, a request that it does not understand.
            RuntimeError: it cannot be reached or fails, again and again.
        """
        pool = ThreadPoolExecutor(TOGETHER)
        try:
            return list(pool.map(self.ask, conversations))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def ask(self, messages: list[dict[str, str]]) -> str:
        """The answer to one conversation."""
        failure, wait = "", 0.0
        for attempt in range(self.tries):
            if attempt:
                self.sleep(min(LONGEST_PAUSE, wait or self.pause * 2 ** (attempt - 1)))
            wait, options = 0.0, dict(self.options)
            try:
                return self.content(self.post({"model": self.model, "messages": messages, **options}))
            except urllib.error.HTTPError as error:
                said = self.words(error)
                if error.code == 400 and self.without_what_it_refuses(said, options):
                    continue
                if error.code not in AGAIN:
                    raise RequestError(f"{self} answered {error.code} ({said}): {remedy(error.code)}") from None
                failure, wait = f"{error.code} ({said})", seconds(error.headers.get("Retry-After"))
            except (OSError, http.client.HTTPException) as error:  # refused, reset, timed out
                reason = getattr(error, "reason", None) or error
                failure = (
                    "no answer in time" if isinstance(reason, TimeoutError) else str(reason) or type(error).__name__
                )
        raise RuntimeError(
            f"{self}: {self.tries} tries failed, the last with {self.hidden(failure)}: is it there, and in health?"
        )

    def post(self, body: dict[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json", "User-Agent": f"orpo_lite/{__version__}"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        # S310: the scheme was looked at
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)  # noqa: S310
        with self.opener.open(request, timeout=self.timeout) as response:
            return response.read(LARGEST)

    def content(self, body: bytes) -> str:
        """The text in a response."""
        try:
            text = json.loads(body)["choices"][0]["message"].get("content")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            said = self.hidden(body[:200].decode("utf-8", "replace"))
            raise RequestError(f"{self} answered no chat completion ({said}): does the address end in /v1?") from None
        return text if isinstance(text, str) else ""

    def without_what_it_refuses(self, said: str, options: dict[str, Any]) -> bool:
        """Newer models want another name for the limit, or no temperature; whether the request was changed."""
        if "max_tokens" in said and "max_tokens" in options:
            self.options = {k: v for k, v in options.items() if k != "max_tokens"} | {"max_completion_tokens": options["max_tokens"]}  # fmt: skip
            return True
        if "temperature" in said and "temperature" in options:
            self.options = {k: v for k, v in options.items() if k != "temperature"}
            return True
        return False

    def words(self, error: urllib.error.HTTPError) -> str:
        """What an error's body says."""
        try:
            body = error.read(LARGEST)
        except (OSError, http.client.HTTPException):
            body = b""
        try:
            found = json.loads(body)
            found = found.get("error", found.get("detail", found.get("message", found)))
            text = str(found.get("message", found) if isinstance(found, dict) else found)
        except (ValueError, AttributeError):
            text = body.decode("utf-8", "replace")
        return self.hidden(" ".join(text.split())[:300] or error.reason)

    def hidden(self, text: str) -> str:
        """Without the key, which a server may repeat."""
        key = os.environ.get(KEY)
        return text.replace(key, "<key>") if key else text


def remedy(status: int) -> str:
    """What to do about a status."""
    if status in (401, 403):
        return f"set {KEY} to a key for this address"
    if status in range(300, 400):
        return "name the address that it leads to"
    return "is this the address of an OpenAI-compatible server, and --judge-model the name of a model there?"


def seconds(given: str | None) -> float:
    """Retry-After, where it is a number."""
    try:
        return max(0.0, float(given or 0))
    except ValueError:
        return 0.0
