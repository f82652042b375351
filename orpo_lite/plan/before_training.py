"""The plan that a run makes before it loads the model: for the lengths of its own pairs, and against the card in use."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np
import psutil
import torch

from orpo_lite.common.console import console, processes
from orpo_lite.common.errors import RequestError
from orpo_lite.common.text import counted, format_gb
from orpo_lite.data import Pairs, pair_lengths
from orpo_lite.plan.gpus import FITS, NOT, Card, Target, card_here, verdict
from orpo_lite.plan.predict import Plan
from orpo_lite.plan.search import Planner, Search, changed
from orpo_lite.plan.step import Shape, batch_sizes, evaluation_pairs, micro_batch, pair_tokens
from orpo_lite.recipe import DataSection, Recipe

logger = logging.getLogger(__name__)

OTHERS = 300_000_000
"""Bytes held by other programs from which on they are mentioned: less may be an error in the size of our own context."""


def plan_before_loading(
    recipe: Recipe, pairs: Lengths, device: torch.device, force: bool, command: str, asked: bool = True
) -> tuple[Recipe, Plan | None]:
    """Fit the recipe to the card in use, print its plan in a line, and refuse a run that cannot fit.

    Args:
        pairs: lengths of the run's pairs.
        force: start even a run that cannot fit.
        command: the command line that started the run, to which a remedy is added.
        asked: plan on the CPU too.

    Returns:
        The recipe as `fitted` returns it, and its plan, or None where the model cannot be planned.

    Raises:
        RequestError: it does not fit; the message says by how much, what else is on the card, and what would make it fit.
    """
    card, others = card_in_use(recipe, device) if device.type == "cuda" else (None, 0)
    planner = Planner(pairs.shape)
    try:
        recipe = fitted(recipe, card, planner)
        if card is None and not asked:
            return recipe, None
        made = planner(recipe, card.target if card else Target("cpu"))
    except Exception as error:  # a model that the meta run cannot follow may still train
        line = (str(error) or type(error).__name__).splitlines()[0]
        console.print(f"memory: no plan, because {line}; training continues without", markup=False, soft_wrap=True)
        return recipe, None
    words = verdict(made, card) if card else ""
    console.print(
        f"memory: planned {format_gb(made.needed, 2)}{f' of {card.gigabytes:.1f} GB' if card else ''} (tensors "
        f"{format_gb(made.peak, 2)}, fullest in the {made.fullest} phase){words and ', ' + words}; {made.shape.why}",
        soft_wrap=True,
    )
    free = psutil.virtual_memory().available
    if card and made.load_host > free:  # the base passes through it on its way to the card
        logger.warning(
            "loading takes about %s of the host's memory (partly an assumption), and %s are free: close other programs",
            format_gb(made.load_host),
            format_gb(free),
        )
    if not card or words != NOT:
        return recipe, made
    room, freed = f"{card.gigabytes:.1f} GB", ""
    if others > OTHERS:
        total = card.gigabytes + others / 1e9
        room += f" left of {total:.1f} GB, since {format_gb(others)} are held by other programs (nvidia-smi lists them)"
        if verdict(made, replace(card, gigabytes=total)) == FITS:
            freed = " It fits once those programs have ended."
    problem = (
        f"memory: {made.recipe} needs {format_gb(made.needed)}, and {card.name} has {room}: it would run out in the "
        f"{made.fullest} phase ({made.shape.why})"
    )
    if force:
        logger.warning("%s; starting anyway because of --force", problem)
        return recipe, made
    console.print("memory: looking for settings that fit")
    found = Search(recipe, card, planner).first_that_fits(shorten=True)
    remedy = "Nothing that was tried makes it fit: use a larger card or a smaller model"
    if found:
        remedy = f"With {format_gb(found.plan.needed)} it fits:\n  {command} {' '.join(found.words)}\n"
    raise RequestError(f"{problem}.{freed} {remedy}; or start anyway with --force")


def fitted(recipe: Recipe, card: Card | None, planner: Planner) -> Recipe:
    """Return a recipe with the fastest settings for a card; the optimizer step keeps its pairs and its gradients.

    Recipes without memory.gpu_gb or per_device_train_batch_size=auto are returned as they are, and so is any without a card.
    """
    size = recipe.memory.gpu_gb
    if not size and not recipe.plans_batches:
        return recipe
    asked = "training.per_device_train_batch_size=auto" if recipe.plans_batches else f"memory.gpu_gb={size:g}"
    instead = "micro-batches of one pair" if recipe.plans_batches else "the recipe's own settings"
    found = None
    if card and size and processes() > 1:  # which have to agree on their micro-batches, whatever each card holds
        card = replace(card, name=f"memory.gpu_gb={size:g}", gigabytes=size)
    if card is None:
        words = f"there is no GPU here; training with {instead}"
    elif processes() > 1 and not size:
        words = f"on several GPUs set memory.gpu_gb to the size of the smallest; training with {instead}"
    elif found := Search(recipe, card, planner).first_that_fits(shorten=False):
        words = f"{counted(found.pairs, 'pair')} of the longest at once, {found.layers} on {card.title} ({' '.join(found.words)})"
    else:
        words = f"nothing that was tried fits {card.title}; all layers checkpoint"
    console.print(f"{asked}: {words}", markup=False, soft_wrap=True)
    return found and changed(recipe, list(found.words)) or recipe


def card_in_use(recipe: Recipe, device: torch.device) -> tuple[Card, int]:
    """Return the card, as small as memory.gpu_gb says, and the bytes that other programs hold of it."""
    card, others = card_here(device)
    size = recipe.memory.gpu_gb
    if size and size < card.gigabytes:
        card = replace(card, name=f"memory.gpu_gb={size:g}", gigabytes=size)
    return card, others


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompt, chosen and rejected answer of each pair, (N, 3) int64."""

    train: np.ndarray
    held_out: np.ndarray

    @classmethod
    def of(cls, pairs: Pairs) -> Lengths:
        """Read the lengths of tokenized pairs."""

        def columns(rows: object) -> np.ndarray:
            found = pair_lengths(rows)  # type: ignore[arg-type]
            return np.stack([found[name] for name in ("prompt", "chosen", "rejected")], 1)

        held_out = columns(pairs.eval) if pairs.eval is not None else np.empty((0, 3), dtype=np.int64)
        return cls(columns(pairs.train), held_out)

    def shape(self, recipe: Recipe, layout: str) -> Shape:
        """Return the costliest micro-batch of training and of evaluation; the recipe's limit where no pair would remain."""
        train = self._kept(self.train, recipe.data)
        if not len(train):
            return micro_batch(recipe, layout)
        (size, steps), budget = batch_sizes(recipe), recipe.orpo.tokens_per_batch
        pairs = costliest(train, layout, size * steps if budget else size, budget)
        held_out = costliest(self._kept(self.held_out, recipe.data), layout, evaluation_pairs(recipe), None)
        prompt, *answers = pairs[0]
        return Shape(
            pairs,
            f"{len(pairs)} of the data's costliest pairs (prompt {prompt:,}, answers {answers[0]:,} and {answers[1]:,} tokens); "
            + (f"orpo.tokens_per_batch of {budget:,}" if budget else "training.per_device_train_batch_size"),
            held_out,
        )

    def _kept(self, pairs: np.ndarray, data: DataSection) -> np.ndarray:
        """Apply the data section's limits, which may be tighter than when the pairs were tokenized."""
        limit = data.max_length
        if limit is None:
            return pairs
        if data.overlong == "drop":
            return pairs[pairs[:, 0] + pairs[:, 1:].max(1) <= limit]
        prompt = np.minimum(pairs[:, :1], limit - 1)
        return np.concatenate([prompt, np.minimum(pairs[:, 1:], limit - prompt)], 1)


def costliest(pairs: np.ndarray, layout: str, count: int, budget: int | None) -> tuple[tuple[int, ...], ...]:
    """Return the costliest of some pairs (N, 3), the first one first: at most `count`, within the budget of tokens."""
    costs = [pair_tokens(pair, layout) for pair in pairs.tolist()]
    order = sorted(range(len(costs)), key=costs.__getitem__, reverse=True)
    taken, tokens = [], 0
    for i in order:
        if len(taken) == count:
            break
        # all are padded to the first, which is the longest
        cost = costs[order[0] if layout == "padded" else i]
        if budget is None or not taken or tokens + cost <= budget:
            taken.append(tuple(pairs[i].tolist()))
            tokens += cost
    return tuple(taken)
