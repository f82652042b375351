"""Write GGUF files and publish on the hub."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orpo_lite.export.gguf import export
    from orpo_lite.export.hub import push

__all__ = ["export", "push"]

_HOMES = {"export": "orpo_lite.export.gguf", "push": "orpo_lite.export.hub"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
