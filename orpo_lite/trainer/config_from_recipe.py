"""Turns a recipe into an ORPOConfig; what transformers refuses is reported by the recipe's field."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import get_scheduler

from orpo_lite.common.console import console
from orpo_lite.common.errors import RequestError
from orpo_lite.common.text import nearest, shown
from orpo_lite.model import BaseFacts
from orpo_lite.model.precision import default_device
from orpo_lite.objective.metrics import COLUMNS, pair_metrics
from orpo_lite.recipe import Recipe
from orpo_lite.recipe.schema import OrpoSection
from orpo_lite.trainer.config import ORPOConfig

DEFAULTS: dict[str, Any] = {
    "learning_rate": 5e-5,
    "lr_scheduler_type": "cosine",
    "logging_steps": 10,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "report_to": "none",
    "seed": 42,
}
"""Defaults of a recipe's `training:` section where transformers' own do not suit QLoRA."""
BITSANDBYTES = ("8bit", "paged", "bnb", "lion", "ademamix")
"""Parts of the names of bitsandbytes' optimizers, which need a GPU."""
REFUSED = (ValueError, TypeError, ImportError)
"""Errors by which transformers refuses arguments."""
SET_BY_OTHER_SECTIONS = ("bf16", "fp16", "gradient_checkpointing", "activation_checkpointing")
"""Fields that follow from model.dtype and memory.checkpointing."""


def checkpointed(recipe: Recipe, device: torch.device) -> int | None:
    """Return how many layers recompute their activations: None for all, 0 for none."""
    wish = recipe.memory.checkpointing
    if wish == "auto":
        wish = "all" if device.type == "cuda" else "none"
    return {"all": None, "none": 0}.get(wish, wish)  # type: ignore[arg-type]


def arguments(
    recipe: Recipe, output: Path, facts: BaseFacts, *, has_eval: bool, checkpointing: int | None
) -> ORPOConfig:
    """Make an ORPOConfig of the recipe, with checkpoints in `output`.

    Raises:
        RequestError: a value that transformers refuses, or a setting that this machine or evaluation does not have.
    """
    training: dict[str, Any] = recipe.training | {
        "output_dir": str(output),
        "per_device_train_batch_size": recipe.pairs_at_once,
    }
    if not has_eval:
        training["eval_strategy"] = "no"
    optim = str(training.get("optim", ""))
    if any(part in optim for part in BITSANDBYTES) and not torch.cuda.is_available():
        console.print(f"training.optim: {optim} needs a CUDA device: adamw_torch is used here", markup=False)
        training["optim"] = "adamw_torch"
    for name in SET_BY_OTHER_SECTIONS:
        if training.pop(name, None):
            console.print(f"training.{name} has no effect: model.dtype and memory.checkpointing decide", markup=False)
    ours: dict[str, Any] = recipe.orpo.model_dump() | {  # its fields have ORPOConfig's names
        # on a CPU, accelerate's autocast is for float32 weights, and ORPOTrainer has its own for a base in 16 bits
        "bf16": facts.precision.bf16 and not (recipe.adapter and default_device().type == "cpu"),
        "fp16": facts.precision.fp16,
        "gradient_checkpointing": checkpointing != 0,
        "head_chunk": None if recipe.memory.head_chunk == "auto" else recipe.memory.head_chunk,
        "kernels": recipe.memory.kernels,
        "checkpointed_layers": checkpointing or None,
        "offload_activations": recipe.memory.offload_activations,
        "loraplus_lr_ratio": recipe.adapter.loraplus_lr_ratio if recipe.adapter else None,
    }
    args = checked_config(training, ours)
    check_best(args.metric_for_best_model)
    return args


def check_best(name: str | None) -> None:
    """Refuse a metric that no evaluation has; transformers would only notice after the first evaluation."""
    measured = set(pair_metrics(torch.zeros(1, len(COLUMNS)), OrpoSection()))
    measured.remove("aux_loss")  # only some models have it
    if name is not None and name.removeprefix("eval_") not in measured:
        raise RequestError(
            f"training.metric_for_best_model: found {shown(name)}{nearest(name.removeprefix('eval_'), measured)}, expected one of "
            f"{', '.join(sorted(measured))}, with or without eval_ before it"
        )


def checked_config(training: dict[str, Any], ours: dict[str, Any]) -> ORPOConfig:
    """Make an ORPOConfig of the recipe's training fields and the fields set by its other sections.

    Raises:
        RequestError: values that transformers refuses, alone or together, or arguments that the schedule does not take.
            It names the fields that the message names, or those without which there would be no error.
    """
    try:
        return make_config(training, ours)
    except REFUSED as error:
        named = fields_in_message(str(error), training)
        for left_out in training if not named else ():
            with contextlib.suppress(*REFUSED):
                make_config({name: value for name, value in training.items() if name != left_out}, ours)
                named.append(left_out)
        raise refusal(error, training, named) from error


def make_config(training: dict[str, Any], ours: dict[str, Any]) -> ORPOConfig:
    """Make an ORPOConfig, and a schedule as the real optimizer will have, which is made after loading the model."""
    args = ORPOConfig(**training, **ours)
    get_scheduler(
        args.lr_scheduler_type,
        torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0),
        num_warmup_steps=1,
        num_training_steps=10,
        scheduler_specific_kwargs=dict(args.lr_scheduler_kwargs or {}),  # type: ignore[arg-type]  # parsed by now
    )
    return args


@contextlib.contextmanager
def field_named(training: dict[str, Any]) -> Iterator[None]:
    """Report errors inside by the fields of the recipe that their messages name; pass on any others."""
    try:
        yield
    except REFUSED as error:
        named = fields_in_message(str(error), training)
        if isinstance(error, RequestError) or not named:
            raise
        raise refusal(error, training, named) from error


def refusal(error: Exception, training: dict[str, Any], fields: list[str]) -> RequestError:
    """Make the error for fields that transformers refuses."""
    found = ", ".join(f"training.{name} (found {shown(training[name])})" for name in fields) or "training"
    return RequestError(f"{found}: refused: {' '.join(str(error).split())}; correct it or remove it")


def fields_in_message(message: str, training: dict[str, Any]) -> list[str]:
    """List the given fields that a message names."""
    return [name for name in training if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", message)]
