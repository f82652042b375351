"""The ORPO objective as pure functions of log-probabilities (arXiv 2403.07691), float32 throughout."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LOG_HALF = -0.6931471805599453
LARGEST_LOGP = -1e-6
"""Upper clamp of mean log-probs, where log(1 - p) and its gradient are still finite in float32."""


def log1mexp(x: Tensor) -> Tensor:
    """Compute log(1 - exp(x)) for x <= 0, with finite value and gradient over [-1e4, 0].

    The argument is clamped before the branches: torch.where differentiates both, and the one not taken would
    otherwise put NaN into the gradient near 0.
    """
    x = x.clamp(max=LARGEST_LOGP)
    return torch.where(x > LOG_HALF, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def log_odds_ratio(chosen_logps: Tensor, rejected_logps: Tensor) -> Tensor:
    """Compute log(odds(chosen) / odds(rejected)), odds(p) = p / (1 - p): the argument of the sigmoid in eq. 7.

    Args:
        chosen_logps: mean log-prob of each chosen completion's tokens, (B,), any float dtype.
        rejected_logps: the same of the rejected completions, (B,).

    Returns:
        (B,) float32.
    """
    chosen, rejected = chosen_logps.float(), rejected_logps.float()
    return (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))


def orpo_loss(chosen_logps: Tensor, rejected_logps: Tensor, nll: Tensor, beta: float = 0.1) -> Tensor:
    """Compute the ORPO loss, eq. 6 and 7: nll - beta * mean(log sigmoid(log odds ratio)).

    Args:
        chosen_logps: mean log-prob of each chosen completion's tokens, (B,).
        rejected_logps: the same of the rejected completions, (B,).
        nll: negative log-likelihood of the chosen sequences, scalar.
        beta: weight of the odds-ratio term (lambda in the paper).

    Returns:
        float32 scalar.
    """
    return nll.float() - beta * F.logsigmoid(log_odds_ratio(chosen_logps, rejected_logps)).mean()


class PairStatistics(NamedTuple):
    """Statistics of a batch's label rows by pair; each (B,) float32."""

    chosen_logps: Tensor
    """Mean log-prob over the chosen completion's tokens."""
    rejected_logps: Tensor
    """Mean log-prob over the rejected completion's tokens."""
    nll_sum: Tensor
    """Negative log-likelihood summed over the labels in the NLL's scope."""
    nll_count: Tensor
    """Number of those labels."""
    chosen_logits: Tensor
    """Mean logit over the chosen completion's rows and the vocabulary, detached."""
    rejected_logits: Tensor
    """Mean logit over the rejected completion's rows and the vocabulary, detached."""


def sum_by_pair(values: Tensor, pair: Tensor, pairs: int) -> Tensor:
    """Sum values (N,) into their pairs (N,) -> (pairs,); rows with pair -1 count nowhere."""
    # -1 goes to a slot of its own: masking rows out would make the shape depend on data and stall a GPU
    slot = torch.where(pair < 0, pairs, pair)
    return values.new_zeros(pairs + 1).index_add(0, slot, values)[:pairs]


def pair_statistics(
    logps: Tensor, mean_logits: Tensor, chosen_pair: Tensor, rejected_pair: Tensor, nll_pair: Tensor, pairs: int
) -> PairStatistics:
    """Reduce label rows to pairs.

    Args:
        logps: log-prob of each label, (N,) float32.
        mean_logits: mean over the vocabulary of each row's logits, (N,) float32.
        chosen_pair: the pair whose chosen completion the row's label belongs to, or -1; (N,) int64.
        rejected_pair: the same for rejected completions; a row may count for both.
        nll_pair: the pair in whose NLL the row counts, or -1.
        pairs: B.
    """
    ones = torch.ones_like(logps)

    def mean(values: Tensor, pair: Tensor) -> Tensor:
        return sum_by_pair(values, pair, pairs) / sum_by_pair(ones, pair, pairs)

    return PairStatistics(
        chosen_logps=mean(logps, chosen_pair),
        rejected_logps=mean(logps, rejected_pair),
        nll_sum=-sum_by_pair(logps, nll_pair, pairs),
        nll_count=sum_by_pair(ones, nll_pair, pairs),
        chosen_logits=mean(mean_logits.detach(), chosen_pair),
        rejected_logits=mean(mean_logits.detach(), rejected_pair),
    )


def window_loss(stats: PairStatistics, beta: float, labels: Tensor | float, pairs: Tensor | float) -> Tensor:
    """Compute this micro-batch's share of the ORPO loss of a window of `labels` NLL labels and `pairs` pairs in all.

    The shares of all micro-batches and processes add up to `orpo_loss` of the window taken as one batch, so any
    split of the same pairs gives the same gradients.
    """
    odds = F.logsigmoid(log_odds_ratio(stats.chosen_logps, stats.rejected_logps))
    return stats.nll_sum.sum() / labels - beta * odds.sum() / pairs


def configured_loss(stats: PairStatistics, settings: Any, labels: Tensor | float, pairs: Tensor | float) -> Tensor:
    """Compute `window_loss` as an ORPOConfig says, in training, evaluation and plans: a variant is chosen here.

    Args:
        settings: an ORPOConfig, or any object with its `beta`.
    """
    return window_loss(stats, settings.beta, labels, pairs)
