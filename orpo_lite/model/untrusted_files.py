"""Files of a model, an adapter or a checkpoint from anywhere, checked before a library reads them."""

import json
import re
import shlex
from collections import Counter
from pathlib import Path, PureWindowsPath
from typing import Any

from peft import PeftType
from safetensors import SafetensorError, safe_open

from orpo_lite.common.errors import RequestError

ADAPTER_WEIGHTS = "adapter_model.safetensors"
AGAIN = "copy or download it again"
UNPICKLE = (
    "import sys, torch; from pathlib import Path; from safetensors.torch import save_file; d = Path(sys.argv[1]); "
    't = torch.load(d / "adapter_model.bin", "cpu", weights_only=True); '
    'save_file({k: v.clone() for k, v in t.items()}, d / "adapter_model.safetensors", {"format": "pt"})'
)


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        RequestError: not readable, not JSON, or another kind of value.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is broken JSON ({error or 'nested too deeply'}): {AGAIN}") from None
    if not isinstance(content, dict):
        raise RequestError(f"{path} holds a {type(content).__name__}, expected a JSON object: {AGAIN}")
    return content


def check_safetensors(path: Path) -> None:
    """Refuse a safetensors file that is not complete."""
    try:
        safe_open(path, "pt").__enter__()
    except (SafetensorError, OSError) as error:
        if path.stat().st_size < 1000 and path.read_bytes().startswith(b"version https://git-lfs"):
            raise RequestError(
                f"{path} is a Git LFS pointer instead of the weights: run `git lfs pull` there"
            ) from None
        raise RequestError(f"{path} is not a whole safetensors file ({error}): {AGAIN}") from None


def check_model(folder: Path) -> None:
    """Refuse a local model folder with files that are missing or broken."""
    if not (folder / "config.json").is_file():
        found = next(folder.glob("*.gguf"), None)
        hint = f"for its GGUF file set model.gguf_file={found.name}" if found else AGAIN
        raise RequestError(f"model.name_or_path: {folder} has no config.json, so it is not a model folder: {hint}")
    if (folder / "tokenizer.json").is_file():
        read_object(folder / "tokenizer.json")
    for shard in shards(folder):
        check_safetensors(folder / shard)


def shards(folder: Path) -> list[str]:
    """List a local model's weight files.

    Raises:
        RequestError: one is missing, pickled or outside of the folder.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        found = [path.name for path in folder.glob("*.safetensors")]
        if found:
            return found
        problem = "has a config.json but no model.safetensors: copy or download it"
        if list(folder.glob("*.bin")):
            problem = (
                "holds only pickled weights (*.bin), which are never loaded because a pickle can run code: if you trust it, "
                f"convert it with transformers' AutoModelForCausalLM.from_pretrained({str(folder)!r})"
                ".save_pretrained(NEW_FOLDER)"
            )
        raise RequestError(f"model.name_or_path: {folder} {problem}")
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict):
        raise RequestError(f"model.name_or_path: {index} is broken, for it has no weight_map: {AGAIN}")
    names = {str(name) for name in places.values()}
    for name in names:
        path = PureWindowsPath(name)  # which knows both kinds of slashes
        if path.anchor or ".." in path.parts:
            raise RequestError(
                f"model.name_or_path: {index} names {name!r}, expected files inside of the folder: fix the index"
            )
        if not (folder / name).is_file():
            raise RequestError(
                f"model.name_or_path: {folder / name} is missing, though {index.name} names it: copy or download it"
            )
    return sorted(names)


def subfolders_hint(folder: Path) -> str:
    """Name the adapters and models below a folder that is none itself, the newest first; nothing where there are none."""

    def age(path: Path) -> tuple[int, float]:
        steps = re.findall(r"checkpoint-(\d+)", str(path.relative_to(folder)))
        return int(steps[-1]) if steps else 0, path.stat().st_mtime

    below = [*folder.glob("*/*config.json"), *folder.glob("*/*/*config.json")]
    names = ("adapter_config.json", "config.json")
    found = {path.parent for path in below if path.name in names and any(path.parent.glob("*.safetensors"))}
    newest, *others = [*sorted(found, key=age, reverse=True), None]
    names = ", ".join(str(path.relative_to(folder)) for path in others if path)
    return f"; give its subfolder {newest}{names and ', the newest; the others: ' + names}" if newest else ""


def check_adapter(folder: Path) -> None:
    """Refuse an adapter folder whose files are missing, broken, pickled, not finite, or name code."""
    path, weights = folder / "adapter_config.json", folder / ADAPTER_WEIGHTS
    if not path.is_file():
        hint = subfolders_hint(folder)
        raise RequestError(f"adapter: {folder} holds no adapter_config.json, so it is not an adapter folder{hint}")
    config = read_object(path)
    kind, rank = config.get("peft_type"), config.get("r")
    if kind != PeftType.LORA:
        raise RequestError(f"adapter: {folder} is of type {kind}, expected LORA: train one, or use another adapter")
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise RequestError(f"adapter: {path}: r is {rank!r}, expected a whole number above 0: {AGAIN}")
    if (old := folder / "adapter_model.bin").is_file() and not weights.is_file():
        raise RequestError(
            f"adapter: {old} is a pickle, which is never loaded because it can run code; this reads its weights alone, and writes "
            f"them to {ADAPTER_WEIGHTS}:\n  python -c {shlex.quote(UNPICKLE)} {shlex.quote(str(folder))}"
        )
    if not weights.is_file():
        raise RequestError(f"adapter: {folder} has no {ADAPTER_WEIGHTS}: {AGAIN}")
    check_safetensors(weights)
    with safe_open(weights, "pt") as file:
        names = list(file.keys())
        shapes = {name: file.get_slice(name).get_shape() for name in names}
        # integers are finite, and float8 has no isfinite of its own
        bad = [name for name in names if not file.get_tensor(name).float().isfinite().all()]
    if bad:
        raise RequestError(
            f"adapter: {weights}: {len(bad)} of {len(names)} tensors are not finite (NaN or infinity), first {bad[0]}: "
            "its training failed; use an earlier checkpoint, or train again with a lower training.learning_rate"
        )
    ends = (".lora_A.weight", ".lora_B.weight")
    if shards := [name for name in names if 0 in shapes[name] or (name.endswith(ends) and len(shapes[name]) == 1)]:
        raise RequestError(
            f"adapter: {weights}: {len(shards)} of {len(names)} tensors are empty or flat, first {shards[0]}: DeepSpeed ZeRO-3 or "
            "FSDP saved the shards of one process: gather the checkpoint (zero_to_fp32.py), or train again with "
            "stage3_gather_16bit_weights_on_model_save, or FSDP's full state dict"
        )
    if lacking := [name for name in ("r", "lora_alpha", "target_modules") if name not in config]:
        ranks = Counter(shape[0] for name, shape in shapes.items() if "lora_A." in name and len(shape) == 2)
        modules = sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in names if ".lora_" in name})
        raise RequestError(
            f"adapter: {path} lacks {', '.join(lacking)}: write there what it was trained with; by its tensors r is "
            f"{max(ranks, key=ranks.__getitem__, default='unknown')}, target_modules {', '.join(modules) or 'unknown'}"
        )
