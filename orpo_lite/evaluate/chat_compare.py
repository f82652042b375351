"""Compare two answers to one message: how likely each side finds them, and the user's choice, kept as training data."""

from __future__ import annotations

import json
import os
import random
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from orpo_lite.common.console import console, errors
from orpo_lite.common.errors import RequestError
from orpo_lite.common.text import visible
from orpo_lite.data.row_shapes import row_shape
from orpo_lite.evaluate.answering import Answerer, Interruptible, Reply, Sampling, Stream, Turns, write
from orpo_lite.objective.loss import log_odds_ratio

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MIN_COLUMNS = 100
"""Width of a terminal from which on answers stand side by side."""
KEYS = "better: 1 or 2, e to write a better one, any other key skips> "


@dataclass
class Comparison:
    """Rounds of a message, two answers and a choice.

    Args:
        file: where choices go; None asks for none.
        blind: the sides are shuffled, and revealed once a choice is made.
        order: draws the shuffles.
        read_key: asks the user for one key.
        read_message: asks the user for text.
    """

    answerer: Answerer
    file: PreferenceFile | None
    blind: bool
    order: random.Random
    read_key: Callable[[str], str]
    read_message: Callable[[str], str]
    chosen: list[str] = field(default_factory=list)
    """Side of each answer that was preferred."""

    def opening(self) -> str:
        """Say where choices go."""
        assert self.file is not None
        held = f", which holds {count_pairs(self.file.held)}" if self.file.held else ""
        return f"your choices are appended to {self.file.path.absolute()}{held}"

    def closing(self) -> str:
        """Sum up the choices, and say how to train on them."""
        assert self.file is not None
        trained = self.answerer.names[-1]
        if not self.chosen:
            return "no choice was made, and nothing written"
        source, path = self.answerer.source, shlex.quote(str(self.file.path))
        words = "--recipe RECIPE"
        if source.recipe and source.kind == "adapter":
            words = f"--recipe {shlex.quote(source.path)} adapter.init_from={shlex.quote(source.path)}"
        return (
            f"appended to {self.file.path}: {count_pairs(len(self.chosen))}; the answer of {trained} was preferred "
            f"{self.chosen.count(trained)} times\nto train on them: python -m orpo_lite.train {words} data.train={path}"
        )

    def round(self, turns: Turns, sampling: Sampling) -> str | None:
        """Answer with both sides, compare the answers, and keep a choice.

        Returns:
            The answer that the conversation continues with, or None where Ctrl-C stopped it.
        """
        names = list(self.answerer.names)
        if self.blind:
            self.order.shuffle(names)
        replies = self.answers(turns, sampling, names)
        if replies is None:
            errors.print("(stopped: no comparison)", style="dim")
            return None
        default = 0 if self.blind else 1
        equal = replies[0].text == replies[1].text
        if equal:
            console.print("both answers are the same, so they make no pair", style="dim")
        if not self.blind or equal or self.file is None:
            self.show_likelihoods(turns, replies, names)
        if equal or self.file is None:
            return replies[default].text
        row, preferred = self.choose(turns, replies, names)
        if row is None:
            side = f"answer {default + 1}" if self.blind else f"the answer of {names[default]}"
            console.print(f"not kept; the conversation continues with {side}", style="dim")
            return replies[default].text
        self.file.append(row)
        self.chosen.append(preferred)
        if self.blind:
            console.print(f"kept; 1 was {names[0]}, 2 was {names[1]}", style="dim")
            self.show_likelihoods(turns, replies, names)
        else:
            console.print(f"kept ({len(self.chosen)} in this chat)", style="dim")
        chosen = row["chosen"]
        return self.answerer.format.answer(chosen if isinstance(chosen, str) else chosen[0]["content"])

    def answers(self, turns: Turns, sampling: Sampling, names: list[str]) -> list[Reply] | None:
        """Show both answers: in columns once they are complete, or on a narrow terminal one after the other as they
        are generated."""
        wide = console.is_terminal and console.width >= MIN_COLUMNS
        titles = [f"answer {place}" if self.blind else f"{place} {name}" for place, name in enumerate(names, 1)]
        state, replies = torch.get_rng_state(), []
        with Interruptible() as stop:
            for title, name in zip(titles, names, strict=True):
                torch.set_rng_state(state)  # the same draws for both, whichever comes first
                if wide:
                    with console.status(title):
                        replies.append(self.answerer.reply(name, turns, sampling, None, stop))
                else:
                    console.print(title, style="bold", markup=False)
                    shown = Stream(self.answerer.tokenizer, strip=self.answerer.format.kind != "plain")
                    replies.append(self.answerer.reply(name, turns, sampling, shown, stop))
                    write("\n")
                    if not replies[-1].ended and not stop.asked:
                        console.print(cut_note(replies[-1]), style="dim")
                if stop.asked:
                    return None
        if wide:
            table = Table(*titles, expand=True, box=None, padding=(0, 2, 0, 0))
            for column in table.columns:
                column.ratio = 1
            table.add_row(
                *(
                    Text(visible(each.text)).append("" if each.ended else f"\n{cut_note(each)}", "dim")
                    for each in replies
                )
            )
            console.print(table)
        return replies

    def show_likelihoods(self, turns: Turns, replies: list[Reply], names: list[str]) -> None:
        """Print the mean log-prob per token of each answer under each side, and its log-odds ratio."""
        try:
            found = self.answerer.mean_logps(turns, replies[0].text, replies[1].text)
        except RequestError as error:
            console.print(f"no log-probs: {error}", style="dim", markup=False, soft_wrap=True)
            return
        titles = [f"{place} ({name})" for place, name in enumerate(names, 1)]
        table = Table(
            "mean log-prob per token", *titles, "log-odds ratio, 1 over 2", box=None, padding=(0, 2, 0, 0), style="dim"
        )
        for name, (first, second) in found.items():
            ratio = log_odds_ratio(torch.tensor(first), torch.tensor(second)).item()
            table.add_row(f"under {name}", f"{first:.4f}", f"{second:.4f}", f"{ratio:+.4f}")
        console.print(table)

    def choose(self, turns: Turns, replies: list[Reply], names: list[str]) -> tuple[dict | None, str]:
        """Ask for the user's choice; return it as a preference row with the preferred side, or None for no choice."""
        texts = [reply.text for reply in replies]
        try:
            key = self.read_key(KEYS)
            if key in ("1", "2"):
                better = int(key) - 1
                if not all(text.strip() for text in texts):
                    raise RequestError("an empty answer makes no pair")
                return self.answerer.format.row(turns, texts[better], texts[1 - better]), names[better]
            if key == "e":
                own = self.read_message("better answer> ")
                worse = texts[names.index(self.answerer.names[-1])]
                if not own or own == worse or not worse.strip():
                    raise RequestError("an empty answer, or the same one, makes no pair")
                return self.answerer.format.row(turns, own, worse), "you"
        except KeyboardInterrupt:
            console.print()
        except RequestError as error:
            console.print(str(error), style="dim", markup=False)
        return None, ""


class PreferenceFile:
    """JSON lines that choices are appended to, each complete and on the disk before the chat continues.

    Several chats may write to one file. Its content stays: a line that a crash left unfinished is closed first.

    Raises:
        RequestError: the file cannot be written, or holds something else.
    """

    def __init__(self, path: str | Path):
        self.path = Path(os.path.expanduser(path))
        folder = self.path.absolute().parent
        if self.path.is_dir() or not folder.is_dir():
            raise RequestError(f"--preferences: {self.path} is not a file that can be written: choose another name")
        if not os.access(self.path if self.path.exists() else folder, os.W_OK):
            raise RequestError(f"--preferences: {self.path} cannot be written: choose another place")
        self.held = self._count() if self.path.exists() else 0
        """Pairs that were in it."""

    def _count(self) -> int:
        held = number = 0
        try:
            with self.path.open(encoding="utf-8") as lines:
                for line in lines:
                    number += 1
                    if line.strip():
                        if row_shape(json.loads(line)) is None:
                            raise ValueError
                        held += 1
        except (ValueError, RecursionError):
            raise RequestError(
                f"--preferences: line {number} of {self.path} is not a preference pair in JSON, so nothing is appended to "
                "it: fix the line, or choose another file"
            ) from None
        return held

    def append(self, row: dict[str, Any]) -> None:
        """Write one row as a line.

        Raises:
            RequestError: it cannot be written; the file is then as it was.
        """
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        try:
            with self.path.open("a+b", buffering=0) as file:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - 1))
                if size and file.read(1) != b"\n":
                    line = b"\n" + line
                try:
                    if file.write(line) != len(line):
                        raise OSError("no room on the disk")
                    os.fsync(file)
                except OSError:
                    file.truncate(size)
                    raise
        except OSError as error:
            raise RequestError(
                f"{self.path} cannot be written ({error.strerror or error}): the choice is not kept"
            ) from None


def cut_note(reply: Reply) -> str:
    """Mention the limit that ended an answer."""
    return f"(cut after {reply.tokens:,} tokens)"


def count_pairs(pairs: int) -> str:
    """Write a number of pairs in words."""
    return "1 pair" if pairs == 1 else f"{pairs:,} pairs"
