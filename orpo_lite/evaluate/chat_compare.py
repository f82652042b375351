"""Two answers to one message, how likely each side finds them, and the user's choice between them."""

from __future__ import annotations

import random
import shlex
from dataclasses import dataclass, field

import torch
from rich.table import Table
from rich.text import Text

from orpo_lite.common.console import console, errors
from orpo_lite.common.errors import RequestError
from orpo_lite.common.text import visible
from orpo_lite.evaluate.answering import Answerer, Reply, Sampling
from orpo_lite.evaluate.chat_preferences import PreferenceFile
from orpo_lite.evaluate.chat_terminal import Interruptible, Stream, read_key, read_message, write
from orpo_lite.evaluate.form import Turns
from orpo_lite.objective.loss import log_odds_ratio

WIDE = 100
"""Columns of a terminal from which on answers stand side by side."""
KEYS = "better: 1 or 2, e to write a better one, any other key skips> "


@dataclass
class Comparison:
    """Rounds of a message, two answers and a choice.

    Args:
        file: where choices go; None asks for none.
        blind: the sides are shuffled, and told once a choice is made.
        order: draws the shuffles.
    """

    answerer: Answerer
    file: PreferenceFile | None
    blind: bool
    order: random.Random
    chosen: list[str] = field(default_factory=list)
    """Side of each answer that was preferred."""

    def opening(self) -> str:
        """Where choices go."""
        assert self.file is not None
        held = f", which holds {counted(self.file.held)}" if self.file.held else ""
        return f"your choices are appended to {self.file.path.absolute()}{held}"

    def closing(self) -> str:
        """What came of it."""
        assert self.file is not None
        trained = self.answerer.names[-1]
        if not self.chosen:
            return "no choice was made, and nothing written"
        found, path = self.answerer.found, shlex.quote(str(self.file.path))
        words = "--recipe RECIPE"
        if found.recipe and found.kind == "adapter":
            words = f"--recipe {shlex.quote(found.path)} adapter.init_from={shlex.quote(found.path)}"
        return (
            f"appended to {self.file.path}: {counted(len(self.chosen))}; the answer of {trained} was preferred "
            f"{self.chosen.count(trained)} times\nto train on them: python -m orpo_lite.train {words} data.train={path}"
        )

    def round(self, turns: Turns, sampling: Sampling) -> str | None:
        """Answer with both sides, show what there is to know, and keep a choice.

        Returns:
            The answer that the conversation goes on with, or None where Ctrl-C stopped it.
        """
        names = list(self.answerer.names)
        if self.blind:
            self.order.shuffle(names)
        replies = self.answers(turns, sampling, names)
        if replies is None:
            errors.print("(stopped: no comparison)", style="dim")
            return None
        goes_on = 0 if self.blind else 1
        equal = replies[0].text == replies[1].text
        if equal:
            console.print("both answers are the same, so they make no pair", style="dim")
        if not self.blind or equal or self.file is None:
            self.likelihoods(turns, replies, names)
        if equal or self.file is None:
            return replies[goes_on].text
        row, kept = self.choose(turns, replies, names)
        if row is None:
            side = f"answer {goes_on + 1}" if self.blind else f"the answer of {names[goes_on]}"
            console.print(f"not kept; the conversation goes on with {side}", style="dim")
            return replies[goes_on].text
        self.file.append(row)
        self.chosen.append(kept)
        if self.blind:
            console.print(f"kept; 1 was {names[0]}, 2 was {names[1]}", style="dim")
            self.likelihoods(turns, replies, names)
        else:
            console.print(f"kept ({len(self.chosen)} in this chat)", style="dim")
        chosen = row["chosen"]
        return self.answerer.form.answer(chosen if isinstance(chosen, str) else chosen[0]["content"])

    def titles(self, names: list[str]) -> list[str]:
        return [f"answer {place}" if self.blind else f"{place} {name}" for place, name in enumerate(names, 1)]

    def answers(self, turns: Turns, sampling: Sampling, names: list[str]) -> list[Reply] | None:
        """Both answers on the screen: in columns once they are made, or below each other while they are."""
        wide = console.is_terminal and console.width >= WIDE
        lead = self.answerer.form.kind != "plain"
        state, replies = torch.get_rng_state(), []
        with Interruptible() as stop:
            for title, name in zip(self.titles(names), names, strict=True):
                torch.set_rng_state(state)  # the same luck for both, whichever comes first
                if wide:
                    with console.status(title):
                        replies.append(self.answerer.reply(name, turns, sampling, None, stop))
                else:
                    console.print(title, style="bold", markup=False)
                    shown = Stream(self.answerer.tokenizer, lead=lead)
                    replies.append(self.answerer.reply(name, turns, sampling, shown, stop))
                    write("\n")
                    if not replies[-1].ended and not stop.asked:
                        console.print(cut(replies[-1]), style="dim")
                if stop.asked:
                    return None
        if wide:
            table = Table(*self.titles(names), expand=True, box=None, padding=(0, 2, 0, 0))
            for column in table.columns:
                column.ratio = 1
            ends = [Text(visible(each.text)).append("" if each.ended else f"\n{cut(each)}", "dim") for each in replies]
            table.add_row(*ends)
            console.print(table)
        return replies

    def likelihoods(self, turns: Turns, replies: list[Reply], names: list[str]) -> None:
        """Mean log-prob a token of each answer under each side, and its log-odds ratio."""
        try:
            found = self.answerer.mean_logps(turns, replies[0].text, replies[1].text)
        except RequestError as error:
            console.print(f"no log-probs: {error}", style="dim", markup=False, soft_wrap=True)
            return
        titles = [f"{place} ({name})" for place, name in enumerate(names, 1)]
        table = Table(
            "mean log-prob a token", *titles, "log-odds ratio, 1 over 2", box=None, padding=(0, 2, 0, 0), style="dim"
        )
        for name, (first, second) in found.items():
            ratio = log_odds_ratio(torch.tensor(first), torch.tensor(second)).item()
            table.add_row(f"under {name}", f"{first:.4f}", f"{second:.4f}", f"{ratio:+.4f}")
        console.print(table)

    def choose(self, turns: Turns, replies: list[Reply], names: list[str]) -> tuple[dict | None, str]:
        """The user's choice as a preference row, and whose answer it prefers; None where there is none."""
        texts = [reply.text for reply in replies]
        try:
            key = read_key(KEYS)
            if key in ("1", "2"):
                better = int(key) - 1
                if not all(text.strip() for text in texts):
                    raise RequestError("an empty answer makes no pair")
                return self.answerer.form.row(turns, texts[better], texts[1 - better]), names[better]
            if key == "e":
                own = read_message("better answer> ")
                worse = texts[names.index(self.answerer.names[-1])]
                if not own or own == worse or not worse.strip():
                    raise RequestError("an empty answer, or the same one, makes no pair")
                return self.answerer.form.row(turns, own, worse), "you"
        except KeyboardInterrupt:
            console.print()
        except RequestError as error:
            console.print(str(error), style="dim", markup=False)
        return None, ""


def cut(reply: Reply) -> str:
    """A word on an answer that a limit ended."""
    return f"(cut after {reply.tokens:,} tokens)"


def counted(pairs: int) -> str:
    return "1 pair" if pairs == 1 else f"{pairs:,} pairs"
