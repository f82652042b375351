"""Training and evaluation under FSDP2 and DeepSpeed: what these want set up before, and taken away after."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from orpo_lite.model import autocast
from orpo_lite.trainer import zero_states
from orpo_lite.trainer.deepspeed import Evaluating, partition
from orpo_lite.trainer.distributed import reshard, zero_stage
from orpo_lite.trainer.resuming import ResumingTrainer


class EngineTrainer(ResumingTrainer):
    """Evaluates before training too, whichever engine trains afterwards."""

    _evaluating: Evaluating | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        reshard(self.model)
        if self.args.world_size > 1:
            # an evaluation before training leaves this mark, on which transformers 5.23 takes the model for one that DDP
            # wraps already: the processes would train apart
            self.model._is_accelerate_prepared = False
        return super().train(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self._before_training():
            metrics = super().evaluate(*args, **kwargs)
        reshard(self.model)
        return metrics

    def _before_training(self) -> contextlib.AbstractContextManager[object]:
        """Ready to evaluate where `train` has not set the engine up yet."""
        if self.accelerator.is_fsdp2 and not isinstance(self.model, FSDPModule):
            # accelerate shards a model together with its optimizer only, which transformers does not give it here
            self.create_optimizer()
            self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
            self.model_wrapped = self.model
            register_fsdp_forward_method(self.model, "generate")
        if not self.is_deepspeed_enabled or self.deepspeed is not None:
            return contextlib.nullcontext()
        if zero_stage(self.accelerator) == 3:
            self._ready_deepspeed()
            self._evaluating = Evaluating(self)
            return contextlib.nullcontext()
        return self._without_engine()

    @contextlib.contextmanager
    def _without_engine(self) -> Iterator[None]:
        """Below ZeRO-3 every process holds the model whole, and DeepSpeed has no engine that evaluates only."""
        self.is_deepspeed_enabled = False
        try:
            with autocast(self.unwrapped()):
                yield
        finally:
            self.is_deepspeed_enabled = True
            self.accelerator._models.clear()  # it would not set the engine up for a model that it knows

    def _ready_deepspeed(self) -> None:
        """The sizes that DeepSpeed is told, and under ZeRO-3 the shares."""
        # an item of the loader is a step of several passes, of which DeepSpeed keeps room for their gradients only if told;
        # it divides by none of these numbers
        plugin: Any = self.accelerator.state.deepspeed_plugin
        config = plugin.deepspeed_config
        sizes = {
            "train_micro_batch_size_per_gpu": self.args.per_device_train_batch_size,
            "gradient_accumulation_steps": 2,
        }
        self.accelerator.gradient_accumulation_steps = 2  # it would set it by the config, and warn
        config |= sizes | {"train_batch_size": math.prod(sizes.values()) * self.args.world_size}
        if zero_stage(self.accelerator) == 3:
            partition(self.model, config, self.args.device)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if self._evaluating is not None:
            self._evaluating.end()
            self._evaluating = None
        if self.is_deepspeed_enabled:
            self._ready_deepspeed()
        if resume_from_checkpoint is None or not self._cut_for_another(resume_from_checkpoint):
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        zero_states.restore(self.deepspeed, Path(resume_from_checkpoint) / zero_states.WHOLE)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is not None and self._cut_for_another(best):
            zero_states.restore(self.deepspeed, Path(best) / zero_states.WHOLE)
        else:
            super()._load_best_model()

    def _cut_for_another(self, checkpoint: str) -> bool:
        """Whether its states of DeepSpeed are those of another number of processes, so that only the whole ones help."""
        return self.is_deepspeed_enabled and zero_states.cut_for_another(Path(checkpoint), self.args.world_size)
