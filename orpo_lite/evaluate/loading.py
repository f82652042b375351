"""A run, adapter or model brought back with held-out pairs, ready to be evaluated."""

from __future__ import annotations

import contextlib
import gc
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PrinterCallback

from orpo_lite.common.errors import RequestError
from orpo_lite.data import Pairs, load_pairs
from orpo_lite.evaluate.buckets import source_names
from orpo_lite.evaluate.held_out import base_only, evaluate
from orpo_lite.evaluate.model_source import Found, find
from orpo_lite.model import BaseFacts, attach_adapter, load_base, load_tokenizer
from orpo_lite.model.base import read_config
from orpo_lite.recipe import AdapterSection, DataSource, Recipe
from orpo_lite.trainer.config_from_recipe import arguments
from orpo_lite.trainer.trainer import ORPOTrainer


@dataclass
class OpenRun:
    """A model, with its adapter on where it has one, its tokenizer, held-out pairs, and a trainer to evaluate with."""

    found: Found
    recipe: Recipe
    model: Any
    tokenizer: Any
    pairs: Pairs
    trainer: ORPOTrainer
    sources: list[str]
    """Where each held-out pair comes from."""

    def base(self) -> contextlib.AbstractContextManager[None]:
        """The base alone, the adapter switched off."""
        return base_only(self.model)

    def measured(self) -> dict[str, dict[str, Any]]:
        """`evaluate` of each side by its name, the base first. The base of a fine-tuned model takes the model's place."""
        results = {}
        if self.found.kind == "adapter":
            with self.base():
                results["base"] = evaluate(self.trainer, sources=self.sources)
        trained = evaluate(self.trainer, sources=self.sources)
        if self.found.kind == "fine-tuned":
            assert self.found.base is not None
            del self.trainer, self.model
            gc.collect()
            self.model, facts = load_base(self.found.base, self.tokenizer)
            self.trainer = evaluating(self.recipe, self.model, facts, self.pairs, self.tokenizer)
            results["base"] = evaluate(self.trainer, sources=self.sources)
        return results | {self.found.names[-1]: trained}


def open_run(path: str, data: str | None = None, trust_remote_code: bool = False) -> OpenRun:
    """Load a run folder for evaluation; `data` replaces its held-out pairs. An adapter's or model's folder needs `data`.

    Code of the base's repository is run only where the caller says so: the folder may be anybody's.

    Raises:
        RequestError: nothing of the kind, no held-out pairs, or unusable data.
    """
    found = find(path, trust_remote_code)
    recipe = found.recipe or made_up(found, data, path)
    recipe.model = recipe.model.model_copy(update={"trust_remote_code": trust_remote_code})
    if data is not None:
        recipe.data.eval = [DataSource(path=data)]
    if recipe.data.eval is None and not recipe.data.eval_fraction:
        raise RequestError(
            f"{path}: the recipe holds out no pairs (data.eval is null, eval_fraction 0); give --data FILE"
        )
    adapter, where = found.kind == "adapter", found.model
    if adapter and (Path(found.path) / "tokenizer_config.json").is_file():
        where = where.model_copy(update={"name_or_path": found.path, "gguf_file": None, "revision": None})
    tokenizer = load_tokenizer(where)
    encoder_decoder = bool(read_config(found.model).is_encoder_decoder)
    held = recipe.data.eval or recipe.data.train
    if recipe.data.eval is not None:
        # only the held-out side is looked at: reading the training pairs as well would be waste
        section = recipe.data.model_copy(
            update={
                "train": recipe.data.eval,
                "eval": None,
                "eval_fraction": 0.0,
                "max_rows": recipe.data.max_eval_rows,
            }
        )
        field = "data.eval" if data is None else "--data"
        pairs = load_pairs(section, tokenizer, encoder_decoder=encoder_decoder, field=field)
        pairs.eval = pairs.train
    else:
        pairs = load_pairs(recipe.data, tokenizer, encoder_decoder=encoder_decoder)
    assert pairs.eval is not None
    sources = source_names(recipe.data, held, pairs.eval)
    model, facts = load_base(found.model, tokenizer)
    if adapter:
        section = (recipe.adapter or AdapterSection()).model_copy(update={"init_from": found.path})
        model = attach_adapter(model, section, tokenizer=tokenizer, checkpointing=False)
    trainer = evaluating(recipe, model, facts, pairs, tokenizer)
    return OpenRun(found, recipe, model, tokenizer, pairs, trainer, sources)


def made_up(found: Found, data: str | None, path: str) -> Recipe:
    """A recipe for what came without one: its model, and the pairs given."""
    if data is None:
        raise RequestError(
            f"{path}: there is no recipe.yaml, so nothing says which pairs are held out; give --data FILE"
        )
    content = {"name": "given", "model": found.model.model_dump(), "data": {"train": data}}
    return Recipe.parse(content | ({} if found.kind == "adapter" else {"adapter": None}), path)


def evaluating(recipe: Recipe, model: Any, facts: BaseFacts, pairs: Pairs, tokenizer: Any) -> ORPOTrainer:
    """A trainer that only evaluates."""
    with tempfile.TemporaryDirectory() as scratch:
        args = arguments(recipe, Path(scratch), facts, has_eval=True, checkpointing=0)
        trainer = ORPOTrainer(model, args, None, None, pairs.eval, tokenizer)
    trainer.remove_callback(PrinterCallback)  # with TRANSFORMERS_VERBOSITY=error it would print between lines of JSON
    return trainer
