"""Merge an adapter into its base, tensor by tensor."""

from typing import TYPE_CHECKING

from orpo_lite.common import lazy_names

if TYPE_CHECKING:
    from orpo_lite.merge.run import merge

__all__ = ["merge"]

__getattr__ = lazy_names(__name__, {"merge": "orpo_lite.merge.run"})
