"""The fastest way to run a recipe's optimizer step on a card: searched over what changes memory and time, not the result.

Micro-batch, number of checkpointed layers and head chunk leave the loss and its gradients what they are, since the
pairs of an optimizer step stay. What a step costs is counted on the meta run: FLOPs, recomputation included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from orpo_lite.common.errors import RequestError
from orpo_lite.objective.head import auto_chunk
from orpo_lite.plan.allocations import FLOPS, HEAD, MOVED, UNPACKED
from orpo_lite.plan.fitted import fitted_name
from orpo_lite.plan.gpus import FITS, Card, verdict
from orpo_lite.plan.predict import Plan, Study, checkpointed_layers
from orpo_lite.plan.remedies import EIGHTHS, changed, shorter
from orpo_lite.plan.step import Shape, evaluation_pairs, pair_tokens
from orpo_lite.recipe import Recipe

UNPACKING = 450.0
"""ASSUMED. FLOPs in whose time a card unpacks a 4-bit weight: some 4.5 bytes through its memory, at about 100 FLOPs a byte,
which is what cards of the last years make of 16-bit products in practice."""
COMING_BACK = 1000.0
"""ASSUMED. FLOPs in whose time a byte comes back from the host, at 25 TFLOP/s and 25 GB/s; the way there costs nothing."""
Shaped = Callable[[Recipe, str], Shape]
WORTH = 1.02
"""Time by which a setting has to be the faster one to be taken before one that needs less memory."""
OFFLOAD = "memory.offload_activations=true"


@dataclass(frozen=True)
class Choice:
    """One way to run the optimizer step."""

    words: tuple[str, ...]
    """Overrides that make it of the recipe."""
    checkpointing: str
    """all, none, or how many layers."""
    plan: Plan
    fits: bool
    flops: float
    """Of an optimizer step of the longest pairs, recomputation included."""
    cost: float
    """The same, and in FLOPs what else takes time."""

    @property
    def pairs(self) -> int:
        """Of the longest ones, in a micro-batch."""
        return len(self.plan.shape.pairs)


@dataclass(frozen=True)
class Fit:
    """The fastest choice that fits, and what it was chosen from."""

    card: Card
    recipe: Recipe
    """With the choice's overrides, under a name of its own."""
    choice: Choice
    weighed: list[Choice]
    """What fits, the fastest first, then what does not."""
    before: Choice
    """The recipe as it stands."""


def fit(recipe: Recipe, card: Card, shape: Shaped | None = None, *, shorten: bool = True) -> Fit:
    """Find the fastest settings with which a recipe fits a card, margins included.

    Args:
        shape: the costliest micro-batch of a recipe in a layout; default, the largest that the recipe lets through.
        shorten: whether data.max_length may be cut.

    Tried in this order, each only where nothing before it fits: micro-batch, checkpointed layers and head chunk;
    activations offloaded to the host; a shorter data.max_length, the only one that changes what is trained on.

    Raises:
        RequestError: nothing that was tried fits.
    """
    search = Search(recipe, card, shape)
    before = search.as_it_stands()
    for words in search.stages(shorten):
        found = search.fastest(words)
        if found is not None:
            break
    else:
        least = min((choice.plan for choice in search.weighed), key=lambda made: made.needed)
        more = "" if shorten else ", or a shorter data.max_length"
        more += "" if recipe.model.quantization in ("nf4", "fp4") else ", or model.quantization=nf4"
        raise RequestError(
            f"--fit: {recipe.name} does not fit {card.title}: {least.needed / 1e9:.1f} GB are needed for "
            f"one pair of 2 x {sum(least.shape.pairs[0]):,} tokens, all layers checkpointed and offloaded; take a larger card or a "
            f"smaller model{more}"
        )
    fitted = changed(recipe, list(found.words))
    assert fitted is not None  # plans were made of it
    weighed = sorted(search.weighed, key=lambda choice: (not choice.fits, choice.cost))
    needs = f"{found.plan.needed / 1e9:.1f} GB of {card.title}, as planned"
    return Fit(
        card, fitted.model_copy(update={"name": fitted_name(recipe, card), "needs": needs}), found, weighed, before
    )


class Search:
    """Ways to run a recipe's optimizer step on a card, each planned once.

    Raises:
        RequestError: the recipe cannot be planned.
    """

    def __init__(self, recipe: Recipe, card: Card, shape: Shaped | None = None) -> None:
        self.recipe, self.card, self.shape = recipe, card, shape
        self.start = self._planned(recipe)
        training = recipe.training
        self.step_pairs = training.get("per_device_train_batch_size", 8) * training.get(
            "gradient_accumulation_steps", 1
        )
        self.weighed: list[Choice] = []
        self._studies: dict[tuple[str, ...], Study] = {}
        # a mean over a micro-batch, or what does not fill one left out: another micro-batch would be another training
        self._fixed = recipe.orpo.nll_mean == "micro" or bool(training.get("dataloader_drop_last"))

    def as_it_stands(self) -> Choice:
        """The recipe without a change."""
        return self._choice((), self.start, checkpointed_layers(self.recipe, self.card.target))

    def stages(self, shorten: bool) -> Iterator[tuple[str, ...]]:
        """Overrides to search the rest with, mildest first."""
        yield ()
        yield (OFFLOAD,)
        for eighths in EIGHTHS if shorten else ():
            yield (OFFLOAD, *shorter(self.recipe, eighths))

    def fastest(self, words: tuple[str, ...]) -> Choice | None:
        """The cheapest choice that fits with some overrides; what was tried is in `weighed`."""
        found = []
        for pairs in self._sizes():
            choice, missed = self.fewest_layers(pairs, words)
            if missed and self._head_would_do(missed):
                finer, _ = self.fewest_layers(pairs, (*words, self._finer_head()))
                choice = min((c for c in (choice, finer) if c), key=lambda c: c.cost, default=None)
            if choice is None:  # more pairs take more memory
                break
            found.append(choice)
        # costs as good as equal: fewer micro-batches, each of which starts as many kernels
        return min(found, key=lambda choice: (float(f"{choice.cost:.3g}"), -choice.pairs), default=None)

    def fewest_layers(self, pairs: int, words: tuple[str, ...]) -> tuple[Choice | None, Choice | None]:
        """A micro-batch of so many pairs with as few checkpointed layers as fit, and the next that no longer does."""
        words = (*self._batch(pairs, words), *words)
        study = self._study(words)
        most = self._choice(words, study, None)
        best, missed = (most, None) if most.fits else (None, most)
        if best:
            counts = [*([] if OFFLOAD in words else [0]), *study.counts]
            low, high = 0, len(counts)
            while low < high:  # memory falls with their number
                middle = (low + high) // 2
                choice = self._choice(words, study, counts[middle])
                if choice.fits:
                    best, high = choice, middle
                else:
                    missed, low = choice, middle + 1
            if most.cost <= WORTH * best.cost:  # the room is worth more
                best = most
        self.weighed.append(best or most)
        return best, missed

    def _head_would_do(self, missed: Choice) -> bool:
        """Whether what a choice takes too much is no more than its chunk of logits."""
        made = missed.plan
        return made.needed - self.card.gigabytes * 1e9 <= made.phases[made.fullest][HEAD]

    def _sizes(self) -> list[int]:
        """Pairs of a micro-batch that are tried."""
        if self._fixed:
            return [len(self.start.shape.pairs)]
        return sorted({math.ceil(self.step_pairs / 2**i) for i in range(self.step_pairs.bit_length() + 1)})

    def _batch(self, pairs: int, words: tuple[str, ...]) -> tuple[str, ...]:
        """Overrides for a micro-batch of so many of the longest pairs."""
        held_out = evaluation_pairs(self.recipe)
        cut = (f"training.per_device_eval_batch_size={pairs}",) if held_out > pairs else ()
        if self._fixed:
            return cut
        tokens = pair_tokens(self._study(words).shape.pairs[0], self.start.layout.name)
        return (f"orpo.tokens_per_batch={pairs * tokens}", *cut)

    def _finer_head(self) -> str:
        vocabulary = self.start.config.get_text_config(decoder=True).vocab_size
        return f"memory.head_chunk={auto_chunk(vocabulary) // 4}"

    def _study(self, words: tuple[str, ...]) -> Study:
        if words not in self._studies:
            trial = changed(self.recipe, ["memory.checkpointing=all", *words])
            if trial is None:
                raise RequestError(f"--fit: {' '.join(words)} does not go together with the rest of {self.recipe.name}")
            self._studies[words] = self._planned(trial)
        return self._studies[words]

    def _planned(self, recipe: Recipe) -> Study:
        shape = self.shape
        return Study(recipe, self.card.target, shape=shape and (lambda layout: shape(recipe, layout)))

    def _choice(self, words: tuple[str, ...], study: Study, recomputed: int | None) -> Choice:
        made = study.plan(recomputed)
        facts, tokens = made.facts, [pair_tokens(pair, made.layout) for pair in made.shape.pairs]
        share = self.step_pairs * tokens[0] / sum(tokens)
        cost = share * (facts[FLOPS] + COMING_BACK * facts[MOVED]) + math.ceil(share) * UNPACKING * facts[UNPACKED]
        word = {None: "all", 0: "none"}.get(recomputed, str(recomputed))
        words = (f"memory.checkpointing={word}", *words) if words else ()
        return Choice(words, word, made, verdict(made, self.card) == FITS, share * facts[FLOPS], cost)
