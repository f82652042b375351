"""A recipe's model on the meta device, with the shapes and dtypes of training and no memory; and its optimizer's states."""

import copy
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from orpo_lite.common.errors import RequestError
from orpo_lite.common.text import nearest
from orpo_lite.model.adapter import attach_adapter, lora_config, prepare_frozen, wrap
from orpo_lite.model.base import adapt_shipped, attention_for, shipped_quantization
from orpo_lite.model.inspection import check_decoder_only
from orpo_lite.model.locating import continued_folder
from orpo_lite.model.precision import four_bits
from orpo_lite.objective.layout import cut_layers
from orpo_lite.plan.allocations import ADAPTER, BASE, CONSTANTS, ENDS, Timeline
from orpo_lite.recipe import AdapterSection, ModelSection, Recipe
from orpo_lite.recipe.loading import resolve_path

CONFIGS = Path(__file__).parent / "configs"
"""Configurations of the recipes' base models, so that plans need no download; `<org>--<model>.json` is named after a hub id."""


def shipped_config(name: str) -> PretrainedConfig | None:
    """Return a new configuration of a hub id whose published config.json's values ship in configs/; None for any other."""
    file = CONFIGS / f"{name.replace('/', '--')}.json"
    return AutoConfig.for_model(**json.loads(file.read_text("utf-8"))) if file.is_file() else None


def find_config(spec: ModelSection) -> PretrainedConfig:
    """Find the configuration of a recipe's base: shipped with the kit, in a folder, a config file, or the hub's cache.

    Raises:
        RequestError: none of these, since nothing is downloaded; or an encoder-decoder.
    """
    name = os.path.expanduser(resolve_path(spec.name_or_path))
    options: dict[str, Any] = {"gguf_file": spec.gguf_file} if spec.gguf_file else {}
    if not os.path.exists(name):
        options["revision"] = spec.revision
    try:
        config = shipped_config(name) or AutoConfig.from_pretrained(
            name, trust_remote_code=spec.trust_remote_code, local_files_only=True, **options
        )
    except (OSError, ValueError) as error:
        raise RequestError(
            f"model.name_or_path: no configuration of {spec.name_or_path} here, and a plan downloads nothing: give a model "
            f"folder or its config.json, or fetch that file once (hf download {spec.name_or_path} config.json)"
        ) from error
    check_decoder_only(config, f"model.name_or_path: {spec.name_or_path}")
    return config


def build(recipe: Recipe, config: PretrainedConfig, dtype: torch.dtype, layers: int | None, recompute: bool) -> Any:
    """Build base and adapter on the meta device, with the functions that training uses.

    Args:
        layers: keep only this many of the decoder's layers; None keeps all.
        recompute: any layer checkpoints its activations.

    Raises:
        RequestError: an unsupported quantization, or an adapter that does not match the model.
    """
    config = copy.deepcopy(config)
    settings = quantization(recipe.model, config, dtype)
    config._attn_implementation = attention_for(config, recipe.model.attention)
    if layers is not None:
        cut_layers(config.get_text_config(decoder=True), layers)
    vars(config).pop("quantization_config", None)  # applied below, on the meta device
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if settings is not None:
        # bitsandbytes' table of codes, filled from a meta tensor, would spoil real quantization
        with mock.patch.dict("bitsandbytes.functional.name2qmap"):
            quantize(model, settings, dtype)
    with torch.device("meta"):
        model = attach(model, recipe, recompute)
    return model.train()


def quantization(spec: ModelSection, config: PretrainedConfig, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Return how the frozen base is quantized; None for 16 or 32 bits."""
    shipped = shipped_quantization(config)
    if shipped and shipped.get("quant_method") != "bitsandbytes":
        raise RequestError(
            f"model.name_or_path: {spec.name_or_path} is quantized with {shipped.get('quant_method')}, which cannot be "
            "planned: use the repository with the 16-bit weights"
        )
    if shipped:
        adapt_shipped(spec.name_or_path, shipped, dtype)
        known: dict[str, Any] = {k: v for k, v in shipped.items() if k.startswith(("load_in", "bnb_4bit"))}
        return BitsAndBytesConfig(**known)
    return None if spec.quantization == "none" else four_bits(spec, dtype)


def quantize(model: PreTrainedModel, settings: BitsAndBytesConfig, dtype: torch.dtype) -> None:
    """Insert bitsandbytes' own layers where transformers' quantizer would, with quantized meta weights."""
    from bitsandbytes.nn.modules import Linear4bit
    from transformers.quantizers.auto import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(settings)
    quantizer._process_model_before_weight_loading(model, device_map=None)
    model.hf_quantizer = quantizer  # type: ignore[attr-defined]  # as from_pretrained sets it
    for module in model.modules():
        if isinstance(module, Linear4bit):
            weight: Any = module.weight
            weight.data = weight.data.to(dtype)
            weight._quantize("meta")
    model.is_loaded_in_4bit = settings.load_in_4bit  # type: ignore[attr-defined]


def attach(model: PreTrainedModel, recipe: Recipe, recompute: bool) -> Any:
    """Attach the recipe's adapter without its special initialization, since only shapes matter."""
    section = recipe.adapter
    if section is not None and section.init_from:
        config = lora_config(str(continued_folder(section.init_from)))
        config.init_lora_weights = True
        adapted = wrap(model, config)
        prepare_frozen(adapted)
        if recompute:
            model.enable_input_require_grads()
        return adapted
    plain: AdapterSection | None = section and section.model_copy(
        update={"init_lora_weights": section.init_lora_weights is not False}
    )
    # all that attaching asks of a tokenizer: new tokens, each a row after the existing ones
    embeddings: Any = model.get_input_embeddings()
    new, rows = list(recipe.model.new_tokens), embeddings.weight.shape[0]
    tokenizer = SimpleNamespace(orpo_lite_new_tokens=new, convert_tokens_to_ids=lambda token: rows + new.index(token))
    return attach_adapter(model, plain, tokenizer=tokenizer, checkpointing=recompute)  # type: ignore[arg-type]


def decoder_layers(model: Any) -> nn.ModuleList | None:
    """Return a model's list of decoder layers; None unless there is exactly one of the length that the config names."""
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    found = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and all(hasattr(layer, "gradient_checkpointing") for layer in module)
    ]
    return found[0] if len(found) == 1 else None


def layer_signatures(model: Any) -> list[str]:
    """Describe each layer's modules and settings, so that equal layers have equal texts."""
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


def hold_model(timeline: Timeline, model: Any) -> None:
    """Log the model's tensors with their purposes."""
    ends = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    for name, module in model.named_modules():
        at_an_end = module in ends or isinstance(module, nn.Embedding)
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                continue
            adapter = "lora_" in name + key or (tensor.requires_grad and isinstance(model, PeftModel))
            timeline.hold(tensor, ADAPTER if adapter else ENDS if at_an_end else BASE)
            for constant in constants(tensor):
                timeline.hold(constant, CONSTANTS)


def constants(weight: Tensor) -> list[Tensor]:
    """Return the tensors that bitsandbytes keeps beside a quantized weight."""
    state: Any = getattr(weight, "quant_state", None)
    found = []
    if state is not None:
        found += [state.absmax, state.code, state.offset]
        if state.nested:
            found += [state.state2.absmax, state.state2.code]
    return [tensor for tensor in found if isinstance(tensor, Tensor)]


STATES = {"adamw": 2, "adam": 2, "lamb": 2, "ademamix": 3, "lion": 1, "rmsprop": 1, "adagrad": 1, "sgd": 0,
          "stable_adamw": 2, "schedule_free_adamw": 2, "schedule_free_radam": 2, "schedule_free_sgd": 1}  # fmt: skip
"""Numbers that an optimizer keeps per trained weight, by its family's name."""
SMALL_8BIT, BLOCK_8BIT, CODES = 4096, 256, 2 * 256 * 4
"""bitsandbytes keeps 32-bit states for tensors with fewer elements, one float32 scale per block, and two code tables."""
SMALL_PAGED = 100_000
"""bitsandbytes pages only tensors with at least this many elements."""


@dataclass(frozen=True)
class OptimizerStates:
    """Bytes of an optimizer."""

    device: int
    """On the card, at all times after the first step."""
    host: int
    """Paged: in the host's memory, moved to the card for a step where there is room."""
    step: int
    """On the card only during a step."""
    why: str


def optimizer_states(optim: str, trained: Iterable[Tensor], cuda: bool) -> OptimizerStates:
    """Count the states of one of transformers' optimizers over trained float32 tensors.

    Args:
        optim: a name of TrainingArguments.optim.
        cuda: it runs on a GPU; on the CPU there is no paging, and adamw_torch replaces 8-bit optimizers.

    Raises:
        RequestError: an optimizer whose states are not known here.
    """
    trained = list(trained)
    sizes = [tensor.numel() for tensor in trained]
    if "8bit" in optim and not cuda:
        optim = "adamw_torch"
    paged, eight = optim.startswith("paged_") and cuda, "8bit" in optim
    endings = "_8bit|_32bit|_bnb|_torch_fused|_torch|_apex_fused|_anyprecision"
    family = re.sub(f"({endings})+$", "", optim.removeprefix("paged_"))
    if family == "adafactor":
        rows = sum(sum(t.shape) if t.ndim > 1 else t.numel() for t in trained)
        return OptimizerStates(4 * rows, 0, 4 * max(sizes, default=0), "adafactor: a row and a column per matrix")
    if family not in STATES:
        raise RequestError(
            f"training.optim: the states of {optim} are not known, so it cannot be planned{nearest(family, STATES)}; known: "
            f"{', '.join(STATES)}, with _8bit, paged_ and _torch as transformers spells them"
        )
    count = STATES[family]
    device = host = 0
    for size in sizes:
        held = count * 4 * size
        if eight and size >= SMALL_8BIT:
            held = count * (size + 4 * -(-size // BLOCK_8BIT))
        if paged and size >= SMALL_PAGED:
            host += held
        else:
            device += held
    device += CODES if eight else 0
    # torch's plain AdamW takes the square roots of all second moments at once on a GPU
    step = 4 * sum(sizes) if optim in ("adamw_torch", "adam_torch") and cuda else 0
    why = f"{optim}: {count} {8 if eight else 32}-bit states" + (", paged in the host's memory" if paged else "")
    return OptimizerStates(device, host, step, why)
