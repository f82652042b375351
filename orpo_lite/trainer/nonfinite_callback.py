"""What the watching trainer learns from transformers' callbacks: when training begins, steps, saves and ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from orpo_lite.trainer.health_warnings import Unchanged

if TYPE_CHECKING:
    from orpo_lite.trainer.nonfinite_guard import WatchingTrainer


class Eyes(TrainerCallback):
    """What transformers tells callbacks only."""

    def __init__(self, trainer: WatchingTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer._logged_at = trainer._began_at = state.global_step
        trainer._in_a_row = 0
        self.unchanged = Unchanged(trainer.model)
        optimizer = kwargs.get("optimizer")
        self.hook = None
        if optimizer is not None and not trainer._inside:
            inner = getattr(optimizer, "optimizer", optimizer)
            self.hook = inner.register_step_pre_hook(self.look_again)

    def look_again(self, *_: Any) -> None:
        """Before the optimizer's own step: callbacks may have changed gradients since they were looked at."""
        callbacks = self.trainer.callback_handler.callbacks
        if any(type(one).on_pre_optimizer_step is not TrainerCallback.on_pre_optimizer_step for one in callbacks):
            self.trainer.look(again=True)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if trainer._left_out or trainer._overflowed:
            return
        self.unchanged.stepped(state.global_step + 1, trainer.alarms, float(trainer._get_learning_rate()))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.hook is not None:
            self.hook.remove()
        self.unchanged.stepped(state.global_step, self.trainer.alarms, 0.0, last=True)
        self.trainer.check_weights()
