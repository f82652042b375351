"""What an adapter names: the base it belongs to, the tokenizer and the dtype it was trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftConfig
from transformers import PreTrainedTokenizerBase

from orpo_lite.common.errors import RequestError
from orpo_lite.model import load_tokenizer
from orpo_lite.model.locating import called, readable
from orpo_lite.recipe import ModelSection, Recipe
from orpo_lite.trainer.run_folder import RunFolder


def base_section(source: Path, base: str | None, trust_remote_code: bool = False) -> ModelSection:
    """The model to merge into: --base, else the run's recipe, else what the adapter names.

    Code of its repository is run only where the caller says so, whatever the folder's recipe does.
    """
    if (source / "recipe.yaml").is_file():
        # by its file: a folder may have the name of a shipped recipe
        spec = Recipe.load(source / "recipe.yaml").model.model_copy(update={"trust_remote_code": trust_remote_code})
        return spec.model_copy(update={"name_or_path": base, "revision": None, "gguf_file": None}) if base else spec
    with called("adapter"), readable(str(source)):
        config = PeftConfig.from_pretrained(str(source))
    name = base or config.base_model_name_or_path
    if not name:
        raise RequestError(f"{source}: adapter_config.json names no base model: give it with --base")
    return ModelSection(name_or_path=name, revision=None if base else config.revision, quantization="none",
                        trust_remote_code=trust_remote_code)  # fmt: skip


def as_trained(source: Path, trust_remote_code: bool = False) -> ModelSection | None:
    """The base of training where it was quantised, else None."""
    spec = base_section(source, None, trust_remote_code)
    return spec if spec.quantization != "none" else None


def tokenizer_of(source: Path, spec: ModelSection) -> PreTrainedTokenizerBase:
    """The tokenizer as trained with, else the base's."""
    if not (source / "tokenizer_config.json").is_file():
        return load_tokenizer(spec)
    return load_tokenizer(spec.model_copy(update={"name_or_path": str(source), "gguf_file": None, "revision": None}))


def trained_dtype(source: Path, spec: ModelSection) -> Any:
    """Compute dtype of the run, where run.json or the recipe says so, else float32."""
    known = spec.dtype
    if (source / "run.json").is_file():
        known = RunFolder(source).read().get("base_model", {}).get("dtype", known)
    # float16 cannot be asked for on the CPU; it rounds stored weights far less than 4 bits do
    return known if known == "bfloat16" else "float32"
