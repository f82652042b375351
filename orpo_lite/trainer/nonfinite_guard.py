"""The check between loss and optimizer: a step that is not finite stops the run before it is taken."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from orpo_lite.trainer import health

if TYPE_CHECKING:
    from orpo_lite.trainer.trainer import ORPOTrainer


class NonFinite(FloatingPointError):
    """A loss or gradient that is NaN or infinite, found before the optimizer step."""


class NonFiniteGuard(TrainerCallback):
    """Finds a loss or gradient that is not finite before optimizer.step, and stops the run.

    The trainer calls `check_step` after the step's last backward pass: before clipping, since a NaN that is clipped is NaN
    everywhere.
    """

    def __init__(self, trainer: Any):
        self.trainer: ORPOTrainer = trainer
        self.sources: list[str] = []
        """Paths that the training pairs' `source` column counts."""
        self.overflows = 0
        """Steps that fp16's loss scaling left out to find its scale."""
        self.overflowed = False
        """True if the step in progress overflowed in fp16."""

    # ---- events of training ----------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.unchanged = health.Unchanged(self.trainer.model)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.overflowed:
            self.unchanged.stepped(state.global_step + 1, self.trainer.health, health.learning_rate(self.trainer))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.unchanged.stepped(state.global_step, self.trainer.health, 0.0, last=True)
        self.check_weights()

    # ---- checks ----------------------------------------------------------------------------------------------------

    def check_step(self) -> None:
        """Check losses and gradients of the step in progress, on all processes together.

        Raises:
            NonFinite: one is not finite; the message names the step, its rows and tensors.
        """
        trainer = self.trainer
        bad_loss, bad_gradient, some, loss = self._figures()
        # gradients are scaled so that they overflow now and then, and the scaler leaves such a step out by itself
        scaler = trainer.accelerator.scaler
        if bad_loss or (bad_gradient and (scaler is None or scaler.get_scale() < 1)):
            raise NonFinite(health.describe_step(trainer, health.locate_pairs(trainer, self.sources)))
        # counted here: fused optimizers leave the step out themselves, without a word to accelerate
        self.overflowed = bool(bad_gradient)
        self.overflows += self.overflowed
        if not bad_gradient:
            trainer.health.step(trainer.state.global_step + 1, loss / trainer.accelerator.num_processes, not some)

    def _figures(self) -> list[float]:
        """Reduce all that is decided on in one wait for the device: every process decides alike."""
        trainer, step = self.trainer, self.trainer.step_in_progress
        assert step is not None
        device, zero = trainer.args.device, torch.zeros((), device=trainer.args.device)
        losses = torch.stack([loss.to(device, torch.float32) for loss in step.losses]).sum() if step.losses else zero
        peak = health.largest([p.grad for p in trainer.model.parameters() if p.grad is not None], device)
        figures = [(~torch.isfinite(losses)).float(), (~torch.isfinite(peak)).float(), (peak > 0).float(), losses]
        return trainer.total(torch.stack(figures)).tolist()

    def check_weights(self) -> None:
        """Check weights before they are written: an update of finite gradients may have overflowed, unseen so far.

        Raises:
            NonFinite: a trained weight is not finite.
        """
        trainer = self.trainer
        wrong = health.not_finite(health.trained(trainer.model))
        if trainer.total(torch.tensor(float(bool(wrong)), device=trainer.args.device)).item():
            raise NonFinite(
                f"step {trainer.state.global_step}: trained weights are not finite after it ({wrong}), though loss and "
                "gradients were: the update itself overflowed. These weights are not written; try a lower "
                f"training.learning_rate (it is {trainer.args.learning_rate:g})"
            )
