"""Check that vLLM's `--enable-lora` can serve an adapter folder as it is."""

import json
import re
from pathlib import Path

from safetensors import safe_open

from orpo_lite.common import safe_yaml

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts for --max-lora-rank."""

LORA_KEY = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight")
REFUSED: dict[str, dict[str, str]] = safe_yaml.read(Path(__file__).with_suffix(".yaml"))


def vllm_rank(adapter_folder: str | Path) -> int:
    """Return the smallest --max-lora-rank that serves this adapter."""
    rank = json.loads((Path(adapter_folder) / "adapter_config.json").read_text("utf-8"))["r"]
    return next(allowed for allowed in RANKS if allowed >= rank)


def vllm_problems(adapter_folder: str | Path) -> list[str]:
    """List the reasons why vLLM would refuse the adapter, or serve something else than was trained; none if it serves it.

    The contract, from vllm-project/vllm: `vllm/lora/peft_helper.py` (no DoRA, modules_to_save or bias, rank at most
    max_lora_rank, one scale for all modules), `vllm/config/lora.py` (MaxLoRARanks), `vllm/lora/lora_model.py`
    (tensors named base_model.model.MODULE.lora_A.weight; modules must be ones that vLLM's model gives LoRA to), and
    docs.vllm.ai/en/latest/features/lora.html.
    """
    folder = Path(adapter_folder)
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    if config.get("peft_type") != "LORA":
        return [f"peft_type is {config.get('peft_type')}: vLLM serves LORA only"]
    problems = [f"{name}={config[name]}: {why}" for name, why in REFUSED["fields"].items() if config.get(name)]
    if config.get("bias", "none") != "none":
        problems.append(f"bias={config['bias']}: vLLM does not support trained biases")
    if config.get("r", 0) > RANKS[-1]:
        problems.append(f"r={config['r']}: vLLM's largest --max-lora-rank is {RANKS[-1]}")
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        keys = list(file.keys())
    modules = {match[1] for key in keys if (match := LORA_KEY.fullmatch(key))}
    other = [key for key in keys if not LORA_KEY.fullmatch(key)]
    if other:
        problems.append(f"{len(other)} tensor(s) that are not LoRA matrices of a linear layer, first {other[0]}")
    if wrapped := next((module for module in modules if re.search(r"(^|\.)(_orig_mod|module)\.", module)), None):
        problems.append(f"LoRA on {wrapped}: named by a wrapper of the trainer, which vLLM does not know")
    for names, why in REFUSED["modules"].items():
        found = sorted({match[2] for module in modules if (match := re.search(rf"(^|\.)({names})$", module))})
        problems += [f"LoRA on {name}: {why}" for name in found]
    return problems
