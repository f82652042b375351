"""What a fit found: on the screen, as JSON, and as a recipe file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from orpo_lite.common.errors import RequestError
from orpo_lite.plan.gpus import Card, find_cards
from orpo_lite.recipe import Recipe

if TYPE_CHECKING:
    from orpo_lite.plan.search import Choice, Fit


def which_card(recipe: Recipe, gpu: str | None) -> Card:
    """The card to fit a recipe to: by name, by memory.gpu_gb, or the one that is there.

    Raises:
        RequestError: none of these says which.
    """
    if gpu:
        cards = find_cards(gpu) if gpu != "cpu" else []
        if len(cards) != 1:
            raise RequestError(f"--gpu: found {gpu}, but --fit fits one card: name it, or give its size such as 12GB")
        return cards[0]
    if recipe.memory.gpu_gb:
        return Card(f"{recipe.memory.gpu_gb:g} GB", recipe.memory.gpu_gb)
    import torch

    if not torch.cuda.is_available():
        raise RequestError(
            "--fit: there is no GPU here: say which card is meant, as in --gpu rtx-3060, --gpu 12GB or memory.gpu_gb=12"
        )

    from orpo_lite.plan.before_training import card_here

    return card_here(torch.device("cuda"))[0]


def output_path(recipe: Recipe, card: Card, output: Path | None) -> Path:
    """Where the recipe goes; a place that will not do is found before the search.

    Raises:
        RequestError: no YAML file, there already, or its folder is not.
    """
    path = output or Path(f"{fitted_name(recipe, card)}.yaml")
    if path.suffix not in (".yaml", ".yml"):
        raise RequestError(f"--output: found {path}, expected a recipe file's name, ending in .yaml")
    if path.exists():
        raise RequestError(f"{path}: there already; give another file with --output, or remove it")
    if not path.parent.is_dir():
        raise RequestError(f"--output: found {path}, but there is no folder {path.parent}: make it first")
    return path


def fitted_name(recipe: Recipe, card: Card) -> str:
    """The fitted recipe's name."""
    return f"{recipe.name}-{re.sub(r'[^a-z0-9.-]', '', card.name.lower())}"


def write(found: Fit, path: Path) -> None:
    """Write the fitted recipe; only what differs from the defaults, and how it came about.

    Raises:
        RequestError: the file is there already, or its folder is not.
    """
    made, card = found.choice.plan, found.card
    content = found.recipe.model_dump(mode="json", exclude_defaults=True)
    from orpo_lite.plan.picture import gigabytes

    head = (
        f"# {found.before.plan.recipe}, fitted to {card.title} by python -m orpo_lite.plan --fit:\n"
        f"# planned peak {gigabytes(made.peak)} GB in tensors, {gigabytes(made.needed)} GB with what is assumed.\n"
        "# per_device_train_batch_size x gradient_accumulation_steps are the pairs of an optimizer step; tokens_per_batch cuts\n"
        "# it into micro-batches.\n"
    )
    text = head + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise RequestError(f"{path}: there already; give another file with --output, or remove it") from None
    except OSError as error:
        raise RequestError(f"{path}: cannot be written ({error.strerror}); give another file with --output") from None


def settings(choice: Choice) -> str:
    """The overrides of a choice beside micro-batch and checkpointing."""
    shown = [
        w for w in choice.words if not w.startswith(("orpo.tokens", "memory.checkpointing", "training.per_device_eval"))
    ]
    return " ".join(shown)


def show(console: Console, found: Fit, written: Path) -> None:
    """What was weighed, what was chosen and why, and where the recipe is."""
    from orpo_lite.plan.picture import gigabytes
    from orpo_lite.plan.search import COMING_BACK, UNPACKING

    table = Table("", "pairs", "checkpointing", "needs GB", "FLOPs", "time", "", box=None)
    for column in (1, 3, 4, 5):
        table.columns[column].justify = "right"
    before = found.before

    def row(mark: str, choice: Choice, style: str) -> None:
        layers = f"{choice.checkpointing} layers" if choice.checkpointing.isdigit() else choice.checkpointing
        relative = (choice.flops / before.flops, choice.cost / before.cost)
        more = settings(choice) if choice.fits else f"does not fit {settings(choice)}"
        table.add_row(
            mark,
            str(choice.pairs),
            layers,
            gigabytes(choice.plan.needed),
            *(f"{number:.2f}" for number in relative),
            escape(more),
            style=style,
        )

    row("as it stands", before, "" if before.fits else "red")
    for choice in found.weighed:
        mine = choice is found.choice
        row("chosen" if mine else "weighed", choice, "bold green" if mine else "" if choice.fits else "red")
    console.print(f"[bold]{escape(before.plan.recipe)} on {escape(found.card.title)}[/]")
    console.print(table)
    console.print(
        "pairs: of the longest that data lets through, in a micro-batch; FLOPs: of an optimizer step, counted, recomputation "
        f"included; both relative to the recipe as it stands, whose step of such pairs takes {before.flops:.3g} FLOPs",
        style="dim",
    )
    console.print(
        f"assumed in time: unpacking a 4-bit weight costs as much as {UNPACKING:.0f} FLOPs, a byte back from the host "
        f"{COMING_BACK:.0f}",
        style="dim",
    )
    left = found.card.gigabytes * 1e9 - found.choice.plan.needed
    console.print(
        f"{gigabytes(left)} GB of the card are left, by figures that were not measured on one; a screen on the card takes some of "
        "it: name a size that is free, such as --gpu 11GB"
    )
    lengths = [word for word in found.choice.words if word.startswith("data.")]
    if lengths:
        console.print(
            f"[yellow]{' '.join(lengths)} changes what is trained on: nothing fits with the recipe's own lengths[/]"
        )
    console.print(f"written: {escape(str(written))}", soft_wrap=True)
    console.print(f"train it: python -m orpo_lite.train --recipe {escape(str(written))}", soft_wrap=True)


def as_dict(found: Fit, written: Path) -> dict[str, Any]:
    """The same as plain numbers and words."""

    def plain(choice: Choice) -> dict[str, Any]:
        return {
            "overrides": list(choice.words),
            "pairs": choice.pairs,
            "checkpointing": choice.checkpointing,
            "needed_bytes": choice.plan.needed,
            "fits": choice.fits,
            "step_flops": choice.flops,
            "relative_time": choice.cost / found.before.cost,
        }

    return {
        "card": found.card.name,
        "total_bytes": int(found.card.gigabytes * 1e9),
        "recipe": str(written),
        "chosen": plain(found.choice),
        "as_it_stands": plain(found.before),
        "weighed": [plain(choice) for choice in found.weighed],
    }
