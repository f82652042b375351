"""A run from recipe to run folder (`run`), `python -m orpo_lite.train`, doctor and bench."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orpo_lite.train.pipeline import Run, run

__all__ = ["Run", "run"]

_HOMES = {"Run": "orpo_lite.train.pipeline", "run": "orpo_lite.train.pipeline"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
