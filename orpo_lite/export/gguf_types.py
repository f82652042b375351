"""Types of GGUF files; those below 8 bits are written by the gguf package, or by llama.cpp's quantizer."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import (
    GGML_QUANT_SIZES,
    GGMLQuantizationType,
    GGUFReader,
    GGUFValueType,
    GGUFWriter,
    LlamaFileType,
    dequantize,
    quant_shape_to_byte_shape,
    quantize,
)

from orpo_lite.common.errors import RequestError

LAST_LINES = 15
"""Lines of a failed program's output to show."""


@dataclass(frozen=True)
class Kind:
    """A type of GGUF file."""

    name: str
    bits: float
    """Bits per weight, approximately."""
    limit: float
    """Largest relative error that the type may cause in a weight tensor."""
    by: str
    """Its writer: converter, gguf or llama.cpp."""


CONVERTER = {
    "f32": Kind("f32", 32, 1e-6, "converter"),
    "f16": Kind("f16", 16, 2e-3, "converter"),
    "bf16": Kind("bf16", 16, 8e-3, "converter"),
    "q8_0": Kind("q8_0", 8.5, 0.03, "converter"),
    # ternary, for models trained so (BitNet); others lose most of their information
    "tq1_0": Kind("tq1_0", 1.7, 1.0, "converter"),
    "tq2_0": Kind("tq2_0", 2.1, 1.0, "converter"),
}
BLOCKS = {
    "q5_1": Kind("q5_1", 6, 0.1, "gguf"),
    "q5_0": Kind("q5_0", 5.5, 0.1, "gguf"),
    "q4_1": Kind("q4_1", 5, 0.2, "gguf"),
    "q4_0": Kind("q4_0", 4.5, 0.2, "gguf"),
    # blocks of 32 with one power of two, for models trained so (gpt-oss); others lose more than with q4_0
    "mxfp4": Kind("mxfp4", 4.25, 0.2, "gguf"),
}
LLAMA_CPP = re.compile(r"(q([2-6])_k(_[sml])?|iq([1-4])_[a-z]+|q[458]_[01])")


def kind_of(name: str, llama_quantize: str | None) -> Kind:
    """Return the type of this name.

    Raises:
        RequestError: there is no such type, or it needs llama.cpp's quantizer and none is given.
    """
    name = name.lower()
    if name in CONVERTER:
        return CONVERTER[name]
    if name in BLOCKS and not llama_quantize:
        return BLOCKS[name]
    match = LLAMA_CPP.fullmatch(name)
    if not match:
        known = ", ".join([*CONVERTER, *BLOCKS])
        raise RequestError(
            f"--quant: no type {name!r}; expected {known}, or with llama.cpp's quantizer q4_k_m and its like"
        )
    bits = int(match[2] or match[4] or name[1])
    if not llama_quantize:
        raise RequestError(
            f"--quant: {name} is written by llama.cpp's quantizer: download a release of llama.cpp "
            "(https://github.com/ggml-org/llama.cpp/releases) and give its program with --llama-quantize "
            "PATH/llama-quantize; without it: " + ", ".join([*CONVERTER, *BLOCKS])
        )
    if not os.access(llama_quantize, os.X_OK) or Path(llama_quantize).is_dir():
        raise RequestError(f"--llama-quantize: {llama_quantize} is not a program that can be run")
    return Kind(name, bits + 1, {1: 0.8, 2: 0.6, 3: 0.4, 4: 0.2, 5: 0.1, 6: 0.06, 8: 0.03}[bits], "llama.cpp")


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
        lines = "\n".join(f"  {line}" for line in done.stdout.strip().splitlines()[-LAST_LINES:])
        raise RuntimeError(f"{llama_quantize} failed (status {done.returncode}); its last lines:\n{lines}")


def with_gguf(path: Path, output: Path, kind: Kind) -> None:
    """Quantize with the gguf package, one tensor at a time; tensors that the converter left in float32 stay so.

    Embeddings and head, which matter most, get 8 bits: llama.cpp too gives them more than the rest.
    """
    reader = GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(output, architecture)
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), field.types[0], sub_type=inner)
    writer.add_file_type(LlamaFileType["MOSTLY_" + {"mxfp4": "MXFP4_MOE"}.get(kind.name, kind.name.upper())])
    # in a file of 16-bit weights, the converter keeps in float32 what needs it; in one of float32, names decide
    f32 = GGMLQuantizationType.F32
    mixed = any(t.tensor_type != f32 for t in reader.tensors)
    small = [t.tensor_type == f32 and (mixed or keeps_float(t.name, len(t.shape))) for t in reader.tensors]
    plan = [
        (tensor, tensor.tensor_type if stays else block_type(tensor.name, int(tensor.shape[0]), kind))
        for tensor, stays in zip(reader.tensors, small, strict=True)
    ]
    for tensor, target in plan:
        shape = [int(n) for n in reversed(tensor.shape)]
        block, size = GGML_QUANT_SIZES[target]
        plain = target in (GGMLQuantizationType.F32, GGMLQuantizationType.F16)
        writer.add_tensor_info(
            tensor.name,
            shape if plain else list(quant_shape_to_byte_shape(shape, target)),
            np.dtype({"F32": np.float32, "F16": np.float16}.get(target.name, np.uint8)),
            int(tensor.n_elements) // block * size,
            raw_dtype=None if plain else target,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, target in plan:
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
