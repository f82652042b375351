"""Write GGUF files and publish on the hub."""

from typing import TYPE_CHECKING

from orpo_lite.common import lazy_names

if TYPE_CHECKING:
    from orpo_lite.export.gguf import export
    from orpo_lite.export.hub import push

__all__ = ["export", "push"]

__getattr__ = lazy_names(__name__, {"export": "orpo_lite.export.gguf", "push": "orpo_lite.export.hub"})
