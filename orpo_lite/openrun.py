"""A finished run brought back: base, adapter, tokenizer and held-out pairs, ready to be evaluated."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PrinterCallback

from orpo_lite.data import Pairs, load_pairs
from orpo_lite.errors import RequestError
from orpo_lite.evaluate import base_only
from orpo_lite.model import attach_adapter, load_base, load_tokenizer
from orpo_lite.model.base import read_config
from orpo_lite.recipe import DataSource, Recipe
from orpo_lite.runfolder import RunFolder
from orpo_lite.settings import arguments
from orpo_lite.trainer import ORPOTrainer


@dataclass
class OpenRun:
    """A run folder brought back: model with adapter, tokenizer, pairs, and a trainer to evaluate with."""

    folder: RunFolder
    recipe: Recipe
    model: Any
    tokenizer: Any
    pairs: Pairs
    trainer: ORPOTrainer

    def base(self) -> contextlib.AbstractContextManager[None]:
        """The base alone, the adapter switched off."""
        return base_only(self.model)


def open_run(path: str, data: str | None = None, trust_remote_code: bool = False) -> OpenRun:
    """Load a run folder for evaluation; `data` replaces its held-out pairs.

    Code of the base's repository is run only where the caller says so: the folder may be anybody's.

    Raises:
        RequestError: not a run folder, full fine-tuning (there is no adapter to switch off), or unusable data.
    """
    folder = RunFolder.open(path)
    folder.read()  # an unfinished run holds no adapter
    recipe = folder.recipe()
    recipe.model.trust_remote_code = trust_remote_code
    if recipe.adapter is None:
        raise RequestError(
            f"{path}: a full fine-tuning has no adapter to switch off; evaluate the two models by their paths"
        )
    tokenizer = load_tokenizer(
        recipe.model.model_copy(update={"name_or_path": path, "gguf_file": None, "revision": None})
    )
    if data is not None:
        recipe.data.eval = [DataSource(path=data)]
    encoder_decoder = bool(read_config(recipe.model).is_encoder_decoder)
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
    base, facts = load_base(recipe.model, tokenizer)
    adapter = recipe.adapter.model_copy(update={"init_from": path})
    model = attach_adapter(base, adapter, tokenizer=tokenizer, checkpointing=False)
    with tempfile.TemporaryDirectory() as scratch:
        args = arguments(recipe, Path(scratch), facts, has_eval=True, checkpointing=0)
        trainer = ORPOTrainer(model, args, None, None, pairs.eval, tokenizer)
    trainer.remove_callback(PrinterCallback)  # with TRANSFORMERS_VERBOSITY=error it would print between lines of JSON
    return OpenRun(folder, recipe, model, tokenizer, pairs, trainer)
