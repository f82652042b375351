"""`python -m orpo_lite.plan --recipe NAME [key=value ...]`: predict memory without GPU or weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orpo_lite.common.console import console, json_alone, run_command
from orpo_lite.common.errors import RequestError
from orpo_lite.plan.gpus import Card, Target, card_here, find_cards
from orpo_lite.recipe import Recipe
from orpo_lite.recipe.listing import RECIPE_OPTION


def command(
    recipe: Annotated[str, RECIPE_OPTION],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example data.max_length=2048")] = None,
    gpu: Annotated[
        str | None, typer.Option(help="a card such as rtx-3060, a size such as 12GB, or all; cpu plans for the CPU")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables (bytes)")] = False,
    fit: Annotated[
        bool,
        typer.Option("--fit", help="find the fastest settings that fit the card, and write them as a recipe"),
    ] = False,
    output: Annotated[Path | None, typer.Option(help="where --fit writes the recipe; default NAME-CARD.yaml")] = None,
) -> None:
    """Predict the peak memory of one training step, and which cards it fits."""
    if output and (not fit or output.suffix != ".yaml"):
        raise RequestError(
            f"--output: found {output}, expected a file that ends in .yaml for --fit: give --fit as well"
        )
    # mistakes are reported before the slow imports
    loaded = Recipe.load(recipe, overrides or [])
    cards = cards_asked_for(loaded, gpu)
    if fit:
        card = card_to_fit(cards, gpu)
        print_fit(loaded, card, output or Path(f"{card.fitted_name(loaded.name)}.yaml"), as_json)
        return
    with json_alone(as_json) as print_json:
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
        tables.show_plan(console, made)
        if verdicts:
            tables.show_cards(console, verdicts)


def cards_asked_for(recipe: Recipe, gpu: str | None) -> list[Card]:
    """Return the cards that --gpu or else memory.gpu_gb names."""
    if gpu:
        return find_cards(gpu) if gpu != "cpu" else []
    size = recipe.memory.gpu_gb
    return [Card(f"{size:g} GB", size)] if size else []


def card_to_fit(cards: list[Card], gpu: str | None) -> Card:
    """Return the card to fit a recipe to: the one that was named, or the one in this machine.

    Raises:
        RequestError: neither is a single card.
    """
    if len(cards) == 1:
        return cards[0]
    if gpu:
        raise RequestError(f"--gpu: found {gpu}, but --fit fits one card: name it, or give its size such as 12GB")
    import torch

    if not torch.cuda.is_available():
        raise RequestError(
            "--fit: there is no GPU here: name a card, as in --gpu rtx-3060, --gpu 12GB or memory.gpu_gb=12"
        )
    return card_here(torch.device("cuda"))[0]


def print_fit(recipe: Recipe, card: Card, path: Path, as_json: bool) -> None:
    """Fit a recipe to a card, write it and print how it was found.

    Raises:
        RequestError: the file exists already, or its folder does not; nothing fits.
    """
    if path.exists():
        raise RequestError(f"{path}: exists already; give another file with --output, or remove it")
    if not path.parent.is_dir():
        raise RequestError(f"--output: found {path}, but there is no folder {path.parent}: create it first")
    with json_alone(as_json) as print_json:
        from orpo_lite.plan import tables
        from orpo_lite.plan.search import fit

        found = fit(recipe, card)
        path.write_text(tables.fitted_recipe(found), "utf-8")
        if as_json:
            choice = found.choice
            told = {
                "card": card.name,
                "recipe": str(path),
                "overrides": choice.words,
                "relative_time": choice.cost / found.before.cost,
            }
            print_json(choice.plan.as_dict() | {"cards": [], "fit": told})
            return
        tables.show_plan(console, found.choice.plan)
        tables.show_fit(console, found, path)


if __name__ == "__main__":
    run_command(command)
