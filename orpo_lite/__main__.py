"""`orpo-lite <command>`: every command is also `python -m orpo_lite.<command>`.

Help is printed from the table below and a command's module is imported only when it runs, so that --help stays quick.
"""

from __future__ import annotations

import importlib
import sys
from typing import NoReturn

COMMANDS = {
    "doctor": "check this machine: packages, card, kernels, hub, and a short training run",
    "recipes": "list the shipped recipes and what each needs",
    "data": "show what a recipe will be trained on: counts, lengths, decoded examples",
    "plan": "say what a recipe takes on a card, with neither GPU nor weights",
    "import": "turn axolotl's or LLaMA-Factory's ORPO configuration into a recipe",
    "train": "train an adapter with ORPO as a recipe says",
    "chat": "talk to a trained model, or choose between its answers and the base's",
    "evaluate": "compare base and adapter of a run on the held-out pairs",
    "bench": "time our trainer against TRL's on your pairs and your card",
    "report": "write a run's report.html again, or one page that compares runs",
    "merge": "merge an adapter into its base: a plain transformers model",
    "export": "write a model or adapter as GGUF, for llama.cpp and Ollama",
    "push": "publish a run's adapter, merged model or GGUF file on the Hugging Face hub",
}

CODE = {
    name: f"orpo_lite.{name}.__main__" for name in ("train", "data", "plan", "evaluate", "report", "merge", "export")
}
"""Commands that are packages; the others are modules at the top."""


def main() -> None:
    """Entry point of the `orpo-lite` console script."""
    from orpo_lite import __version__

    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        from orpo_lite.common.console import run_command

        sys.argv[:2] = [f"orpo-lite {name}"]
        run_command(importlib.import_module(CODE.get(name) or f"orpo_lite.{name}").command)
    elif name in ("--complete", "--show-completion", "--install-completion"):
        from orpo_lite.common import shells
        from orpo_lite.common.errors import RequestError

        try:
            shells.main(name, sys.argv[2:], COMMANDS)
        except RequestError as error:
            refuse(str(error))
    elif name in ("-V", "--version"):
        print(f"orpo-lite {__version__}")
    elif name in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print("usage: orpo-lite COMMAND [ARGUMENTS]    (orpo-lite COMMAND --help for its arguments)\n")
        print("\n".join(f"  {command:<{width}}  {purpose}" for command, purpose in COMMANDS.items()))
        print(
            "\norpo-lite --install-completion [bash|zsh|fish|powershell]    completes commands, recipes and key=value words"
        )
    else:
        from orpo_lite.recipe.training_fields import nearest

        refuse(f"no command {name!r}{nearest(name, COMMANDS)}; orpo-lite --help lists them")


def refuse(why: str) -> NoReturn:
    """End with status 2, in colour as the commands do."""
    from rich.markup import escape

    from orpo_lite.common.console import errors

    errors.print(f"[bold red]error:[/] {escape(why)}", soft_wrap=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
