"""Evaluate held-out pairs: base against adapter, with intervals, the length baseline, and results by group."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from orpo_lite.common.console import console
from orpo_lite.common.text import counted, measured
from orpo_lite.recipe import RuleSection

if TYPE_CHECKING:
    from datasets import Dataset

    from orpo_lite.trainer.trainer import ORPOTrainer

ROWS = {
    "rewards/accuracies": "reward accuracy",
    "rewards/margins": "reward margin",
    "log_odds_chosen": "log-odds ratio",
    "nll_loss": "NLL per token",
    "loss": "ORPO loss",
}
FEW = 20
"""Held-out pairs below which an accuracy is known to 20 points at best."""


def wilson_interval(successes: float, trials: int) -> tuple[float, float]:
    """Compute a proportion's 95% score interval (Wilson 1927): it stays inside [0, 1] and is usable at 0% and 100%."""
    if trials == 0:
        return 0.0, 1.0
    z, p = 1.959964, successes / trials
    middle, spread = p + z * z / (2 * trials), z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    return max(0.0, (middle - spread) / (1 + z * z / trials)), min(1.0, (middle + spread) / (1 + z * z / trials))


def sign_test(wins: int, losses: int) -> float:
    """Compute the two-sided p of a split at least as uneven under a fair coin, exactly."""
    n = wins + losses
    # the numbers of ways to choose 0, 1, ... of n, each from the one before it
    ways = accumulate(range(min(wins, losses)), lambda ways, k: ways * (n - k) // (k + 1), initial=1)
    return min(1.0, 2 * sum(ways) / 2**n)


def length_baseline(pairs: Dataset) -> float:
    """Compute the accuracy of always preferring the longer answer, in tokens; a tie counts half."""
    from orpo_lite.data import pair_lengths

    counted = pair_lengths(pairs)
    chosen, rejected = counted["chosen"], counted["rejected"]
    return float((chosen > rejected).sum() + (chosen == rejected).sum() / 2) / max(1, len(pairs))


def evaluate(trainer: ORPOTrainer, sources: list[str] | None = None) -> dict[str, Any]:
    """Evaluate the model as it stands on the held-out pairs of its trainer.

    Args:
        sources: the name of each pair's source.

    Returns:
        TRL's metrics without their prefix, loss, rewards/accuracies_interval (95%, Wilson), length_baseline (accuracy),
        pairs (how many), and under `by` the result of `breakdown`.
    """
    from orpo_lite.objective.metrics import COLUMNS

    held: Any = trainer.eval_dataset
    metrics = trainer.evaluate(held)
    count = len(held)
    named = {key.removeprefix("eval_"): value for key, value in metrics.items() if key.startswith("eval_")}
    skip = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    result: dict[str, Any] = {key: value for key, value in named.items() if key not in skip}
    result["rewards/accuracies_interval"] = wilson_interval(result["rewards/accuracies"] * count, count)
    result["length_baseline"] = length_baseline(held)
    result["pairs"] = count
    chosen, rejected = (trainer.predictions[:, COLUMNS.index(f"logps/{side}")] for side in ("chosen", "rejected"))
    result["by"] = breakdown(chosen, rejected, trainer.args.beta, held, sources)
    return result


def rule_shares(samples: list[dict[str, str]], rule: RuleSection | None) -> dict[str, float] | None:
    """Compute the shares of answers that match the recipe's rule for the chosen and for the rejected style."""
    if rule is None or not samples:
        return None

    def share(pattern: str) -> float:
        return sum(bool(re.search(pattern, sample["answer"], re.IGNORECASE)) for sample in samples) / len(samples)

    return {"chosen": share(rule.chosen), "rejected": share(rule.rejected)}


def breakdown(
    chosen: np.ndarray, rejected: np.ndarray, beta: float, pairs: Dataset, sources: list[str] | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Compute accuracy and margin by prompt length, by which answer is longer, and by source.

    Args:
        chosen: mean log-prob of each chosen completion, (N,).
        rejected: mean log-prob of each rejected completion, (N,).
        pairs: the tokenized pairs, in the same order.
        sources: the name of each pair's source.

    Returns:
        For each grouping (prompt_tokens, longer_answer, source) a list of {"bucket", "pairs", "accuracy", "interval"
        (95%, Wilson), "margin" (mean reward margin)}; every pair is in one bucket, and empty buckets are left out.
    """
    from orpo_lite.data import pair_lengths

    counted = pair_lengths(pairs)
    longer = np.sign(counted["chosen"] - counted["rejected"])
    words = {1: "chosen longer", 0: "equally long", -1: "chosen shorter"}
    groups = {
        "prompt_tokens": by_length(counted["prompt"]),
        "longer_answer": [(word, longer == sign) for sign, word in words.items()],
    }
    if sources is not None:
        names = np.array(sources, dtype=object)
        groups["source"] = [
            (name, names == name) for name in sorted(set(sources), key=lambda n: (-sources.count(n), n))
        ]
    right, margin = chosen > rejected, beta * (chosen - rejected)

    def bucket(name: str, mask: np.ndarray) -> dict[str, Any]:
        count, hits = int(mask.sum()), int(right[mask].sum())
        return {"bucket": name, "pairs": count, "accuracy": hits / count, "interval": wilson_interval(hits, count),
                "margin": float(margin[mask].mean())}  # fmt: skip

    return {group: [bucket(name, mask) for name, mask in parts if mask.any()] for group, parts in groups.items()}


def by_length(tokens: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Split pairs by the tokens of their prompts, at powers of two."""
    edges = 2 ** np.arange(4, 15)
    place = np.searchsorted(edges, tokens)
    names = [f"up to {edges[0]}", *(f"{low + 1} to {2 * low}" for low in edges[:-1]), f"{edges[-1] + 1} and more"]
    return [(name, place == number) for number, name in enumerate(names)]


def show(results: dict[str, dict[str, Any]], keys: Iterable[str] = ROWS, **more: Sequence[str]) -> None:
    """Print evaluations of the same pairs as a table, a column for each.

    Args:
        keys: the metrics to show.
        more: cells of further rows, by what stands before them.
    """
    from rich.markup import escape
    from rich.table import Table

    first = next(iter(results.values()))
    table = Table(counted(first["pairs"], "held-out pair"), *map(escape, results), box=None)
    for key in keys:
        table.add_row(ROWS[key], *(measured(result, key) for result in results.values()))
    if len({result["pairs"] for result in results.values()}) > 1:
        table.add_row("pairs", *(f"{result['pairs']:,}" for result in results.values()))
    table.add_row("always the longer answer", f"{first['length_baseline']:.1%}")
    for name, cells in more.items():
        table.add_row(name, *cells)
    console.print(table)


def too_few(held_out: int) -> str | None:
    """Say how little an accuracy on so many held-out pairs tells, where that is little; None for none or enough."""
    if not 0 < held_out < FEW:
        return None
    low, high = wilson_interval(round(0.75 * held_out), held_out)
    return (
        f"few held-out pairs ({held_out}): an accuracy of {round(0.75 * held_out) / held_out:.0%} means {low:.0%} to {high:.0%}; "
        "take more, by data.eval_fraction or a longer file in data.eval"
    )


def format_share(value: float, interval: tuple[float, float]) -> str:
    """Format a proportion and its interval as percentages."""
    return f"{value:.1%} ({interval[0]:.1%} to {interval[1]:.1%})"
