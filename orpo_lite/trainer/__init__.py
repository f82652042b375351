"""ORPOTrainer and what surrounds one optimizer step."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orpo_lite.trainer.config import ORPOConfig
    from orpo_lite.trainer.trainer import ORPOTrainer

__all__ = ["ORPOConfig", "ORPOTrainer"]

_HOMES = {"ORPOConfig": "orpo_lite.trainer.config", "ORPOTrainer": "orpo_lite.trainer.trainer"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
