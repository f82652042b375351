"""`python -m orpo_lite.plan --recipe NAME [key=value ...]`: will it fit? Memory predicted without GPU and weights."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from orpo_lite.common.console import console, errors, run_command
from orpo_lite.common.errors import RequestError
from orpo_lite.plan import drawing
from orpo_lite.recipe.listing import RECIPE_OPTION


def command(
    recipe: Annotated[str | None, RECIPE_OPTION] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example data.max_length=2048")] = None,
    gpu: Annotated[
        str | None, typer.Option(help="a card such as rtx-3060, a size such as 12GB, or all; cpu plans for the CPU")
    ] = None,
    all_recipes: Annotated[
        bool, typer.Option("--all-recipes", help="print the table of all shipped recipes as Markdown")
    ] = False,
    beside_trl: Annotated[
        bool,
        typer.Option("--beside-trl", help="plan the training step of TRL's ORPOTrainer as well, on the same pairs"),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables (bytes)")] = False,
    fit: Annotated[
        bool, typer.Option("--fit", help="search the fastest settings that fit the card, and write them as a recipe")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="where --fit writes the recipe; default NAME-CARD.yaml")] = None,
    picture: Annotated[Path | None, typer.Option(help="write the bars as FILE.png, .svg or .html")] = None,
    gpus: Annotated[int | None, typer.Option(help="plan one of so many GPUs, and what travels between them")] = None,
    strategy: Annotated[str | None, typer.Option(help="how --gpus share the work: ddp, fsdp2, zero2 or zero3")] = None,
    offload: Annotated[
        bool, typer.Option("--offload", help="fsdp2 and zero3: the shards wait in the host's memory")
    ] = False,
) -> None:
    """Predict the peak memory of one training step, and which cards it fits."""
    if all_recipes == (recipe is not None):
        raise RequestError("give one of --recipe NAME and --all-recipes")
    if beside_trl and all_recipes:
        raise RequestError("--beside-trl plans one recipe: give --recipe NAME")
    if output and not fit:
        raise RequestError("--output says where --fit writes the recipe it finds: give --fit as well")
    if fit and all_recipes:
        raise RequestError("--fit fits one recipe: give --recipe NAME")
    if gpus is None and (strategy or offload):
        raise RequestError("--strategy and --offload say how several GPUs share a recipe: give --gpus as well")
    if gpus is not None and (all_recipes or beside_trl or fit):
        raise RequestError("--gpus plans one recipe as it stands: leave --all-recipes, --beside-trl and --fit out")
    if gpus is not None and gpu == "cpu":
        raise RequestError("--gpus plans cards: give --gpu a card or a size, or leave it out")
    if picture:
        if all_recipes:
            raise RequestError("--picture shows the plan of one recipe: give --recipe NAME")
        drawing.check(picture)
    from orpo_lite.plan import fitted
    from orpo_lite.plan.gpus import Card, find_cards
    from orpo_lite.recipe import Recipe

    # before the long imports, so that a mistake is told at once
    loaded = Recipe.load(recipe, overrides or []) if recipe is not None else None
    cards = find_cards(gpu) if gpu and gpu != "cpu" else []
    fitting = None
    if loaded and fit:
        card = fitted.which_card(loaded, gpu)
        fitting = card, fitted.output_path(loaded, card, output)
    from orpo_lite.plan import picture as pictures
    from orpo_lite.plan import tables as show
    from orpo_lite.plan.kernels import Target
    from orpo_lite.plan.multi_gpu import SpreadPlan
    from orpo_lite.plan.predict import plan
    from orpo_lite.plan.remedies import Planner, judge
    from orpo_lite.plan.search import fit as search
    from orpo_lite.plan.units import Spread

    spread = Spread(gpus, strategy or "ddp", offload) if gpus is not None else None
    if loaded is None:
        print(show.all_recipes())
        return
    planner, found, verdicts = Planner(), None, []
    if fitting:
        found = search(loaded, fitting[0])
        made = found.choice.plan
    elif gpu == "cpu":
        made = plan(loaded, Target("cpu"))
    else:
        if not gpu and loaded.memory.gpu_gb:
            cards = [Card(f"{loaded.memory.gpu_gb:g} GB", loaded.memory.gpu_gb)]
        made = planner(loaded, cards[0].target if len(cards) == 1 else Target("cuda"), spread)
        verdicts = [judge(loaded, card, functools.partial(planner, spread=spread)) for card in cards]
    drawn = pictures.picture(made.as_dict(), [show.as_dict(one) for one in verdicts])
    advice: list[str] = []
    if isinstance(made, SpreadPlan):
        from orpo_lite.plan.worth import sizes, worth

        advice = [worth(loaded, card, planner.spread(loaded, card.target, made.spread), planner) for card in cards]
        advice = advice or [sizes(loaded, made, planner)]
    theirs = None
    if beside_trl:
        from tests.benchmarks import trl_memory as trl_step

        theirs = trl_step.plan_trl(found.recipe if found else loaded, made)
    if as_json:
        told = made.as_dict() | {"cards": [show.as_dict(one) for one in verdicts]}
        if spread:
            told["verdict"] = advice
        if theirs:
            told["trl"] = trl_step.as_dict(made, theirs)
        if found and fitting:
            fitted.write(found, fitting[1])
            told["fit"] = fitted.as_dict(found, fitting[1])
        print(json.dumps(told, indent=1))
    else:
        show.plan(console, made)
        pictures.bars(console, drawn)
        if verdicts:
            show.cards(console, verdicts)
        if isinstance(made, SpreadPlan):
            show.traffic(console, made, advice)
        if theirs:
            trl_step.show(console, made, theirs)
        if found and fitting:
            fitted.write(found, fitting[1])
            fitted.show(console, found, fitting[1])
    if picture:
        drawing.write(drawn, picture)
        (errors if as_json else console).print(f"picture: {escape(str(picture))}", soft_wrap=True)


if __name__ == "__main__":
    run_command(command)
