"""DeepSpeed, and what it and FSDP2 want set up before training and before an evaluation."""

from __future__ import annotations

import contextlib
import copy
import math
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from orpo_lite.common.errors import RequestError
from orpo_lite.model import autocast
from orpo_lite.trainer.distributed import reshard, zero_stage

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def zero_stage_asked(settings: Any = None) -> int | None:
    """Return the stage that a recipe's `training.deepspeed` or the launcher asks for; None without DeepSpeed.

    Args:
        settings: DeepSpeed's settings in the recipe, or a file of them.

    Raises:
        RequestError: there is no such file, or it does not hold DeepSpeed's settings.
    """
    by_launcher = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if not settings and not by_launcher:
        return None
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    asked = settings or (file if file != "none" else None)
    if asked is None:
        return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2))
    from accelerate.utils.deepspeed import HfDeepSpeedConfig

    name = "training.deepspeed" if settings else "deepspeed_config_file"
    try:
        return int(HfDeepSpeedConfig(asked).get_value("zero_optimization.stage", 0) or 0)
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise RequestError(
            f"{name}: found {asked!r}, expected DeepSpeed's settings or a JSON file of them "
            f"({' '.join(str(error).split())[:200]})"
        ) from None


def partition(model: nn.Module, config: dict[str, Any], device: torch.device) -> None:
    """Cut all weights into ZeRO-3's shares, one after the other, from wherever they are.

    DeepSpeed's engine would first move the whole model to the card. What else it does to a whole model is done here:
    numbers get the dtype of its mixed precision, buffers go to the card. 4-bit weights stay as they are packed.

    Args:
        config: DeepSpeed's settings.
        device: this process's card.
    """
    from deepspeed.runtime.zero import Init  # pyright: ignore[reportMissingImports]

    halves = {name: config[name] for name in HALF if config.get(name, {}).get("enabled")}
    for parameter in model.parameters():
        packed = getattr(parameter, "quant_state", None) is not None
        if halves and parameter.is_floating_point() and not packed and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(HALF[next(iter(halves))])
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    zero = {name: value for name, value in config["zero_optimization"].items() if value != "auto"}
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero} | halves
    Init(module=model, config_dict_or_path=settings)


class EvaluationEngine:
    """An engine of ZeRO-3 without an optimizer, between a trainer's first evaluation and its training."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.config = trainer, trainer.accelerator.state.deepspeed_plugin.deepspeed_config
        self.before = copy.deepcopy(self.config)

    def end(self) -> None:
        """Make room for the engine that trains, with the settings that transformers takes away to evaluate."""
        trainer, accelerator = self.trainer, self.trainer.accelerator
        if trainer.deepspeed is not None:
            trainer.deepspeed.destroy()
            for module in trainer.model.modules():
                # DeepSpeed (0.19) leaves these, and the next engine would take weights for gathered that this one has released
                for left in ("pre_bwd_fn", "post_bwd_fn"):
                    module.__dict__.pop(left, None)
        trainer.deepspeed, trainer.model_wrapped = None, trainer.model
        accelerator.deepspeed_engine_wrapped = None
        accelerator._models.clear()
        self.config.clear()
        self.config.update(self.before)


# ---- what FSDP2 and DeepSpeed want set up before training and evaluation -----------------------------------------------


def prepare_to_train(trainer: Any) -> None:
    """Get a model ready for the engine that trains it, also after an evaluation."""
    reshard(trainer.model)
    if trainer.args.world_size > 1:
        # an evaluation before training leaves this mark, on which transformers 5.23 takes the model for one that DDP
        # wraps already: the processes would train apart
        trainer.model._is_accelerate_prepared = False
    if trainer.engine_to_evaluate is not None:
        trainer.engine_to_evaluate.end()
        trainer.engine_to_evaluate = None
    if trainer.is_deepspeed_enabled:
        set_sizes(trainer)


def ready_to_evaluate(trainer: Any) -> contextlib.AbstractContextManager[object]:
    """Get a model ready to evaluate where `train` has not set the engine up yet."""
    if trainer.accelerator.is_fsdp2 and not isinstance(trainer.model, FSDPModule):
        # accelerate shards a model together with its optimizer only, which transformers does not give it here
        trainer.create_optimizer()
        trainer.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.model_wrapped = trainer.model
        register_fsdp_forward_method(trainer.model, "generate")
    if not trainer.is_deepspeed_enabled or trainer.deepspeed is not None:
        return contextlib.nullcontext()
    if zero_stage(trainer.accelerator) == 3:
        set_sizes(trainer)
        trainer.engine_to_evaluate = EvaluationEngine(trainer)
        return contextlib.nullcontext()
    return without_engine(trainer)


@contextlib.contextmanager
def without_engine(trainer: Any) -> Iterator[None]:
    """Evaluate below ZeRO-3 without an engine: every process holds the model whole, and DeepSpeed has none that only evaluates."""
    trainer.is_deepspeed_enabled = False
    try:
        with autocast(trainer.unwrapped()):
            yield
    finally:
        trainer.is_deepspeed_enabled = True
        trainer.accelerator._models.clear()  # it would not set the engine up for a model that it knows


def set_sizes(trainer: Any) -> None:
    """Set the sizes in DeepSpeed's settings, and under ZeRO-3 cut the weights into shares."""
    # an item of the loader is a step of several passes, for whose gradients DeepSpeed keeps room only if it knows; it
    # divides by none of these numbers
    config = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
    sizes = {
        "train_micro_batch_size_per_gpu": trainer.args.per_device_train_batch_size,
        "gradient_accumulation_steps": 2,
    }
    trainer.accelerator.gradient_accumulation_steps = 2  # it would set it by the config, and warn
    config |= sizes | {"train_batch_size": math.prod(sizes.values()) * trainer.args.world_size}
    if zero_stage(trainer.accelerator) == 3:
        partition(trainer.model, config, trainer.args.device)
