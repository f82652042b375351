"""Held-out evaluation: base against adapter on the same pairs, with intervals and the length baseline."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from orpo_lite.common.console import console
from orpo_lite.evaluate.buckets import breakdown
from orpo_lite.recipe import RuleSection

if TYPE_CHECKING:
    from datasets import Dataset

    from orpo_lite.trainer.trainer import ORPOTrainer


def wilson_interval(successes: float, trials: int) -> tuple[float, float]:
    """95% score interval of a proportion (Wilson 1927): inside [0, 1], and usable at 0% and 100%."""
    if trials == 0:
        return 0.0, 1.0
    z, p = 1.959964, successes / trials
    middle, spread = p + z * z / (2 * trials), z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    return max(0.0, (middle - spread) / (1 + z * z / trials)), min(1.0, (middle + spread) / (1 + z * z / trials))


def length_baseline(pairs: Dataset) -> float:
    """Accuracy of always preferring the longer answer, in tokens; a tie counts half."""
    from orpo_lite.data import pair_lengths

    counted = pair_lengths(pairs)
    chosen, rejected = counted["chosen"], counted["rejected"]
    return float((chosen > rejected).sum() + (chosen == rejected).sum() / 2) / max(1, len(pairs))


def evaluate(trainer: ORPOTrainer, pairs: Dataset | None = None, sources: list[str] | None = None) -> dict[str, Any]:
    """Metrics of the model as it stands on the held-out pairs, by their plain names.

    Args:
        trainer: its `eval_dataset` is used where `pairs` is None.
        sources: the name of each pair's source.

    Returns:
        TRL's metrics, loss, rewards/accuracies_interval (95%, Wilson), accuracies of the length baseline, pairs, and
        under `by` what `buckets.breakdown` gives.
    """
    from orpo_lite.objective.metrics import COLUMNS

    held: Any = trainer.eval_dataset if pairs is None else pairs
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


def judge(samples: list[dict[str, str]], rule: RuleSection | None) -> dict[str, float] | None:
    """Return the shares of answers in the chosen and in the rejected style, by the recipe's rule."""
    if rule is None or not samples:
        return None
    shares = {}
    for style, pattern in (("chosen", rule.chosen), ("rejected", rule.rejected)):
        hits = [re.search(pattern, sample["answer"], re.IGNORECASE) is not None for sample in samples]
        shares[style] = sum(hits) / len(samples)
    return shares


@contextlib.contextmanager
def base_only(model: Any) -> Iterator[None]:
    """Switch the adapter off: the model is the base it was trained on."""
    with model.disable_adapter():
        yield


ROWS = {
    "rewards/accuracies": "reward accuracy",
    "rewards/margins": "reward margin",
    "log_odds_chosen": "log-odds ratio",
    "nll_loss": "NLL a token",
    "loss": "ORPO loss",
}


def show(before: dict[str, Any], after: dict[str, Any], names: tuple[str, str] = ("before", "after")) -> None:
    """Table of two evaluations of the same pairs."""
    show_sides(dict(zip(names, (before, after), strict=True)))


def show_sides(results: dict[str, dict[str, Any]]) -> None:
    """Table of evaluations of the same pairs, a column each."""
    from rich.table import Table

    first = next(iter(results.values()))
    title = f"{first['pairs']} held-out pairs"
    table = Table("held-out pairs", *results, box=None, title=title, title_justify="left")
    for key, label in ROWS.items():
        cells = []
        for result in results.values():
            if key == "rewards/accuracies":
                cells.append(share(result[key], result["rewards/accuracies_interval"]))
            else:
                cells.append(f"{result[key]:.4f}")
        table.add_row(label, *cells)
    table.add_row("always the longer answer", f"{first['length_baseline']:.1%}")
    console.print(table)


def share(value: float, interval: tuple[float, float]) -> str:
    """A proportion and its interval."""
    return f"{value:.1%} ({interval[0]:.1%} to {interval[1]:.1%})"


def __getattr__(name: str) -> Any:
    if name != "command":
        raise AttributeError(f"module 'orpo_lite.evaluate' has no attribute {name!r}")
    from orpo_lite.evaluate.__main__ import command

    return command
