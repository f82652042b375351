"""Types of GGUF files, quantizing to those below 8 bits, and reading a file back to compare it with its source."""

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
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

from orpo_lite.common import safe_yaml
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
    program: str = ""
    """llama.cpp's llama-quantize, where that writes it."""
    library: str = ""
    """A library of ggml, where that does; the converter without either."""


CONVERTER = {"f32": 1e-6, "f16": 2e-3, "bf16": 8e-3, "q8_0": 0.03, "tq1_0": 1.0, "tq2_0": 1.0}
"""The converter's types and their limits. The last two are ternary, for models trained so (BitNet); others lose most."""
LLAMA_CPP = re.compile(r"(q([2-6])_k(_[sml])?|iq([1-4])_[a-z]+|q[458]_[01])")
MIXTURES: dict[str, list[tuple[str, str | float, str]]] = safe_yaml.read(Path(__file__).with_suffix(".yaml"))
FALLBACK = {"Q2_K": "IQ4_NL", "Q3_K": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""K-quant -> llama.cpp's type for rows that are no multiple of 256."""
LIBRARIES = {"xllamacpp": "*.so", "llama_cpp": "lib/*ggml-base*"}
"""Package -> where its wheel keeps ggml, which holds the quantizer of llama.cpp."""
PROBE = (
    "import ctypes as c, sys; q = c.CDLL(sys.argv[1]).ggml_quantize_chunk;"
    "q(12, (c.c_float * 256)(), (c.c_char * 256)(), c.c_int64(0), c.c_int64(1), c.c_int64(256), None)"
)


def kind_of(name: str, llama_quantize: str | None) -> Kind:
    """Return the type of this name.

    Raises:
        RequestError: there is no such type, or it needs llama.cpp's quantizer and none is found.
    """
    name, known = name.lower(), ", ".join([*CONVERTER, *MIXTURES])
    name += "_m" * (name in ("q3_k", "q4_k", "q5_k"))
    if name in CONVERTER:
        return Kind(name, CONVERTER[name])
    match = LLAMA_CPP.fullmatch(name)
    if not match:
        raise RequestError(f"--quant: no type {name!r}; expected {known}, or another of llama.cpp's llama-quantize")
    limit = {1: 0.8, 2: 0.6, 3: 0.4, 4: 0.2, 5: 0.1, 6: 0.06, 8: 0.03}[int(match[2] or match[4] or name[1])]
    program = llama_quantize or shutil.which("llama-quantize")
    if program and (not os.access(program, os.X_OK) or Path(program).is_dir()):
        raise RequestError(f"--llama-quantize: {program} is not a program that can be run")
    if program:
        return Kind(name, limit, program=str(Path(program).absolute()))
    if name in MIXTURES and (library := ggml_library()):
        return Kind(name, limit, library=library)
    wheel = (
        "pip install xllamacpp (Linux) or llama-cpp-python, whose library quantizes, or " if name in MIXTURES else ""
    )
    raise RequestError(
        f"--quant: {name} is written by llama.cpp's quantizer: {wheel}download a release of llama.cpp "
        "(https://github.com/ggml-org/llama.cpp/releases) and give its program with --llama-quantize PATH/llama-quantize"
    )


def ggml_library() -> str | None:
    """Return the path of a ggml library with a quantizer that runs on this CPU, from an installed package; None without.

    It is tried in another process, which may crash.
    """
    for package, pattern in LIBRARIES.items():
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            for path in map(str, Path(folder).glob(pattern)):
                if subprocess.run([sys.executable, "-c", PROBE, path], capture_output=True).returncode == 0:
                    return path
    return None


def quantize_file(path: Path, output: Path, kind: Kind) -> None:
    """Write `path`, a GGUF file of 16-bit floats, as another file of this type.

    Raises:
        RuntimeError: llama.cpp's quantizer failed; the message ends with its last lines.
    """
    if kind.library:
        write_blocks(path, output, kind)
        return
    words = [kind.program, str(path), str(output), kind.name.upper()]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode or not output.is_file():
        raise RuntimeError(
            f"{kind.program} failed (status {done.returncode}); its last lines:\n{last_lines(done.stdout)}"
        )


def write_blocks(path: Path, output: Path, kind: Kind) -> None:
    """Quantize with ggml, one tensor at a time; tensors that the converter left in float32 stay so."""
    reader = GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(output, architecture)
    layers = int(reader.fields[f"{architecture}.block_count"].contents())
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    encode = ggml_quantizer(kind.library)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type"):
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=inner)
    writer.add_file_type(LlamaFileType[f"MOSTLY_{kind.name.upper()}"])
    f32 = GGMLQuantizationType.F32
    targets: list[GGMLQuantizationType] = []
    for tensor in reader.tensors:
        target = f32 if tensor.tensor_type == f32 else block_type(tensor.name, int(tensor.shape[0]), kind, layers, tied)
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
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        plain = target in (f32, GGMLQuantizationType.F16)
        writer.write_tensor_data(quantize(values, target) if plain else encode(values, target))
    writer.close()


def ggml_quantizer(library: str) -> Callable[[np.ndarray, GGMLQuantizationType], np.ndarray]:
    """Return ggml's quantizer: (float32 values (..., row), type) -> bytes (..., bytes of a row)."""
    function = ctypes.CDLL(library).ggml_quantize_chunk
    function.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def encode(values: np.ndarray, target: GGMLQuantizationType) -> np.ndarray:
        values = np.ascontiguousarray(values)
        out = np.empty(quant_shape_to_byte_shape(values.shape, target), np.uint8)
        row = values.shape[-1]
        function(int(target), values.ctypes.data, out.ctypes.data, 0, values.size // row, row, None)
        return out

    return encode


def block_type(name: str, row: int, kind: Kind, layers: int, tied: bool) -> GGMLQuantizationType:
    """Return the type of a tensor by its name and layer, see `MIXTURES`; float16 where its rows cannot be cut into blocks.

    The head matters most and gets more bits, also where the embeddings are the head (`tied`).
    """
    number = re.match(r"blk\.(\d+)\.", name)
    layer, eighth = int(number[1]) if number else 0, layers // 8

    def inside(which: str | float) -> bool:
        if which == "more":
            return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
        return which == "all" or layer < (int(layers * which) if isinstance(which, float) else int(which))

    wanted = next(kept for part, which, kept in MIXTURES[kind.name] if part in name and inside(which)).upper()
    if name == ("token_embd.weight" if tied else "output.weight"):
        wanted = "Q6_K"
    if row % GGML_QUANT_SIZES[GGMLQuantizationType[wanted]][0]:
        wanted = FALLBACK.get(wanted, "F16")
    return GGMLQuantizationType["F16" if row % 32 else wanted]


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
                # the text half of a multimodal model is a model of its own in llama.cpp
                text = key.replace("language_model.", "")
                tensor = matrices.get(names and names.get_name(text, try_suffixes=(".weight", ".bias")))  # type: ignore[arg-type]
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
    if not found:
        raise Mismatch(f"no matrix of {source} is found in the file by its name, so nothing can be compared")
    share = compared / sum(int(tensor.n_elements) for tensor in reader.tensors)
    return f"read back: {found} of {len(matrices)} matrices ({share:.0%} of the weights) hold the source's values"


def types_of(path: Path, kind: Kind) -> str:
    """Return the types of the file's matrices with their numbers, in a line to print."""
    counts: Counter[str] = Counter()
    for tensor in GGUFReader(path).tensors:
        name, short = tensor.tensor_type.name, bool(tensor.shape[0] % 256)
        if len(tensor.shape) > 1:
            instead = short and name in ("F16", *FALLBACK.values()) and name != kind.name.upper()
            counts[name + " (rows not a multiple of 256)" * instead] += 1
    return "matrices: " + ", ".join(f"{number} {name}" for name, number in counts.most_common())


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
