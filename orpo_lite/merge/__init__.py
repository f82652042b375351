"""Merge an adapter into its base, tensor by tensor."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orpo_lite.merge.run import merge

__all__ = ["merge"]

_HOMES = {"merge": "orpo_lite.merge.run"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
