"""Resolve what a path names (a run, an adapter or a whole model), and load and evaluate what is compared."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import safe_open
from transformers import PrinterCallback

from orpo_lite.common.console import errors
from orpo_lite.common.errors import RequestError
from orpo_lite.common.text import counted
from orpo_lite.data import DropReport, load_pairs
from orpo_lite.data.lengths import numbers
from orpo_lite.evaluate.held_out import evaluate
from orpo_lite.model.adapter import CHANGES_BASE, lora_config
from orpo_lite.model.locating import adapter_folder
from orpo_lite.model.untrusted_files import ADAPTER_WEIGHTS, subfolders_hint
from orpo_lite.recipe import DataSource, ModelSection, Recipe
from orpo_lite.recipe.loading import MODEL_FOLDER, check_folder, is_recipe, resolve_path
from orpo_lite.trainer.config_from_recipe import arguments
from orpo_lite.trainer.run_folder import RunFolder, base_section
from orpo_lite.trainer.run_record import RunRecord, read_record
from orpo_lite.trainer.trainer import ORPOTrainer

if TYPE_CHECKING:
    from orpo_lite.evaluate.answering import Side

RENDERING = ("apply_template", "system", "template_kwargs", "completion_end")
"""Fields of a recipe's data section that say how a row is written for its model, whatever rows those are."""


@dataclass
class ModelSource:
    """A model found on disk or on the hub: its weights, and what is known about their training. Nothing is loaded yet."""

    path: str
    """The folder, or the hub id of a whole model."""
    kind: Literal["base", "adapter", "fine-tuned", "model"]
    """base: what the folder's weights started from; fine-tuned: a run without an adapter; model: any other whole model,
    such as a merged one."""
    model: ModelSection
    """The base of an adapter, or the whole model."""
    base: ModelSection | None = None
    """The model that a fine-tuned one started from."""
    recipe: Recipe | None = None
    record: RunRecord = field(default_factory=RunRecord)
    """run.json, where there is one."""

    @property
    def row_shapes(self) -> set[str]:
        """List the shapes of the rows it was trained on; empty where that is not known."""
        return {one.shape or "" for one in self.record.data.sources.values() if one.section in ("train", None)}

    def __str__(self) -> str:
        name = self.model.name_or_path
        quantized = "" if self.model.quantization == "none" else f", {self.model.quantization}"
        return {
            "base": f"{name}, the base of {self.path}",
            "adapter": f"{self.path}, an adapter on {name}{quantized}",
            "fine-tuned": f"{self.path}, fine-tuned from {self.base and self.base.name_or_path}",
            "model": f"{self.path}, a whole model",
        }[self.kind]


def resolve_model(path: str, trust_remote_code: bool = False, base: str | None = None) -> ModelSource:
    """Find out what a path or hub id names; a recipe names its base.

    Code of a repository is run only where the caller says so: the folder may be anybody's.

    Args:
        base: another base for an adapter than the one it names.

    Raises:
        RequestError: no model there, or a run that did not finish.
    """
    folder = Path(os.path.expanduser(resolve_path(path)))
    if is_recipe(path) and not os.path.isdir(folder):
        recipe = Recipe.load(path)
        return ModelSource(recipe.model.name_or_path, "model", recipe.model, recipe=recipe)
    if os.path.isfile(folder):
        hint = "; talk to a GGUF file with llama-cli or Ollama" if folder.suffix == ".gguf" else ""
        raise RequestError(f"{path} is a file, expected {MODEL_FOLDER}{hint}")
    if not os.path.isdir(folder):
        check_folder(path, MODEL_FOLDER)
        downloaded = adapter_folder(path)
        if not (downloaded / "adapter_config.json").is_file():
            return ModelSource(path, "model", whole_model(path, trust_remote_code))
        folder = downloaded
    recipe, record = None, RunRecord()
    if (folder / "recipe.yaml").is_file():
        recipe = RunFolder.open(folder).recipe()
        # publishing leaves run.json out and adds a card; a run that has neither did not finish
        if (folder / "run.json").is_file() or not is_published(folder):
            record = read_record(RunFolder(folder))
    if (folder / "adapter_config.json").is_file():
        section = base_section(folder, base, trust_remote_code)
        return ModelSource(str(folder), "adapter", section, recipe=recipe, record=record)
    if (folder / "config.json").is_file():
        after = whole_model(str(folder), trust_remote_code)
        if recipe is None or recipe.adapter is not None:
            return ModelSource(str(folder), "model", after)
        before = recipe.model.model_copy(update={"trust_remote_code": trust_remote_code})
        after = after.model_copy(update={"dtype": recipe.model.dtype})
        return ModelSource(str(folder), "fine-tuned", after, before, recipe, record)
    if recipe is not None:
        RunFolder(folder).read()  # raises where the run did not finish
        raise RequestError(f"{path}: the run is finished, but its adapter_config.json is gone: copy the folder again")
    raise RequestError(
        f"{path}: holds neither adapter_config.json nor config.json: expected {MODEL_FOLDER}{subfolders_hint(folder)}"
    )


def is_published(folder: Path) -> bool:
    """Check for the model card of a run, which the cards that PEFT writes are not."""
    card = folder / "README.md"
    return card.is_file() and "\n- orpo\n" in card.read_text("utf-8", "replace").partition("\n---\n")[0]


def whole_model(path: str, trust_remote_code: bool) -> ModelSection:
    """Describe a model as its files have it."""
    return ModelSection(name_or_path=path, quantization="none", trust_remote_code=trust_remote_code)


def writes_to_base(source: ModelSource) -> bool:
    """Tell whether loading an adapter changes weights of its base, so that the base is not what is left without it."""
    config = lora_config(source.path)
    own = ("lora_", "token_adapter", *(config.modules_to_save or ()))
    with safe_open(Path(source.path) / ADAPTER_WEIGHTS, "pt") as file:
        # embeddings of a resized vocabulary, biases
        whole = any(not any(word in name for word in own) for name in file.keys())  # noqa: SIM118  # no dict
    return whole or str(config.init_lora_weights).lower().startswith(CHANGES_BASE)


def evaluate_sides(sides: list[Side], data: str | None = None) -> tuple[dict[str, dict[str, Any]], DropReport]:
    """Evaluate each side on the held-out pairs of the last one; `data` replaces them.

    A side is taken out of the list once it is measured, which makes room in memory for the next.

    Returns:
        Results by name, from `evaluate`, and what was dropped of the rows.

    Raises:
        RequestError: no held-out pairs, or unusable data.
    """
    run = sides[-1].source
    recipe = held_out_recipe(run, data)
    by_path = {side.source.path: side for side in sides}
    field = "data.eval" if data is None else "--data"
    pairs = {path: held_out_pairs(side, recipe, field) for path, side in reversed(by_path.items())}
    mine, report = pairs[run.path]
    paths = [source.path[:300] for source in recipe.data.eval or recipe.data.train]
    results: dict[str, dict[str, Any]] = {}
    while sides:
        side = sides.pop(0)
        held, _ = pairs[side.source.path]
        if len(mine) != len(held):
            errors.print(f"{side.name} is measured on {counted(len(held), 'pair')}, {run.path} on {len(mine):,}: "
                         "others are dropped in the form of each", soft_wrap=True, markup=False)  # fmt: skip
        names = [paths[number] for number in numbers(held, "source")]
        with side.model() as model, tempfile.TemporaryDirectory() as scratch:
            args = arguments(recipe, Path(scratch), side.loaded[1], has_eval=True, checkpointing=0)
            trainer = ORPOTrainer(model, args, None, None, held, side.tokenizer)
            trainer.remove_callback(PrinterCallback)  # it would print between lines of JSON
            results[side.name] = evaluate(trainer, names)
        del model, trainer
    return results, report


def held_out_recipe(source: ModelSource, data: str | None) -> Recipe:
    """Make the recipe that says which pairs are held out: the run's own, or `data`, which other folders need.

    Raises:
        RequestError: nothing says which.
    """
    recipe, path = source.recipe, source.path
    if recipe is None:
        if data is None:
            raise RequestError(
                f"{path}: there is no recipe.yaml, so nothing says which pairs are held out; give --data FILE"
            )
        content = {"name": "given", "model": source.model.model_dump(), "data": {"train": data, "eval": data}}
        return Recipe.parse(content, path)
    if data is not None:
        recipe.data.eval = [DataSource(path=data)]
    if recipe.data.eval is None and not recipe.data.eval_fraction:
        raise RequestError(
            f"{path}: the recipe holds out no pairs (data.eval is null, eval_fraction 0); give --data FILE"
        )
    return recipe


def held_out_pairs(side: Side, recipe: Recipe, field: str) -> tuple[Any, DropReport]:
    """Load a recipe's held-out pairs as a side reads them, and report what was dropped.

    The training pairs are not read where the two come from different data.
    """
    own = side.source.recipe
    section = recipe.data.model_copy(update={name: getattr(own.data, name) for name in RENDERING} if own else {})
    if section.eval is None:
        pairs = load_pairs(section, side.tokenizer)
        return pairs.eval, pairs.report
    alone = {"train": section.eval, "eval": None, "eval_fraction": 0.0, "max_rows": section.max_eval_rows}
    pairs = load_pairs(section.model_copy(update=alone), side.tokenizer, field=field)
    return pairs.train, pairs.report
