"""`python -m orpo_lite.chat RUN`: talk to what was trained; with --compare choose between base and adapter."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from orpo_lite.common.console import console, errors, load, progress
from orpo_lite.common.errors import RequestError
from orpo_lite.common.files import append_line
from orpo_lite.common.text import nearest, visible
from orpo_lite.evaluate.__main__ import Against, Base, MaxNewTokens, Run, Temperature, TopP, TrustRemoteCode
from orpo_lite.recipe.loading import MODEL_FOLDER, check_folder

if TYPE_CHECKING:
    from orpo_lite.evaluate.answering import Sampling, Side, Turns

FILE = "preferences.jsonl"
HELP = {
    "/help": "show this list",
    "/clear": "begin a new conversation; the system turn stays",
    "/system TEXT": "set the system turn and begin anew; without TEXT show it, `/system none` removes it",
    "/undo": "take back the last message and its answer",
    "/quit": "end, as Ctrl-D does",
}
MIN_ROOM = 64
"""Tokens that an answer should have room for: a new conversation begins where there are fewer."""
MIN_COLUMNS = 100
"""Width of a terminal from which on answers stand side by side."""
CHOICE = "better: 1 or 2 (← →), e to write one, Enter to skip; or type your next message"


def command(
    run: Run,
    prompt: Annotated[str | None, typer.Option(help="answer this and end; standard input works as well")] = None,
    system: Annotated[str | None, typer.Option(help="system turn; default: what the chat template writes")] = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    max_new_tokens: MaxNewTokens = 512,
    seed: Annotated[int | None, typer.Option(help="of the sampling, to get the same answers again")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="answer with base and adapter, and keep which one you like better")
    ] = False,
    against: Against = None,
    base: Base = None,
    blind: Annotated[bool, typer.Option("--blind", help="with --compare: reveal the sides after your choice")] = False,
    preferences: Annotated[
        str, typer.Option(metavar="FILE", help="with --compare: where choices are appended, as training data")
    ] = FILE,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk to a trained model in the terminal, or compare it with its base or another model."""
    for path in filter(None, (run, against)):
        check_folder(path, MODEL_FOLDER)
    compare = compare or against is not None
    if (blind or preferences != FILE) and not compare:
        raise RequestError(f"{'--blind' if blind else '--preferences'} goes with --compare: add it, or leave this out")
    interactive = prompt is None and sys.stdin.isatty()
    if prompt is None and not interactive:
        prompt = sys.stdin.read().strip()
    if prompt is not None and not prompt.strip():
        raise RequestError("found an empty prompt: write it after --prompt, or pipe it in")
    kept = PreferenceFile(preferences) if compare and interactive else None

    load("orpo_lite.evaluate.answering")
    import torch

    from orpo_lite.evaluate.answering import Sampling, find_sides

    sampling = Sampling(max_new_tokens, temperature, top_p)
    sides = find_sides(run, trust_remote_code, base, against, "--compare" if compare else None)
    torch.manual_seed(seed if seed is not None else random.SystemRandom().randrange(2**32))
    if compare:
        chat = Comparison(sides, sampling, system, kept, blind, random.Random(seed), against is not None)
    else:
        chat = Chat(sides[-1:], sampling, system)
    for side in chat.sides:
        _ = side.stops  # loaded before the first message is typed
    if prompt is None:
        chat.run()
    else:
        chat.ask([{"role": "user", "content": prompt}])


class Chat:
    """One conversation with a model."""

    def __init__(self, sides: list[Side], sampling: Sampling, system: str | None):
        self.sides, self.sampling, self.system = sides, sampling, system
        self.turns: Turns = []
        self.over, self.next = False, ""
        """True once the chat ends; the next message, if it is typed already."""
        self.typing: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        """Context manager that keeps what is typed while an answer is written."""

    def run(self) -> None:
        """Read and answer messages until Ctrl-D or /quit."""
        from orpo_lite.evaluate import terminal

        self.typing = terminal.typing_kept
        how = "greedy" if not self.sampling.temperature else f"temperature {self.sampling.temperature:g}"
        self.say(f"{how}, answers of at most {self.sampling.max_new_tokens:,} tokens")
        for note in dict.fromkeys(one.format.note for one in self.sides if one.format.note):
            self.say(note)
        self.say(
            f"/help lists the commands; {terminal.BLOCK} begins and ends several lines; Ctrl-C stops an answer, Ctrl-D ends\n"
        )
        while not self.over:
            try:
                line, self.next = self.next or terminal.read_message("you> "), ""
                if line:
                    self.handle(line)
            except RequestError as error:
                self.say(str(error))
            except KeyboardInterrupt:
                self.say("\n(Ctrl-D or /quit ends)")
            except EOFError:
                console.print()
                break

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
        """Answer a conversation that ends with a message; it is kept where there is an answer.

        Where a model has no room for it, its last message begins a new one.
        """
        system: Turns = [{"role": "system", "content": self.system}] if self.system else []
        wanted = min(MIN_ROOM, self.sampling.max_new_tokens)
        rooms = [one.room(one.prompts([system + turns])[0], wanted) for one in self.sides]
        if len(turns) > 1 and min(rooms) < wanted:
            turns = turns[-1:]
            self.say("(the model has no room for more turns: your message begins a new conversation)")
        text = self.answer(system + turns)
        if text is not None:
            self.turns = [*turns, {"role": "assistant", "content": text}]

    def answer(self, window: Turns) -> str | None:
        """Write the answer while it is generated; None where the conversation goes on without one."""
        [side] = self.sides
        stream = side.stream()
        try:
            with self.typing():
                reply = side.reply(window, self.sampling, stream)
        except KeyboardInterrupt:
            self.say("\n(stopped)")
            return side.format.answer(stream.text)
        if reply.remark:
            self.say(f"({reply.remark})")
        return reply.text

    def say(self, line: str, where: Console = errors) -> None:
        """Print a line that is not a model's; a single model's answers alone go to standard output."""
        where.print(line, style="dim", markup=False, soft_wrap=True)

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
            for side in self.sides:
                side.prompts([[{"role": "system", "content": system}, {"role": "user", "content": "Hi"}]])
        self.system = system
        self.do_clear("")

    def do_undo(self, _: str) -> None:
        if not self.turns:
            raise RequestError("there is nothing to take back")
        self.say(f"taken back: {self.turns[-2]['content'][:60]}")
        del self.turns[-2:]

    def do_quit(self, _: str) -> None:
        self.over = True


class Comparison(Chat):
    """A conversation with two models, of whose answers to each message the user chooses one.

    Args:
        sides: the two, the trained one last.
        file: where choices go; None asks for none.
        blind: the sides are shuffled, and revealed once a choice is made.
        order: draws the shuffles.
        signed: rows say whose their answers are: chosen_model, rejected_model.
    """

    def __init__(
        self, sides: list[Side], sampling: Sampling, system: str | None, file: PreferenceFile | None,
        blind: bool, order: random.Random, signed: bool = False,
    ):  # fmt: skip
        super().__init__(sides, sampling, system)
        self.file, self.blind, self.order, self.signed = file, blind, order, signed
        self.preferred: list[str] = []
        """The side of each answer that was preferred."""

    def run(self) -> None:
        """Say where choices go, run the chat, sum up the choices, and say how to train on them."""
        assert self.file is not None
        self.say(f"your choices are appended to {self.file.path.absolute()}, which holds {self.file.held:,} pairs")
        super().run()
        source, trained = self.sides[-1].source, self.sides[-1].name
        words = ["python", "-m", "orpo_lite.train", "--recipe", "RECIPE"]
        if source.recipe and source.kind == "adapter":
            words[-1:] = [source.path, f"adapter.init_from={source.path}"]
        self.say(
            f"{len(self.preferred)} pairs appended to {self.file.path}; the answer of {trained} was preferred "
            f"{self.preferred.count(trained)} times\n"
            f"to train on them: {shlex.join([*words, f'data.train={self.file.path}'])}"
            if self.preferred
            else "no choice was made"
        )

    def answer(self, window: Turns) -> str | None:
        """Answer with both sides, compare the answers, and keep a choice."""
        order = list(self.sides)
        if self.blind:
            self.order.shuffle(order)
        try:
            with self.typing():
                texts = self.both(window, order)
        except KeyboardInterrupt:
            self.say("\n(stopped: no comparison)", console)
            return None
        names, (first, second) = list(texts), texts.values()
        file = self.file if first != second else None
        if first == second:
            self.say("both answers are the same, so they make no pair", console)
        if file is None or not self.blind:
            self.show_likelihoods(window, texts)
        choice = self.choose(texts) if file else None
        if file is None or choice is None:
            if file:
                kept = "answer 1" if self.blind else f"the answer of {names[1]}"
                self.say(f"not kept; the conversation continues with {kept}", console)
            return first if self.blind else second
        form, (better, worse) = self.sides[-1].format, choice
        signed = {"chosen_model": better, "rejected_model": worse} if self.signed else {}
        file.append(form.row(window, texts[better], texts[worse]) | signed)
        self.preferred.append(better)
        if self.blind:
            self.say(f"kept; 1 was {names[0]}, 2 was {names[1]}", console)
            self.show_likelihoods(window, {name: texts[name] for name in names})
        else:
            self.say(f"kept ({len(self.preferred)} in this chat)", console)
        return form.answer(texts[better])

    def both(self, turns: Turns, order: list[Side]) -> dict[str, str]:
        """Show both answers: in columns once they are complete, or on a narrow terminal one after the other as they
        are generated."""
        import torch

        wide = console.is_terminal and console.width >= MIN_COLUMNS
        titles = [f"answer {place}" if self.blind else f"{place} {one.name}" for place, one in enumerate(order, 1)]
        seed, replies = int(torch.randint(2**62, ())), []
        for title, one in zip(titles, order, strict=True):
            torch.manual_seed(seed)  # the same draws for both, whichever comes first
            if wide:
                with progress(title):
                    replies.append(one.reply(turns, self.sampling))
            else:
                console.print(title, style="bold", markup=False)
                replies.append(one.reply(turns, self.sampling, one.stream()))
        if wide:
            table = Table(*map(escape, titles), expand=True, box=None, padding=(0, 2, 0, 0))
            for column in table.columns:
                column.ratio = 1
            table.add_row(*(Text(visible(reply.text)) for reply in replies))
            console.print(table)
        for title, reply in zip(titles, replies, strict=True):
            if reply.remark:
                self.say(f"({title}: {reply.remark})", console)
        return {one.name: reply.text for one, reply in zip(order, replies, strict=True)}

    def show_likelihoods(self, turns: Turns, texts: dict[str, str]) -> None:
        """Print the mean log-prob per token of each answer under each side, and its log-odds ratio."""
        from orpo_lite.objective.loss import log_odds_ratio

        try:
            found = {one.name: one.mean_logps(turns, *texts.values()) for one in self.sides}
        except RequestError as error:
            self.say(f"no log-probs: {error}", console)
            return
        titles = [escape(f"{place} ({name})") for place, name in enumerate(texts, 1)]
        table = Table(
            "mean log-prob per token", *titles, "log-odds ratio, 1 over 2", box=None, padding=(0, 2, 0, 0), style="dim"
        )
        for name, (first, second) in found.items():
            ratio = log_odds_ratio(first, second).item()
            table.add_row(escape(f"under {name}"), f"{first:.4f}", f"{second:.4f}", f"{ratio:+.4f}")
        console.print(table)

    def choose(self, texts: dict[str, str]) -> tuple[str, str] | None:
        """Ask which answer is better.

        Args:
            texts: the answers as they are shown, by side; one that the user writes is added as "you".

        Returns:
            Whose the better and the worse answer are; None for no choice.
        """
        from orpo_lite.evaluate import terminal

        names, trained = list(texts), self.sides[-1].name
        choices = {"1": names, "2": names[::-1], "e": ["you", trained]}
        self.say(CHOICE, console)
        try:
            said = terminal.read_choice("1, 2 or e> ", tuple(choices))
            if said == "e":
                texts["you"] = terminal.read_message("better answer> ")
        except KeyboardInterrupt:
            console.print()
            return None
        if said not in choices:
            self.next = said
            return None
        better, worse = choices[said]
        if texts[better] == texts[worse] or not all(texts[name].strip() for name in (better, worse)):
            self.say("an empty answer, or the same one, makes no pair", console)
            return None
        return better, worse


class PreferenceFile:
    """JSON lines that choices are appended to, each on the disk before the chat continues; what is in it stays.

    Raises:
        RequestError: the file cannot be written, or holds something else.
    """

    def __init__(self, path: str | Path):
        from orpo_lite.data.row_shapes import row_shape

        self.path = Path(path).expanduser()
        exists = self.path.exists()
        if self.path.is_dir() or not os.access(self.path if exists else self.path.absolute().parent, os.W_OK):
            raise RequestError(f"--preferences: {self.path} is not a file that can be written: choose another name")
        lines = self.path.read_text("utf-8", "replace").split("\n") if exists else []
        self.held = sum(bool(line.strip()) for line in lines)
        """Pairs that were in it."""
        for number, line in enumerate(lines, 1):
            try:
                known = not line.strip() or row_shape(json.loads(line)) is not None
            except (ValueError, RecursionError):
                known = False
            if not known:
                raise RequestError(
                    f"--preferences: line {number} of {self.path} is not a preference pair in JSON, so nothing is appended "
                    "to it: fix the line, or choose another file"
                )
        if lines and lines[-1]:
            append_line(self.path, "")  # ends a line that has no line break

    def append(self, row: dict[str, Any]) -> None:
        """Write one row as a line.

        Raises:
            RequestError: it cannot be written; the file is then as it was.
        """
        try:
            append_line(self.path, json.dumps(row, ensure_ascii=False))
        except OSError as error:
            raise RequestError(f"{self.path} cannot be written ({error.strerror}): the choice is not kept") from None
