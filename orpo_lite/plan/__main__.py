"""`python -m orpo_lite.plan --recipe NAME [key=value ...]`: predict memory without GPU or weights."""

from typing import Annotated

import typer

from orpo_lite.common.console import console, json_alone, load, run_command
from orpo_lite.common.text import next_command
from orpo_lite.plan.gpus import NOT, Card, Target, find_cards
from orpo_lite.recipe import Recipe
from orpo_lite.recipe.listing import RECIPE_OPTION


def command(
    recipe: Annotated[str, RECIPE_OPTION],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example data.max_length=2048")] = None,
    gpu: Annotated[
        str | None, typer.Option(help="a card such as rtx-3060, a size such as 12GB, or all; cpu plans for the CPU")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables (bytes)")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="print every phase, and what is assumed")] = False,
) -> None:
    """Predict the peak memory of one training step, and which cards it fits."""
    # mistakes are reported before the slow imports
    loaded = Recipe.load(recipe, overrides or [])
    cards = cards_asked_for(loaded, gpu)
    with json_alone(as_json) as print_json:
        load("orpo_lite.plan.search")
        from orpo_lite.plan import tables
        from orpo_lite.plan.search import Planner, judge

        planner = Planner()
        verdicts = [judge(loaded, card, planner) for card in cards]
        if len(cards) == 1:
            made = verdicts[0].plan
        else:
            made = planner(loaded, Target("cpu") if gpu == "cpu" else Target("cuda"))
        if as_json:
            print_json(made.as_dict() | {"cards": [tables.verdict_as_dict(one) for one in verdicts]})
            return
        tables.show_verdicts(console, made, verdicts)
        tables.show_plan(console, made, verbose)
        command = next_command("train", "--recipe", recipe, *(overrides or []))
        for one in verdicts if len(verdicts) == 1 else ():
            if one.remedy or one.words != NOT:
                words = one.remedy.words if one.remedy else ()
                console.print(f"next: {' '.join([command, *words])}", soft_wrap=True, markup=False)


def cards_asked_for(recipe: Recipe, gpu: str | None) -> list[Card]:
    """Return the cards that --gpu or else memory.gpu_gb names."""
    wish = gpu or recipe.memory.gpu_gb
    return find_cards(str(wish)) if wish and wish != "cpu" else []


if __name__ == "__main__":
    run_command(command)
