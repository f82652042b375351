"""Questions about a model: its class, routers, quantized share, trainable share, and where it came from."""

import re
from collections import Counter
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from orpo_lite.common.errors import RequestError
from orpo_lite.model.precision import is_quantized_parameter

ROUTER_NAME = re.compile(r"router|gate|gating|.*_gate")
ROUTER_CLASS = re.compile(r"Router|TopK")
MIN_QUANTIZED = 0.95
REPACKING_FLAG = "support_avx512bf16_for_cpu"
"""The attribute by which bitsandbytes' Linear4bit decides whether to repack weights on the CPU."""


def routers(model: nn.Module) -> set[str]:
    """Find the names of the modules that choose or weigh experts, and of everything inside them.

    A router is a sibling of the experts called router, gate or something_gate (a shared expert's gate too), or any
    module whose class says Router or TopK. An MLP's gate_proj is none.
    """
    blocks = {
        name.rpartition(".")[0]
        for name, module in model.named_modules()
        if name and (name.rpartition(".")[2] == "experts" or "Experts" in type(module).__name__)
    }
    found: set[str] = set()
    for name, module in model.named_modules():
        parent, _, last = name.rpartition(".")
        beside_experts = parent in blocks and ROUTER_NAME.fullmatch(last) is not None
        if name and (parent in found or beside_experts or ROUTER_CLASS.search(type(module).__name__)):
            found.add(name)
    return found


def outside_text(model: PreTrainedModel) -> set[str]:
    """Find the names of the modules of a multimodal model that text never passes through: vision and audio towers."""
    if model.config.get_text_config(decoder=True) is model.config:
        return set()
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    text = {id(module) for module in decoder.modules()} | {id(head)}
    above = {name for name, module in model.named_modules() if any(child is decoder for child in module.modules())}
    return {name for name, module in model.named_modules() if id(module) not in text and name not in above}


def keep_4bit_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights, which it does on CPUs with AVX512-BF16.

    At the first pass without gradients its Linear4bit (0.50) packs the weight, rounds its scales to bfloat16, and from
    then on computes it by a kernel without a backward pass, in training too: the gradients of all layers below are lost
    without an error.

    Raises:
        RequestError: an earlier pass has packed them.
    """
    for name, module in model.named_modules():
        if getattr(module, REPACKING_FLAG, False):
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise RequestError(
                    f"model: an earlier pass without gradients has packed 4-bit weights such as {name} for AVX512-BF16, and "
                    "packed weights cannot be trained through: load the model again, and give it to ORPOTrainer before it "
                    "computes anything"
                )
            setattr(module, REPACKING_FLAG, False)


def weight_count(parameter: torch.Tensor) -> int:
    """Count the weights that a parameter stands for: 4-bit ones are stored packed."""
    state = getattr(parameter, "quant_state", None)  # only bitsandbytes' 4-bit parameters have one
    return state.shape.numel() if state is not None else parameter.numel()


def trainable_share(model: nn.Module) -> tuple[int, int]:
    """Count (trainable, all) parameters; 4-bit weights are counted unpacked, tied ones once."""
    counts = [(weight_count(p), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in counts if trained), sum(n for n, _ in counts)


def is_quantized(model: nn.Module) -> bool:
    """Return True for a base that transformers loaded through a quantizer."""
    return getattr(unwrap(model), "hf_quantizer", None) is not None


def check_quantized_share(model: PreTrainedModel) -> float:
    """Compute the share of the weights of linear layers and experts that is held in 4 bits.

    Embeddings, output head and routers are not counted, nor is anything one-dimensional. Parameters are counted, not
    linear modules: fused experts are bare 3-D parameters that the quantizer passes over.

    Raises:
        RequestError: less than 95%, with the figure and the largest parameters that are not quantized.
    """
    kinds, head = nn.Embedding | nn.modules.conv._ConvNd, model.get_output_embeddings()
    aside = {name for name, module in model.named_modules() if isinstance(module, kinds) or module is head}
    aside |= routers(model)
    quantized, rest = 0, Counter[str]()
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] in aside or (parameter.ndim < 2 and weight_count(parameter) == parameter.numel()):
            continue
        if is_quantized_parameter(parameter):
            quantized += weight_count(parameter)
        else:
            rest[name] += parameter.numel()
    share = quantized / max(1, quantized + rest.total())
    if share < MIN_QUANTIZED:
        largest = "\n".join(f"  {name}: {size:,} weights" for name, size in rest.most_common(3))
        raise RequestError(
            f"model.quantization: only {share:.1%} of the weights of {base_name(model)}'s linear layers and experts can "
            f"be quantized (expected at least {MIN_QUANTIZED:.0%}), so the model would need more memory than its 4-bit "
            f"size suggests. Largest weights that are not quantized:\n{largest}\n"
            "Set model.quantization=none, on several GPUs if one cannot hold it"
        )
    return share


def unwrap(model: Any) -> Any:
    """Return the transformers model inside a PeftModel, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def base_name(model: nn.Module) -> str:
    """Return the hub id or folder that the base was loaded from; empty for a model built from a config."""
    return unwrap(model).name_or_path


def base_revision(model: nn.Module) -> str | None:
    """Return the commit of a base that came from the hub, else None."""
    return getattr(unwrap(model).config, "_commit_hash", None)


def check_decoder_only(config: PreTrainedConfig, where: str) -> None:
    """Raise RequestError for an encoder-decoder."""
    if config.is_encoder_decoder:
        raise RequestError(
            f"{where} is an encoder-decoder ({config.model_type}), and orpo_lite trains decoder-only models: use one of "
            "those, or TRL's ORPOTrainer"
        )
