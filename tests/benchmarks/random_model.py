"""A random model of a base's shape, so that benchmarks need no weights."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from orpo_lite.model import load_tokenizer
from orpo_lite.plan.meta_model import find_config
from orpo_lite.recipe import Recipe


@contextlib.contextmanager
def random_model(recipe: Recipe, layers: int) -> Iterator[Recipe]:
    """Give the recipe a random model of its base's shape with `layers` layers, so that no weights are needed."""
    tokenizer = load_tokenizer(recipe.model, recipe.adapter and recipe.adapter.init_from)
    config: Any = find_config(recipe.model)
    decoder = config.get_text_config(decoder=True)
    decoder.num_hidden_layers = layers
    if getattr(decoder, "layer_types", None):
        decoder.layer_types = decoder.layer_types[:layers]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        section = recipe.model.model_copy(update={"name_or_path": folder, "gguf_file": None, "revision": None})
        yield recipe.model_copy(update={"model": section})
