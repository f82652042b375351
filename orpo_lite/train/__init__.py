"""A run from recipe to run folder (`run`), `python -m orpo_lite.train`, doctor and bench."""

from typing import TYPE_CHECKING

from orpo_lite.common import lazy_names

if TYPE_CHECKING:
    from orpo_lite.train.pipeline import Run, run

__all__ = ["Run", "run"]

__getattr__ = lazy_names(__name__, {"Run": "orpo_lite.train.pipeline", "run": "orpo_lite.train.pipeline"})
