"""A conversation: what the user writes, commands or messages, until Ctrl-D."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from orpo_lite.common.console import console, errors
from orpo_lite.common.errors import RequestError
from orpo_lite.common.text import nearest
from orpo_lite.evaluate.answering import Answerer, Reply, Sampling
from orpo_lite.evaluate.chat_compare import Comparison
from orpo_lite.evaluate.chat_terminal import BLOCK, Interruptible, Stream, read_message, write
from orpo_lite.evaluate.form import Turns

HELP = {
    "/help": "this list",
    "/clear": "begin a new conversation; the system turn stays",
    "/system TEXT": "set the system turn and begin anew; without TEXT show it, `/system none` takes it away",
    "/undo": "take back the last message and its answer",
    "/regenerate": "answer the last message again",
    "/temperature T": "0 takes the most likely token each time; above, tokens are drawn",
    "/save FILE": "write the conversation as JSON",
    "/quit": "end, as Ctrl-D does",
}
ROOM = 64
"""Tokens that the oldest turns make way for, so that an answer is not cut at once."""


class Chat:
    """One conversation with a model, or with two of which the user chooses an answer.

    Args:
        comparison: makes and compares two answers; None asks the trained model alone.
    """

    def __init__(
        self, answerer: Answerer, sampling: Sampling, system: str | None, comparison: Comparison | None = None
    ):
        self.answerer, self.sampling, self.comparison = answerer, sampling, comparison
        self.turns: Turns = []
        self.system = system
        self.over = False
        self.watched = False
        """Whether somebody sits at the terminal; else standard output is for answers alone."""

    def run(self) -> None:
        """Until Ctrl-D or /quit."""
        self.watched = True
        told = "greedy" if not self.sampling.temperature else f"temperature {self.sampling.temperature:g}"
        console.print(f"{told}, at most {self.sampling.max_new_tokens:,} tokens an answer")
        if self.answerer.form.note:
            self.say(self.answerer.form.note)
        if self.comparison:
            self.say(self.comparison.opening())
        console.print(
            f"/help lists the commands; {BLOCK} begins and ends several lines; Ctrl-C stops an answer, Ctrl-D ends\n",
            style="dim",
        )
        while not self.over:
            try:
                line = read_message("you> ")
                if line:
                    self.take(line)
            except RequestError as error:
                self.say(str(error))
            except KeyboardInterrupt:
                console.print("\n(Ctrl-D or /quit ends)", style="dim")
            except EOFError:
                console.print()
                break
        if self.comparison:
            self.say(self.comparison.closing())

    def once(self, prompt: str) -> None:
        """Answer one message, the answer and nothing else to standard output."""
        self.ask([{"role": "user", "content": prompt}])

    def take(self, line: str) -> None:
        """A command or a message."""
        if not line.startswith("/"):
            self.ask([*self.turns, {"role": "user", "content": line}])
            return
        name, _, rest = line.partition(" ")
        commands = {shown.split()[0]: shown for shown in HELP}
        if name not in commands:
            raise RequestError(f"no command {name}{nearest(name, commands)}; /help lists them")
        getattr(self, f"do_{name[1:]}")(rest.strip())

    def ask(self, turns: Turns) -> None:
        """Answer a conversation that ends with a message; it is kept where there is an answer."""
        window = self.window(turns)
        text = self.comparison.round(window, self.sampling) if self.comparison else self.stream(window)
        if text is not None:
            self.turns = [*turns, {"role": "assistant", "content": text}]

    def stream(self, window: Turns) -> str:
        """The trained model's answer, written while it is made."""
        form = self.answerer.form
        with Interruptible() as stop:
            shown = Stream(self.answerer.tokenizer, lead=form.kind != "plain")
            reply = self.answerer.reply(self.answerer.names[-1], window, self.sampling, shown, stop)
        write("\n")
        self.ending(reply, stop.asked)
        return reply.text

    def ending(self, reply: Reply, stopped: bool) -> None:
        """A word on an answer that the model did not end itself."""
        if stopped:
            self.say("(stopped)")
        elif not reply.ended:
            self.say(f"(cut after {reply.tokens:,} tokens: --max-new-tokens)")

    def window(self, turns: Turns) -> Turns:
        """The conversation as the model is given it: the system turn and as many of the last turns as it has room for.

        Raises:
            RequestError: the last message alone is too long, or the template refuses it.
        """
        head: Turns = [{"role": "system", "content": self.system}] if self.system else []
        wanted = min(ROOM, self.sampling.max_new_tokens)
        for start in range(0, len(turns), 2):
            window = head + turns[start:]
            [ids] = self.answerer.prompts([window])
            last = start + 2 > len(turns)
            if self.answerer.room(ids, wanted) >= (1 if last else wanted):
                if start:
                    self.say(
                        f"(the first {start} turns are left out: the model takes {self.answerer.context:,} tokens)"
                    )
                return window
        raise RequestError(
            f"the message has {len(ids):,} tokens with all that the template adds, and the model takes "
            f"{self.answerer.context:,}: it is not sent"
        )

    def say(self, line: str) -> None:
        """A line of ours, not of a model, to whoever watches."""
        (console if self.watched else errors).print(line, style="dim", markup=False, soft_wrap=True)

    # ---- commands ----------------------------------------------------------------------------------------------------

    def do_help(self, _: str) -> None:
        width = max(map(len, HELP))
        for shown, purpose in HELP.items():
            console.print(f"  {shown:<{width}}  {purpose}", markup=False, soft_wrap=True)

    def do_clear(self, _: str) -> None:
        self.turns = []
        self.say("a new conversation")

    def do_system(self, text: str) -> None:
        if not text:
            self.say(f"system: {self.system}" if self.system else "no system turn but what the template writes itself")
            return
        system = None if text == "none" else text
        if system:
            self.answerer.prompts([[{"role": "system", "content": system}, {"role": "user", "content": "Hi"}]])
        self.system = system
        self.do_clear("")

    def do_undo(self, _: str) -> None:
        if not self.turns:
            raise RequestError("there is nothing to take back")
        self.say(f"taken back: {self.turns[-2]['content'][:60]}")
        del self.turns[-2:]

    def do_regenerate(self, _: str) -> None:
        if not self.turns:
            raise RequestError("there is nothing to answer again")
        if not self.sampling.temperature:
            self.say("greedy answers come again the same; /temperature 0.7 draws others")
        self.ask(self.turns[:-1])

    def do_temperature(self, text: str) -> None:
        try:
            value = float(text)
            if not 0 <= value <= 100:
                raise ValueError
        except ValueError:
            raise RequestError(f"found {text[:40]!r}, expected a number from 0 on, such as /temperature 0.7") from None
        self.sampling = replace(self.sampling, temperature=value)
        self.say("greedy" if not value else f"temperature {value:g}")

    def do_save(self, name: str) -> None:
        if not name:
            raise RequestError("name the file: /save conversation.json")
        head: list[dict[str, Any]] = [{"role": "system", "content": self.system}] if self.system else []
        try:
            with Path(name).expanduser().open("x", encoding="utf-8") as file:
                file.write(json.dumps({"messages": head + self.turns}, ensure_ascii=False, indent=1) + "\n")
        except OSError as error:
            raise RequestError(f"{name} cannot be written: {error.strerror}") from None
        self.say(f"written to {name}")

    def do_quit(self, _: str) -> None:
        self.over = True
