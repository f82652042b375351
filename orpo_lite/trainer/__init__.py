"""ORPOTrainer and what surrounds one optimizer step."""

from typing import TYPE_CHECKING

from orpo_lite.common import lazy_names

if TYPE_CHECKING:
    from orpo_lite.trainer.config import ORPOConfig
    from orpo_lite.trainer.trainer import ORPOTrainer

__all__ = ["ORPOConfig", "ORPOTrainer"]

__getattr__ = lazy_names(
    __name__, {"ORPOConfig": "orpo_lite.trainer.config", "ORPOTrainer": "orpo_lite.trainer.trainer"}
)
