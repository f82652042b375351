"""The run folder: one place that every later command takes."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orpo_lite.errors import RequestError
from orpo_lite.recipe import Recipe

SAME_RESULT = re.compile(
    r"memory\.|orpo\.tokens_per_batch: was \d+, is \d+$|training\.(per_device_eval_batch_size|on_nonfinite): "
)
"""Changes that a run can go on with: of what it takes and not what it makes, and of what becomes of steps that fail."""


@dataclass
class RunFolder:
    """A run's folder and what lies where in it."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoint(self) -> Path | None:
        """The newest checkpoint, or None."""
        steps = {
            int(m[1]): p
            for p in self.checkpoints.glob("checkpoint-*")
            if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))
        }
        return steps[max(steps)] if steps else None

    @property
    def finished(self) -> bool:
        return (self.path / "run.json").is_file()

    @classmethod
    def create(cls, recipe: Recipe, resume: bool = False) -> RunFolder:
        """The folder of a new run, or the one being resumed.

        An unfinished run of the same recipe, settings of memory aside, is gone on with, from its newest checkpoint if it
        has one; a folder that holds anything else is left alone and the next free number is appended.

        Raises:
            RequestError: `resume`, but there is nothing to go on from, or the recipe has changed.
        """
        folder = cls(recipe.folder)
        if resume and folder.checkpoint is None:
            raise RequestError(
                f"--resume: {folder.path} holds no checkpoint to go on from (training.save_strategy and save_steps say when one is written); start without --resume"
            )
        if (folder.path / "recipe.yaml").is_file() and not folder.finished:
            changes = folder.changes(recipe)
            changed = [line for line in changes if not SAME_RESULT.match(line)]
            if not changed:
                if changes:
                    recipe.save(folder.path / "recipe.yaml")
                return folder
            if resume:
                lines = "\n".join(f"  - {line}" for line in changed)
                raise RequestError(
                    f"--resume: {folder.path} was started with another recipe:\n{lines}\nundo the changes, or start without --resume"
                )
        elif resume:
            raise RequestError(f"--resume: the run in {folder.path} is finished; start without --resume for a new one")
        number = 2
        while folder.path.exists() and any(folder.path.iterdir()):
            folder, number = cls(recipe.folder.with_name(f"{recipe.folder.name}-{number}")), number + 1
        try:
            folder.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(
                f"training.output_dir: {folder.path} cannot be written ({error.strerror}): choose another place"
            ) from None
        if folder.path != recipe.folder:  # its own recipe leads back to it, also to resume
            recipe = recipe.model_copy(update={"training": recipe.training | {"output_dir": str(folder.path)}})
        recipe.save(folder.path / "recipe.yaml")
        return folder

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """An existing run folder.

        Raises:
            RequestError: no such folder, or not a run folder.
        """
        folder = cls(Path(path))
        if not (folder.path / "recipe.yaml").is_file():
            raise RequestError(f"{path}: found no recipe.yaml, expected a run folder that orpo_lite.train has written")
        return folder

    def recipe(self) -> Recipe:
        # by its file: a folder may have the name of a shipped recipe
        return Recipe.load(self.path / "recipe.yaml")

    def changes(self, recipe: Recipe) -> list[str]:
        """Fields in which the recipe differs from the one that this folder was started with."""
        return list(differences(self.recipe().model_dump(mode="json"), recipe.model_dump(mode="json")))

    def read(self) -> dict[str, Any]:
        """run.json."""
        try:
            return json.loads((self.path / "run.json").read_text("utf-8"))
        except FileNotFoundError:
            raise RequestError(
                f"{self.path}: no run.json, so this run did not finish; train it with --resume first"
            ) from None
        except ValueError as error:
            raise RequestError(
                f"{self.path / 'run.json'} is broken JSON ({error}): copy the run again, or train it again"
            ) from None

    def write(self, facts: dict[str, Any]) -> None:
        """Write run.json, whole or not at all."""
        aside = self.path / "run.json.part"
        aside.write_text(json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=True), "utf-8")
        aside.replace(self.path / "run.json")


def differences(old: Any, new: Any, place: str = "") -> list[str]:
    """One line for every leaf in which two recipes differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{place}.{key}".strip("."))]
    return [] if old == new else [f"{place}: was {old!r}, is {new!r}"]
