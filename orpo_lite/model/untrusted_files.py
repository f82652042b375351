"""Files of a model, an adapter or a checkpoint from anywhere, checked before a library reads them."""

from __future__ import annotations

import json
import pickletools
from pathlib import Path
from typing import Any

import torch
from peft import PeftType
from safetensors import SafetensorError, safe_open
from torch.serialization import get_unsafe_globals_in_checkpoint
from transformers import __version__ as transformers_version
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from orpo_lite.common.errors import RequestError

ADAPTER_WEIGHTS = "adapter_model.safetensors"
INDEX_OF_SHARDS = ".metadata"
"""Index that torch.distributed.checkpoint pickles beside its shards."""
SHARDED = {
    "collections.OrderedDict",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}
"""Plain records that checkpoints of FSDP2 and DeepSpeed hold beside tensors."""
NUMBERS = {
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray._reconstruct",
    "numpy.ndarray",
    "numpy.dtype",
    "_codecs.encode",
}
PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
AGAIN = "copy or download it again"


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
        with path.open("rb") as stream:
            pointer = stream.read(40).startswith(b"version https://git-lfs")
        if pointer:
            raise RequestError(
                f"{path} is a Git LFS pointer instead of the weights: run `git lfs pull` there"
            ) from None
        raise RequestError(f"{path} is not a whole safetensors file ({error}): {AGAIN}") from None


def check_links(folder: Path) -> None:
    """Refuse links that lead out of the folder; those of the hub's cache lead to its own blobs.

    A stranger's folder could name any file of this machine, which a run would copy and a push would publish.
    """
    home = folder.resolve()
    home = home.parents[1] if home.parent.name == "snapshots" else home
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not path.resolve().is_relative_to(home):
            raise RequestError(
                f"{path} is a link to {path.resolve()}, outside of its folder: copy the file there if that is intended"
            )


def check_torch_files(folder: Path) -> None:
    """Refuse a file of torch.save in a checkpoint that would run code, or that torch.save has not written.

    Nothing is loaded: the names that the pickle would import are read from its instructions. A trainer saves nothing
    but numbers, tensors and containers.
    """
    for path in sorted(folder.rglob("*")):
        index = path.name == INDEX_OF_SHARDS
        if not path.is_file() or not (index or path.suffix in PICKLES):
            continue
        remedy = "remove this checkpoint to resume from the previous one, or start a new run"
        try:
            names = named_in_pickle(path) if index else set(get_unsafe_globals_in_checkpoint(str(path)))
            names -= NUMBERS | SHARDED
        except Exception as error:  # whatever pickletools and torch find wrong
            raise RequestError(
                f"{path} was not written by torch.save ({' '.join(str(error).split())[:200]}); any other pickle could run "
                f"code and is never loaded: {remedy}, or write its tensors with safetensors.torch.save_file"
            ) from None
        names = {name for name in names if not name.startswith(("numpy.dtypes.", "torch."))}
        if names and path.name != "training_args.bin":  # which nothing loads
            raise RequestError(
                f"{path} is a pickle that would run {', '.join(sorted(names))[:200]}, expected numbers and tensors; it is "
                f"never loaded: {remedy}, or write its tensors with safetensors.torch.save_file"
            )


def named_in_pickle(path: Path) -> set[str]:
    """List what a bare pickle would import, read from its instructions without running any."""
    names, texts, memo, last = set[str](), list[str | None](), dict[int, str | None](), None
    with path.open("rb") as stream:
        for code, value, _ in pickletools.genops(stream):
            if "UNICODE" in code.name:
                texts.append(value)  # type: ignore[arg-type]  # text, by the instruction
            elif code.name in ("MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT"):
                place = len(memo) if value is None else int(value)  # type: ignore[arg-type]
                memo[place] = texts[-1] if last is not None and "UNICODE" in last and texts else None
            elif code.name in ("BINGET", "LONG_BINGET", "GET"):
                texts.append(memo.get(int(value)))  # type: ignore[arg-type]
            elif code.name in ("GLOBAL", "INST"):
                names.add(str(value).replace(" ", "."))
            elif code.name == "STACK_GLOBAL":
                names.add(".".join(map(str, texts[-2:])))
            last = code.name
    return names


def check_model(folder: Path) -> None:
    """Refuse a local model folder with files that are missing, broken or outside of it."""
    check_links(folder)
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise RequestError(
                f"model.name_or_path: {folder} holds an adapter, not a model: put its base there, and set "
                f"adapter.init_from={folder} to continue training it"
            )
        found = next(folder.glob("*.gguf"), None)
        hint = f"for its GGUF file set model.gguf_file={found.name}" if found else AGAIN
        raise RequestError(f"model.name_or_path: {folder} has no config.json, so it is not a model folder: {hint}")
    kind = read_object(folder / "config.json")
    name = kind.get("model_type")
    if "auto_map" not in kind and (not isinstance(name, str) or name not in CONFIG_MAPPING):
        found = f"model_type is {name!r}, which transformers {transformers_version} does not know" if name else (
            "model_type is missing")  # fmt: skip
        raise RequestError(
            f"model.name_or_path: {folder / 'config.json'}: {found}: {AGAIN}, or pip install -U transformers"
        )
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
        if not found and list(folder.glob("*.bin")):
            raise RequestError(
                f"model.name_or_path: {folder} holds only pickled weights (*.bin), which are never loaded because a "
                "pickle can run code: if you trust it, convert it with transformers' "
                f"AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(NEW_FOLDER)"
            )
        if not found:
            raise RequestError(
                f"model.name_or_path: {folder} has a config.json but no model.safetensors: copy or download it"
            )
        return found
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise RequestError(f"model.name_or_path: {index} is broken ({error}): copy or download it again") from None
    for name in names:
        if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts or "\\" in name:
            raise RequestError(
                f"model.name_or_path: {index} names {name!r}, expected files inside of the folder: fix the index"
            )
        if not (folder / name).is_file():
            raise RequestError(
                f"model.name_or_path: {folder / name} is missing, though {index.name} names it: copy or download it"
            )
    return names


def check_adapter(folder: Path) -> None:
    """Refuse an adapter folder whose files are missing, broken, pickled, not finite, or name code."""
    if folder.is_dir():
        check_links(folder)
    path, weights = folder / "adapter_config.json", folder / ADAPTER_WEIGHTS
    if not path.is_file():
        raise RequestError(f"adapter: {folder} holds no adapter_config.json, so it is not an adapter folder")
    config = read_object(path)
    kind, rank = config.get("peft_type"), config.get("r")
    if kind != PeftType.LORA:
        raise RequestError(f"adapter: {folder} is of type {kind}, expected LORA: train one, or use another adapter")
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise RequestError(f"adapter: {path}: r is {rank!r}, expected a whole number above 0: {AGAIN}")
    if config.get("megatron_config") or config.get("megatron_core", "megatron.core") != "megatron.core":
        raise RequestError(
            f"adapter: {path}: megatron_config and megatron_core name Python code to import, which an adapter is not "
            "allowed to do: remove both if this is a plain LoRA adapter"
        )
    if not weights.is_file():
        old = folder / "adapter_model.bin"
        if old.is_file():
            raise RequestError(
                f"adapter: {old} is a pickle, which is never loaded because it can run code: write {ADAPTER_WEIGHTS} "
                "beside it with safetensors.torch.save_file(torch.load(FILE, weights_only=True), NEW_FILE)"
            )
        raise RequestError(f"adapter: {folder} has no {ADAPTER_WEIGHTS}: {AGAIN}")
    check_safetensors(weights)
    with safe_open(weights, "pt") as file:
        names = list(file.keys())
        bad = [name for name in names if not finite(file.get_tensor(name))]
    if bad:
        raise RequestError(
            f"adapter: {weights}: {len(bad)} of {len(names)} tensors are not finite (NaN or infinity), first {bad[0]}: "
            "its training failed; use an earlier checkpoint, or train again with a lower training.learning_rate"
        )


def finite(tensor: torch.Tensor) -> bool:
    """Return True for a tensor without NaN and infinity."""
    return not tensor.is_floating_point() or bool(tensor.float().isfinite().all())
