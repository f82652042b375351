"""`python -m tests.benchmarks.recipes_table`: the table of plans in recipes/README.md, as Markdown."""

from __future__ import annotations

from orpo_lite.plan.gpus import CARDS, FITS, NOT, SIZES, Target, verdict
from orpo_lite.plan.search import Planner
from orpo_lite.recipe import Recipe
from orpo_lite.recipe.loading import shipped_recipes

BEGIN, END = "<!-- plan: begin (python -m tests.benchmarks.recipes_table) -->", "<!-- plan: end -->"


def all_recipes() -> str:
    """Return the table of recipes/README.md, between its markers."""
    planner = Planner()
    head = "recipe | longest pair | pairs per micro-batch | peak in tensors, GB | with margins, GB | smallest card | T4 | host, loading, GB"
    rows = [row_of(Recipe.load(name), planner) for name in shipped_recipes()]
    return "\n".join([BEGIN, "", f"| {head} |", "|---|---|---|---|---|---|---|---|", *rows, "", END])


def row_of(recipe: Recipe, planner: Planner) -> str:
    """Return a recipe's row of the table."""
    made, on_t4 = planner(recipe, Target("cuda")), planner(recipe, CARDS["t4"].target)
    verdicts = {card.name: verdict(made, card) for card in SIZES}
    smallest = next((name for name, words in verdicts.items() if words == FITS), "none of 80 GB and less")
    tight = next((name for name, words in verdicts.items() if words != NOT), smallest)
    if tight != smallest:
        smallest += f" ({tight}: tight)"
    cells = (
        recipe.name,
        f"2 x {sum(made.shape.pairs[0]):,}",
        len(made.shape.pairs),
        f"{made.peak / 1e9:.1f}",
        f"{made.needed / 1e9:.1f}",
        smallest,
        f"{verdict(on_t4, CARDS['t4'])}, {on_t4.needed / 1e9:.1f}",
        f"{made.load_host / 1e9:.1f}",
    )
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    print(all_recipes())
