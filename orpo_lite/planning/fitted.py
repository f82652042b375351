"""What a fit found: on the screen, as JSON, and as a recipe file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from orpo_lite.errors import RequestError
from orpo_lite.planning.cards import Card, find_cards
from orpo_lite.planning.fit import COMING_BACK, UNPACKING, Choice, Fit, fit
from orpo_lite.planning.picture import gigabytes
from orpo_lite.planning.start import card_here
from orpo_lite.recipe import Recipe


def search(recipe: Recipe, gpu: str | None) -> Fit:
    """Fit a recipe to a card by name, to memory.gpu_gb, or to the card that is there.

    Raises:
        RequestError: none of these says which card, or nothing that was tried fits it.
    """
    if gpu:
        cards = find_cards(gpu) if gpu != "cpu" else []
        if len(cards) != 1:
            raise RequestError(f"--gpu: found {gpu}, but --fit fits one card: name it, or give its size such as 12GB")
        return fit(recipe, cards[0])
    if recipe.memory.gpu_gb:
        return fit(recipe, Card(f"{recipe.memory.gpu_gb:g} GB", recipe.memory.gpu_gb))
    if not torch.cuda.is_available():
        raise RequestError(
            "--fit: there is no GPU here: say which card is meant, as in --gpu rtx-3060, --gpu 12GB or memory.gpu_gb=12"
        )
    return fit(recipe, card_here(torch.device("cuda"))[0])


def check(output: Path | None) -> None:
    """Find out before the search that the recipe cannot go there.

    Raises:
        RequestError: no YAML file, or it is there already.
    """
    if output and output.suffix not in (".yaml", ".yml"):
        raise RequestError(f"--output: found {output}, expected a recipe file's name, ending in .yaml")
    if output and output.exists():
        raise RequestError(f"{output}: there already; give another file with --output, or remove it")


def write(found: Fit, output: Path | None) -> Path:
    """Write the fitted recipe; only what differs from the defaults, and how it came about.

    Raises:
        RequestError: the file is there already, or its folder is not.
    """
    path = output or Path(f"{found.recipe.name}.yaml")
    made, card = found.choice.plan, found.card
    content = found.recipe.model_dump(mode="json", exclude_defaults=True)
    head = (
        f"# {found.before.plan.recipe}, fitted to {card.name} ({card.gigabytes:g} GB) by python -m orpo_lite.plan --fit:\n"
        f"# planned peak {gigabytes(made.peak)} GB in tensors, {gigabytes(made.needed)} GB with what is assumed\n"
    )
    text = head + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise RequestError(f"{path}: there already; give another file with --output, or remove it") from None
    except OSError as error:
        raise RequestError(f"{path}: cannot be written ({error.strerror}); give another file with --output") from None
    return path


def settings(choice: Choice) -> str:
    """The overrides of a choice beside micro-batch and checkpointing."""
    shown = [
        w for w in choice.words if not w.startswith(("orpo.tokens", "memory.checkpointing", "training.per_device_eval"))
    ]
    return " ".join(shown)


def show(console: Console, found: Fit, written: Path) -> None:
    """What was weighed, what was chosen and why, and where the recipe is."""
    table = Table("", "pairs", "checkpointing", "else", "needs GB", "FLOPs", "time", box=None)
    for column in (1, 4, 5, 6):
        table.columns[column].justify = "right"
    before = found.before

    def row(mark: str, choice: Choice, style: str) -> None:
        table.add_row(
            mark,
            str(choice.pairs),
            choice.checkpointing,
            escape(settings(choice)),
            gigabytes(choice.plan.needed),
            f"{choice.flops:.3g}",
            f"{choice.cost / before.cost:.2f}" if choice.fits else "does not fit",
            style=style,
        )

    row("as it stands", before, "" if before.fits else "red")
    for choice in found.weighed:
        mine = choice is found.choice
        row("chosen" if mine else "", choice, "bold green" if mine else "" if choice.fits else "red")
    console.print(f"[bold]{escape(before.plan.recipe)} on {escape(found.card.name)} ({found.card.gigabytes:g} GB)[/]")
    console.print(table)
    console.print(
        "pairs: of the longest that data lets through, in a micro-batch; FLOPs: of a whole optimizer step of such pairs, "
        "counted, recomputation included; time: relative to the recipe as it stands",
        style="dim",
    )
    console.print(
        f"assumed in time: unpacking a 4-bit weight costs as much as {UNPACKING:.0f} FLOPs, a byte back from the host "
        f"{COMING_BACK:.0f}",
        style="dim",
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
