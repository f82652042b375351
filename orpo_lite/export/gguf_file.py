"""Types of GGUF files, quantizing to those below 8 bits, and reading a file back to compare it with its source."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFReader,
    GGUFValueType,
    GGUFWriter,
    LlamaFileType,
    dequantize,
    get_tensor_name_map,
    quant_shape_to_byte_shape,
    quantize,
)
from safetensors import safe_open
from transformers import PreTrainedTokenizerBase

from orpo_lite.common.errors import RequestError
from orpo_lite.export.llama_cpp import byte_level, last_lines


class Mismatch(RuntimeError):
    """The file does not hold what its source holds."""


@dataclass(frozen=True)
class Kind:
    """A type of GGUF file."""

    name: str
    limit: float
    """Largest relative error ||w' - w|| / ||w|| that the type may cause in a weight tensor."""
    by: str
    """Its writer: converter, gguf or llama.cpp."""


CONVERTER = {"f32": 1e-6, "f16": 2e-3, "bf16": 8e-3, "q8_0": 0.03, "tq1_0": 1.0, "tq2_0": 1.0}
"""The converter's types and their limits. The last two are ternary, for models trained so (BitNet); others lose most."""
BLOCKS = {"q5_1": 0.1, "q5_0": 0.1, "q4_1": 0.2, "q4_0": 0.2, "mxfp4": 0.2}
"""The gguf package's. The last has one power of two for 32 weights, for models trained so (gpt-oss)."""
LLAMA_CPP = re.compile(r"(q([2-6])_k(_[sml])?|iq([1-4])_[a-z]+|q[458]_[01])")


def kind_of(name: str, llama_quantize: str | None) -> Kind:
    """Return the type of this name.

    Raises:
        RequestError: there is no such type, or it needs llama.cpp's quantizer and none is given.
    """
    name, known = name.lower(), ", ".join([*CONVERTER, *BLOCKS])
    if name in CONVERTER:
        return Kind(name, CONVERTER[name], "converter")
    if name in BLOCKS and not llama_quantize:
        return Kind(name, BLOCKS[name], "gguf")
    match = LLAMA_CPP.fullmatch(name)
    if not match:
        raise RequestError(
            f"--quant: no type {name!r}; expected {known}, or with llama.cpp's quantizer q4_k_m and its like"
        )
    if not llama_quantize:
        raise RequestError(
            f"--quant: {name} is written by llama.cpp's quantizer: download a release of llama.cpp "
            "(https://github.com/ggml-org/llama.cpp/releases) and give its program with --llama-quantize "
            f"PATH/llama-quantize; without it: {known}"
        )
    if not os.access(llama_quantize, os.X_OK) or Path(llama_quantize).is_dir():
        raise RequestError(f"--llama-quantize: {llama_quantize} is not a program that can be run")
    bits = int(match[2] or match[4] or name[1])
    return Kind(name, {1: 0.8, 2: 0.6, 3: 0.4, 4: 0.2, 5: 0.1, 6: 0.06, 8: 0.03}[bits], "llama.cpp")


# ---- quantizing ----------------------------------------------------------------------------------------------------------


def quantize_file(path: Path, output: Path, kind: Kind, llama_quantize: str | None) -> None:
    """Write `path`, a GGUF file of floats, as another file of this type.

    Raises:
        RuntimeError: llama.cpp's quantizer failed; the message ends with its last lines.
    """
    if kind.by == "gguf":
        with_gguf(path, output, kind)
        return
    assert llama_quantize is not None  # `kind_of` has checked it
    words = [str(Path(llama_quantize).absolute()), str(path), str(output), kind.name.upper()]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode or not output.is_file():
        raise RuntimeError(
            f"{llama_quantize} failed (status {done.returncode}); its last lines:\n{last_lines(done.stdout)}"
        )


def with_gguf(path: Path, output: Path, kind: Kind) -> None:
    """Quantize with the gguf package, one tensor at a time; tensors that the converter left in float32 stay so.

    Embeddings and head, which matter most, get 8 bits: llama.cpp too gives them more than the rest.
    """
    reader = GGUFReader(path)
    writer = GGUFWriter(output, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type"):
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=inner)
    writer.add_file_type(LlamaFileType["MOSTLY_" + {"mxfp4": "MXFP4_MOE"}.get(kind.name, kind.name.upper())])
    # in a file of 16-bit weights, the converter keeps in float32 what needs it; in one of float32, names decide
    f32 = GGMLQuantizationType.F32
    mixed = any(tensor.tensor_type != f32 for tensor in reader.tensors)
    targets: list[GGMLQuantizationType] = []
    for tensor in reader.tensors:
        stays = tensor.tensor_type == f32 and (mixed or keeps_float(tensor.name, len(tensor.shape)))
        target = f32 if stays else block_type(tensor.name, int(tensor.shape[0]), kind)
        shape = [int(n) for n in reversed(tensor.shape)]
        block, size = GGML_QUANT_SIZES[target]
        plain = {f32: np.float32, GGMLQuantizationType.F16: np.float16}.get(target)
        writer.add_tensor_info(
            tensor.name,
            shape if plain else list(quant_shape_to_byte_shape(shape, target)),
            np.dtype(plain or np.uint8),
            int(tensor.n_elements) // block * size,
            raw_dtype=None if plain else target,
        )
        targets.append(target)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, target in zip(reader.tensors, targets, strict=True):
        writer.write_tensor_data(quantize(dequantize(tensor.data, tensor.tensor_type).astype(np.float32), target))
    writer.close()


def keeps_float(name: str, dimensions: int) -> bool:
    """Return True for tensors that llama.cpp computes in float32."""
    kept = ("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "position_embd.weight")
    return dimensions < 2 or not name.endswith(".weight") or name.endswith(kept) or ".ssm_" in name


def block_type(name: str, row: int, kind: Kind) -> GGMLQuantizationType:
    """Return the type of a tensor with rows of this length: float16 where they cannot be cut into blocks."""
    ends = name in ("token_embd.weight", "output.weight")
    wanted = GGMLQuantizationType.Q8_0 if ends else GGMLQuantizationType[kind.name.upper()]
    return GGMLQuantizationType.F16 if row % GGML_QUANT_SIZES[wanted][0] else wanted


# ---- reading back --------------------------------------------------------------------------------------------------------


def check_fields(path: Path, tokenizer: PreTrainedTokenizerBase, fields: dict[str, Any], context: int | None) -> None:
    """Compare tokenizer and metadata of the file with the tokenizer; every token by its id.

    Raises:
        Mismatch: a field or token differs; the message names it.
    """
    reader = GGUFReader(path)

    def field(key: str) -> Any:
        return reader.fields[key].contents() if key in reader.fields else None

    length = f"{field('general.architecture')}.context_length"
    if context and field(length) is not None:
        fields = fields | {length: context}
    for key, value in fields.items():
        found = field(key)
        if found != value and not (isinstance(value, float) and abs(found - value) < 1e-6 * abs(value)):
            raise Mismatch(f"{key} is {str(found)[:200]!r} in the file, expected {str(value)[:200]!r}")
    tokens = field("tokenizer.ggml.tokens")
    added = tokenizer.added_tokens_decoder
    for token, i in tokenizer.get_vocab().items():
        # user-defined tokens are written with the spaces that they stand for
        if i >= len(tokens) or tokens[i] != token and not (i in added and tokens[i] == token.replace("▁", " ")):
            found = repr(tokens[i]) if i < len(tokens) else "missing"
            raise Mismatch(f"token {i} is {found} in the file, expected {token!r}")
    rows = next((int(tensor.shape[1]) for tensor in reader.tensors if tensor.name == "token_embd.weight"), len(tokens))
    if rows != len(tokens):
        raise Mismatch(f"the file holds {len(tokens)} tokens and {rows} embeddings")
    if byte_level(tokenizer) and not field("tokenizer.ggml.merges"):
        raise Mismatch("the file holds no merges for its byte-level tokenizer")


def compare_values(path: Path, source: Path, limit: float) -> str:
    """Compare the values of every matrix that has the same name in file and source; return a sentence.

    Values are compared sorted, since the converter moves rows where llama.cpp computes in another order. Vectors are left
    out: it adds 1 to some models' norms.

    Args:
        path: the GGUF file.
        source: the model folder.
        limit: largest relative error, see `Kind.limit`.

    Raises:
        Mismatch: a matrix does not hold the source's values, or is not finite.
    """
    reader = GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    layers = int(reader.fields[f"{architecture}.block_count"].contents())
    kind = next((kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture), None)
    names = get_tensor_name_map(kind, layers) if kind is not None else None
    matrices = {tensor.name: tensor for tensor in reader.tensors if len(tensor.shape) > 1}
    found = compared = 0
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            for key in shard.keys():  # noqa: SIM118  # no dict
                tensor = matrices.get(names and names.get_name(key, try_suffixes=(".weight", ".bias")))  # type: ignore[arg-type]
                if tensor is None:
                    continue
                expected = np.sort(shard.get_tensor(key).float().numpy(), axis=None)
                values = np.sort(dequantize(tensor.data, tensor.tensor_type), axis=None)
                if not np.isfinite(values).all():
                    raise Mismatch(
                        f"{tensor.name} is not finite: a weight may be too large for float16, try bf16 or f32"
                    )
                same_size = values.size == expected.size
                if not same_size or not np.linalg.norm(values - expected) <= limit * np.linalg.norm(expected):
                    raise Mismatch(f"{tensor.name} does not hold the values of {key}")
                found, compared = found + 1, compared + values.size
    share = compared / sum(int(tensor.n_elements) for tensor in reader.tensors)
    return f"read back: {found} of {len(matrices)} matrices ({share:.0%} of the weights) hold the source's values"


def check_pairs(path: Path, pairs: dict[str, dict[str, torch.Tensor]]) -> str:
    """Read an adapter's file back: the same number of pairs, of the same ranks, all finite; return a phrase to print.

    Raises:
        Mismatch: they are not.
    """
    held = GGUFReader(path).tensors
    ranks = sorted(int(tensor.shape[1]) for tensor in held if tensor.name.endswith(".lora_a"))
    if len(held) != 2 * len(pairs) or ranks != sorted(pair["A"].shape[0] for pair in pairs.values()):
        raise Mismatch(f"{path.name} holds {len(held)} matrices, expected {2 * len(pairs)}")
    for tensor in held:
        if not np.isfinite(tensor.data).all():
            raise Mismatch(f"{tensor.name}: not finite")
    return f"{len(pairs)} LoRA pairs, {path.stat().st_size / 1e6:.1f} MB"
