"""The fastest settings with which a recipe fits a card.

Micro-batch and number of checkpointed layers leave the loss and its gradients unchanged, since an optimizer
step keeps its pairs. The cost of a step is counted on the meta run: FLOPs, recomputation included.
"""

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

from orpo_lite.common.console import progress
from orpo_lite.common.errors import RequestError
from orpo_lite.plan.allocations import FLOPS, LAUNCHED, MOVED, UNPACKED
from orpo_lite.plan.gpus import FITS, NOT, Card, Target, verdict
from orpo_lite.plan.predict import Plan, Study
from orpo_lite.plan.step import Shape, batch_sizes, evaluation_pairs, pair_tokens
from orpo_lite.recipe import Recipe
from orpo_lite.recipe.loading import apply_override
from orpo_lite.trainer.config_from_recipe import checkpointed

OFFLOAD = "memory.offload_activations=true"
UNPACKING = 450.0
"""ASSUMED. FLOPs that a card could do while it unpacks a 4-bit weight: some 4.5 bytes through its memory, at the 100 FLOPs
per byte that recent cards reach in 16-bit products in practice."""
FETCHING = 1000.0
"""ASSUMED. FLOPs that a card could do while it fetches a byte from the host, at 25 TFLOP/s and 25 GB/s; sending it there
is not counted."""
LAUNCHING = 2e8
"""ASSUMED. FLOPs that a card could do while the host launches a kernel, at 25 TFLOP/s and 8 microseconds with autograd: a step
is bound by its launches where they take longer than its work."""
WORTH = 1.02
"""A setting has to be faster by this factor to be preferred to one that needs less memory."""


class Planner:
    """Plans of recipes that differ in some fields; what two of them have in common is traced once."""

    def __init__(self, shape: Callable[[Recipe, str], Shape] | None = None) -> None:
        self.shape = shape
        self._studies: dict[tuple[str, Target], Study] = {}

    @progress("planning")
    def __call__(self, recipe: Recipe, target: Target) -> Plan:
        """Plan a recipe as it stands.

        Raises:
            RequestError: the model's configuration is not available, or the recipe cannot be planned.
        """
        return self.study(recipe, target).plan(checkpointed(recipe, target.device))

    def study(self, recipe: Recipe, target: Target) -> Study:
        """Return the study of a recipe, which plans any number of checkpointed layers."""
        key = recipe.model_dump_json(exclude={"memory": {"checkpointing"}}), target
        if key not in self._studies:
            self._studies[key] = Study(recipe, target, self.shape)
        return self._studies[key]


def changed(recipe: Recipe, words: list[str]) -> Recipe | None:
    """Apply overrides to a recipe; None where they conflict with the rest of it."""
    content = recipe.model_dump(mode="json")
    for word in words:
        apply_override(content, word)
    try:
        return Recipe.parse(content)
    except RequestError:
        return None


@dataclass(frozen=True)
class Choice:
    """One way to run the optimizer step."""

    words: tuple[str, ...]
    """Its overrides of the recipe."""
    checkpointing: str
    """all, none, or the number of layers."""
    plan: Plan
    fits: bool
    cost: float
    """FLOPs of an optimizer step of the longest pairs, recomputation included; whatever else takes time is converted."""

    @property
    def pairs(self) -> int:
        """Longest pairs in a micro-batch."""
        return len(self.plan.shape.pairs)

    @property
    def layers(self) -> str:
        """Say how many layers are checkpointed."""
        one = {"all": "all layers", "none": "no layer", "1": "1 layer"}
        return f"{one.get(self.checkpointing, f'{self.checkpointing} layers')} checkpointed"


@dataclass(frozen=True)
class Verdict:
    """The verdict on a recipe and a card, and what would make it fit."""

    card: Card
    plan: Plan
    words: str
    remedy: Choice | None = None
    """Settings that fit, where the recipe does not; None if nothing that was tried does."""
    chosen: Choice | None = None
    """Settings of a recipe that leaves its micro-batches to the plan."""


@progress("planning")
def judge(recipe: Recipe, card: Card, planner: Planner) -> Verdict:
    """Plan a recipe for a card; where it does not fit, look for overrides with which it does.

    A recipe that leaves its micro-batches to the plan is judged as it would be trained on this card.
    """
    search = Search(recipe, card, planner)
    chosen = search.first_that_fits(shorten=False) if recipe.plans_batches else None
    made = chosen.plan if chosen else planner(recipe, card.target)
    words = verdict(made, card)
    return Verdict(card, made, words, search.first_that_fits(shorten=True) if words == NOT else None, chosen)


class Search:
    """Ways to run a recipe's optimizer step on a card.

    Raises:
        RequestError: the recipe cannot be planned.
    """

    def __init__(self, recipe: Recipe, card: Card, planner: Planner) -> None:
        self.recipe, self.card, self.planner = recipe, card, planner
        self.start = planner.study(recipe, card.target)
        self.step_pairs = math.prod(batch_sizes(recipe))
        self.tried: list[Choice] = []
        # means per micro-batch, or incomplete ones dropped: another micro-batch would train something else
        self._fixed = recipe.orpo.nll_mean == "micro" or bool(recipe.training.get("dataloader_drop_last"))
        # what a recipe gives beside `auto` stays
        self._fixed |= recipe.plans_batches and recipe.orpo.tokens_per_batch is not None
        self._layers_stay = recipe.plans_batches and recipe.memory.checkpointing != "auto"

    @progress("looking for settings that fit")
    def first_that_fits(self, shorten: bool) -> Choice | None:
        """Return the fastest choice with the mildest changes that make the recipe fit; None if none do.

        Each of these is tried only where nothing before it fits: micro-batch and checkpointed layers; activations offloaded
        to the host; 4-bit weights; a shorter data.max_length, the only one that changes what is trained on.

        Args:
            shorten: the last two may be tried.
        """
        stages: list[tuple[str, ...]] = [(), (OFFLOAD,)]
        if shorten:
            four_bits = (OFFLOAD, "model.quantization=nf4")
            if self.recipe.adapter and self.recipe.model.quantization == "none" and self._applied(four_bits):
                stages.append(four_bits)
            stages += [(*stages[-1], *shorter(self.recipe, eighths)) for eighths in range(7, 0, -1)]
        return next(filter(None, map(self.fastest, filter(self._applied, stages))), None)

    def fastest(self, words: tuple[str, ...]) -> Choice | None:
        """Return the cheapest choice that fits with some overrides; everything tried is added to `tried`."""
        sizes = {math.ceil(self.step_pairs / 2**i) for i in range(self.step_pairs.bit_length() + 1)}
        found = []
        for pairs in [len(self.start.shape.pairs)] if self._fixed else sorted(sizes):
            choice = self.fewest_layers(pairs, words)
            self.tried.append(choice)
            if not choice.fits:  # more pairs need more memory
                break
            found.append(choice)
        # at practically equal cost, fewer micro-batches: each launches as many kernels
        return min(found, key=lambda choice: (float(f"{choice.cost:.3g}"), -choice.pairs), default=None)

    def fewest_layers(self, pairs: int, words: tuple[str, ...]) -> Choice:
        """Return a micro-batch of so many pairs with the fewest checkpointed layers that fit; with all if none does."""
        words = (*self._batch(pairs, words), *words)
        study = self._study(words)
        if self._layers_stay:
            return self.choice(words, study, checkpointed(self.recipe, self.card.target.device))
        most = self.choice(words, study, None)
        if not most.fits:
            return most
        counts = [*([] if OFFLOAD in words else [0]), *study.counts]
        # memory falls with their number
        fewest = bisect_left(counts, True, key=lambda count: self.choice(words, study, count).fits)
        best = self.choice(words, study, counts[fewest]) if fewest < len(counts) else most
        return most if most.cost <= WORTH * best.cost else best

    def _batch(self, pairs: int, words: tuple[str, ...]) -> tuple[str, ...]:
        """Return the overrides for a micro-batch of so many of the longest pairs."""
        cut = (f"training.per_device_eval_batch_size={pairs}",) if evaluation_pairs(self.recipe) > pairs else ()
        if self._fixed:
            return cut
        tokens = pair_tokens(self._study(words).shape.pairs[0], self.start.layout.name)
        return (f"orpo.tokens_per_batch={pairs * tokens}", *cut)

    def _applied(self, words: tuple[str, ...]) -> Recipe | None:
        return changed(self.recipe, ["memory.checkpointing=all", *words])

    def _study(self, words: tuple[str, ...]) -> Study:
        trial = self._applied(words)
        assert trial is not None  # `first_that_fits` leaves out what conflicts
        return self.planner.study(trial, self.card.target)

    def choice(self, words: tuple[str, ...], study: Study, recomputed: int | None) -> Choice:
        """Plan a study with some layers checkpointed, and count what its optimizer step costs."""
        made = study.plan(recomputed)
        facts, tokens = made.facts, [pair_tokens(pair, made.layout) for pair in made.shape.pairs]
        share = self.step_pairs * tokens[0] / sum(tokens)
        work = share * (facts[FLOPS] + FETCHING * facts[MOVED]) + math.ceil(share) * UNPACKING * facts[UNPACKED]
        cost = max(work, math.ceil(share) * LAUNCHING * facts[LAUNCHED])
        word = {None: "all", 0: "none"}.get(recomputed, str(recomputed))
        words = (f"memory.checkpointing={word}", *words) if words else ()
        return Choice(words, word, made, verdict(made, self.card) == FITS, cost)


def shorter(recipe: Recipe, eighths: int) -> tuple[str, ...]:
    """Cut max_length, and max_prompt_length where it would no longer leave room for an answer."""
    length = max(8, (recipe.data.max_length or 512) * eighths // 8)
    prompt = recipe.data.max_prompt_length
    cut = (f"data.max_prompt_length={length // 2}",) if prompt and prompt > length // 2 else ()
    return (f"data.max_length={length}", *cut)
