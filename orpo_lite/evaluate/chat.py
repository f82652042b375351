"""`python -m orpo_lite.chat RUN`: talk to what was trained; with --compare choose between base and adapter."""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orpo_lite.common.console import console, errors
from orpo_lite.common.errors import RequestError
from orpo_lite.common.text import nearest, visible

if TYPE_CHECKING:
    from orpo_lite.evaluate.answering import Answerer, Sampling, Turns
    from orpo_lite.evaluate.chat_compare import Comparison

with contextlib.suppress(ImportError):  # Windows: lines without editing
    import readline  # noqa: F401  # input() edits lines and remembers them once it is there

FILE = "preferences.jsonl"
BLOCK = '"""'
"""Begins and ends a message of several lines."""
HELP = {
    "/help": "show this list",
    "/clear": "begin a new conversation; the system turn stays",
    "/system TEXT": "set the system turn and begin anew; without TEXT show it, `/system none` removes it",
    "/undo": "take back the last message and its answer",
    "/regenerate": "answer the last message again",
    "/temperature T": "0 takes the most likely token each time; above, tokens are sampled",
    "/save FILE": "write the conversation as JSON",
    "/quit": "end, as Ctrl-D does",
}
MIN_ROOM = 64
"""Tokens that an answer should have room for: the oldest turns are left out for it."""


def command(
    run: Annotated[str, typer.Argument(help="run folder, adapter folder, or folder of a whole model")],
    prompt: Annotated[str | None, typer.Option(help="answer this and end; standard input works as well")] = None,
    system: Annotated[str | None, typer.Option(help="system turn; default: what the chat template writes")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most likely token each time")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", min=0, max=1, help="sample from the most likely tokens")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="longest answer, in tokens")] = 512,
    seed: Annotated[int | None, typer.Option(help="of the sampling, to get the same answers again")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="answer with base and adapter, and keep which one you like better")
    ] = False,
    blind: Annotated[bool, typer.Option("--blind", help="with --compare: reveal the sides after your choice")] = False,
    preferences: Annotated[
        str, typer.Option(metavar="FILE", help="with --compare: where choices are appended, as training data")
    ] = FILE,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run Python code that the base's repository ships")
    ] = False,
) -> None:
    """Talk to a trained model in the terminal, or compare it with its base."""
    if (blind or preferences != FILE) and not compare:
        raise RequestError(f"{'--blind' if blind else '--preferences'} goes with --compare: add it, or leave this out")
    if top_p < 1 and not temperature:
        raise RequestError("--top-p has an effect only on sampling: set --temperature too, such as 0.7")
    interactive = prompt is None and sys.stdin.isatty()
    if prompt is None and not interactive:
        prompt = sys.stdin.read().strip()
    if prompt is not None and not prompt.strip():
        raise RequestError("found an empty prompt: write it after --prompt, or pipe it in")

    import torch

    from orpo_lite.evaluate.answering import Sampling, load_answerer
    from orpo_lite.evaluate.chat_compare import Comparison, PreferenceFile

    kept = PreferenceFile(preferences) if compare and interactive else None
    screen = console if interactive else errors
    answerer = load_answerer(
        run,
        trust_remote_code,
        "--compare" if compare else None,
        lambda line: screen.print(line, soft_wrap=True, markup=False),
    )
    torch.manual_seed(seed if seed is not None else random.SystemRandom().randrange(2**32))
    sampling = Sampling(max_new_tokens, temperature, top_p)
    comparison = None
    if compare:
        comparison = Comparison(answerer, kept, blind, random.Random(seed), read_key, read_message)
    chat = Chat(answerer, sampling, system, comparison)
    if prompt is None:
        chat.run()
    else:
        chat.ask([{"role": "user", "content": prompt}])


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
        self.interactive = False
        """Tell whether a user sits at the terminal; else standard output is for answers alone."""

    def run(self) -> None:
        """Read and answer messages until Ctrl-D or /quit."""
        self.interactive = True
        how = "greedy" if not self.sampling.temperature else f"temperature {self.sampling.temperature:g}"
        console.print(f"{how}, answers of at most {self.sampling.max_new_tokens:,} tokens")
        if self.answerer.format.note:
            self.say(self.answerer.format.note)
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
                    self.handle(line)
            except RequestError as error:
                self.say(str(error))
            except KeyboardInterrupt:
                console.print("\n(Ctrl-D or /quit ends)", style="dim")
            except EOFError:
                console.print()
                break
        if self.comparison:
            self.say(self.comparison.closing())

    def handle(self, line: str) -> None:
        """Run a command or answer a message."""
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
        """Write the trained model's answer while it is generated."""
        from orpo_lite.evaluate.answering import Interruptible, Stream, write

        with Interruptible() as stop:
            shown = Stream(self.answerer.tokenizer, strip=self.answerer.format.kind != "plain")
            reply = self.answerer.reply(self.answerer.names[-1], window, self.sampling, shown, stop)
        write("\n")
        if stop.asked:
            self.say("(stopped)")
        elif not reply.ended:
            self.say(f"(cut after {reply.tokens:,} tokens: --max-new-tokens)")
        return reply.text

    def window(self, turns: Turns) -> Turns:
        """Select the system turn and as many of the last turns as the model has room for.

        Raises:
            RequestError: the last message alone is too long, or the template refuses it.
        """
        head: Turns = [{"role": "system", "content": self.system}] if self.system else []
        wanted = min(MIN_ROOM, self.sampling.max_new_tokens)
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
        """Print a line that is not a model's."""
        (console if self.interactive else errors).print(line, style="dim", markup=False, soft_wrap=True)

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
            self.say("greedy answers stay the same; /temperature 0.7 samples others")
        self.ask(self.turns[:-1])

    def do_temperature(self, text: str) -> None:
        try:
            value = float(text)
            if not 0 <= value <= 100:
                raise ValueError
        except ValueError:
            raise RequestError(f"found {text[:40]!r}, expected a number from 0 up, such as /temperature 0.7") from None
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


def read_message(prompt: str) -> str:
    """Read a line, or several between triple quotes.

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
    """Read a key, without Enter where the terminal allows it; "" for Enter alone.

    Raises:
        EOFError: Ctrl-D.
        KeyboardInterrupt: Ctrl-C.
    """
    try:
        import termios
        import tty

        terminal = sys.stdin.fileno()
        before = termios.tcgetattr(terminal)
    except (ImportError, OSError, ValueError, termios.error):  # Windows, or no terminal
        return input(prompt).strip()[:1]
    print(prompt, end="", flush=True)
    try:
        tty.setcbreak(terminal, termios.TCSADRAIN)
        key = os.read(terminal, 1).decode("latin-1")
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
    if key in ("\x04", ""):
        raise EOFError
    print(visible(key).strip())
    return key.strip()
