"""What a loaded model consists of: routers, quantised share, trainable share, where it came from."""

from __future__ import annotations

import logging
import re
from collections import Counter
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from orpo_lite.common.errors import RequestError

logger = logging.getLogger(__name__)

ROUTER_NAME = re.compile(r"router|gate|gating|.*_gate")
ROUTER_CLASS = re.compile(r"Router|TopK")
MIN_QUANTISED = 0.95
PACKS = "support_avx512bf16_for_cpu"
"""What bitsandbytes' Linear4bit calls its leave to repack weights on the CPU."""


def routers(model: nn.Module) -> set[str]:
    """Names of the modules that choose or weigh experts, and of everything inside them.

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
    """Names of the modules of a multimodal model that text never passes through: vision and audio towers."""
    if model.config.get_text_config(decoder=True) is model.config or model.config.is_encoder_decoder:
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
    """
    packed = 0
    for module in model.modules():
        if getattr(module, PACKS, False):
            weight: Any = module.weight
            state = getattr(weight, "quant_state", None)  # sharded weights have none
            if getattr(state, "packing_format_for_cpu", False):
                module.state_dict()  # bitsandbytes unpacks what it writes down
                state = weight.quant_state
                if not state.nested:  # its inverse leaves these scales in the packed order
                    state.absmax = state.absmax.T.reshape(-1).float()
                packed += 1
            setattr(module, PACKS, False)
    if packed:
        logger.warning(
            "%d 4-bit weights were packed for AVX512-BF16 by an earlier pass; they are unpacked, with rounded scales: load "
            "the model anew for the weights as they were",
            packed,
        )


def weight_count(parameter: torch.Tensor) -> int:
    """Number of weights a parameter stands for: 4-bit ones are stored packed."""
    state = getattr(parameter, "quant_state", None)  # only bitsandbytes' 4-bit parameters have one
    # of a weight that ZeRO-3 has cut, there is nothing here between its passes
    return state.shape.numel() if state is not None else getattr(parameter, "ds_numel", parameter.numel())


def trainable_share(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; 4-bit weights are counted unpacked, tied ones once."""
    counts = [(weight_count(p), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in counts if trained), sum(n for n, _ in counts)


def is_quantised(model: nn.Module) -> bool:
    """True for a base that transformers loaded through a quantiser."""
    return getattr(unwrap(model), "hf_quantizer", None) is not None


def check_quantised_share(model: PreTrainedModel) -> float:
    """Share of the weights of linear layers and experts that bitsandbytes holds in 4 or 8 bits.

    Embeddings, output head and routers are left out of the count, as is everything one-dimensional. Counted by
    parameters, not by linear modules: fused experts are bare 3-D parameters that the quantiser passes over.

    Raises:
        RequestError: less than 95%, with the figure and the largest parameters that are not quantised.
    """
    aside = routers(model)
    aside |= {
        name for name, module in model.named_modules() if isinstance(module, nn.Embedding | nn.modules.conv._ConvNd)
    }
    aside |= {name for name, module in model.named_modules() if module is model.get_output_embeddings()}
    quantised, rest = 0, Counter[str]()
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] in aside or (parameter.ndim < 2 and weight_count(parameter) == parameter.numel()):
            continue
        packed = getattr(parameter, "quant_state", None) is not None  # 4-bit, in whatever dtype it is stored
        if type(parameter).__name__ in ("Params4bit", "Int8Params") and (
            packed or not parameter.dtype.is_floating_point
        ):
            quantised += weight_count(parameter)
        else:
            rest[name] += parameter.numel()
    share = quantised / max(1, quantised + rest.total())
    if share < MIN_QUANTISED:
        largest = "\n".join(f"  {name}: {size:,} weights" for name, size in rest.most_common(3))
        raise RequestError(
            f"model.quantization: only {share:.1%} of the weights of {base_name(model)}'s linear layers and experts can "
            f"be quantised (expected at least {MIN_QUANTISED:.0%}), so the model would not fit where its 4- or 8-bit "
            f"size would. Not quantised, the largest first:\n{largest}\n"
            "Set model.quantization=none, over several GPUs if one cannot hold it"
        )
    return share


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside a PeftModel, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def base_name(model: nn.Module) -> str:
    """Hub id or folder that the base was loaded from; empty for a model built from a config."""
    return unwrap(model).name_or_path  # type: ignore[return-value]


def base_revision(model: nn.Module) -> str | None:
    """Commit of a base that came from the hub, else None."""
    return getattr(unwrap(model).config, "_commit_hash", None)
