"""Whatever every layer uses; needs neither torch nor transformers."""

import importlib
from collections.abc import Callable
from typing import Any


def lazy_names(package: str, homes: dict[str, str]) -> Callable[[str], Any]:
    """Return a module's `__getattr__` that imports a name's home when the name is first used.

    Args:
        homes: name -> dotted module that defines it.
    """

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(homes[name]), name)

    return load
