"""Where a base lies, and what to tell the user when it cannot be read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import errors as hub
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig

from orpo_lite.common.errors import RequestError
from orpo_lite.common.text import nearest
from orpo_lite.model.untrusted_files import check_model
from orpo_lite.recipe import ModelSection
from orpo_lite.recipe.loading import BUILTIN, resolve_path

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
    folder = Path(os.path.expanduser(name))  # Path's own fails where there is no such user
    if os.path.isdir(folder):
        check_model(folder)
        return str(folder)
    if os.path.isfile(folder):
        hint = f"set model.name_or_path={folder.parent} model.gguf_file={folder.name}" if folder.suffix == ".gguf" else (
            "give its folder, or a hub id"
        )  # fmt: skip
        raise RequestError(f"model.name_or_path: {name} is a file, expected a model folder: {hint}")
    if looks_local(spec.name_or_path):
        raise RequestError(
            f"model.name_or_path: there is no folder {name}: give the path of a model folder, or a hub id USER/NAME"
        )
    return name


def adapter_folder(source: str | Path) -> Path:
    """Folder of a run or an adapter; a hub id is downloaded, its adapter and tokenizer alone.

    Raises:
        RequestError: neither on this disk nor on the hub.
    """
    folder = Path(os.path.expanduser(source))
    if os.path.exists(folder) or looks_local(str(source)) or str(source).count("/") != 1:
        return folder
    near = nearest(folder.name, [path.name for path in folder.parent.glob("*/")])
    if near or folder.parent.name == "outputs":
        raise RequestError(f"{folder}: there is no such folder in {folder.parent}{near}")
    with called("adapter"), readable(str(source)):
        return Path(snapshot_download(str(source), allow_patterns=ADAPTER_FILES))


def read_config(spec: ModelSection) -> PreTrainedConfig:
    """The base's configuration."""
    name = locate(spec)
    with readable(spec.name_or_path):
        try:
            return AutoConfig.from_pretrained(name, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
        except (ArithmeticError, AttributeError, KeyError, TypeError) as error:  # sizes that no model has
            raise RequestError(
                f"model.name_or_path: config.json of {spec.name_or_path} describes no model ({type(error).__name__}: "
                f"{error}): copy or download it again"
            ) from error


def looks_local(name: str) -> bool:
    """True for what can only be a path, never a hub id (user/name)."""
    return name.startswith((".", "/", "~", BUILTIN)) or name.count("/") > 1 or "\\" in name or Path(name).is_absolute()


@contextlib.contextmanager
def called(field: str, hint: str = "") -> Iterator[None]:
    """Errors about a base by the name of what the user gave, where that is not the recipe's model.name_or_path."""
    try:
        yield
    except RequestError as error:
        raise RequestError(str(error).replace("model.name_or_path", field) + hint) from error


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
    text = " ".join(str(error).split())
    name = name if len(name) <= 300 else f"{name[:300]}..."
    page = f"https://huggingface.co/{name}"
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
    if text.startswith("Unrecognized configuration class"):
        kind = text.partition("configuration class <class '")[2].partition("'")[0].rpartition(".")[2]
        return f"model.name_or_path: {name} is described by a {kind}: take a model that writes text"
    if text.startswith("Couldn't instantiate the backend tokenizer"):
        return (
            f"model.name_or_path: {name} has no tokenizer that can be read: copy the tokenizer's files (tokenizer.json and "
            "tokenizer_config.json, or tokenizer.model) there; for the latter pip install sentencepiece"
        )
    if any(isinstance(c, hub.EntryNotFoundError) for c in chain):
        return f"model.name_or_path: {name} lacks a file: see {page}/tree/main ({text})"
    if "trust_remote_code" in text:
        return (
            f"model.trust_remote_code: {name} runs Python code from its own repository: read it on {page}, and set "
            "model.trust_remote_code=true in the recipe if you trust it (--trust-remote-code, where a command takes a folder)"
        )
    return f"model.name_or_path: {name} cannot be loaded: {text[:400]}"
