"""Where a base or an adapter is found (folder, hub, GGUF file), and what to do when it cannot be read."""

import contextlib
import functools
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils.hub import has_file
from transformers.utils.peft_utils import find_adapter_config_file

from orpo_lite.common import safe_yaml
from orpo_lite.common.console import progress
from orpo_lite.common.errors import RequestError
from orpo_lite.model.inspection import check_decoder_only
from orpo_lite.model.untrusted_files import check_model, read_object
from orpo_lite.recipe import ModelSection
from orpo_lite.recipe.loading import ADAPTER_FOLDER, check_folder, check_model_path, looks_local, resolve_path

ADAPTER_FILES = ["adapter_*", "*.json", "*.jinja", "*.model", "*.txt", "recipe.yaml", "README.md", "curves.png"]


def locate(spec: ModelSection) -> str:
    """Return the folder or hub id to load from. A GGUF base is dequantized into its cached folder first.

    Raises:
        RequestError: a path that does not exist, is not a model folder, or lacks weight files that its index names.
    """
    name = resolve_path(spec.name_or_path)
    folder = Path(os.path.expanduser(name))  # Path's own fails where there is no such user
    if os.path.isfile(folder):
        gguf = folder.suffix == ".gguf"
        hint = (
            f"set model.name_or_path={folder.parent} model.gguf_file={folder.name}"
            if gguf
            else "give its folder, or a hub id"
        )
        raise RequestError(f"model.name_or_path: {name} is a file, expected a model folder: {hint}")
    if spec.gguf_file:
        from orpo_lite.model.gguf import cached_folder

        path = find_gguf(name, spec.gguf_file, spec.revision)
        with hub_errors_in_words(str(path)):
            return str(cached_folder(path))
    check_no_adapter_is_lost(spec.name_or_path, revision=spec.revision)
    if os.path.isdir(folder):
        check_model(folder)
        return str(folder)
    check_model_path(spec.name_or_path)
    return name


def find_gguf(name: str, gguf_file: str, revision: str | None) -> Path:
    """Find a GGUF file on this disk, or download it if `name` is a hub id.

    Raises:
        RequestError: no such folder or file, or not GGUF.
    """
    folder, file = Path(name).expanduser(), Path(gguf_file).expanduser()
    if file.is_absolute() or ".." in file.parts:
        raise RequestError(
            f"model.gguf_file: found {gguf_file}, expected the name of a file inside model.name_or_path: set "
            f"model.name_or_path={file.absolute().parent} model.gguf_file={file.name}"
        )
    if folder.is_dir():
        path = folder / file
        if not path.is_file():
            there = sorted(p.name for p in folder.glob("*.gguf"))
            raise RequestError(
                f"model.gguf_file: {path} does not exist; GGUF files there: {', '.join(there) or 'none'}"
            )
    else:
        check_model_path(name)
        with hub_errors_in_words(name), progress(f"downloading {gguf_file}"):
            path = Path(hf_hub_download(name, gguf_file, revision=revision))
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise RequestError(f"model.gguf_file: {path} is not a GGUF file")
    return path


def adapter_folder(source: str | Path) -> Path:
    """Return the folder of a run or an adapter; of a hub id, adapter and tokenizer are downloaded.

    Raises:
        RequestError: neither on this disk nor on the hub.
    """
    folder = Path(os.path.expanduser(source))
    if os.path.exists(folder):
        return folder
    with renaming_field("adapter"), hub_errors_in_words(str(source)), progress(f"downloading {source}"):
        check_folder(source, ADAPTER_FOLDER)
        return Path(snapshot_download(str(source), allow_patterns=ADAPTER_FILES))


def continued_folder(init_from: str) -> Path:
    """Return the folder of adapter.init_from, see `adapter_folder`."""
    try:
        return adapter_folder(resolve_path(init_from))
    except RequestError as error:
        raise RequestError(f"adapter.init_from: {str(error).removeprefix('adapter: ')}") from error


def check_no_adapter_is_lost(
    named: str, base: str | None = None, adapter: str | None = None, revision: str | None = None
) -> None:
    """Refuse a base that is itself an adapter, or that leaves out an adapter which another was trained on.

    Args:
        named: model.name_or_path, or what `adapter` names as its base; `revision` is that of a hub id.
        base: what is used in its place, if anything.

    Raises:
        RequestError: with the commands that merge the chain, in order.
    """
    chain, whole = adapter_chain(named, revision)
    if base is not None and not any(same_model(base, one) for one in chain):
        chain, whole = adapter_chain(base)
    if len(chain) == 1 and whole:
        return
    lost, onto, steps, made = chain[:-1] if whole else chain, "" if whole else " --base BASE", "", ""
    for one in [*reversed(lost), *([adapter] if adapter else [])]:
        below, made = made, shlex.quote(f"{Path(resolve_path(one)).name}-merged")
        steps += f"\n  python -m orpo_lite.merge {shlex.quote(one)}{onto} --output {made}"
        onto = f" --base {made}"
    if adapter:
        raise RequestError(
            f"{adapter}: its base {lost[0]} is itself an adapter, which would be lost: merge from below:{steps}\n(or leave the "
            f"last one out and give --base {below} here; model.name_or_path={below} in a recipe)"
        )
    root = chain[1] if len(chain) == 2 else "BASE"
    raise RequestError(
        f"model.name_or_path: {named} is an adapter, not a model: merge it first:{steps}\nthen set model.name_or_path={made}; "
        f"to train the adapter itself further: model.name_or_path={root} adapter.init_from={named}"
    )


def adapter_chain(name: str, revision: str | None = None) -> tuple[list[str], bool]:
    """List a model, or an adapter and what it was trained on; False where the last is an adapter that names no base."""
    chain = [name]
    while (config := adapter_config(chain[-1], revision)) is not None:
        below = read_object(config).get("base_model_name_or_path")
        if not isinstance(below, str) or not below or below in chain:
            return chain, False
        chain.append(below)
        revision = None
    return chain, True


hub_adapter_config = functools.cache(find_adapter_config_file)
"""Asks the hub once in a process."""


def adapter_config(name: str, revision: str | None = None) -> Path | None:
    """Return the adapter_config.json of a folder or hub id that holds an adapter and no whole model, else None."""
    place = os.path.expanduser(resolve_path(name))
    local = os.path.isdir(place)
    if not local and (looks_local(name) or name.count("/") != 1):
        return None
    try:
        found = (find_adapter_config_file if local else hub_adapter_config)(place, revision=revision)
        weights = ("model.safetensors", "model.safetensors.index.json")
        return Path(found) if found and not any(has_file(place, one, revision) for one in weights) else None
    except (OSError, ValueError):  # whoever reads the model says what is wrong
        return None


def same_model(one: str, other: str) -> bool:
    """Return True where two names are those of one folder or one hub id."""
    return os.path.realpath(os.path.expanduser(one)) == os.path.realpath(os.path.expanduser(other))


def read_config(spec: ModelSection) -> PreTrainedConfig:
    """Read the base's configuration.

    Raises:
        RequestError: see `locate`; sizes that no model has; or an encoder-decoder.
    """
    name = locate(spec)
    with hub_errors_in_words(spec.name_or_path):
        try:
            config = AutoConfig.from_pretrained(name, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
        except (ArithmeticError, AttributeError, KeyError, TypeError) as error:
            raise RequestError(
                f"model.name_or_path: config.json of {spec.name_or_path} does not describe a model ({type(error).__name__}: "
                f"{error}): copy or download it again"
            ) from error
    check_decoder_only(config, f"model.name_or_path: {spec.name_or_path}")
    return config


@contextlib.contextmanager
def renaming_field(field: str, hint: str = "") -> Iterator[None]:
    """Report errors about a base by the name of what the user gave, where that is not model.name_or_path."""
    try:
        yield
    except RequestError as error:
        text = str(error)
        raise RequestError(text.replace("model.name_or_path", field) + hint * ("model.name_or_path" in text)) from error


@contextlib.contextmanager
def hub_errors_in_words(name: str) -> Iterator[None]:
    """Turn what transformers and the hub raise while reading `name` into a RequestError that says what to do."""
    try:
        yield
    except RequestError:
        raise
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise RequestError(explain(name, error)) from error


CAUSES: list[dict[str, Any]] = safe_yaml.read(Path(__file__).with_suffix(".yaml"))


def explain(name: str, error: BaseException) -> str:
    """Put an error into words, by the exceptions behind it."""
    chain, cause = [], error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    kinds = {kind.__name__ for one in chain for kind in type(one).__mro__}
    text = " ".join(str(error).split())
    words = next(one["say"] for one in CAUSES if any(sign in kinds or sign in text for sign in one["when"]))
    name = name if len(name) <= 300 else f"{name[:300]}..."
    kind = text.partition("<class '")[2].partition("'")[0].rpartition(".")[2]
    return "model." + words.format(name=name, page=f"https://huggingface.co/{name}", kind=kind, text=text[:400])
