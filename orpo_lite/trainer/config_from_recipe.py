"""A recipe as an ORPOConfig, with what transformers refuses in it named by field."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import get_scheduler
from transformers.training_args import ParallelMode

from orpo_lite.common.console import console
from orpo_lite.common.errors import RequestError
from orpo_lite.common.text import nearest, shown
from orpo_lite.model import BaseFacts
from orpo_lite.objective.metrics import COLUMNS, pair_metrics
from orpo_lite.recipe import Recipe
from orpo_lite.trainer.config import ORPOConfig

SPOKEN = {"saving steps": "save_steps", "evaluation steps": "eval_steps", "Save strategy": "save_strategy",
          "Evaluation strategy": "eval_strategy"}  # fmt: skip
"""What transformers' messages call some fields."""


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
"""What a recipe's `training:` section takes where it is silent and transformers' own default serves QLoRA badly."""
BITSANDBYTES = ("8bit", "paged", "bnb", "lion", "ademamix")
"""Parts of the names of optimizers that bitsandbytes has, on a GPU only."""


def checkpointed(recipe: Recipe, device: torch.device) -> int | None:
    """How many layers recompute their activations: None for all, 0 for none."""
    wish = recipe.memory.checkpointing
    if wish == "auto":
        wish = "all" if device.type == "cuda" else "none"
    return {"all": None, "none": 0}.get(wish, wish)  # type: ignore[arg-type]


def arguments(
    recipe: Recipe, output: Path, facts: BaseFacts, *, has_eval: bool, checkpointing: int | None
) -> ORPOConfig:
    """The recipe as an ORPOConfig whose checkpoints go to `output`."""
    training: dict[str, Any] = recipe.training | {"output_dir": str(output)}
    if not has_eval:
        training["eval_strategy"] = "no"
    optim = str(training.get("optim", ""))
    if any(part in optim for part in BITSANDBYTES) and not torch.cuda.is_available():
        console.print(f"training.optim: {optim} needs a CUDA device: adamw_torch is used here", markup=False)
        training["optim"] = "adamw_torch"
    for name in (
        "bf16",
        "fp16",
        "gradient_checkpointing",
        "activation_checkpointing",
    ):  # model.dtype, memory: say these
        training.pop(name, None)
    ours: dict[str, Any] = {
        "bf16": facts.precision.bf16,
        "fp16": facts.precision.fp16,
        "gradient_checkpointing": checkpointing != 0,
        "beta": recipe.orpo.beta,
        "nll_scope": recipe.orpo.nll_scope,
        "nll_mean": recipe.orpo.nll_mean,
        "layout": recipe.orpo.layout,
        "tokens_per_batch": recipe.orpo.tokens_per_batch,
        "head_chunk": None if recipe.memory.head_chunk == "auto" else recipe.memory.head_chunk,
        "checkpointed_layers": checkpointing or None,
        "offload_activations": recipe.memory.offload_activations,
        "disable_dropout": recipe.orpo.disable_dropout,
        "loraplus_lr_ratio": recipe.adapter.loraplus_lr_ratio if recipe.adapter else None,
    }
    args = checked_config(training, ours)
    check_best(args.metric_for_best_model)
    if args.fsdp and args.parallel_mode != ParallelMode.DISTRIBUTED:
        raise RequestError(
            f"training.fsdp: found {shown(training.get('fsdp'))}, but this is one process, and FSDP spreads a model over several: "
            "start with `accelerate launch` or torchrun, or leave it out"
        )
    return args


def check_best(name: str | None) -> None:
    """Raise RequestError for a metric that no evaluation has: transformers looks for it after the first one only."""
    measured = set(pair_metrics(torch.zeros(1, len(COLUMNS)), 1.0)) - {"aux_loss"}  # which only some models have
    if name is not None and name.removeprefix("eval_") not in measured:
        raise RequestError(
            f"training.metric_for_best_model: found {shown(name)}{nearest(name.removeprefix('eval_'), measured)}, expected one of "
            f"{', '.join(sorted(measured))}, with or without eval_ before it"
        )


def checked_config(training: dict[str, Any], ours: dict[str, Any]) -> ORPOConfig:
    """An ORPOConfig of the recipe's training fields and of what its other sections say.

    Raises:
        RequestError: values that transformers refuses, alone or together, or a schedule that cannot be made of them.
    """
    try:
        args = ORPOConfig(**training, **ours)
    except (ValueError, TypeError, ImportError) as error:
        raise refusal(error, training, to_blame(str(error), training, ours)) from error
    try:
        # as it will be for the real optimizer, hours of loading later
        get_scheduler(
            args.lr_scheduler_type,
            torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0),
            num_warmup_steps=1,
            num_training_steps=10,
            scheduler_specific_kwargs=dict(args.lr_scheduler_kwargs or {}),  # type: ignore[arg-type]  # parsed by now
        )
    except (ValueError, TypeError) as error:
        named = [name for name in ("lr_scheduler_kwargs", "lr_scheduler_type") if name in training]
        raise refusal(error, training, named) from error
    return args


@contextlib.contextmanager
def field_named(training: dict[str, Any]) -> Iterator[None]:
    """What a trainer refuses, by the fields of the recipe that its message names; any other error as it is."""
    try:
        yield
    except RequestError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        if named := spoken_of(str(error), training):
            raise refusal(error, training, named) from error
        raise


def refusal(error: Exception, training: dict[str, Any], named: list[str]) -> RequestError:
    found = ", ".join(f"training.{name} (found {shown(training[name])})" for name in named) or "training"
    return RequestError(f"{found}: refused: {' '.join(str(error).split())}; mend it or leave it out")


def to_blame(message: str, training: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """The fields given that a message names; where it names none, those without which there would be no error."""
    return spoken_of(message, training) or [
        name for name in training if not fails({k: v for k, v in training.items() if k != name} | ours)
    ]


def spoken_of(message: str, training: dict[str, Any]) -> list[str]:
    """The fields given that a message names."""
    for words, name in SPOKEN.items():
        message = message.replace(words, f"{words} {name}")
    return [name for name in training if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", message)]


def fails(fields: dict[str, Any]) -> bool:
    """Whether transformers refuses these fields, in the ways that `checked_config` reports."""
    try:
        ORPOConfig(**fields)
    except (ValueError, TypeError, ImportError):
        return True
    return False
