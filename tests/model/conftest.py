"""Tiny random base models on disk, one folder a family, and adapters that are not zero."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    Gemma2Config,
    GPT2Config,
    GraniteMoeConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from orpo_lite.model import attach_adapter, load_base
from orpo_lite.recipe import AdapterSection, ModelSection
from tests.tiny import tiny_model, tiny_tokenizer

VOCABULARY = 420
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": 0,
    "initializer_range": 0.2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama-tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
    "gemma2": lambda: Gemma2Config(**SIZES, head_dim=16),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    ),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=16),
    "qwen2_moe": lambda: Qwen2MoeConfig(**SIZES, **EXPERTS, shared_expert_intermediate_size=64),
    "granitemoe": lambda: GraniteMoeConfig(**SIZES, num_local_experts=4),
}


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory) -> Callable[[str], Path]:
    """Name of a family -> folder with a random model of it and a tokenizer; built once."""
    built: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in built:
            built[family] = tmp_path_factory.mktemp(family)
            tiny_model(CONFIGS[family]()).save_pretrained(built[family])
            tiny_tokenizer(eos="</s>", pad="<pad>").save_pretrained(built[family])
        return built[family]

    return folder


@pytest.fixture
def section(base_folder) -> Callable[..., ModelSection]:
    """section(family, **fields): the recipe's model section for a tiny base, not quantized unless it says so."""

    def make(family: str, **fields: Any) -> ModelSection:
        return ModelSection(**{"name_or_path": str(base_folder(family)), "quantization": "none"} | fields)

    return make


@pytest.fixture
def attach(section):
    """attach(family, quantization, **adapter fields) -> PeftModel."""

    def make(family, quantization="none", checkpointing=False, **fields):
        model, _ = load_base(section(family, quantization=quantization))
        return attach_adapter(model, AdapterSection(**{"r": 4} | fields), checkpointing=checkpointing)

    return make


PEFTS = {"bias", "rank_pattern", "alpha_pattern"}
"""Options of LoRA that adapters of others have, and a recipe's section has not."""


def with_adapter(base: Any, tokenizer: Any = None, **fields: Any) -> Any:
    """Attach an adapter as a recipe does, or as PEFT does where an option is PEFT's alone; with its recipe section."""
    adapter = AdapterSection(**{"r": 4} | {key: value for key, value in fields.items() if key not in PEFTS})
    if not PEFTS & fields.keys():
        return attach_adapter(base, adapter, tokenizer=tokenizer), adapter
    config = LoraConfig(**{"r": 4, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | fields)
    return get_peft_model(base, config), adapter


@torch.no_grad()
def disturb(model: torch.nn.Module, scale: float = 0.1) -> None:
    """Move every trainable parameter, as training would."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += scale * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def logits(model: PreTrainedModel | torch.nn.Module) -> torch.Tensor:
    """Logits of a fixed sentence."""
    tokens = torch.arange(5, 25)[None]
    return model.eval()(input_ids=tokens).logits
