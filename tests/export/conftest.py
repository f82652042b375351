"""Model folders to export, and adapters of them; the GGUF converter, skipped where it cannot be had."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, MistralConfig, Phi3Config, Qwen3Config

from orpo_lite.common.errors import RequestError
from orpo_lite.export.llama_cpp import converter_folder
from orpo_lite.model import load_base, load_tokenizer, save_adapter
from orpo_lite.recipe import ModelSection
from tests.model.conftest import CONFIGS, SIZES, disturb, with_adapter
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training import CHATML

FAMILIES: dict[str, Callable[[], Any]] = CONFIGS | {
    "mistral": lambda: MistralConfig(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16),
    "phi3": lambda: Phi3Config(**SIZES, pad_token_id=1),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, head_dim=16),
}


@pytest.fixture(scope="session")
def converter() -> Path:
    try:
        return converter_folder()
    except RequestError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Callable[[str], Path]:
    """Name of a family -> folder with a random model and a tokenizer with a ChatML template; built once."""
    built: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in built:
            built[family] = tmp_path_factory.mktemp("models") / f"tiny-{family}"
            tiny_model(FAMILIES[family]()).save_pretrained(built[family])
            tokenizer = tiny_tokenizer(("<|im_start|>", "<|im_end|>"), CHATML, eos="</s>", pad="<pad>")
            tokenizer.save_pretrained(built[family])
        return built[family]

    return folder


@pytest.fixture
def adapter_folder(model_folder, tmp_path) -> Callable[..., tuple[Any, Path]]:
    """adapter_folder(family, **adapter fields) -> (adapter model after some 'training', its folder)."""

    def make(family: str, **fields: Any) -> tuple[Any, Path]:
        spec = ModelSection(name_or_path=str(model_folder(family)), quantization="none")
        torch.manual_seed(0)
        model, _ = with_adapter(load_base(spec)[0], **fields)
        disturb(model)
        folder = tmp_path / f"adapter-{family}"
        save_adapter(model, folder)
        load_tokenizer(spec).save_pretrained(folder)
        return model, folder

    return make
