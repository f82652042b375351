"""Plans on disk, so that the second start of a run has its plan at once."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from orpo_lite.plan.kernels import Target
from orpo_lite.plan.lengths import Lengths
from orpo_lite.plan.meta_model import find_config
from orpo_lite.plan.predict import Plan, plan
from orpo_lite.plan.step import Shape, evaluation_pairs
from orpo_lite.recipe import Recipe
from orpo_lite.recipe.loading import PACKAGE

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")
UNPLANNED = {"adam_beta1", "adam_beta2", "adam_epsilon", "data_seed", "eval_steps", "eval_strategy", "hub_model_id",
             "learning_rate", "logging_dir", "logging_steps", "lr_scheduler_kwargs", "lr_scheduler_type", "max_grad_norm",
             "max_steps", "num_train_epochs", "output_dir", "report_to", "run_name", "save_steps", "save_strategy",
             "save_total_limit", "seed", "warmup_ratio", "warmup_steps", "weight_decay"}  # fmt: skip
"""Fields of the training section that no plan depends on; any other makes it anew."""


def cached_plan(recipe: Recipe, target: Target, lengths: Lengths) -> Plan:
    """The plan of a recipe over the pairs' own lengths, from the disk where it was made before.

    Raises:
        RequestError: as `predict.plan`.
    """
    path = folder() / f"{key(recipe, target, lengths)}.json"
    made = read(path)
    if made is None:
        made = plan(recipe, target, shape=lambda layout: lengths.shape(recipe, layout))
        write(path, made)
    return dataclasses.replace(made, recipe=recipe.name)


def folder() -> Path:
    """$ORPO_LITE_CACHE/plans, else orpo_lite/plans in $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("ORPO_LITE_CACHE")
    root = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "orpo_lite"
    return root.expanduser() / "plans"


def key(recipe: Recipe, target: Target, lengths: Lengths) -> str:
    """Hash of all that a plan depends on, our own code among it."""
    content = recipe.model_dump(mode="json", include={"model", "adapter", "orpo", "memory"})
    content["training"] = {name: value for name, value in recipe.training.items() if name not in UNPLANNED}
    content["held out"] = evaluation_pairs(recipe)
    # which layout it will be is only known once the model stands
    content["shapes"] = [lengths.shape(recipe, layout).__dict__ for layout in ("padded", "packed", "shared")]
    content["config"] = find_config(recipe.model).to_dict()
    content["target"] = dataclasses.asdict(target)
    content["versions"] = [version(name) for name in LIBRARIES]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode())
    for file in sorted(PACKAGE.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:40]


def version(name: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)


def read(path: Path) -> Plan | None:
    """A plan that was written before; None where there is none, or it is damaged."""
    content = load(path)
    if content is None:
        return None
    try:
        content["target"] = Target(content["target"]["kind"], tuple(content["target"]["capability"]))
        shape = content["shape"]
        content["shape"] = Shape(tuple(map(tuple, shape["pairs"])), shape["why"], tuple(map(tuple, shape["held_out"])))
        content["phases"] = {name: Counter(parts) for name, parts in content["phases"].items()}
        content["facts"] = Counter(content["facts"])
        return Plan(**content)
    except (KeyError, TypeError, ValueError):
        return None


def write(path: Path, made: Plan) -> None:
    """Store a plan."""
    store(path, vars(made) | {"target": vars(made.target), "shape": vars(made.shape)})


def load(path: Path) -> Any:
    """What was stored under a path; None where there is nothing, or it is damaged."""
    try:
        digest, _, text = path.read_text("utf-8").partition("\n")
        return json.loads(text) if digest == hashlib.sha256(text.encode()).hexdigest() else None
    except (OSError, ValueError):
        return None


def store(path: Path, content: Any) -> None:
    """Whole or not at all; a cache that cannot be written is done without."""
    text = json.dumps(content)  # on one line
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as file:
            file.write(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")
        os.replace(file.name, path)
