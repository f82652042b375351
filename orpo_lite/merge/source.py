"""What an adapter names: the base it belongs to, the tokenizer and the dtype it was trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orpo_lite.recipe import ModelSection
from orpo_lite.trainer.run_folder import RunFolder, base_section


def as_trained(source: Path, trust_remote_code: bool = False) -> ModelSection | None:
    """The base of training where it was quantised, else None."""
    spec = base_section(source, None, trust_remote_code)
    return spec if spec.quantization != "none" else None


def trained_dtype(source: Path, spec: ModelSection) -> Any:
    """Compute dtype of the run, where run.json or the recipe says so, else float32."""
    known = spec.dtype
    if (source / "run.json").is_file():
        known = RunFolder(source).read().get("base_model", {}).get("dtype", known)
    # float16 cannot be asked for on the CPU; it rounds stored weights far less than 4 bits do
    return known if known == "bfloat16" else "float32"
