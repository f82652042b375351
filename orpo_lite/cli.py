"""What every command shares: exit status, where errors go, and the console."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

from orpo_lite.errors import RequestError

console = Console(highlight=False, quiet=os.environ.get("RANK", "0") != "0")  # launchers number their processes
errors = Console(stderr=True, highlight=False)


def run_command(function: Callable[..., Any]) -> None:
    """Run a module's command as `python -m orpo_lite.<name>`: parse the arguments, then `guard`."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(context_settings={"help_option_names": ["-h", "--help"]})(function)
    guard(app)


def guard(app: Callable[..., Any]) -> None:
    """Call a typer app; 0 done, 1 the run failed, 2 the request was wrong. `--debug` anywhere shows the traceback."""
    # click has no option that may go with a value or without
    arguments = ["--resume-force" if word == "--resume=force" else word for word in sys.argv[1:]]
    debug = "--debug" in arguments
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        app(args=[word for word in arguments if word != "--debug"], standalone_mode=True)
    except RequestError as error:
        if debug:
            traceback.print_exc()
        errors.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        errors.print("[bold red]interrupted[/]")
        sys.exit(130)
    except Exception as error:
        if debug:
            traceback.print_exc()
        errors.print(f"[bold red]failed:[/] {escape(f'{type(error).__name__}: {error}')}", soft_wrap=True)
        if not debug:
            errors.print("run the same command with --debug for the traceback")
        sys.exit(1)
