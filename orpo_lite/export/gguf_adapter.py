"""An adapter alone as a GGUF LoRA file, which llama.cpp and Ollama apply to a GGUF file of its base."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from orpo_lite.common.errors import RequestError
from orpo_lite.export.gguf_verify import Mismatch
from orpo_lite.export.gguf_vocabulary import write_vocabulary
from orpo_lite.export.llama_cpp import run_converter

KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
INSTEAD = "; export the merged model instead (without --adapter)"


def write_adapter(
    source: Path, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, output: Path, work: Path, name: str
) -> str:
    """Write the adapter in `source` as GGUF; return a phrase to print.

    llama.cpp scales every pair by one alpha over the pair's rank; the factors of rsLoRA and patterns go into B.

    Args:
        source: adapter folder.
        config: the base's configuration.
        tokenizer: as trained with.
        output: file to write.
        work: an empty folder for intermediate files.
        name: general.name in the file.

    Raises:
        RequestError: the adapter trained something that a LoRA file cannot hold.
        Mismatch: the file does not read back.
    """
    adapter = PeftConfig.from_pretrained(str(source))
    refuse(source, adapter)
    assert isinstance(adapter, LoraConfig)
    pairs = read_pairs(source)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
    modules: dict[str, tuple[bool, float]] = {}
    tied = config.get_text_config().tie_word_embeddings
    for module, pair in pairs.items():
        try:
            layer: Any = base.get_submodule(module)
        except AttributeError:
            raise RequestError(f"{source}: LoRA on {module}, which {type(base).__name__} does not have") from None
        if isinstance(layer, nn.Embedding) or (tied and layer is base.get_output_embeddings()):
            raise RequestError(f"{source}: LoRA on {module}, which llama.cpp has no LoRA for{INSTEAD}")
        rank = pair["A"].shape[0]
        alpha = adapter.alpha_pattern.get(get_pattern_key(adapter.alpha_pattern, module), adapter.lora_alpha)  # type: ignore[union-attr, arg-type]
        scale = alpha / (math.sqrt(rank) if adapter.use_rslora else rank)
        modules[module] = (isinstance(layer, Conv1D), scale * rank / adapter.lora_alpha)
    save_file({f"{m}.{side}": t.contiguous() for m, pair in pairs.items() for side, t in pair.items()}, work / "pairs")
    write_vocabulary(tokenizer, config, work / "vocabulary")
    request = {
        "task": "adapter",
        "model": str(work / "vocabulary"),
        "vocabulary": str(work / "vocabulary"),
        "matrices": str(work / "pairs"),
        "modules": modules,
        "type": "ALL_F32",
        "name": name,
        "pre": None,
        "byte_level": False,
        "fields": {"general.name": name, "adapter.type": "lora", "adapter.lora.alpha": float(adapter.lora_alpha)},
        "output": str(output),
    }
    run_converter(request)
    return check(output, pairs)


def refuse(source: Path, config: PeftConfig) -> None:
    """Raise RequestError that names what a LoRA file of llama.cpp cannot hold, if there is anything."""
    if not isinstance(config, LoraConfig):
        raise RequestError(f"{source}: found peft_type {config.peft_type}, expected LORA{INSTEAD}")
    start = config.init_lora_weights
    altered = isinstance(start, str) and start.lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga"))
    reasons = {
        "use_dora (DoRA): llama.cpp has no weight decomposition": config.use_dora,
        f"bias={config.bias}: llama.cpp adds no trained biases": config.bias != "none",
        f"modules_to_save={config.modules_to_save}: whole weights are no LoRA matrices": config.modules_to_save,
        f"target_parameters={config.target_parameters}: LoRA on fused experts": config.target_parameters,
        "trainable_token_indices: trained token embeddings are no LoRA matrices": config.trainable_token_indices,
        f"init_lora_weights={start}: it alters the base, so the adapter does not fit the original": altered,
        "lora_alpha=0: nothing would be added": not config.lora_alpha,
    }
    found = [reason for reason, there in reasons.items() if there]
    if found:
        raise RequestError(f"{source}: --adapter cannot hold {'; '.join(found)}{INSTEAD}")


def read_pairs(source: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Read the LoRA matrices: module -> {"A": (rank, in), "B": (out, rank)}, float32."""
    path = source / "adapter_model.safetensors"
    if not path.is_file():
        raise RequestError(f"{path} does not exist: expected PEFT's adapter weights")
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    with safe_open(path, "pt") as file:
        for key in file.keys():
            match = KEY.fullmatch(key)
            if not match:
                kind = "LoRA on embeddings" if "lora_embedding" in key else "not a LoRA matrix of a linear layer"
                raise RequestError(f"{path}: {key}: {kind}, which a LoRA file of llama.cpp cannot hold{INSTEAD}")
            pairs.setdefault(match[1], {})[match[2]] = file.get_tensor(key).float()
    halves = [module for module, pair in pairs.items() if len(pair) != 2]
    if halves or not pairs:
        raise RequestError(f"{path}: found {halves[0] + ' with one matrix' if halves else 'no LoRA matrices'}")
    return pairs


def check(path: Path, pairs: dict[str, dict[str, torch.Tensor]]) -> str:
    """Read the file back: the same number of pairs, of the same ranks, all finite; return a phrase to print."""
    held = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    ranks = sorted(int(tensor.shape[1]) for name, tensor in held.items() if name.endswith(".lora_a"))
    if len(held) != 2 * len(pairs) or ranks != sorted(pair["A"].shape[0] for pair in pairs.values()):
        raise Mismatch(f"{path.name} holds {len(held)} matrices, expected {2 * len(pairs)}")
    for name, tensor in held.items():
        if not torch.from_numpy(tensor.data.copy()).isfinite().all():
            raise Mismatch(f"{name}: not finite")
    return f"{len(pairs)} LoRA pairs, {path.stat().st_size / 1e6:.1f} MB"


def trained_base(source: Path) -> str:
    """Return the adapter's name for its base, for messages."""
    return json.loads((source / "adapter_config.json").read_text("utf-8")).get("base_model_name_or_path") or "its base"
