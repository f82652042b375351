"""The model of a recipe on the meta device: shapes and dtypes as training has them, and no memory."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from orpo_lite.common.errors import RequestError
from orpo_lite.model.adapter import attach_adapter, lora_config, prepare_frozen, wrap
from orpo_lite.model.base import shipped_quantization
from orpo_lite.model.precision import BACKENDS
from orpo_lite.plan.allocations import ADAPTER, BASE, CONSTANTS, ENDS, Timeline
from orpo_lite.plan.configs import base_config
from orpo_lite.plan.kernels import Target
from orpo_lite.recipe import AdapterSection, ModelSection, Recipe
from orpo_lite.recipe.loading import resolve_path


def find_config(spec: ModelSection) -> PretrainedConfig:
    """Configuration of a recipe's base: one that travels with the kit, a folder, a config file, or the hub's cache.

    Raises:
        RequestError: none of these; nothing is downloaded.
    """
    name = resolve_path(spec.name_or_path)
    path = Path(name).expanduser()
    try:
        if spec.gguf_file and path.is_dir():
            return AutoConfig.from_pretrained(path, gguf_file=spec.gguf_file, trust_remote_code=False)
        if path.suffix == ".json" and path.is_file():
            return AutoConfig.from_pretrained(path, trust_remote_code=False)
        found = base_config(name)
        return found or AutoConfig.from_pretrained(
            name, revision=spec.revision, trust_remote_code=spec.trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise RequestError(
            f"model.name_or_path: no configuration of {spec.name_or_path} here, and a plan downloads nothing: give a model "
            f"folder or its config.json, or fetch that file once (hf download {spec.name_or_path} config.json)"
        ) from error


def compute_dtype(spec: ModelSection, target: Target) -> torch.dtype:
    """dtype that `choose_precision` takes on the target, which need not be here.

    Raises:
        RequestError: float16 on the CPU.
    """
    if target.kind == "cpu" and spec.dtype == "float16":
        raise RequestError("model.dtype: found float16, but the CPU cannot train in it: set model.dtype=auto")
    native = "float32" if target.kind == "cpu" else "bfloat16" if target.capability >= (8, 0) else "float16"
    return getattr(torch, native if spec.dtype == "auto" else spec.dtype)


def build(recipe: Recipe, config: PretrainedConfig, dtype: torch.dtype, layers: int | None, recompute: bool) -> Any:
    """Base and adapter on the meta device, by the functions that training uses.

    Args:
        layers: keep only so many of the decoder's layers; None keeps all.
        recompute: whether any layer checkpoints its activations.

    Raises:
        RequestError: a quantisation that a plan does not know, or an adapter that does not fit.
    """
    config = copy.deepcopy(config)
    settings = quantization(recipe.model, config, dtype)
    config._attn_implementation = None if recipe.model.attention == "auto" else recipe.model.attention
    vars(config).pop("quantization_config", None)  # applied below, on the meta device
    auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config, dtype=dtype)
    if layers is not None:
        shorten(model, layers)
    if settings is not None:
        with real_code_map():
            quantise(model, settings, dtype)
    with torch.device("meta"):
        model = attach(model, recipe, recompute)
    return model.train()


def quantization(spec: ModelSection, config: PretrainedConfig, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """How the frozen base is held; None for 16 or 32 bits."""
    shipped = shipped_quantization(config)
    if shipped and shipped.get("quant_method") != "bitsandbytes":
        raise RequestError(
            f"model.name_or_path: {spec.name_or_path} is quantised with {shipped.get('quant_method')}, which cannot be "
            "planned: take the repository with the 16-bit weights"
        )
    if shipped:
        known: dict[str, Any] = {k: v for k, v in shipped.items() if k.startswith(("load_in", "bnb_4bit"))}
        known["bnb_4bit_compute_dtype"] = dtype
        return BitsAndBytesConfig(**known)
    return None if spec.quantization == "none" else BACKENDS[spec.quantization].settings(spec, dtype, False)


@contextlib.contextmanager
def real_code_map() -> Iterator[None]:
    """Leave bitsandbytes' table of codes as it was: filled from a meta tensor, it would poison real quantisation."""
    from bitsandbytes.functional import name2qmap

    kept = dict(name2qmap)
    try:
        yield
    finally:
        name2qmap.clear()
        name2qmap.update(kept)


def quantise(model: PreTrainedModel, settings: BitsAndBytesConfig, dtype: torch.dtype) -> None:
    """Put bitsandbytes' own layers in, chosen by transformers' quantiser, with quantised meta weights."""
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn.modules import Int8Params, Linear4bit, Linear8bitLt, Params4bit
    from transformers.quantizers.auto import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(settings)
    quantizer._process_model_before_weight_loading(model, device_map=None)
    model.hf_quantizer = quantizer  # type: ignore[attr-defined]  # as from_pretrained sets it
    make: Any = Params4bit  # its arguments are those of __new__
    for module in model.modules():
        weight: Any = getattr(module, "weight", None)
        if isinstance(module, Linear4bit):
            full = torch.empty(module.out_features, module.in_features, dtype=dtype, device="meta")
            packed, state = quantize_4bit(
                full,
                blocksize=weight.blocksize,
                compress_statistics=weight.compress_statistics,
                quant_type=weight.quant_type,
            )
            module.weight = make(packed, requires_grad=False, quant_state=state, bnb_quantized=True,
                                              compress_statistics=weight.compress_statistics,
                                              quant_type=weight.quant_type, module=module)  # fmt: skip
            module.quant_state = state  # type: ignore[assignment]  # None in its class
        elif isinstance(module, Linear8bitLt):
            codes = torch.empty(module.out_features, module.in_features, dtype=torch.int8, device="meta")
            scales = torch.empty(module.out_features, dtype=torch.float32, device="meta")
            module.weight = Int8Params(codes, requires_grad=False, CB=codes, SCB=scales)  # type: ignore[call-arg]
    model.is_loaded_in_4bit = settings.load_in_4bit  # type: ignore[attr-defined]
    model.is_loaded_in_8bit = settings.load_in_8bit  # type: ignore[attr-defined]


def attach(model: PreTrainedModel, recipe: Recipe, recompute: bool) -> Any:
    """The recipe's adapter, its start left plain: only shapes count."""
    section = recipe.adapter
    if section is not None and section.init_from:
        config = lora_config(resolve_path(section.init_from))
        config.init_lora_weights = True
        adapted = wrap(model, config)
        prepare_frozen(adapted)
        if recompute:
            model.enable_input_require_grads()
        return adapted
    plain: AdapterSection | None = section and section.model_copy(
        update={"init_lora_weights": section.init_lora_weights is not False}
    )
    return attach_adapter(model, plain, tokenizer=_NewTokens(recipe.model, model), checkpointing=recompute)  # type: ignore[arg-type]


class _NewTokens:
    """The little of a tokenizer that attaching an adapter asks for: new tokens, each a row after the others."""

    def __init__(self, spec: ModelSection, model: Any) -> None:
        self.orpo_lite_new_tokens = list(spec.new_tokens)
        self._first = model.get_input_embeddings().weight.shape[0]

    def convert_tokens_to_ids(self, token: str) -> int:
        return self._first + self.orpo_lite_new_tokens.index(token)


# ---- layers ----------------------------------------------------------------------------------------------------------


def decoder_layers(model: Any) -> nn.ModuleList | None:
    """The list of a decoder's layers; None where there is not exactly one of the length that the config says."""
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    found = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and all(hasattr(layer, "gradient_checkpointing") for layer in module)
    ]
    return found[0] if len(found) == 1 and not model.config.is_encoder_decoder else None


def shorten(model: Any, count: int) -> None:
    """Keep a decoder's first layers, and what its config says of them."""
    layers = decoder_layers(model)
    assert layers is not None
    text, whole = model.config.get_text_config(decoder=True), len(layers)
    del layers[count:]
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == whole:
            setattr(text, name, value[:count])
    text.num_hidden_layers = count


def signatures(model: Any) -> list[str]:
    """What each layer is made of and set to, so that like layers have like text."""
    layers = decoder_layers(model)
    if layers is None:
        return []
    text = model.config.get_text_config(decoder=True)
    lists = [value for value in vars(text).values() if isinstance(value, list) and len(value) == len(layers)]
    result = []
    for i, layer in enumerate(layers):
        parts = [str(value[i]) for value in lists]
        for name, module in layer.named_modules():
            settings = {k: v for k, v in vars(module).items() if isinstance(v, str | bool | int | float | None)}
            settings.pop("layer_idx", None)
            shapes = [(k, tuple(p.shape), str(p.dtype)) for k, p in module.named_parameters(recurse=False)]
            parts.append(f"{name} {type(module).__name__} {sorted(settings.items(), key=str)} {shapes}")
        result.append("\n".join(parts))
    return result


# ---- what is held all the time ---------------------------------------------------------------------------------------


def hold_model(timeline: Timeline, model: Any) -> None:
    """Log the model's tensors, each by what it is for."""
    ends = {id(end) for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None}
    for name, module in model.named_modules():
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                continue
            timeline.hold(
                tensor, label_of(model, name + key, tensor, id(module) in ends or isinstance(module, nn.Embedding))
            )
            for constant in constants(tensor):
                timeline.hold(constant, CONSTANTS)


def label_of(model: Any, name: str, tensor: Tensor, at_an_end: bool) -> str:
    """What a tensor of the model is for; at an end are embeddings and head."""
    if "lora_" in name or (tensor.requires_grad and isinstance(model, PeftModel)):
        return ADAPTER
    return ENDS if at_an_end else BASE


def constants(weight: Tensor) -> list[Tensor]:
    """Tensors that bitsandbytes keeps beside a quantised weight."""
    state: Any = getattr(weight, "quant_state", None)
    found = [getattr(weight, "SCB", None)]
    if state is not None:
        found += [state.absmax, state.code, state.offset]
        if state.nested:
            found += [state.state2.absmax, state.state2.code]
    return [tensor for tensor in found if isinstance(tensor, Tensor)]
