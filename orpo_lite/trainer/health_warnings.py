"""Warnings about a run whose numbers are finite and yet suspicious, each logged once and kept for run.json."""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from typing import Any

import numpy as np
from torch import nn

from orpo_lite.trainer.nonfinite_report import listed, local

logger = logging.getLogger(__name__)

LOW_LORA_LEARNING_RATE = 1e-5
HISTORY = 100
"""Number of steps that a loss is compared with."""
ENOUGH = 16
"""Number of steps before a median and its spread mean anything."""
BLOCK, BLOCKS = 8, 5
"""A trend is what all of BLOCKS successive means, each over BLOCK steps, follow."""
UNCHANGED_AFTER = 20
"""Optimizer steps, at a learning rate above 0, after which an unchanged adapter is no accident."""


class HealthWarnings:
    """The warnings of a run so far, and the figures of its last steps.

    Args:
        log: whether this process logs them; all processes keep them.
    """

    def __init__(self, log: bool = True):
        self.log = log
        self.warnings: list[dict[str, Any]] = []
        """One entry per warning: its kind, the optimizer step from 1 (0: before training), the message."""
        self.losses: deque[float] = deque(maxlen=HISTORY)
        self.trend: deque[tuple[float, float]] = deque(maxlen=BLOCK * BLOCKS)

    def warn(self, kind: str, step: int, words: str) -> None:
        """Log a warning, unless one of its kind has been logged, and keep it."""
        if any(one["kind"] == kind for one in self.warnings):
            return
        self.warnings.append({"kind": kind, "step": step, "message": words})
        if self.log:
            logger.warning("%s", words)

    def check_learning_rate(self, rate: float) -> None:
        """Check the learning rate of a LoRA adapter, before training."""
        if rate < LOW_LORA_LEARNING_RATE:
            self.warn(
                "low learning rate",
                0,
                f"learning_rate {rate:g} is low for LoRA, which usually wants 5e-5 to 5e-4: the adapter may hardly change; "
                "try training.learning_rate=1e-4",
            )

    def check_predictions(self, predictions: Any, dataset: Any, step: int) -> None:
        """Name held-out pairs whose log-probs are not finite; logged at each evaluation, kept once.

        Args:
            predictions: one row per pair, (N, len(metrics.COLUMNS)).
            dataset: the held-out pairs, in the same order.
            step: optimizer steps done.
        """
        wrong = np.flatnonzero(~np.isfinite(np.asarray(predictions, dtype=np.float64)).all(1)).tolist()
        if not wrong:
            return
        pairs = []
        for number in wrong:
            row = dataset[number]
            tokens = len(row["chosen_ids"]) + len(row["rejected_ids"])
            pairs.append({"row": int(row.get("row", -1)), "source": None, "number": number, "tokens": tokens})
        words = (
            f"held-out pairs at step {step}: the log-probs of {len(wrong)} of {len(predictions)} are not finite, and so is the "
            f"mean: {listed(pairs)}. Look at these rows, and try model.dtype=float32; training continues"
        )
        if self.log and any(one["kind"] == "held-out loss" for one in self.warnings):
            logger.warning("%s", words)
        self.warn("held-out loss", step, words)

    def step(self, step: int, loss: float, chosen: float, margin: float, zero_gradient: bool) -> None:
        """Check an optimizer step that is about to be taken.

        Args:
            loss: of the whole step.
            chosen: mean log-prob of its chosen answers' tokens.
            margin: that, less the same of the rejected answers.
            zero_gradient: every gradient is exactly 0.
        """
        if zero_gradient:
            self.warn(
                "zero gradient",
                step,
                f"step {step}: every gradient is exactly 0, so nothing is learned. If the loss is far above where it began, the "
                "weights were thrown out: try a lower training.learning_rate. Otherwise check whether the adapter's modules take part "
                "in the forward pass (adapter.target_modules) and, in fp16, whether gradients underflow (model.dtype=float32)",
            )
        self._spike(step, loss)
        self._collapse(step, chosen, margin)

    def _spike(self, step: int, loss: float) -> None:
        """Find one loss far out, or three in a row; by median and MAD, which a few odd batches do not move."""
        if len(self.losses) >= ENOUGH:
            *past, third, second = self.losses
            middle = statistics.median(past)
            spread = max(1.4826 * statistics.median(abs(x - middle) for x in past), 0.02 * abs(middle))
            far, running = middle + max(25 * spread, 1.5 * abs(middle)), middle + max(6 * spread, 0.3 * abs(middle))
            if loss > far or min(loss, second, third) > running:
                self.warn(
                    "loss spike",
                    step,
                    f"step {step}: the loss jumped to {loss:.4g}, where the median of the {len(past)} steps before is "
                    f"{middle:.4g}. If it stays there, try a lower training.learning_rate, more warm-up "
                    "(training.warmup_steps) or a smaller training.max_grad_norm; if it recurs with certain rows, look at those",
                )
        self.losses.append(loss)

    def _collapse(self, step: int, chosen: float, margin: float) -> None:
        """Find a margin that grows while the chosen answers themselves become less likely, block after block."""
        self.trend.append((chosen, margin))
        if len(self.trend) < BLOCK * BLOCKS:
            return
        blocks = [list(self.trend)[i * BLOCK : (i + 1) * BLOCK] for i in range(BLOCKS)]
        means = [tuple(statistics.fmean(x[i] for x in block) for i in (0, 1)) for block in blocks]
        noise = [
            math.sqrt(statistics.fmean(statistics.variance(x[i] for x in block) for block in blocks) * 2 / BLOCK)
            for i in (0, 1)
        ]
        falls = all(b[0] < a[0] for a, b in zip(means, means[1:], strict=False))
        grows = all(b[1] > a[1] for a, b in zip(means, means[1:], strict=False))
        fall, growth = means[0][0] - means[-1][0], means[-1][1] - means[0][1]
        # beyond the noise of the blocks' means, and enough to matter: 0.1 is a tenth of the tokens' probability
        if falls and grows and fall > max(4 * noise[0], 0.1) and growth > max(4 * noise[1], 0.1):
            self.warn(
                "rewards collapsing",
                step,
                f"step {step}: over the last {BLOCK * BLOCKS} steps the chosen answers' mean log-prob fell from "
                f"{means[0][0]:.3f} to {means[-1][0]:.3f} while the margin grew from {means[0][1]:.3f} to {means[-1][1]:.3f}: "
                "the model unlearns the rejected answers and the chosen ones along with them. Try a smaller orpo.beta or "
                "training.learning_rate, fewer epochs, or orpo.nll_scope=prompt+chosen",
            )


class Unchanged:
    """Finds an adapter that training leaves as it was: sums of what is trained, at the start and later.

    Of LoRA only B is compared: it starts at 0, so that no update of it is rounded away unseen.
    """

    def __init__(self, model: nn.Module):
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.parameters = [p for name, p in trained if "lora_B" in name] or [p for _, p in trained]
        self.before = self.sums()
        self.steps = 0

    def sums(self) -> list[tuple[float, float]]:
        # of absolute values too: an antisymmetric change has a sum of 0
        values = [local(p).detach().double() for p in self.parameters]
        return [(float(one.sum()), float(one.abs().sum())) for one in values]

    def stepped(self, step: int, health: HealthWarnings, learning_rate: float, last: bool = False) -> None:
        """Compare after an optimizer step that was taken, or (`last`) after all of them."""
        if not last:
            self.steps += learning_rate > 0
        if (self.steps if last else self.steps == UNCHANGED_AFTER) and self.parameters and self.sums() == self.before:
            health.warn(
                "adapter unchanged",
                step,
                f"step {step}: after {self.steps} optimizer steps the trained weights are bit for bit what they were: updates "
                "are rounded away or never made. Try a higher training.learning_rate, check adapter.target_modules, and "
                "train in float32 (trainable parameters in 16 bits lose small updates)",
            )
