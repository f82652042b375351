"""The tokenizer as converter and llama.cpp need it: files, rule for splitting text, special tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from orpo_lite.common.errors import RequestError
from orpo_lite.model import stop_token_ids

WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|NUMBER| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
RULES = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|" + WORDS.replace("NUMBER", r"\p{N}{1,3}"): "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|" + WORDS.replace("NUMBER", r"\p{N}"): "qwen2",
}
"""Regular expression of a Split pre-tokenizer -> llama.cpp's name for the same rule."""


def splitting_rule(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return llama.cpp's name for how a byte-level tokenizer splits text before merging; None where it has none.

    The converter recognizes published tokenizers by their tokens; this is for tokenizers that users trained.
    """
    core = backend(tokenizer)
    parts = core["pre_tokenizer"] or {}
    parts = parts["pretokenizers"] if parts.get("type") == "Sequence" else [parts]
    kinds = [part.get("type") for part in parts]
    if kinds[-1] != "ByteLevel" or parts[-1]["add_prefix_space"]:
        return None
    if kinds == ["ByteLevel"] and parts[0]["use_regex"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"] and parts[1]["use_regex"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not parts[1]["use_regex"]:
        rule = RULES.get(parts[0]["pattern"].get("Regex", ""))
        # with llama-bpe, a word that is a token becomes that token without merging
        return "smaug-bpe" if rule == "llama-bpe" and not core["model"].get("ignore_merges") else rule
    return None


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


def write_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, folder: Path) -> None:
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
    added = {i: token.special for i, token in tokenizer.added_tokens_decoder.items()}
    pieces = {i: piece for piece, i in model["vocab"].items()}
    out = proto.ModelProto()  # type: ignore[attr-defined]
    out.trainer_spec.model_type = 2  # BPE
    out.trainer_spec.byte_fallback = True
    out.trainer_spec.unk_piece = unknown
    for i in range(max(pieces) + 1):
        piece = pieces.get(i, f"[PAD{i}]")
        is_byte = len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
        # single characters are no result of a merge: they come after all merges
        score = 0.0 if i in added or is_byte else -float(order.get(piece, len(order) + i))
        kind = (
            kinds.UNKNOWN
            if piece == unknown
            else kinds.UNUSED
            if i not in pieces
            else kinds.BYTE
            if is_byte
            else kinds.CONTROL
            if added.get(i)
            else kinds.USER_DEFINED
            if i in added
            else kinds.NORMAL
        )
        out.pieces.add(piece=piece, score=score, type=kind)
    path.write_bytes(out.SerializeToString())


def stop_ids(tokenizer: PreTrainedTokenizerBase, generation: Any = None) -> list[int]:
    """List the tokens that end an answer, EOS first: the tokenizer's, chat template's and generation config's."""
    more = getattr(generation, "eos_token_id", None)
    more = [] if more is None else more if isinstance(more, list) else [more]
    return list(dict.fromkeys([*stop_token_ids(tokenizer), *more]))


def token_fields(tokenizer: PreTrainedTokenizerBase, stops: list[int]) -> dict[str, Any]:
    """Return GGUF fields for the tokenizer's actual behavior, part of which the converter guesses from files."""
    plain = tokenizer("a")["input_ids"]
    assert isinstance(plain, list)
    ids = {"bos": tokenizer.bos_token_id, "eos": stops[0], "unknown": tokenizer.unk_token_id}
    ids |= {"padding": tokenizer.pad_token_id} | dict(zip(("eot", "eom"), stops[1:], strict=False))
    fields: dict[str, Any] = {f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items() if i is not None}
    fields["tokenizer.ggml.add_bos_token"] = tokenizer.bos_token_id is not None and plain[0] == tokenizer.bos_token_id
    fields["tokenizer.ggml.add_eos_token"] = tokenizer.eos_token_id is not None and plain[-1] == tokenizer.eos_token_id
    if sentencepiece_like(tokenizer):
        first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])[0]  # type: ignore[arg-type]
        fields["tokenizer.ggml.add_space_prefix"] = first.startswith("▁")
    if isinstance(tokenizer.chat_template, str):
        fields["tokenizer.chat_template"] = tokenizer.chat_template
    return fields
