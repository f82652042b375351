"""LoRA and its relatives on a base: attach, continue, save."""

from __future__ import annotations

import logging
import os
import re
import warnings
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from orpo_lite.common.errors import RequestError
from orpo_lite.model import adapter_targets
from orpo_lite.model.base import grow_embeddings, grow_vocabulary, rows_for_new_tokens
from orpo_lite.model.inspection import base_name, base_revision, is_quantized, outside_text, routers
from orpo_lite.model.locating import adapter_folder, check_no_adapter_is_lost, hub_errors_in_words, renaming_field
from orpo_lite.model.untrusted_files import ADAPTER_WEIGHTS, check_adapter
from orpo_lite.recipe import AdapterSection
from orpo_lite.recipe.loading import resolve_path

logger = logging.getLogger(__name__)

SAME_IN_PEFT = {"r", "target_parameters", "modules_to_save", "rank_pattern", "alpha_pattern", "bias", "use_rslora",
                "use_dora", "init_lora_weights"}  # fmt: skip
"""Fields of the adapter section that PEFT calls the same."""
CHANGES_BASE = ("pissa", "olora")
"""Initializations of foreign adapters that took the starting product out of their base weights."""
CANNOT_REPEAT = ("corda", "loftq", "lora_ga")
"""Initializations of foreign adapters that changed their base in a way that the adapter alone does not record."""


def attach_adapter(
    model: PreTrainedModel,
    adapter: AdapterSection | None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    checkpointing: bool = False,
) -> PeftModel | PreTrainedModel:
    """Make a base trainable: a new LoRA adapter, an existing one to continue, or (None) all of its weights.

    Trainable parameters are float32 whatever the base computes in: 16-bit ones round small updates away, and loss
    scaling refuses float16 gradients.

    Args:
        tokenizer: from load_tokenizer; its new tokens get trained embeddings.
        checkpointing: activations will be recomputed, so gradients must start at the embeddings.

    Raises:
        RequestError: modules that do not exist, full fine-tuning on a quantized base, an existing adapter that does not
            fit.
    """
    if tokenizer is not None:
        grow_vocabulary(model, tokenizer)
    if adapter is None:
        if is_quantized(model):
            raise RequestError(
                "adapter: null asks for full fine-tuning, but the base is quantized and quantized weights cannot be "
                "trained: set model.quantization=none on an unquantized model, or give an adapter"
            )
        return model.float().requires_grad_(True)
    if adapter.init_from:
        peft_model = load_adapter(model, adapter.init_from, trainable=True)
        kept: LoraConfig = peft_model.peft_config["default"]  # type: ignore[assignment]  # load_adapter takes no other
        logger.info(f"adapter: continuing {adapter.init_from} with its own shape, r={kept.r} alpha={kept.lora_alpha}")
    else:
        peft_model = new_adapter(model, adapter, tokenizer)
    prepare_frozen(peft_model)
    if checkpointing:
        model.enable_input_require_grads()
    return peft_model


def new_adapter(
    model: PreTrainedModel, adapter: AdapterSection, tokenizer: PreTrainedTokenizerBase | None
) -> PeftModel:
    """Attach a new adapter as the recipe's section says."""
    avoid = {name for name in routers(model) if not adapter_targets.is_named(adapter, name)} | outside_text(model)
    targets = adapter.target_modules
    if targets in ("all-linear", ["all-linear"]):
        targets = adapter_targets.all_linear(model, avoid)
    adapter_targets.check_named(model, adapter, targets)
    config = LoraConfig(
        **adapter.model_dump(include=SAME_IN_PEFT),
        task_type="CAUSAL_LM",
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # PEFT scales by any number
        lora_dropout=adapter.dropout,
        target_modules=targets,
        exclude_modules=adapter_targets.excluded(model, adapter, avoid),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        trainable_token_indices=adapter_targets.token_rows(model, adapter, tokenizer),
        revision=base_revision(model),
    )
    peft_model = wrap(model, config)
    adapter_targets.check_patterns(peft_model, adapter)
    return peft_model


def wrap(model: PreTrainedModel, config: LoraConfig, **options: Any) -> PeftModel:
    """Call get_peft_model, and raise what PEFT refuses as a RequestError."""
    with warnings.catch_warnings():
        # PEFT asks transformers for a property that 5.23 renamed
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        try:
            return get_peft_model(model, config, **options)  # type: ignore[return-value]  # never the mixed kind here
        except (ValueError, TypeError, NotImplementedError, AttributeError, re.error) as error:
            raise RequestError(f"adapter: {' '.join(str(error).split())}") from error


def prepare_frozen(model: PeftModel) -> None:
    """Turn trained parameters into float32, and the norms of a quantized base too.

    PEFT's prepare_model_for_kbit_training also turns embeddings and output head to float32, 2 GB more for Llama-3-8B
    on a 16 GB card; QLoRA's own code keeps those in the compute dtype, as here.
    """
    norms_too = is_quantized(model)
    for module in model.modules():
        norm = norms_too and "norm" in type(module).__name__.lower()
        for parameter in module.parameters(recurse=False):
            wanted = parameter.requires_grad or norm
            if wanted and parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()


def load_adapter(model: PreTrainedModel, source: str | Path, *, trainable: bool = False) -> PeftModel:
    """Put an existing LoRA adapter (folder or hub id) on a base, with every one of its tensors.

    Unlike PeftModel.from_pretrained, keys that the adapter lacks or the base has no place for are errors, and the
    adapter is never rounded to the base's 16 bits on the way.

    Raises:
        RequestError: no such adapter, not LoRA, or shapes and names that do not fit this base.
    """
    source = str(adapter_folder(resolve_path(str(source))))
    config = lora_config(source)
    init = str(config.init_lora_weights).lower()
    if init.startswith(CANNOT_REPEAT) or (init.startswith(CHANGES_BASE) and is_quantized(model)):
        raise RequestError(changed_base(source, init))
    if not init.startswith(CHANGES_BASE):
        config.init_lora_weights = True  # the weights come from the file; EVA and others would warn or compute
    config.auto_mapping = None  # names a library to import; a run's own adapter must not pass it on
    trained_on, config.base_model_name_or_path = config.base_model_name_or_path, None
    if trained_on and base_name(model) and trained_on != base_name(model):
        check_no_adapter_is_lost(trained_on, base_name(model), source, config.revision)
        logger.warning(f"adapter: {source} was trained on {trained_on}; here its base is {base_name(model)}")
    config.inference_mode = not trainable
    grow_embeddings(model, vocabulary_rows(model, source, config))
    misfit = f"adapter: {source} does not fit {base_name(model)}, so check that this is its base: "
    try:
        with renaming_field("adapter"), hub_errors_in_words(source):
            peft_model = wrap(model, config)
            result = peft_model.load_adapter(source, "default", is_trainable=trainable)
    except (RequestError, RuntimeError, SafetensorError) as error:
        raise RequestError(misfit + shorten(str(error).removeprefix("adapter: "), 400)) from error
    wrong = [f"it lacks {key}" for key in result.missing_keys]
    wrong += [f"the base has no place for {key}" for key in result.unexpected_keys]
    if wrong:
        raise RequestError(f"{misfit}{len(wrong)} tensor(s) differ, first: {wrong[0]}")
    return peft_model


def lora_config(source: str) -> LoraConfig:
    """Read the configuration of an existing adapter.

    Raises:
        RequestError: no adapter there, or not LoRA.
    """
    folder = Path(source)
    if not os.path.isdir(folder):
        raise RequestError(
            f"adapter: there is no folder {source}: give the folder of an adapter, or a hub id USER/NAME"
        )
    check_adapter(folder)
    with renaming_field("adapter"), hub_errors_in_words(source):
        return PeftConfig.from_pretrained(source)  # type: ignore[return-value]  # the check takes no other


def changed_base(source: str, init: str) -> str:
    """Say why an adapter with such an initialization does not fit an unchanged base."""
    return (
        f"adapter: {source} was initialized with {init}, which changed its base weights, and this base does not have "
        "that change: save it as a plain LoRA first (PEFT's path_initial_model_for_weight_conversion)"
    )


def vocabulary_rows(
    model: PreTrainedModel, source: str | Path, config: LoraConfig, tokenizer: PreTrainedTokenizerBase | None = None
) -> int:
    """Return how many rows the embeddings of a base have under an adapter.

    They are those of the adapter's own tensors for them, else the base's and as many more as new tokens need: those of the
    tokenizer, and those whose embeddings the adapter trains.
    """
    ends: list[Any] = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    names = {name for name, module in model.named_modules() if any(module is end for end in ends)}
    held: set[int] = set()
    with safe_open(Path(source) / ADAPTER_WEIGHTS, "pt") as file:
        for key in file.keys():  # noqa: SIM118  # no dict
            path, _, leaf = bare(key.removeprefix("base_model.model.")).replace(".modules_to_save", "").rpartition(".")
            if leaf == "weight" and path.removesuffix(".lora_B") in names:
                held.add(file.get_slice(key).get_shape()[0])
            elif leaf == "lora_embedding_A" and path in names:
                held.add(file.get_slice(key).get_shape()[1])
    added = rows_for_new_tokens(tokenizer) if tokenizer is not None else 0
    return max(held, default=max(len(ends[0].weight), added, 1 + max(trained_rows(config), default=-1)))


def bare(path: str) -> str:
    """Return a module's path without PEFT's wrappers."""
    for word in ("base_layer", "original_module", "token_adapter"):
        path = path.replace(f".{word}", "").removeprefix(f"{word}.")
    return path


def trained_rows(config: LoraConfig) -> list[int]:
    """List the ids of the tokens whose embeddings are in the adapter itself."""
    rows = config.trainable_token_indices or []
    return [row for ids in (rows.values() if isinstance(rows, dict) else [rows]) for row in ids]


def save_adapter(model: nn.Module, folder: str | Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Write the adapter as PEFT's own files; a fully fine-tuned model as transformers' own.

    Args:
        weights: the trained weights, gathered, where the model itself holds shards of them.
    """
    if not isinstance(model, PeftModel):
        model.save_pretrained(str(folder), state_dict=weights)  # type: ignore[operator]  # a transformers model
        return
    # "auto" asks the hub whether the vocabulary grew; new tokens' rows are in the adapter as it is
    model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=weights)
