"""Compare base and adapter; answer prompts; chat; judge."""

from typing import TYPE_CHECKING

from orpo_lite.common import lazy_names

if TYPE_CHECKING:
    from orpo_lite.evaluate.held_out import evaluate

__all__ = ["evaluate"]

__getattr__ = lazy_names(__name__, {"evaluate": "orpo_lite.evaluate.held_out"})
