"""Which metrics a report draws, and which of them together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orpo_lite.report.run_record import Told

BLUE, ORANGE, GREEN, RED, PURPLE, TEAL = range(6)
"""Places in the page's palette."""


@dataclass(frozen=True)
class Metric:
    key: str
    label: str
    colour: int = BLUE
    scale: Callable[[Told], float] = lambda run: 1.0
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    key: str
    title: str
    hint: str
    metrics: tuple[Metric, ...]
    form: Any = "g"
    unit: str = ""
    limits: tuple[float | None, float | None] = (None, None)


PANELS = (
    Panel("loss", "Loss", "ORPO loss = NLL + odds term. Both parts should fall; the odds term alone falling is a model that "
          "learns to reject without learning to answer.",
          (Metric("loss", "ORPO loss"), Metric("nll_loss", "NLL a token", ORANGE, dashed=True),
           Metric("log_odds_ratio", "odds term", GREEN, lambda run: -run.beta), Metric("aux_loss", "router loss", PURPLE))),
    Panel("rewards", "Rewards", "beta x mean log-prob of an answer. Rejected should fall away from chosen, and chosen not far with it.",
          (Metric("rewards/chosen", "chosen", GREEN), Metric("rewards/rejected", "rejected", RED, dashed=True))),
    Panel("margin", "Reward margin", "Chosen minus rejected: above 0 and growing where preferences are learned.",
          (Metric("rewards/margins", "margin"),)),
    Panel("accuracy", "Reward accuracy", "Share of pairs whose chosen answer is the likelier one; bars are 95% intervals of the "
          "held-out pairs.", (Metric("rewards/accuracies", "accuracy"),), "%", limits=(-0.03, 1.03)),
    Panel("log-odds", "Log-odds ratio", "Log of the odds of chosen over those of rejected, which the odds term pushes up.",
          (Metric("log_odds_chosen", "log-odds ratio"),)),
    Panel("learning-rate", "Learning rate", "", (Metric("learning_rate", "learning rate"),), limits=(0.0, None)),
    Panel("gradient-norm", "Gradient norm", "Before clipping. Spikes that do not come down again are a sign of too high a "
          "learning rate.", (Metric("grad_norm", "gradient norm"),), limits=(0.0, None)),
    Panel("tokens", "Tokens a second", "Tokens that the model computed, without evaluation.",
          (Metric("tokens_per_second", "tokens a second"),), limits=(0.0, None)),
    Panel("memory", "Peak memory", "Highest so far.", (Metric("peak_memory_gb", "peak memory"),), unit="GB", limits=(0.0, None)),
)  # fmt: skip
