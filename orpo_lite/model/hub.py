"""Where a base lies, and what to tell the user when it cannot be read."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import errors as hub
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from orpo_lite.errors import RequestError
from orpo_lite.recipe import BUILTIN, ModelSection, resolve_path

ADAPTER_FILES = ["adapter_*", "*.json", "*.jinja", "*.model", "*.txt", "recipe.yaml", "README.md", "curves.png"]


def locate(spec: ModelSection) -> str:
    """Folder or hub id to load from. A GGUF base is dequantised into its cached folder first.

    Raises:
        RequestError: a path that does not exist, is no model folder, or lacks weight files its index names.
    """
    name = resolve_path(spec.name_or_path)
    if spec.gguf_file:
        from orpo_lite.model.gguf import cached_folder

        return str(cached_folder(name, spec.gguf_file, spec.revision))
    folder = Path(name).expanduser()
    if folder.is_dir():
        check_folder(folder)
        return str(folder)
    if folder.is_file():
        hint = f"set model.name_or_path={folder.parent} model.gguf_file={folder.name}" if folder.suffix == ".gguf" else (
            "give its folder, or a hub id"
        )  # fmt: skip
        raise RequestError(f"model.name_or_path: {name} is a file, expected a model folder: {hint}")
    if looks_local(spec.name_or_path):
        raise RequestError(f"model.name_or_path: there is no folder {name}")
    return name


def adapter_folder(source: str | Path) -> Path:
    """Folder of a run or an adapter; a hub id is downloaded, its adapter and tokenizer alone.

    Raises:
        RequestError: neither on this disk nor on the hub.
    """
    folder = Path(source).expanduser()
    if folder.exists() or looks_local(str(source)) or str(source).count("/") != 1:
        return folder
    with readable(str(source)):
        return Path(snapshot_download(str(source), allow_patterns=ADAPTER_FILES))


def looks_local(name: str) -> bool:
    """True for what can only be a path, never a hub id (user/name)."""
    return name.startswith((".", "/", "~", BUILTIN)) or name.count("/") > 1 or "\\" in name or Path(name).is_absolute()


def check_folder(folder: Path) -> None:
    """Name what is missing or broken in a local model folder before transformers fails on it in its own words."""
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise RequestError(
                f"model.name_or_path: {folder} holds an adapter, not a model: put its base there, and set "
                f"adapter.init_from={folder} to go on training it"
            )
        found = next(folder.glob("*.gguf"), None)
        hint = f"; for its GGUF file set model.gguf_file={found.name}" if found else ""
        raise RequestError(f"model.name_or_path: {folder} has no config.json, so it is no model folder{hint}")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise RequestError(f"model.name_or_path: {index} is broken ({error}): copy or download it again") from None
    else:
        shards = [path.name for path in folder.glob("*.safetensors")]
        if not shards and list(folder.glob("*.bin")):
            raise RequestError(
                f"model.name_or_path: {folder} holds pickled weights only (*.bin), which are never loaded because a "
                "pickle can run code: convert the folder to safetensors"
            )
        if not shards:
            raise RequestError(f"model.name_or_path: {folder} has a config.json but no model.safetensors")
    for shard in shards:
        if not (folder / shard).is_file():
            raise RequestError(f"model.name_or_path: {folder / shard} is missing, though {index.name} names it")
        try:
            safe_open(folder / shard, "pt").__enter__()
        except SafetensorError as error:
            raise RequestError(
                f"model.name_or_path: {folder / shard} is not a whole safetensors file ({error}): copy or download it again"
            ) from None


@contextlib.contextmanager
def readable(name: str) -> Iterator[None]:
    """Turn what transformers and the hub raise while reading `name` into a RequestError that says what to do."""
    try:
        yield
    except RequestError:
        raise
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise RequestError(explain(name, error)) from error


def explain(name: str, error: BaseException) -> str:
    """The error in words, by the hub's exception that lies behind it."""
    chain, cause = [], error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    page = f"https://huggingface.co/{name}"
    text = " ".join(str(error).split())
    if any(isinstance(c, hub.GatedRepoError) for c in chain):
        return f"model.name_or_path: {name} is gated: accept its terms on {page}, then run `hf auth login`"
    if any(isinstance(c, hub.RevisionNotFoundError) for c in chain):
        return f"model.revision: {name} has no such branch, tag or commit: see {page}/commits/main"
    if any(isinstance(c, hub.RepositoryNotFoundError | hub.HFValidationError) for c in chain):
        return (
            f"model.name_or_path: {name} is neither a local folder nor a model that the hub shows you: check the "
            f"spelling on {page}; for a private one run `hf auth login`"
        )
    if any(isinstance(c, hub.LocalEntryNotFoundError | hub.OfflineModeIsEnabled | ConnectionError) for c in chain):
        return (
            f"model.name_or_path: {name} is neither a local folder nor in the download cache, and the hub cannot be "
            f"reached: get online (HF_HUB_OFFLINE unset) or download {page} beforehand and give its folder"
        )
    if text.startswith("Unrecognized model"):
        return (
            f"model.name_or_path: {name} has no config.json that says what model it is: see {page}/tree/main; if its "
            "weights are GGUF, set model.gguf_file to one of those files"
        )
    if any(isinstance(c, hub.EntryNotFoundError) for c in chain):
        return f"model.name_or_path: {name} lacks a file: see {page}/tree/main ({text})"
    if "trust_remote_code" in text:
        return (
            f"model.trust_remote_code: {name} runs Python code from its own repository: read it on {page}, and set "
            "model.trust_remote_code=true if you trust it"
        )
    return f"{name} cannot be loaded: {text}"
