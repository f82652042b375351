"""`orpo-lite <command>`: every command is also `python -m orpo_lite.<command>`, or as `CODE` says.

Help is printed from the table below, and a command's module is imported only when it runs, so that --help is quick.
"""

import importlib
import os
import sys
from collections.abc import Callable
from typing import NoReturn

COMMANDS = {
    "doctor": "check this machine: packages, memory, card, hub, and a short training run",
    "recipes": "list the shipped recipes and what each needs",
    "new": "look at your pairs and write a commented recipe for them",
    "data": "show what a recipe trains on: counts, lengths, decoded examples",
    "plan": "predict the memory that a recipe needs, without a GPU or weights",
    "import": "turn axolotl's or LLaMA-Factory's ORPO configuration into a recipe",
    "pairs": "make preference pairs: sample answers to prompts, and rank them",
    "train": "train an adapter with ORPO as a recipe says",
    "sweep": "train with several values of some fields, and say which are best",
    "chat": "talk to a trained model, or choose between its answers and the base's",
    "evaluate": "compare base and adapter of a run on the held-out pairs",
    "ui": "open a local page in the browser, from pairs to a published adapter",
    "bench": "time our trainer against TRL's on your pairs and your card",
    "report": "write a run's report.html again, or a page that compares runs",
    "merge": "merge an adapter into its base: a plain transformers model",
    "export": "write a model or adapter as GGUF, for llama.cpp and Ollama",
    "push": "publish a run's adapter, merged model or GGUF file on the Hugging Face hub",
}

CODE = {
    name: f"orpo_lite.{name}.__main__" for name in ("train", "data", "plan", "evaluate", "report", "merge", "export")
}
CODE |= {name: f"orpo_lite.train.{name}" for name in ("new", "sweep", "ui")} | {"pairs": "orpo_lite.evaluate.pairs"}
"""Commands that are packages, and those inside of one; the others are modules at the top."""
COMPLETE = "_ORPO_LITE_COMPLETE"
"""Set by the shell's script when it asks for completions."""


def main() -> None:
    """Entry point of the `orpo-lite` console script."""
    from orpo_lite import __version__

    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if COMPLETE in os.environ or name in ("--install-completion", "--show-completion"):
        complete()
    elif name in COMMANDS:
        from orpo_lite.common.console import run_command

        sys.argv[:2] = [f"orpo-lite {name}"]
        function = load(name)
        run_command(function, vars(sys.modules[function.__module__]).get("on_usage_error"), f"orpo-lite {name}")
    elif name in ("-V", "--version"):
        print(f"orpo-lite {__version__}")
    elif name in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print("usage: orpo-lite COMMAND [ARGUMENTS]    (orpo-lite COMMAND --help for its arguments)\n")
        print("\n".join(f"  {command:<{width}}  {purpose}" for command, purpose in COMMANDS.items()))
        print("\norpo-lite --install-completion [bash|zsh|fish|powershell]    completes commands, options and recipes")
    else:
        from orpo_lite.common.text import nearest

        refuse(f"no command {name!r}{nearest(name, COMMANDS)}; orpo-lite --help lists them")


def load(name: str) -> Callable[..., None]:
    """Import a command's function."""
    return importlib.import_module(CODE.get(name) or f"orpo_lite.{name}").command


def complete() -> None:
    """Let typer install its completion, or answer the shell: only the command on the line is imported."""
    import typer

    if sys.argv[2:]:  # the shell was named
        os.environ["_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"] = "1"
    words = (os.environ.get("_TYPER_COMPLETE_ARGS") or os.environ.get("COMP_WORDS") or "").split()
    app = typer.Typer(add_completion=True)
    for name, purpose in COMMANDS.items():
        app.command(name, help=purpose)(load(name) if name in words[1:2] else lambda: None)
    app(prog_name="orpo-lite")


def refuse(why: str) -> NoReturn:
    """Print an error as commands do, and exit with status 2."""
    from rich.markup import escape

    from orpo_lite.common.console import errors

    errors.print(f"[bold red]error:[/] {escape(why)}", soft_wrap=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
