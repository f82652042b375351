"""Consoles that no text from data or models can act on, how every command runs, and facts of this process."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, ClassVar

import typer
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, Task
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from orpo_lite.common.credentials import without_secrets
from orpo_lite.common.errors import ReportedElsewhere, RequestError
from orpo_lite.common.text import at_words, visible


class Harmless:
    """A renderable whose text has gone through `visible`; colors are rich's own, added later."""

    def __init__(self, inner: Any):
        self.inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for text, style, control in console.render(self.inner, options):
            yield Segment(text if control else visible(text), style, control)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement.get(console, options, self.inner)


class Screen(RenderHook):
    """A hook that makes all text visible: rich strips some control characters, but lets the escape character through."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [Harmless(item) for item in renderables]


console = Console(
    highlight=False, emoji=False, quiet=os.environ.get("RANK", "0") != "0"
)  # launchers number their processes
errors = Console(stderr=True, highlight=False, emoji=False)
for each in (console, errors):
    each.push_render_hook(Screen())


@contextlib.contextmanager
def json_alone(wanted: bool = True) -> Iterator[Callable[[Any], None]]:
    """With --json, send what is printed inside to stderr, and yield a function that prints a value as JSON on stdout.

    So stdout is one JSON document, whatever libraries, progress bars or our own lines print meanwhile.
    """
    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext():
        yield lambda value: print(json.dumps(value, indent=1), file=stdout)


def run_command(
    function: Callable[..., Any], on_usage_error: Callable[[list[str]], None] | None = None, name: str | None = None
) -> None:
    """Run a module's command as `python -m orpo_lite.<name>`: parse the arguments, then `guard`."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(context_settings={"help_option_names": ["-h", "--help"]})(function)
    guard(app, on_usage_error, name)


def guard(
    app: Callable[..., Any], on_usage_error: Callable[[list[str]], None] | None = None, name: str | None = None
) -> None:
    """Call a typer app and exit: 0 done, 1 the run failed, 2 the request was wrong; `--debug` shows the traceback.

    Neither the message nor the traceback shows a token.

    Args:
        on_usage_error: prints more about a command line that the parser refused; it gets the arguments.
        name: the command as its usage shows it, where that is not `python -m MODULE`.
    """
    # click has no option that takes a value or none
    arguments = ["--resume-force" if word == "--resume=force" else word for word in sys.argv[1:]]
    debug = "--debug" in arguments
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # Windows' pipes use cp1252; characters that it lacks are escaped
            stream.reconfigure(errors="backslashreplace")
    try:
        app(args=[word for word in arguments if word != "--debug"], standalone_mode=True, prog_name=name)
    except RequestError as error:
        if reports_errors() and not isinstance(error, ReportedElsewhere):
            print_error("error", str(error), debug)
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == 2 and on_usage_error:
            on_usage_error(arguments)
        raise
    except KeyboardInterrupt:
        errors.print("[bold red]interrupted[/]")
        sys.exit(130)
    except Exception as error:
        # a lost connection has its reason in another process; messages of other processes come in between
        trace = processes() > 1 and not isinstance(error, ConnectionError)
        print_error("failed", f"{type(error).__name__}: {error}", debug or trace)
        if not debug:
            errors.print("run the same command with --debug for the traceback")
        sys.exit(1)


def print_error(title: str, text: str, trace: bool) -> None:
    """Print an error on stderr without secrets, after its traceback where asked, each line by rank where there are several."""
    whose = f"rank {rank()}: " if processes() > 1 else ""
    if trace:
        lines = visible(without_secrets(traceback.format_exc())).splitlines(keepends=True)
        sys.stderr.write("".join(whose + line for line in lines))
    text = f"{title}: {whose}{without_secrets(text)}"
    text = at_words(text, width=errors.width) if errors.is_terminal else text
    errors.print(f"[bold red]{title}:[/]{escape(text.removeprefix(f'{title}:'))}", soft_wrap=True)


SILENCE = 3
"""Seconds after which a line is printed where none can be drawn."""


class Line(Progress):
    """The work under way on stderr, and of several pieces inside one another the innermost.

    On a terminal it is one line, which leaves out the least important numbers where it is narrow. Elsewhere, as in a pipe or a
    notebook, it is printed after some seconds, and again after ever longer times. Bars of libraries (tqdm) are taken over.
    """

    current: ClassVar[Line | None] = None

    def __init__(self) -> None:
        from tqdm.std import tqdm

        # what a notebook's kernel starts has a terminal too, but one that keeps all that was ever drawn on it
        self.drawn = sys.stderr.isatty() and not errors.is_dumb_terminal and "JPY_PARENT_PID" not in os.environ
        both, self.undo = self.drawn and sys.stdout.isatty(), contextlib.ExitStack()
        screen = Console(stderr=True, highlight=False, emoji=False, force_terminal=self.drawn, force_jupyter=False)
        screen.push_render_hook(Screen())
        super().__init__(console=screen, transient=True, refresh_per_second=4, speed_estimate_period=600,
                         redirect_stdout=both, redirect_stderr=self.drawn)  # fmt: skip
        for each in [errors] * self.drawn + [console] * both:  # so that what they print appears above the line
            each.push_render_hook(self.live)
            self.undo.callback(each.pop_render_hook)
        self.undo.callback(setattr, tqdm, "display", tqdm.display)
        tqdm.display = lambda bar, *_, **__: self.take_over(bar)  # type: ignore[assignment, method-assign]

    def stop(self) -> None:
        """Remove the line."""
        self.undo.close()
        self.live.stop()

    def get_renderables(self) -> Iterator[Table]:
        """Draw the innermost piece of work, or print it where a line is due."""
        for task in [one for one in self.tasks if (one.elapsed or 0) > 0.2][-1:]:
            due = task.fields["due"]
            if self.drawn:
                yield fitted(task, self.console.width - 1)
            elif (task.elapsed or 0) > due:
                task.fields["due"] = due + min(300, max(7, due))
                sys.stderr.write(f"{task.description}: {', '.join(cells_of(task))}\n")
                sys.stderr.flush()

    def take_over(self, bar: Any) -> bool:
        """Show what a library's bar counts, unless the innermost piece of work counts something itself."""
        bar.fp, bar.sp = io.StringIO(), lambda _: None
        for task in self.tasks[-1:]:
            if not task.fields["counts"]:
                self.update(task.id, total=bar.total, completed=bar.n, in_bytes=bar.unit == "B")
        return True


@contextlib.contextmanager
def progress(
    label: str, total: int | None = None, done: int = 0, in_bytes: bool = False
) -> Iterator[Callable[..., None]]:
    """Show a piece of work until it ends, on the first process alone; yield `Progress.update`, `advance` first.

    Args:
        total: how much there is to do, where that is known; `done` of it was done before.
        in_bytes: the two are bytes.
    """
    if rank():
        yield lambda *_, **__: None
        return
    if not (line := Line.current):
        line = Line.current = Line()
        line.start()
        line.console.show_cursor(True)  # a process that is killed could not show it again
    task = line.add_task(visible(label), total=total, completed=done, in_bytes=in_bytes, counts=total is not None, due=SILENCE, figures=())  # fmt: skip
    try:
        yield lambda advance=None, **facts: line.update(task, advance=advance, **facts)
    finally:
        line.remove_task(task)
        if not line.tasks:
            Line.current = None
            line.stop()


def cells_of(task: Task) -> list[str]:
    """Return how much is done, the time, and what else is known of a task, the most important first."""
    counts = (
        (DownloadColumn() if task.fields["in_bytes"] else MofNCompleteColumn())
        .render(task)
        .plain.strip()
        .replace("/?", "")
    )
    left, elapsed = task.time_remaining, timedelta(seconds=int(task.elapsed or 0))
    time = f"{timedelta(seconds=int(left))} left" if task.total and left is not None else str(elapsed)
    return [*([counts] if task.total or task.completed else []), time, *task.fields["figures"]]


def fitted(task: Task, width: int) -> Table:
    """Draw as much of a task as fits into `width` columns."""
    cells = cells_of(task)
    label = Text(task.description)
    label.truncate(max(10, width - cell_len(cells[0]) - 2), overflow="ellipsis")
    line, room, bar, shown = Table.grid(padding=(0, 2, 0, 0), pad_edge=False), width - label.cell_len, 0, list[str]()
    for cell in [*cells[:4], *([""] if task.total else []), *cells[4:]]:
        taken = 2 + (cell_len(cell) or 10)
        if taken > room:
            break
        room, bar, shown = room - taken, bar or 10 * (not cell), [*shown, *([cell] if cell else [])]
    line.add_row(label, *([BarColumn(min(40, bar + room))(task)] if bar else []), *shown)
    return line


def load(module: str) -> None:
    """Import a module that takes seconds."""
    with progress("loading the libraries"):
        importlib.import_module(module)


def rank() -> int:
    """Return this process's number among those that a launcher has started, 0 where it is alone."""
    return int(os.environ.get("RANK") or 0)


def processes() -> int:
    """Return the number of processes that a launcher has started."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def refuse_sharding(**settings: Any) -> None:
    """Raise RequestError where FSDP or DeepSpeed is asked for, by a field of TrainingArguments or of the launcher.

    Args:
        settings: values by the names of their fields.
    """
    variables = {name: os.environ.get(name, "") for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")}
    for name, value in (settings | variables).items():
        # transformers 5.2 fills fsdp_config with defaults, each of them 0 or False
        unset = not (any(value.values()) if isinstance(value, dict) else value)
        if unset or str(value).lower() in ("false", "0", "no", "off"):
            continue
        raise RequestError(
            f"{name}: {'FSDP' if 'fsdp' in name.lower() else 'DeepSpeed'} is asked for, which splits a model over cards, and "
            "orpo_lite trains on several cards with DDP, where each holds the whole 4-bit base: leave it out, and start with "
            "recipes/accelerate/ddp.yaml or torchrun (one card needs neither)"
        )


def reports_errors() -> bool:
    """Return True if this process reports errors in the request: one per machine until the processes have joined."""
    joined = "torch.distributed" in sys.modules and sys.modules["torch.distributed"].is_initialized()
    return joined or os.environ.get("LOCAL_RANK", "0") == "0"


def peak_memory_bytes(device: Any) -> int:
    """Return the peak memory so far of a torch device: what torch allocated on CUDA, else the process's resident set."""
    if str(device).startswith("cuda"):
        return sys.modules["torch"].cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    if sys.platform == "linux":
        # getrusage would count what the parent held when it started this process
        with open("/proc/self/status", encoding="ascii", errors="replace") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
