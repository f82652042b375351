"""Plans of recipes as they stand."""

from collections.abc import Callable

from orpo_lite.plan.gpus import Target
from orpo_lite.plan.predict import Plan
from orpo_lite.plan.search import Planner
from orpo_lite.plan.step import Shape
from orpo_lite.recipe import Recipe


def plan(recipe: Recipe, target: Target | None = None, shape: Callable[[str], Shape] | None = None) -> Plan:
    """Plan for a device (default: a CUDA card) and a micro-batch by its layout (default: the largest allowed)."""
    return Planner(shape and (lambda _, layout: shape(layout)))(recipe, target or Target("cuda"))
