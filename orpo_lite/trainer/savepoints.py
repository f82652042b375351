"""When a checkpoint is written."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

if TYPE_CHECKING:
    from orpo_lite.trainer.resuming import ResumingTrainer


class SavePoints(TrainerCallback):
    """When to save: also by the clock, and when a signal has asked to stop; after the evaluation that is due."""

    def __init__(self, trainer: ResumingTrainer):
        self.trainer = trainer
        self.saved_at, self.saved_step, self.deferred, self.stops = 0.0, -1, False, False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved_at, self.saved_step, self.deferred, self.stops = time.monotonic(), -1, False, False
        if self.trainer._resumed is not None:
            self.trainer._go_on()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ends_epoch = float(state.epoch).is_integer() or control.should_training_stop
        asked, due = self._agreed(args)
        self.trainer.ends = control.should_training_stop
        control.should_save |= asked or due
        control.should_training_stop |= asked
        self.stops = asked and not ends_epoch
        if control.should_save and ends_epoch:
            # the epoch's own evaluation and logs come first: a run gone on with would never make them
            control.should_save, self.deferred = False, True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.stopping.number is None:
            self.trainer.ends = control.should_training_stop
        if self.trainer.is_in_train and self._agreed(args)[0]:
            control.should_save = control.should_training_stop = True
            self.stops = not float(state.epoch or 0).is_integer()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stops:
            control.should_log = control.should_evaluate = False
            control.should_save = self.saved_step != state.global_step
        elif self.deferred:
            control.should_save, self.deferred = True, False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved_at, self.saved_step = time.monotonic(), state.global_step

    def _agreed(self, args: Any) -> tuple[bool, bool]:
        """Whether to stop, and whether the clock says to save, alike on all processes."""
        asked = self.trainer.stopping.number is not None
        minutes = args.save_minutes
        due = minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes
        if args.world_size > 1:
            asked, due = (self.trainer._total(torch.tensor([asked, due], device=args.device).int()) > 0).tolist()
            if asked and self.trainer.stopping.number is None:
                self.trainer.stopping.number = 15
        return asked, due
