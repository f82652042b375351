"""TRL's metrics by TRL's names, as exact means over pairs whatever the micro-batches and processes."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from orpo_lite.objective.loss import PairStatistics, configured_loss, log_odds_ratio

COLUMNS = ("logits/chosen", "logits/rejected", "logps/chosen", "logps/rejected", "nll_sum", "nll_count", "aux_loss")
"""Columns of an evaluation's predictions, one row per pair; the first two are TRL's predictions."""


def metric_sums(stats: PairStatistics, aux: Tensor | None, beta: float, attention_mask: Tensor) -> dict[str, Tensor]:
    """Sum over the pairs of a batch, for `finish_metrics` to take means; all scalars."""
    chosen, rejected = stats.chosen_logps.detach(), stats.rejected_logps.detach()
    odds = log_odds_ratio(chosen, rejected)
    sums = {
        "rewards/chosen": beta * chosen,
        "rewards/rejected": beta * rejected,
        "rewards/accuracies": (chosen > rejected).float(),
        "rewards/margins": beta * (chosen - rejected),
        "logps/chosen": chosen,
        "logps/rejected": rejected,
        "logits/chosen": stats.chosen_logits,
        "logits/rejected": stats.rejected_logits,
        "log_odds_ratio": F.logsigmoid(odds),
        "log_odds_chosen": odds,
        "nll_sum": stats.nll_sum.detach(),
        "nll_count": stats.nll_count,
        "pairs": torch.ones_like(chosen),
    }
    if aux is not None:
        sums["aux_loss"] = aux.detach().float().expand(len(chosen))
    return {key: value.sum() for key, value in sums.items()} | {"tokens": attention_mask.sum() * bool(len(chosen))}


def finish_metrics(sums: dict[str, Any]) -> dict[str, float]:
    """Compute TRL's metrics by TRL's names: means over pairs, nll_loss over labels."""
    counts = {"nll_sum", "nll_count", "pairs", "tokens"}
    metrics = {key: float(value / sums["pairs"]) for key, value in sums.items() if key not in counts}
    return metrics | {"nll_loss": float(sums["nll_sum"] / sums["nll_count"])}


def pair_metrics(predictions: Tensor, settings: Any) -> dict[str, float]:
    """Compute metrics and loss of an evaluation's predictions, exact over all its pairs.

    Args:
        predictions: (N, len(COLUMNS)), any float dtype.
        settings: see `configured_loss`.
    """
    column = {name: predictions[:, i].double() for i, name in enumerate(COLUMNS)}
    stats = PairStatistics(column["logps/chosen"], column["logps/rejected"], column["nll_sum"], column["nll_count"],
                           column["logits/chosen"], column["logits/rejected"])  # fmt: skip
    sums = metric_sums(stats, None, settings.beta, torch.zeros(1))
    metrics = finish_metrics(sums) | {"aux_loss": column["aux_loss"].mean().item()}
    return metrics | {"loss": configured_loss(stats, settings, stats.nll_count.sum(), len(predictions)).item()}
