"""Studies of a recipe are shared by the tests of a module: they are deterministic, and tracing takes a second each."""

from collections.abc import Iterator
from typing import Any

import pytest

from orpo_lite.plan import predict, search, step
from orpo_lite.plan.predict import Study
from orpo_lite.recipe import Recipe


@pytest.fixture(autouse=True, scope="module")
def shared_studies() -> Iterator[None]:
    known: dict[Any, Study] = {}
    ours = step.Passes

    def shared(recipe: Recipe, target: Any, shape: Any = None) -> Study:
        if shape is not None or step.Passes is not ours:
            return Study(recipe, target, shape)
        content = recipe.model_dump_json(exclude={"name": True, "needs": True, "memory": {"checkpointing"}})
        key = content, target
        if key not in known:
            known[key] = Study(recipe, target)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        for module in (predict, search):
            patch.setattr(module, "Study", shared)
        yield
