"""DeepSpeed's ZeRO-3: weights that are cut into shares one after the other, and an engine to evaluate with before training."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import nn

from orpo_lite.common.errors import RequestError

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def zero_stage_asked(settings: Any = None) -> int | None:
    """The stage that a recipe's `training.deepspeed` or the launcher asks for; None without DeepSpeed.

    Args:
        settings: of the recipe: DeepSpeed's own, or a file of them.

    Raises:
        RequestError: there is no such file, or it is none of DeepSpeed's.
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

    DeepSpeed's engine would first move the whole model to the card. What it does else to a whole model is done here:
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


class Evaluating:
    """An engine of ZeRO-3 that has no optimizer, between a trainer's first evaluation and its training."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.config = trainer, trainer.accelerator.state.deepspeed_plugin.deepspeed_config
        self.before = copy.deepcopy(self.config)

    def end(self) -> None:
        """Make room for the engine that trains, with the settings that transformers takes away to evaluate."""
        trainer, accelerator = self.trainer, self.trainer.accelerator
        if trainer.deepspeed is not None:
            trainer.deepspeed.destroy()
            for module in trainer.model.modules():
                # DeepSpeed (0.19) leaves these, and the next engine would take weights for gathered that this one has let go
                for left in ("pre_bwd_fn", "post_bwd_fn"):
                    module.__dict__.pop(left, None)
        trainer.deepspeed, trainer.model_wrapped = None, trainer.model
        accelerator.deepspeed_engine_wrapped = None
        accelerator._models.clear()
        self.config.clear()
        self.config.update(self.before)
