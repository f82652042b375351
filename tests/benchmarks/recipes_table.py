"""`python -m tests.benchmarks.recipes_table [NAME ...]`: make the plans of recipes anew, in recipes/README.md and in their headers.

Without names all recipes are planned, which takes some minutes. The time of 1,000 pairs is the roofline of `launches`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from orpo_lite.plan.gpus import CARDS, FITS, SIZES, Card, verdict
from orpo_lite.plan.predict import Study
from orpo_lite.plan.search import Choice, Planner, Search, changed
from orpo_lite.plan.step import Shape, pair_tokens, period
from orpo_lite.recipe import Recipe
from orpo_lite.recipe.loading import shipped_recipes
from tests.benchmarks import launches

README = Path(__file__).parents[2] / "recipes" / "README.md"
BEGIN, END = "<!-- plan: begin (python -m tests.benchmarks.recipes_table) -->", "<!-- plan: end -->"
HEAD = (
    "recipe", "longest pair", "smallest card, what auto picks there", "the recipe's card, what auto picks there",
    "1,000 pairs, estimate", "host, loading, GB",
)  # fmt: skip
PLANNED = re.compile(r"# Planned for .*\n(?:# .*margins\.\n)?")
FIGURES = {
    8: launches.Card(30e12, 272e9, launches.AMPERE), 12: launches.CARDS["RTX 3060"], 15.8: launches.CARDS["T4"],
    16: launches.Card(44e12, 288e9, launches.AMPERE), 24: launches.CARDS["RTX 4090"],
    48: launches.Card(362e12, 864e9, launches.AMPERE), 80: launches.Card(312e12, 2039e9, launches.AMPERE),
    141: launches.Card(989e12, 4800e9, launches.AMPERE),
}  # fmt: skip
"""A card of each size that recipes are written for: RTX 4060, RTX 3060, T4, RTX 4060 Ti, RTX 4090, L40S, A100, H200."""
TYPICAL = (launches.PROMPT, launches.ANSWER, launches.ANSWER)


def card_of(recipe: Recipe) -> Card | None:
    """Return the card that a recipe names first in `needs`; None where it takes a CPU."""
    size = re.match(r"(\d+) GB GPU( without bf16)?", recipe.needs or "")
    if size is None:
        return None
    return CARDS["t4"] if size[2] else Card(f"{size[1]} GB", float(size[1]))


def best(recipe: Recipe, card: Card, planner: Planner) -> Choice | None:
    """Return what `auto` picks on a card."""
    return Search(recipe, card, planner).first_that_fits(shorten=False)


def row_of(recipe: Recipe, planner: Planner) -> tuple[list[str], str]:
    """Return a recipe's cells in the table, and the lines on its plan in its header; none for a recipe that needs no card."""
    card, auto = card_of(recipe), recipe.plans_batches
    trial = changed(recipe, ["training.per_device_train_batch_size=auto"])
    assert trial is not None
    one = planner(trial, (card or SIZES[0]).target)
    layers = len(planner.study(trial, (card or SIZES[0]).target).layers)
    sizes = sorted([*SIZES, *([card] if card else [])], key=lambda one: one.gigabytes)
    smallest = next((size for size in sizes if verdict(one, size) == FITS), None)
    at_least = best(trial, smallest, planner) if smallest and auto else None
    there = best(trial, card, planner) if card and auto else None
    minutes = f"{seconds_of(trial, card, there) / 60:.0f} min" if card and there else ""
    cells = [
        recipe.name, f"2 x {sum(one.shape.pairs[0]):,}",
        picked(smallest, at_least, layers) or "none of 80 GB and less" if card else "none needed",
        picked(card, there, layers) or "none needed", minutes,
        f"{one.load_host / 1e9:.1f}",
    ]  # fmt: skip
    if not (card and there):
        return cells, ""
    title = "a T4" if card.name == "t4" else f"a card of {card.name}"
    offloaded = ", activations offloaded" if any("offload" in word for word in there.words) else ""
    return cells, (
        f"# Planned for {title}: {there.pairs} of the longest pairs at once, {there.checkpointing} of {layers} layers checkpointed"
        f"{offloaded},\n# {there.plan.needed / 1e9:.1f} GB with margins.\n"
    )


def picked(card: Card | None, choice: Choice | None, layers: int) -> str:
    """Name a card and say what `auto` picks there, and how much memory that needs."""
    if card is None or choice is None:
        return card.name if card else ""
    count = {"all": layers, "none": 0}.get(choice.checkpointing, choice.checkpointing)
    offloaded = " offloaded," * any("offload" in word for word in choice.words)
    pairs = f"{choice.pairs} pair{'s' * (choice.pairs > 1)}"
    return f"{card.name}: {pairs}, {count} of {layers} layers,{offloaded} {choice.plan.needed / 1e9:.1f} GB"


def seconds_of(recipe: Recipe, card: Card, choice: Choice) -> float:
    """Estimate the time of 1,000 pairs of 256 prompt and 2 x 384 answer tokens with what `auto` picks."""
    held_out = ["data.eval_fraction=0", "data.eval=null", "memory.offload_activations=false"]
    trial = changed(recipe, [*(word for word in choice.words if "offload" not in word), *held_out])
    assert trial is not None and trial.orpo.tokens_per_batch
    study = Study(trial, card.target, lambda *_: Shape((), ""))
    pairs = min(1000, max(1, trial.orpo.tokens_per_batch // pair_tokens(TYPICAL, study.layout.name)))
    pairs = min(pairs, recipe.training.get("gradient_accumulation_steps", 1))
    layers, each = len(study.layers), period(study.layers)
    whole = {}
    for recomputed in (True, False):
        found = launches.micro_batch(study, pairs, each, recomputed, trl=False)
        if each < layers:
            taller, more = launches.micro_batch(study, pairs, 2 * each, recomputed, trl=False), layers / each - 1
            for name in ("counts", "kernels"):
                first, second = getattr(found, name), getattr(taller, name)
                for key in second.keys() | first.keys():
                    first[key] += more * (second[key] - first[key])
        whole[recomputed] = launches.seconds(found, FIGURES[card.gigabytes])
    share = {"all": 1.0, "none": 0.0}.get(choice.checkpointing)
    share = int(choice.checkpointing) / layers if share is None else share
    return 1000 / pairs * (share * whole[True] + (1 - share) * whole[False])


def write(names: list[str]) -> None:
    """Plan recipes and write their rows and headers, one after the other."""
    planner = Planner()
    for name in names:
        path = shipped_recipes()[name]
        cells, header = row_of(Recipe.load(name), planner)
        text = README.read_text("utf-8")
        before, table, after = (text.partition(BEGIN)[0], *text.partition(BEGIN)[2].partition(END)[::2])
        rows = {line.split("|")[1].strip(): line for line in table.splitlines()[4:] if line.startswith("|")}
        if f"| {' | '.join(HEAD)} |" not in table:
            rows = {}
        rows[name] = f"| {' | '.join(cells)} |"
        made = "\n".join(rows[key] for key in shipped_recipes() if key in rows)
        head = f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}"
        README.write_text(f"{before}{BEGIN}\n\n{head}\n{made}\n\n{END}{after}", "utf-8")
        if header:
            path.write_text(PLANNED.sub(lambda _, lines=header: lines, path.read_text("utf-8"), count=1), "utf-8")
        print(rows[name], flush=True)


if __name__ == "__main__":
    write(sys.argv[1:] or list(shipped_recipes()))
