"""The training section as an ORPOConfig, with what transformers refuses in it named by field."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import get_scheduler

from orpo_lite.config import ORPOConfig
from orpo_lite.errors import RequestError
from orpo_lite.recipe.checks import shown

SPOKEN = {"saving steps": "save_steps", "evaluation steps": "eval_steps", "Save strategy": "save_strategy",
          "Evaluation strategy": "eval_strategy"}  # fmt: skip
"""What transformers' messages call some fields."""


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


def refusal(error: Exception, training: dict[str, Any], named: list[str]) -> RequestError:
    found = ", ".join(f"training.{name} (found {shown(training[name])})" for name in named) or "training"
    return RequestError(f"{found}: transformers refuses it: {' '.join(str(error).split())}; mend it or leave it out")


def to_blame(message: str, training: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """The fields given that a message names; where it names none, those without which there would be no error."""
    for words, name in SPOKEN.items():
        message = message.replace(words, f"{words} {name}")
    named = [name for name in training if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", message)]
    return named or [name for name in training if not fails({k: v for k, v in training.items() if k != name} | ours)]


def fails(fields: dict[str, Any]) -> bool:
    try:
        ORPOConfig(**fields)
    except Exception:
        return True
    return False
