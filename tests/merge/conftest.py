"""Bases on disk with PEFT adapters beside them, and what PEFT makes of the pair in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.model.conftest import base_folder, disturb, section  # noqa: F401  # fixtures


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every stored tensor of a model folder."""
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in tensors(file).items()}


def tensors(file: Path) -> dict[str, torch.Tensor]:
    """Read a file's tensors, copied, since older safetensors write in place where a test writes the file again."""
    return {key: value.clone() for key, value in load_file(file).items()}


@pytest.fixture(autouse=True)
def verified(monkeypatch):
    """Every model of these tests can be run from its files, so that each merge is checked."""
    from orpo_lite.merge import run

    def check(*given, **options):
        notes = check_merged(*given, **options)
        assert not notes[0].startswith("not verified"), notes
        return notes

    check_merged = run.check_merged
    monkeypatch.setattr(run, "check_merged", check)


@pytest.fixture
def adapted(base_folder, tmp_path):  # noqa: F811
    """adapted(family, dtype, shard_size, **LoraConfig) -> (model with adapter in memory, base folder, adapter folder)."""

    def make(
        family: str, dtype: torch.dtype = torch.float32, shard_size: str = "50GB", **lora: Any
    ) -> tuple[PeftModel, Path, Path]:
        base = tmp_path / "base"
        if not base.exists():
            model = AutoModelForCausalLM.from_pretrained(base_folder(family), dtype=dtype)
            model.save_pretrained(base, max_shard_size=shard_size)
            AutoTokenizer.from_pretrained(base_folder(family)).save_pretrained(base)
        torch.manual_seed(0)
        config = LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | lora)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), config)
        disturb(model)
        adapter = tmp_path / "adapter"
        model.save_pretrained(adapter)
        return model.eval(), base, adapter

    return make
