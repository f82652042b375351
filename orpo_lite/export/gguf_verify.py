"""Read a GGUF file back, with transformers' reader where it knows the model, and compare it with its source."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from orpo_lite.export.gguf_vocabulary import byte_level

PROBE_TOKENS = 64


class Mismatch(RuntimeError):
    """The file does not hold what its source holds."""


def read(path: Path) -> GGUFReader:
    try:
        return GGUFReader(path)
    except ValueError as error:
        # forks of llama.cpp have types of their own
        raise Mismatch(f"the file written cannot be read back: {error}; was it llama.cpp's own quantizer?") from error


def check_fields(path: Path, tokenizer: PreTrainedTokenizerBase, fields: dict[str, Any], context: int | None) -> None:
    """Compare tokenizer and metadata of the file with the tokenizer; every token by its id.

    Raises:
        Mismatch: a field or token differs; the message names it.
    """
    reader = read(path)

    def field(key: str) -> Any:
        return reader.fields[key].contents() if key in reader.fields else None

    for key, value in fields.items():
        found = field(key)
        if found != value and not (isinstance(value, float) and abs(found - value) < 1e-6 * abs(value)):
            raise Mismatch(f"{key} is {str(found)[:200]!r} in the file, expected {str(value)[:200]!r}")
    architecture = field("general.architecture")
    written = field(f"{architecture}.context_length")
    if context and written is not None and written != context:
        raise Mismatch(f"{architecture}.context_length is {written} in the file, expected {context}")
    tokens = field("tokenizer.ggml.tokens")
    added = tokenizer.added_tokens_decoder
    for token, i in tokenizer.get_vocab().items():
        # user-defined tokens are written with the spaces that they stand for
        if i >= len(tokens) or tokens[i] != token and not (i in added and tokens[i] == token.replace("▁", " ")):
            found = repr(tokens[i]) if i < len(tokens) else "missing"
            raise Mismatch(f"token {i} is {found} in the file, expected {token!r}")
    rows = {t.name: int(t.shape[1]) for t in reader.tensors if t.name == "token_embd.weight"}
    if rows and rows["token_embd.weight"] != len(tokens):
        raise Mismatch(f"the file holds {len(tokens)} tokens and {rows['token_embd.weight']} embeddings")
    if byte_level(tokenizer) and not field("tokenizer.ggml.merges"):
        raise Mismatch("the file holds no merges for its byte-level tokenizer")


def compare(path: Path, source: Path, limit: float, exact: bool) -> list[str]:
    """Compare weights, and logits where both models fit into memory; return sentences to print.

    Args:
        path: the GGUF file.
        source: the model folder.
        limit: largest relative error ||w' - w|| / ||w|| that the file's type may have in a weight tensor.
        exact: the type is a float type, so the logits must agree as well.

    Raises:
        Mismatch: a weight or the logits are not the source's.
    """
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    parameters = sum(int(tensor.n_elements) for tensor in GGUFReader(path).tensors)
    # both models in float32, and the reader's temporary copy of one
    needed = 12 * parameters
    if needed > psutil.virtual_memory().available:
        return [
            by_values(path, source, limit),
            f"logits not compared: that needs {needed / 1e9:.0f} GB of memory ({size / 1e9:.1f} GB of weights)",
        ]
    with quietly():
        original = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
        ).eval()
        copied = load(path, original)
    if copied is None:
        name = type(original).__name__
        return [
            by_values(path, source, limit),
            f"logits not compared: transformers cannot read {name} from GGUF",
        ]
    weights(original, copied, limit)
    return [logits(original, copied, exact)]


def load(path: Path, original: PreTrainedModel) -> PreTrainedModel | None:
    """Load the file with transformers; None where its reader does not know the model."""
    place = {"gguf_file": path.name, "dtype": torch.float32}
    try:
        # with the source's configuration: from the file, the reader would take defaults for some fields
        model, report = type(original).from_pretrained(  # type: ignore[misc]
            path.parent, config=copy.deepcopy(original.config), output_loading_info=True, **place
        )
        return model.eval() if not report["missing_keys"] and not report["mismatched_keys"] else None
    except NotImplementedError:
        pass  # GGUF has no name for some models, such as Mistral: they are read as the model that they are written as
    except (ValueError, KeyError, RuntimeError):
        return None
    try:
        found = AutoModelForCausalLM.from_pretrained(path.parent, **place).state_dict()
        model = copy.deepcopy(original)
        model.load_state_dict(found)
        return model
    except (ValueError, KeyError, NotImplementedError, RuntimeError):
        return None


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Silence transformers' warnings and progress bars; the comparison shows whether they mattered."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def weights(original: PreTrainedModel, copied: PreTrainedModel, limit: float) -> None:
    """Compare every weight by its name.

    Raises:
        Mismatch: one is off by more than `limit` of its norm.
    """
    found = copied.state_dict()
    for name, weight in original.state_dict().items():
        error = relative(found[name].float(), weight.float())
        if not error <= limit:
            raise Mismatch(f"{name} is off by {error:.2g} of its norm, at most {limit:g} expected of this type")


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp(min=1e-20)).item()


@torch.no_grad()
def logits(original: PreTrainedModel, copied: PreTrainedModel, exact: bool) -> str:
    """Compare logits on random tokens; return a sentence.

    Raises:
        Mismatch: they are not finite, or, if `exact`, differ.
    """
    generator = torch.Generator().manual_seed(0)
    rows = original.config.get_text_config().vocab_size
    tokens = torch.randint(rows, (1, PROBE_TOKENS), generator=generator)
    before, after = original(tokens).logits[0], copied(tokens).logits[0]
    if not after.isfinite().all():
        raise Mismatch("the file's logits are not finite: a weight may be too large for float16, try bf16 or f32")
    drift = ((after - before).abs().mean() / before.std()).item()
    divergence = torch.nn.functional.kl_div(
        after.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="none"
    )
    kl, same = divergence.sum(-1).mean().item(), (after.argmax(-1) == before.argmax(-1)).float().mean().item()
    if exact and drift > 0.1:
        raise Mismatch(f"logits differ by {drift:.1e} of their spread")
    words = (
        f"read back by transformers: logits differ by {drift:.1e} of their spread, KL {kl:.1e}, the most likely token "
        f"agrees at {same:.0%} of positions"
    )
    return words if same > 0.5 else f"{words}; this type loses too much of this model to be useful"


def by_values(path: Path, source: Path, limit: float) -> str:
    """Compare the sorted values of tensors whose names correspond; return a sentence.

    For models that transformers cannot read from GGUF, or that do not fit into memory.

    Raises:
        Mismatch: a tensor does not hold the source's values.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    reader = GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    blocks = int(reader.fields[f"{architecture}.block_count"].contents())
    kind = next((k for k, name in MODEL_ARCH_NAMES.items() if name == architecture), None)
    names = get_tensor_name_map(kind, blocks) if kind is not None else None
    held = {tensor.name: tensor for tensor in reader.tensors}
    places: dict[str, tuple[Path, str]] = {}
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            for key in shard.keys():
                name = names.get_name(key, try_suffixes=(".weight", ".bias")) if names else None
                if name in held:
                    places[name] = (file, key)
    compared = 0
    for name, (file, key) in places.items():
        tensor = held[name]
        with safe_open(file, "pt") as shard:
            expected = shard.get_tensor(key).float().flatten().sort().values
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float().flatten().sort().values
        allowed = 1e-6 if tensor.tensor_type == GGMLQuantizationType.F32 else limit
        if values.shape != expected.shape or not relative(values, expected) <= max(allowed, limit):
            raise Mismatch(f"{name} does not hold the values of {key}")
        compared += expected.numel()
    total = sum(int(tensor.n_elements) for tensor in reader.tensors)
    if not places:
        return "no weight compared: none of the file's tensors has a counterpart by name"
    return f"{len(places)} of {len(held)} tensors ({compared / total:.0%} of the weights) hold the source's values"
