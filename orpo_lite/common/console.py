"""What every command shares: exit status, where errors go, and consoles that no text from data or models acts on."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import typer
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook
from rich.markup import escape
from rich.measure import Measurement
from rich.segment import Segment

from orpo_lite.common.errors import RequestError, ToldElsewhere

# what could move the cursor, set a title, colour, reorder or hide text; line breaks and tabs stay
ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff]")


def printable(text: str) -> str:
    """The text with control and direction characters written out, so that it cannot act on a terminal."""
    return ACTS.sub(lambda match: match.group().encode("unicode_escape", "surrogatepass").decode(), text)


class Harmless:
    """A renderable whose text has gone through `printable`; colours are rich's own, added later."""

    def __init__(self, inner: Any):
        self.inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for text, style, control in console.render(self.inner, options):
            yield Segment(text if control else printable(text), style, control)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement.get(console, options, self.inner)


class Screen(RenderHook):
    """Rich strips some control characters from text and lets the escape character through."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [Harmless(item) for item in renderables]


console = Console(highlight=False, quiet=os.environ.get("RANK", "0") != "0")  # launchers number their processes
errors = Console(stderr=True, highlight=False)
for each in (console, errors):
    each.push_render_hook(Screen())


@contextlib.contextmanager
def json_alone(wanted: bool = True) -> Iterator[Callable[[Any], None]]:
    """With --json, send what is printed inside to stderr, and give what prints a value as JSON on stdout.

    So stdout is one JSON document, whatever libraries, progress bars or our own lines have to say meanwhile.
    """
    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext():
        yield lambda value: print(json.dumps(value, indent=1), file=stdout)


def alone_to_tell() -> bool:
    """Whether this process says what is wrong with the request: one a machine, as all of them find the same until they meet."""
    met = "torch.distributed" in sys.modules and sys.modules["torch.distributed"].is_initialized()
    return met or os.environ.get("LOCAL_RANK", "0") == "0"


def run_command(function: Callable[..., Any]) -> None:
    """Run a module's command as `python -m orpo_lite.<name>`: parse the arguments, then `guard`."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(context_settings={"help_option_names": ["-h", "--help"]})(function)
    guard(app)


def guard(app: Callable[..., Any]) -> None:
    """Call a typer app; 0 done, 1 the run failed, 2 the request was wrong. `--debug` anywhere shows the traceback.

    Neither it nor an error shows a token.
    """
    from orpo_lite.common.credentials import without_secrets

    # click has no option that may go with a value or without
    arguments = ["--resume-force" if word == "--resume=force" else word for word in sys.argv[1:]]
    debug = "--debug" in arguments
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # DeepSpeed, where it is installed, says so on stdout, in the middle of what --json prints
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # Windows' pipes speak cp1252: what that lacks is written out
            stream.reconfigure(errors="backslashreplace")

    def tell(title: str, text: str, trace: bool = False) -> None:
        several = int(os.environ.get("WORLD_SIZE") or 1) > 1
        whose = f"rank {os.environ.get('RANK', 0)}: " if several else ""
        if debug or (trace and several):  # other processes' messages stand in between
            lines = printable(without_secrets(traceback.format_exc())).splitlines(keepends=True)
            sys.stderr.write("".join(whose + line for line in lines))
        errors.print(f"[bold red]{title}:[/] {whose}{escape(without_secrets(text))}", soft_wrap=True)

    try:
        app(args=[word for word in arguments if word != "--debug"], standalone_mode=True)
    except RequestError as error:
        if alone_to_tell() and not isinstance(error, ToldElsewhere):
            tell("error", str(error))
        sys.exit(2)
    except SystemExit as refused:
        if refused.code == 2 and "--recipe" in arguments:
            tell_fields(arguments)
        raise
    except KeyboardInterrupt:
        errors.print("[bold red]interrupted[/]")
        sys.exit(130)
    except Exception as error:
        # a lost connection has its reason in another process
        tell("failed", f"{type(error).__name__}: {error}", trace=not isinstance(error, ConnectionError))
        if not debug:
            errors.print("run the same command with --debug for the traceback")
        sys.exit(1)


def tell_fields(arguments: list[str]) -> None:
    """After a refused command line: how a training field is written that was given as a flag, as TRL's scripts take it."""
    from orpo_lite.recipe.training_fields import training_fields

    for word in arguments:
        name, _, value = word.removeprefix("--").replace("-", "_").partition("=")
        if word.startswith("--") and name in training_fields():
            errors.print(
                f"a recipe's field is a word without dashes: training.{name}={escape(value) or 'VALUE'}", soft_wrap=True
            )
