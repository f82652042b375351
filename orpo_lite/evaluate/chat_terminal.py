"""The terminal's side of a chat: lines and keys in, answers out while they are made, Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from orpo_lite.common.console import console
from orpo_lite.common.text import visible

with contextlib.suppress(ImportError):  # Windows: lines without editing
    import readline  # noqa: F401  # input() edits lines and remembers them once it is there

BLOCK = '"""'
"""Begins and ends a message of several lines."""
INCOMPLETE = "\ufffd"
"""What a tokenizer makes of the first bytes of a character."""


def write(text: str) -> None:
    """Text of a model to the terminal, at once and as text: every character that acts is written out by itself, so a
    sequence cannot come together from parts."""
    console.file.write(visible(text))
    console.file.flush()


class Stream(BaseStreamer):
    """Writes an answer while it is made.

    Args:
        skip: tokens of the prompt arrive first.
        lead: the space before the first word is left out.
    """

    def __init__(self, tokenizer: Any, out: Callable[[str], None] = write, lead: bool = True):
        self.tokenizer, self.out, self.lead = tokenizer, out, lead
        self.ids: list[int] = []
        self.done = ""
        """What is written of the text of `ids`."""
        self.prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then a token at a time."""
        if self.prompt:
            self.prompt = False
            return
        self.ids += value.flatten().tolist()
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        self._write(text.rstrip(INCOMPLETE))  # a character may be made of several tokens
        if text.endswith("\n"):
            self.ids, self.done = [], ""

    def end(self) -> None:
        """Write what was held back."""
        self._write(self.tokenizer.decode(self.ids, skip_special_tokens=True))

    def _write(self, text: str) -> None:
        new, self.done = text[len(self.done) :], max(text, self.done, key=len)
        if self.lead:
            new = new.lstrip()
        if new:
            self.lead = False
            self.out(new)


class Interruptible(StoppingCriteria):
    """While open, Ctrl-C ends an answer at its next token; pressed again it does not wait for that.

    Attributes:
        asked: whether it was pressed.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Interruptible:
        self.main = threading.current_thread() is threading.main_thread()
        if self.main:
            self.before = signal.signal(signal.SIGINT, self._on)
        return self

    def __exit__(self, *_: object) -> None:
        if self.main:
            signal.signal(signal.SIGINT, self.before)

    def _on(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> Any:
        """transformers asks after each token."""
        return torch.full((len(input_ids),), self.asked, dtype=torch.bool, device=input_ids.device)


def read_message(prompt: str) -> str:
    """A line that the user writes, or several between lines of triple quotes.

    Raises:
        EOFError: Ctrl-D.
        KeyboardInterrupt: Ctrl-C.
    """
    line = input(prompt)
    if not line.lstrip().startswith(BLOCK):
        return line.strip()
    lines = [line.lstrip().removeprefix(BLOCK)]
    while not lines[-1].rstrip().endswith(BLOCK):
        lines.append(input("...> "))
    lines[-1] = lines[-1].rstrip().removesuffix(BLOCK)
    return "\n".join(lines).strip()


def read_key(prompt: str) -> str:
    """A key, without Enter where the terminal can; "" for Enter alone.

    Raises:
        EOFError: Ctrl-D.
        KeyboardInterrupt: Ctrl-C.
    """
    try:
        import termios
        import tty

        place = sys.stdin.fileno()
        before = termios.tcgetattr(place)
    except (ImportError, OSError, ValueError, termios.error):  # Windows, or no terminal
        return input(prompt).strip()[:1]
    console.file.write(prompt)
    console.file.flush()
    try:
        tty.setcbreak(place, termios.TCSADRAIN)
        key = os.read(place, 1).decode("latin-1")
    finally:
        termios.tcsetattr(place, termios.TCSADRAIN, before)
    if key in ("\x04", ""):
        raise EOFError
    console.file.write(f"{visible(key).strip()}\n")
    console.file.flush()
    return key.strip()
