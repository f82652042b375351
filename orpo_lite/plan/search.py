"""Searches: changes with which a recipe fits a card, and the fastest settings for a card.

Micro-batch and number of checkpointed layers leave the loss and its gradients unchanged, since an optimizer
step keeps its pairs. The cost of a step is counted on the meta run: FLOPs, recomputation included.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from orpo_lite.common.errors import RequestError
from orpo_lite.plan.allocations import FLOPS, MOVED, UNPACKED
from orpo_lite.plan.gpus import FITS, NOT, Card, verdict
from orpo_lite.plan.kernels import Target
from orpo_lite.plan.multi_gpu import Parallelism, parallel_plan
from orpo_lite.plan.predict import Plan, Study, checkpointed_layers
from orpo_lite.plan.step import Shape, batch_sizes, evaluation_pairs, pair_tokens
from orpo_lite.recipe import Recipe
from orpo_lite.recipe.loading import apply_override

EIGHTHS = (7, 6, 5, 4, 3, 2, 1)
"""Shorter lengths to try, in eighths of the recipe's."""
OFFLOAD = "memory.offload_activations=true"
FOUR_BITS = ("nf4", "fp4")


# ---- overrides with which a recipe fits ------------------------------------------------------------------------------


class Planner:
    """Plans that are made once, however often they are asked for."""

    def __init__(self) -> None:
        self._studies: dict[tuple[str, Target], Study] = {}
        self._plans: dict[tuple[str, Target, int | None, Parallelism | None], Plan] = {}

    def __call__(self, recipe: Recipe, target: Target, parallelism: Parallelism | None = None) -> Plan:
        """Plan a recipe on one card, or one of the GPUs that share it."""
        # a study plans any number of checkpointed layers
        key, count = recipe.model_dump_json(exclude={"memory": {"checkpointing"}}), checkpointed_layers(recipe, target)
        if (key, target) not in self._studies:
            self._studies[key, target] = Study(recipe, target)
        study = self._studies[key, target]
        if (key, target, count, parallelism) not in self._plans:
            made = parallel_plan(study, count, parallelism) if parallelism else study.plan(count)
            self._plans[key, target, count, parallelism] = made
        return self._plans[key, target, count, parallelism]


@dataclass(frozen=True)
class Verdict:
    """The verdict on a recipe and a card, and what would make it fit."""

    card: Card
    plan: Plan
    words: str
    remedy: str | None
    """Overrides with which it fits; None where it fits without, empty where nothing that was tried is enough."""
    remedied: Plan | None


def judge(recipe: Recipe, card: Card, planner: Callable[[Recipe, Target], Plan]) -> Verdict:
    """Plan a recipe for a card; where it does not fit, look for overrides with which it does."""
    made = planner(recipe, card.target)
    words = verdict(made, card)
    if words != NOT:
        return Verdict(card, made, words, None, None)
    return Verdict(card, made, words, *find_remedy(recipe, card, planner))


def find_remedy(recipe: Recipe, card: Card, planner: Callable[[Recipe, Target], Plan]) -> tuple[str, Plan | None]:
    """Return the first overrides with which a recipe fits, mildest first and each added to those before, and their plan.

    All of them keep the pairs of an optimizer step. A shorter max_length changes what is trained on, so it comes last.
    """

    def planned(words: list[str]) -> Plan | None:
        trial = changed(recipe, words)
        return planner(trial, card.target) if trial else None

    def fits(words: list[str]) -> bool:
        made = planned(words)
        return made is not None and verdict(made, card) == FITS

    words: list[str] = []
    for change in mild_changes(recipe, card.target):
        if changed(recipe, [*words, *change]):
            words += change
            if fits(words):
                return " ".join(words), planned(words)
    lengths = [[*words, *shorter(recipe, eighths)] for eighths in EIGHTHS]
    best = bisect_left(lengths, True, key=fits)  # memory falls with the length
    return (" ".join(lengths[best]), planned(lengths[best])) if best < len(lengths) else ("", None)


def changed(recipe: Recipe, words: list[str]) -> Recipe | None:
    """Apply overrides to a recipe; None where they conflict with the rest of it."""
    content = recipe.model_dump(mode="json")
    for word in words:
        apply_override(content, word)
    try:
        return Recipe.parse(content)
    except RequestError:
        return None


def mild_changes(recipe: Recipe, target: Target) -> Iterator[list[str]]:
    """Iterate over overrides that reduce memory and keep the pairs of an optimizer step."""
    pairs, steps = batch_sizes(recipe)
    held_out = ["training.per_device_eval_batch_size=1"] if evaluation_pairs(recipe) > 1 else []
    if recipe.orpo.tokens_per_batch:  # any pair longer than the budget gets a micro-batch of its own
        yield ["orpo.tokens_per_batch=1", *held_out]
    elif pairs > 1:
        accumulated = f"training.gradient_accumulation_steps={pairs * steps}"
        yield ["training.per_device_train_batch_size=1", accumulated, *held_out]
    elif held_out:
        yield held_out
    if checkpointed_layers(recipe, target) is not None:
        yield ["memory.checkpointing=all"]
    if not recipe.memory.offload_activations:
        yield [OFFLOAD]
    if recipe.adapter and recipe.model.quantization not in FOUR_BITS:
        yield ["model.quantization=nf4"]


def shorter(recipe: Recipe, eighths: int) -> list[str]:
    """Cut max_length, and max_prompt_length where it would no longer leave room for an answer."""
    length = max(8, (recipe.data.max_length or 512) * eighths // 8)
    prompt = recipe.data.max_prompt_length
    words = [f"data.max_length={length}"]
    if prompt and prompt > length // 2:
        words.append(f"data.max_prompt_length={length // 2}")
    return words


# ---- the fastest settings that fit -----------------------------------------------------------------------------------

UNPACKING = 450.0
"""ASSUMED. FLOPs that a card could do while it unpacks a 4-bit weight: some 4.5 bytes through its memory, at the 100 FLOPs
per byte that recent cards reach in 16-bit products in practice."""
FETCHING = 1000.0
"""ASSUMED. FLOPs that a card could do while it fetches a byte from the host, at 25 TFLOP/s and 25 GB/s; sending is free."""
WORTH = 1.02
"""A setting has to be faster by this factor to be preferred to one that needs less memory."""
Shaped = Callable[[Recipe, str], Shape]


@dataclass(frozen=True)
class Choice:
    """One way to run the optimizer step."""

    words: tuple[str, ...]
    """Its overrides of the recipe."""
    checkpointing: str
    """all, none, or the number of layers."""
    plan: Plan
    fits: bool
    flops: float
    """Of an optimizer step of the longest pairs, recomputation included."""
    cost: float
    """The same, with everything else that takes time converted to FLOPs."""

    @property
    def pairs(self) -> int:
        """Longest pairs in a micro-batch."""
        return len(self.plan.shape.pairs)


@dataclass(frozen=True)
class Fit:
    """The fastest choice that fits, and everything that was tried."""

    card: Card
    recipe: Recipe
    """With the choice's overrides, under a name of its own."""
    choice: Choice
    tried: list[Choice]
    before: Choice
    """The recipe as it stands."""


def fit(recipe: Recipe, card: Card, shape: Shaped | None = None, *, shorten: bool = True) -> Fit:
    """Find the fastest settings with which a recipe fits a card, margins included.

    Each of these is tried only where nothing before it fits: micro-batch and checkpointed layers; activations offloaded
    to the host; a shorter data.max_length, the only one that changes what is trained on.

    Args:
        shape: the costliest micro-batch of a recipe in a layout; default, the largest that the recipe allows.
        shorten: data.max_length may be cut.

    Raises:
        RequestError: nothing that was tried fits.
    """
    search = Search(recipe, card, shape)
    before = search.as_it_stands()
    found = next(filter(None, map(search.fastest, search.stages(shorten))), None)
    if found is None:
        least = min((choice.plan for choice in search.tried), key=lambda made: made.needed)
        more = "" if shorten else ", or a shorter data.max_length"
        more += "" if recipe.model.quantization in FOUR_BITS else ", or model.quantization=nf4"
        raise RequestError(
            f"--fit: {recipe.name} does not fit {card.title}: it needs {least.needed / 1e9:.1f} GB for one pair of 2 x "
            f"{sum(least.shape.pairs[0]):,} tokens with all layers checkpointed and offloaded; use a larger card or a smaller "
            f"model{more}"
        )
    fitted = changed(recipe, list(found.words))
    assert fitted is not None  # it was planned
    needs = f"{found.plan.needed / 1e9:.1f} GB of {card.title}, as planned"
    fitted = fitted.model_copy(update={"name": card.fitted_name(recipe.name), "needs": needs})
    return Fit(card, fitted, found, search.tried, before)


class Search:
    """Ways to run a recipe's optimizer step on a card, each planned once.

    Raises:
        RequestError: the recipe cannot be planned.
    """

    def __init__(self, recipe: Recipe, card: Card, shape: Shaped | None = None) -> None:
        self.recipe, self.card, self.shape = recipe, card, shape
        self.start = self._planned(recipe)
        self.step_pairs = math.prod(batch_sizes(recipe))
        self.tried: list[Choice] = []
        self._studies: dict[tuple[str, ...], Study] = {}
        # means per micro-batch, or incomplete ones dropped: another micro-batch would train something else
        self._fixed = recipe.orpo.nll_mean == "micro" or bool(recipe.training.get("dataloader_drop_last"))

    def as_it_stands(self) -> Choice:
        """Return the recipe without a change."""
        return self._choice((), self.start, checkpointed_layers(self.recipe, self.card.target))

    def stages(self, shorten: bool) -> Iterator[tuple[str, ...]]:
        """Iterate over the overrides to search with, mildest first."""
        yield ()
        yield (OFFLOAD,)
        for eighths in EIGHTHS if shorten else ():
            yield (OFFLOAD, *shorter(self.recipe, eighths))

    def fastest(self, words: tuple[str, ...]) -> Choice | None:
        """Return the cheapest choice that fits with some overrides; everything tried is added to `tried`."""
        found = []
        for pairs in self._sizes():
            choice = self.fewest_layers(pairs, words)
            if choice is None:  # more pairs need more memory
                break
            found.append(choice)
        # at practically equal cost, fewer micro-batches: each launches as many kernels
        return min(found, key=lambda choice: (float(f"{choice.cost:.3g}"), -choice.pairs), default=None)

    def fewest_layers(self, pairs: int, words: tuple[str, ...]) -> Choice | None:
        """Return a micro-batch of so many pairs with the fewest checkpointed layers that fit; None if none does."""
        words = (*self._batch(pairs, words), *words)
        study = self._study(words)
        most = best = self._choice(words, study, None)
        if most.fits:
            counts = [*([] if OFFLOAD in words else [0]), *study.counts]
            choices = [functools.partial(self._choice, words, study, count) for count in counts]
            if not (choices and (best := choices[0]()).fits):
                fewest = bisect_left(choices, True, key=lambda choice: choice().fits)  # memory falls with their number
                best = choices[fewest]() if fewest < len(choices) else most
            if most.cost <= WORTH * best.cost:
                best = most
        self.tried.append(best)
        return best if best.fits else None

    def _sizes(self) -> list[int]:
        """Return the pairs per micro-batch to try."""
        if self._fixed:
            return [len(self.start.shape.pairs)]
        return sorted({math.ceil(self.step_pairs / 2**i) for i in range(self.step_pairs.bit_length() + 1)})

    def _batch(self, pairs: int, words: tuple[str, ...]) -> tuple[str, ...]:
        """Return the overrides for a micro-batch of so many of the longest pairs."""
        held_out = evaluation_pairs(self.recipe)
        cut = (f"training.per_device_eval_batch_size={pairs}",) if held_out > pairs else ()
        if self._fixed:
            return cut
        tokens = pair_tokens(self._study(words).shape.pairs[0], self.start.layout.name)
        return (f"orpo.tokens_per_batch={pairs * tokens}", *cut)

    def _study(self, words: tuple[str, ...]) -> Study:
        if words not in self._studies:
            trial = changed(self.recipe, ["memory.checkpointing=all", *words])
            if trial is None:
                raise RequestError(f"--fit: {' '.join(words)} conflicts with the rest of {self.recipe.name}")
            self._studies[words] = self._planned(trial)
        return self._studies[words]

    def _planned(self, recipe: Recipe) -> Study:
        shape = self.shape
        return Study(recipe, self.card.target, shape=shape and (lambda layout: shape(recipe, layout)))

    def _choice(self, words: tuple[str, ...], study: Study, recomputed: int | None) -> Choice:
        made = study.plan(recomputed)
        facts, tokens = made.facts, [pair_tokens(pair, made.layout) for pair in made.shape.pairs]
        share = self.step_pairs * tokens[0] / sum(tokens)
        cost = share * (facts[FLOPS] + FETCHING * facts[MOVED]) + math.ceil(share) * UNPACKING * facts[UNPACKED]
        word = {None: "all", 0: "none"}.get(recomputed, str(recomputed))
        words = (f"memory.checkpointing={word}", *words) if words else ()
        return Choice(words, word, made, verdict(made, self.card) == FITS, share * facts[FLOPS], cost)
