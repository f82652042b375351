"""The largest micro-batch that a run's own pairs can make, in place of the largest that its recipe lets through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from orpo_lite.data import pair_lengths
from orpo_lite.plan.step import Shape, evaluation_pairs, micro_batch
from orpo_lite.recipe import DataSection, Recipe

if TYPE_CHECKING:
    from orpo_lite.data import Pairs


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompt, chosen and rejected answer of each pair, (N, 3) int64."""

    train: np.ndarray
    held_out: np.ndarray
    encoder_decoder: bool = False

    @classmethod
    def of(cls, pairs: Pairs, encoder_decoder: bool) -> Lengths:
        def columns(rows: object) -> np.ndarray:
            found = pair_lengths(rows)  # type: ignore[arg-type]
            return np.stack([found[name] for name in ("prompt", "chosen", "rejected")], 1)

        held_out = columns(pairs.eval) if pairs.eval is not None else np.empty((0, 3), dtype=np.int64)
        return cls(columns(pairs.train), held_out, encoder_decoder)

    def shape(self, recipe: Recipe, layout: str) -> Shape:
        """The costliest micro-batch of training and of evaluation; the recipe's own limit where no pair would be left."""
        train = self._let_through(self.train, recipe.data)
        if not len(train):
            return micro_batch(recipe, layout, self.encoder_decoder)
        size, budget = recipe.training.get("per_device_train_batch_size", 8), recipe.orpo.tokens_per_batch
        if budget:
            size *= recipe.training.get("gradient_accumulation_steps", 1)
        pairs = worst(train, layout, size, budget)
        held_out = worst(self._let_through(self.held_out, recipe.data), layout, evaluation_pairs(recipe), None)
        prompt, *answers = pairs[0]
        return Shape(
            pairs,
            f"{len(pairs)} of the data's costliest pairs (prompt {prompt:,}, answers {answers[0]:,} and {answers[1]:,} tokens); "
            + (f"orpo.tokens_per_batch of {budget:,}" if budget else "training.per_device_train_batch_size"),
            held_out,
        )

    def _let_through(self, pairs: np.ndarray, data: DataSection) -> np.ndarray:
        """The pairs as the data section's lengths leave them, which may be tighter than when they were tokenised."""
        limit = data.max_length
        if limit is None or self.encoder_decoder:
            return pairs
        if data.overlong == "drop":
            return pairs[pairs[:, 0] + pairs[:, 1:].max(1) <= limit]
        prompt = np.minimum(pairs[:, :1], limit - 1)
        return np.concatenate([prompt, np.minimum(pairs[:, 1:], limit - prompt)], 1)


def worst(pairs: np.ndarray, layout: str, count: int, budget: int | None) -> tuple[tuple[int, ...], ...]:
    """The costliest of some pairs (N, 3), the costliest first: at most `count`, and the budget's tokens if that is set."""
    prompt, chosen, rejected = pairs.T
    costs = {
        "padded": 2 * (prompt + np.maximum(chosen, rejected)),
        "packed": 2 * prompt + chosen + rejected,
        "shared": prompt + chosen + rejected,
    }[layout]
    order = np.argsort(-costs, kind="stable")
    taken, tokens = [], 0
    for i in order.tolist():
        if len(taken) == count:
            break
        # padded to the first, which is the longest
        cost = int(costs[order[0] if layout == "padded" else i])
        if budget is None or not taken or tokens + cost <= budget:
            taken.append(tuple(pairs[i].tolist()))
            tokens += cost
    return tuple(taken)
