"""What would make a recipe fit a card: changes tried one after the other, each planned anew."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from orpo_lite.common.errors import RequestError
from orpo_lite.plan.gpus import FITS, NOT, Card, verdict
from orpo_lite.plan.kernels import Target
from orpo_lite.plan.multi_gpu import SpreadPlan, spread_plan
from orpo_lite.plan.predict import Plan, Study, checkpointed_layers
from orpo_lite.plan.step import evaluation_pairs
from orpo_lite.plan.units import Spread
from orpo_lite.recipe import Recipe

EIGHTHS = (7, 6, 5, 4, 3, 2, 1)
"""Shorter lengths that are tried, in eighths of the recipe's."""


class Planner:
    """Plans that are made once, however often they are asked for."""

    def __init__(self) -> None:
        self._studied: dict[tuple[str, Target], Study] = {}
        self._made: dict[tuple[str, Target, Spread | None], Plan] = {}

    def __call__(self, recipe: Recipe, target: Target, spread: Spread | None = None) -> Plan:
        """The plan of a recipe on one card, or of one of the GPUs that it is spread over."""
        key = (json.dumps(recipe.model_dump(mode="json"), sort_keys=True), target)
        if key not in self._studied:
            self._studied[key] = Study(recipe, target)
        if (*key, spread) not in self._made:
            study, recomputed = self._studied[key], checkpointed_layers(recipe, target)
            self._made[*key, spread] = spread_plan(study, recomputed, spread) if spread else study.plan(recomputed)
        return self._made[*key, spread]

    def spread(self, recipe: Recipe, target: Target, spread: Spread) -> SpreadPlan:
        """The plan of one of the GPUs that a recipe is spread over."""
        made = self(recipe, target, spread)
        assert isinstance(made, SpreadPlan)
        return made


@dataclass(frozen=True)
class Verdict:
    """How a recipe stands to a card."""

    card: Card
    plan: Plan
    words: str
    remedy: str | None
    """Overrides with which it fits, None where it fits anyway, empty where nothing that was tried is enough."""
    remedied: Plan | None


def judge(recipe: Recipe, card: Card, planner: Callable[[Recipe, Target], Plan]) -> Verdict:
    """Plan a recipe for a card; where it does not fit, look for what would make it."""
    made = planner(recipe, card.target)
    words = verdict(made, card)
    if words != NOT:
        return Verdict(card, made, words, None, None)
    remedy, remedied = find_remedy(recipe, card, planner)
    return Verdict(card, made, words, remedy, remedied)


def find_remedy(recipe: Recipe, card: Card, planner: Callable[[Recipe, Target], Plan]) -> tuple[str, Plan | None]:
    """The first changes, mildest first and each on top of the others, with which the recipe fits.

    All of them keep the pairs of an optimizer step. A shorter max_length alone changes what is trained on, so it comes last.
    """
    words: list[str] = []
    for change in (one_pair, recompute_all, to_host, four_bits):
        more = change(recipe, card.target)
        if not more:
            continue
        trial = changed(recipe, [*words, *more])
        if trial is None:
            continue
        words += more
        made = planner(trial, card.target)
        if verdict(made, card) == FITS:
            return " ".join(words), made
    best: tuple[str, Plan | None] = ("", None)
    low, high = 0, len(EIGHTHS)
    while low < high:  # memory falls with the length
        middle = (low + high) // 2
        longer = [*words, *shorter(recipe, EIGHTHS[middle])]
        trial = changed(recipe, longer)
        made = planner(trial, card.target) if trial else None
        if made and verdict(made, card) == FITS:
            best, high = (" ".join(longer), made), middle
        else:
            low = middle + 1
    return best


def changed(recipe: Recipe, words: list[str]) -> Recipe | None:
    """The recipe with overrides; None where they do not go together with the rest of it."""
    from orpo_lite.recipe.loading import apply_override

    content = recipe.model_dump(mode="json")
    for word in words:
        apply_override(content, word)
    try:
        return Recipe.parse(content)
    except RequestError:
        return None


def one_pair(recipe: Recipe, target: Target) -> list[str]:
    """One pair a micro-batch, and as many more micro-batches; one pair a batch of the evaluation."""
    held_out = ["training.per_device_eval_batch_size=1"] if evaluation_pairs(recipe) > 1 else []
    pairs = recipe.training.get("per_device_train_batch_size", 8)
    if recipe.orpo.tokens_per_batch:  # the longest pair alone stands in a micro-batch of its own
        return ["orpo.tokens_per_batch=1", *held_out]
    if pairs == 1:
        return held_out
    steps = pairs * recipe.training.get("gradient_accumulation_steps", 1)
    return ["training.per_device_train_batch_size=1", f"training.gradient_accumulation_steps={steps}", *held_out]


def recompute_all(recipe: Recipe, target: Target) -> list[str]:
    return [] if checkpointed_layers(recipe, target) is None else ["memory.checkpointing=all"]


def to_host(recipe: Recipe, target: Target) -> list[str]:
    return [] if recipe.memory.offload_activations else ["memory.offload_activations=true"]


def four_bits(recipe: Recipe, target: Target) -> list[str]:
    if recipe.adapter is None or recipe.model.quantization in ("nf4", "fp4"):
        return []
    return ["model.quantization=nf4"]


def shorter(recipe: Recipe, eighths: int) -> list[str]:
    """max_length cut, and limits inside it with it."""
    length = max(8, (recipe.data.max_length or 512) * eighths // 8)
    prompt = recipe.data.max_prompt_length
    words = [f"data.max_length={length}"]
    if prompt and prompt > length // 2:
        words.append(f"data.max_prompt_length={length // 2}")
    return words
