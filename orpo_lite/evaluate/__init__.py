"""Compare base and adapter; answer prompts; chat; judge."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orpo_lite.evaluate.held_out import evaluate

__all__ = ["evaluate"]

_HOMES = {"evaluate": "orpo_lite.evaluate.held_out"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
