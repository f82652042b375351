"""Resolve what a path names (a run, an adapter or a whole model) and load it with held-out pairs, ready to evaluate."""

from __future__ import annotations

import gc
import os
import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from transformers import PrinterCallback

from orpo_lite.common.errors import RequestError
from orpo_lite.data import Pairs, load_pairs
from orpo_lite.data.lengths import numbers
from orpo_lite.data.sources import shorten
from orpo_lite.evaluate.held_out import evaluate
from orpo_lite.model import BaseFacts, attach_adapter, load_base
from orpo_lite.model.locating import adapter_folder
from orpo_lite.model.untrusted_files import subfolders_hint
from orpo_lite.recipe import AdapterSection, DataSource, ModelSection, Recipe
from orpo_lite.recipe.loading import looks_local, resolve_path
from orpo_lite.trainer.config_from_recipe import arguments
from orpo_lite.trainer.run_folder import RunFolder, base_section, tokenizer_of
from orpo_lite.trainer.run_record import RunRecord, read_record
from orpo_lite.trainer.trainer import ORPOTrainer

EXPECTED = "expected a run folder, the folder of an adapter or of a model, or a hub id USER/NAME"


@dataclass
class ModelSource:
    """A model found on disk or on the hub: its weights, and what is known about their training. Nothing is loaded yet."""

    path: str
    """The folder, or the hub id of a whole model."""
    kind: Literal["adapter", "fine-tuned", "model"]
    """fine-tuned: a run without an adapter; model: any other whole model, such as a merged one."""
    model: ModelSection
    """The base of an adapter, or the whole model."""
    base: ModelSection | None = None
    """The model that a fine-tuned one started from."""
    recipe: Recipe | None = None
    record: RunRecord = field(default_factory=RunRecord)
    """run.json, where there is one."""

    @property
    def names(self) -> tuple[str, ...]:
        """Name the sides that can answer, the trained one last."""
        return ("model",) if self.kind == "model" else ("base", self.kind)

    @property
    def row_shapes(self) -> set[str]:
        """List the shapes of the rows it was trained on; empty where that is not known."""
        return {one.shape or "" for one in self.record.data.sources.values() if one.section in ("train", None)}

    def check_two_sides(self, option: str) -> None:
        """Raise RequestError, naming the option that needs two sides, for a model without a base."""
        if self.kind == "model":
            raise RequestError(
                f"{option}: {self.path} is a whole model, so there is no base to compare it with: give the run or adapter "
                "folder that it was merged from"
            )

    def __str__(self) -> str:
        if self.kind == "model":
            return f"{self.path}, a whole model"
        if self.base is not None:
            return f"{self.path}, fine-tuned from {self.base.name_or_path}"
        quantized = "" if self.model.quantization == "none" else f", {self.model.quantization}"
        return f"{self.path}, an adapter on {self.model.name_or_path}{quantized}"


def resolve_model(path: str, trust_remote_code: bool = False) -> ModelSource:
    """Find out what a path or hub id names.

    Code of a repository is run only where the caller says so: the folder may be anybody's.

    Raises:
        RequestError: no model there, or a run that did not finish.
    """
    folder = Path(os.path.expanduser(resolve_path(path)))
    if os.path.isfile(folder):
        hint = "; talk to a GGUF file with llama-cli or Ollama" if folder.suffix == ".gguf" else ""
        raise RequestError(f"{path} is a file, {EXPECTED}{hint}")
    if not os.path.isdir(folder):
        if looks_local(path):
            raise RequestError(f"{path}: there is no such folder: {EXPECTED}")
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
        base = base_section(folder, None, trust_remote_code)
        return ModelSource(str(folder), "adapter", base, recipe=recipe, record=record)
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
        f"{path}: holds neither adapter_config.json nor config.json: {EXPECTED}{subfolders_hint(folder)}"
    )


def is_published(folder: Path) -> bool:
    """Check for the model card of a run, which the cards that PEFT writes are not."""
    card = folder / "README.md"
    return card.is_file() and "\n- orpo\n" in card.read_text("utf-8", "replace").partition("\n---\n")[0]


def whole_model(path: str, trust_remote_code: bool) -> ModelSection:
    """Describe a model as its files have it."""
    return ModelSection(name_or_path=path, quantization="none", trust_remote_code=trust_remote_code)


def load_model(source: ModelSource, tokenizer: Any) -> tuple[Any, BaseFacts]:
    """Load the weights, with the adapter on where there is one."""
    model, facts = load_base(source.model, tokenizer)
    if source.kind == "adapter":
        section = (source.recipe and source.recipe.adapter) or AdapterSection()
        section = section.model_copy(update={"init_from": source.path})
        model = attach_adapter(model, section, tokenizer=tokenizer, checkpointing=False)
    return model, facts


@dataclass
class HeldOut:
    """A model with held-out pairs to evaluate it on."""

    source: ModelSource
    recipe: Recipe
    tokenizer: Any
    pairs: Pairs
    pair_sources: list[str]
    """The source of each held-out pair."""

    @cached_property
    def trainer(self) -> ORPOTrainer:
        """A trainer for evaluation, with the model as it was trained; loaded at first use."""
        return self.evaluator(*load_model(self.source, self.tokenizer))

    def evaluator(self, model: Any, facts: BaseFacts) -> ORPOTrainer:
        """Make a trainer that only evaluates."""
        with tempfile.TemporaryDirectory() as scratch:
            args = arguments(self.recipe, Path(scratch), facts, has_eval=True, checkpointing=0)
            trainer = ORPOTrainer(model, args, None, None, self.pairs.eval, self.tokenizer)
        trainer.remove_callback(
            PrinterCallback
        )  # with TRANSFORMERS_VERBOSITY=error it would print between lines of JSON
        return trainer

    def evaluate_sides(self) -> dict[str, dict[str, Any]]:
        """Evaluate each side, the base first; the base of a fine-tuned model makes room for it in memory."""
        results = {}
        if self.source.base is not None:
            results["base"] = evaluate(
                self.evaluator(*load_base(self.source.base, self.tokenizer)), sources=self.pair_sources
            )
            gc.collect()
        elif self.source.kind == "adapter":
            with self.trainer.model.disable_adapter():
                results["base"] = evaluate(self.trainer, sources=self.pair_sources)
        return results | {self.source.names[-1]: evaluate(self.trainer, sources=self.pair_sources)}


def load_for_evaluation(path: str, data: str | None = None, trust_remote_code: bool = False) -> HeldOut:
    """Find a run's held-out pairs; `data` replaces its held-out pairs. An adapter's or model's folder needs `data`.

    Raises:
        RequestError: no model there, no held-out pairs, or unusable data.
    """
    source = resolve_model(path, trust_remote_code)
    recipe = source.recipe or default_recipe(source, data, path)
    recipe.model = recipe.model.model_copy(update={"trust_remote_code": trust_remote_code})
    if data is not None:
        recipe.data.eval = [DataSource(path=data)]
    if recipe.data.eval is None and not recipe.data.eval_fraction:
        raise RequestError(
            f"{path}: the recipe holds out no pairs (data.eval is null, eval_fraction 0); give --data FILE"
        )
    tokenizer = tokenizer_of(Path(source.path), source.model)
    pairs = held_out_pairs(source, recipe, tokenizer, "data.eval" if data is None else "--data")
    paths = [shorten(source.path) for source in recipe.data.eval or recipe.data.train]
    names = [paths[number] for number in numbers(pairs.eval, "source")]
    return HeldOut(source, recipe, tokenizer, pairs, names)


def default_recipe(source: ModelSource, data: str | None, path: str) -> Recipe:
    """Make a recipe for a folder that has none: its model, and the given pairs."""
    if data is None:
        raise RequestError(
            f"{path}: there is no recipe.yaml, so nothing says which pairs are held out; give --data FILE"
        )
    content = {"name": "given", "model": source.model.model_dump(), "data": {"train": data}}
    return Recipe.parse(content | ({} if source.kind == "adapter" else {"adapter": None}), path)


def held_out_pairs(source: ModelSource, recipe: Recipe, tokenizer: Any, field: str) -> Pairs:
    """Load the held-out pairs, without reading the training pairs where the two come from different data."""
    if recipe.data.eval is None:
        return load_pairs(recipe.data, tokenizer)
    alone = {"train": recipe.data.eval, "eval": None, "eval_fraction": 0.0, "max_rows": recipe.data.max_eval_rows}
    section = recipe.data.model_copy(update=alone)
    pairs = load_pairs(section, tokenizer, field=field)
    pairs.eval = pairs.train
    return pairs
