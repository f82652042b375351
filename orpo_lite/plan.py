"""`python -m orpo_lite.plan --recipe NAME [key=value ...]`: will it fit? Memory predicted without GPU and weights."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from orpo_lite.cli import console, run_command
from orpo_lite.errors import RequestError


def command(
    recipe: Annotated[
        str | None, typer.Option(help="name of a shipped recipe, path of a YAML file, or run folder")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example data.max_length=2048")] = None,
    gpu: Annotated[
        str | None, typer.Option(help="a card such as rtx-3060, a size such as 12GB, or all; cpu plans for the CPU")
    ] = None,
    all_recipes: Annotated[
        bool, typer.Option("--all-recipes", help="print the table of all shipped recipes as Markdown")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables (bytes)")] = False,
) -> None:
    """Predict the peak memory of one training step, and which cards it fits."""
    if all_recipes == (recipe is not None):
        raise RequestError("give one of --recipe NAME and --all-recipes")
    from orpo_lite.recipe import Recipe

    # before the long imports, so that a mistake is told at once
    loaded = Recipe.load(recipe, overrides or []) if recipe is not None else None
    from orpo_lite.planning import show
    from orpo_lite.planning.cards import Card, find_cards
    from orpo_lite.planning.kernels import Target
    from orpo_lite.planning.predict import plan
    from orpo_lite.planning.remedies import Planner, judge

    if loaded is None:
        print(show.all_recipes())
        return
    if gpu == "cpu":
        made, verdicts = plan(loaded, Target("cpu")), []
    else:
        planner, cards = Planner(), find_cards(gpu) if gpu else []
        if not gpu and loaded.memory.gpu_gb:
            cards = [Card(f"{loaded.memory.gpu_gb:g} GB", loaded.memory.gpu_gb)]
        made = planner(loaded, cards[0].target if len(cards) == 1 else Target("cuda"))
        verdicts = [judge(loaded, card, planner) for card in cards]
    if as_json:
        print(json.dumps(made.as_dict() | {"cards": [show.as_dict(one) for one in verdicts]}, indent=1))
        return
    show.plan(console, made)
    if verdicts:
        show.cards(console, verdicts)


if __name__ == "__main__":
    run_command(command)
