"""What more GPUs are worth to a recipe: memory, throughput or neither, in a sentence a card."""

from __future__ import annotations

from orpo_lite.plan.gpus import FITS, NOT, SHOWN, Card, verdict
from orpo_lite.plan.multi_gpu import SpreadPlan
from orpo_lite.plan.remedies import Planner, find_remedy
from orpo_lite.plan.units import SHARDED, Spread
from orpo_lite.recipe import Recipe


def worth(recipe: Recipe, card: Card, made: SpreadPlan, planner: Planner) -> str:
    """Whether a second card helps, and what would do on one."""
    spread, name = made.spread, card.title
    alone = planner(recipe, card.target)
    gain = f"about {made.speedup:.1f} times the pairs a second of one"
    if verdict(alone, card) != NOT:
        if spread.strategy == "ddp":
            return f"{name}: one card holds the recipe; {spread.gpus} are worth it for throughput: {gain}"
        ddp = planner.spread(recipe, card.target, Spread(spread.gpus))
        return (
            f"{name}: one card holds the recipe, so that the memory {spread.strategy} saves is not needed: for throughput take "
            f"ddp, {ddp.traffic / 1e9:.2f} GB a step instead of {made.traffic / 1e9:.2f} GB (about {ddp.speedup:.1f} times the "
            f"pairs a second of one card, against {made.speedup:.1f})"
        )
    fits = verdict(made, card) != NOT
    words, planned = find_remedy(recipe, card, planner)
    together = (
        f"{spread} hold it with {made.needed / 1e9:.1f} GB each, at {made.speedup / spread.gpus:.0%} of their speed without traffic"
        if fits
        else f"{spread} do not hold it either ({made.needed / 1e9:.1f} GB each){otherwise(recipe, card, made, planner)}"
    )
    if planned is not None and "data.max_length" not in words:
        smaller = "a smaller micro-batch is enough" if "batch" in words else "other settings are enough"
        return (
            f"{name}: one card will do, {smaller}, with the same pairs in a step ({planned.needed / 1e9:.1f} GB): {words}. "
            f"More cards are then for throughput, by ddp with these words; as the recipe stands, {together}"
        )
    return (
        f"{name}: too little for the recipe alone ({alone.needed / 1e9:.1f} GB), whatever the micro-batch; {together}"
    )


def otherwise(recipe: Recipe, card: Card, made: SpreadPlan, planner: Planner) -> str:
    """What else the same number of cards could do."""
    for strategy in [made.spread.strategy] if made.spread.strategy in SHARDED else SHARDED:
        for offload in (False, True):
            other = Spread(made.spread.gpus, strategy, offload)
            planned = planner(recipe, card.target, other)
            if verdict(planned, card) != NOT:
                flags = f"--strategy {strategy}{' --offload' if offload else ''}"
                return f"; with {flags} they do ({planned.needed / 1e9:.1f} GB)"
    return ""


def sizes(recipe: Recipe, made: SpreadPlan, planner: Planner) -> str:
    """The smallest cards that hold the recipe, alone and spread."""

    def smallest(planned: object) -> str:
        fitting = [card.name for card in SHOWN[:-1] if verdict(planned, card) == FITS]  # type: ignore[arg-type]
        return fitting[0] if fitting else "more than 80 GB"

    alone = planner(recipe, made.target)
    one, many = smallest(alone), smallest(made)
    verdict_words = (
        f"the memory of more cards does not help: they are for throughput, about {made.speedup:.1f} times the pairs a second"
        if one == many
        else f"{made.spread} are for memory where a card is smaller than {one}"
    )
    return f"alone it takes a card of {one}, as one of {made.spread} {many}: {verdict_words}"
