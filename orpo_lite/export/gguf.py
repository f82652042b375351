"""A model or adapter as a GGUF file, for llama.cpp, Ollama and LM Studio."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from orpo_lite.common.console import console
from orpo_lite.common.errors import RequestError
from orpo_lite.common.files import write_atomically
from orpo_lite.export.gguf_vocabulary import byte_level, splitting_rule, stop_ids, token_fields, write_vocabulary
from orpo_lite.export.llama_cpp import run_converter
from orpo_lite.export.ollama import modelfile
from orpo_lite.model import read_config
from orpo_lite.model.untrusted_files import check_adapter, check_links
from orpo_lite.recipe import ModelSection
from orpo_lite.report.vllm import vllm_problems, vllm_rank
from orpo_lite.trainer.run_folder import base_section, tokenizer_of

SMALL = 50 * 10**6
"""Bytes allowed for tokenizer and metadata when disk space is checked."""


@dataclass(frozen=True)
class Request:
    """A checked request for an export."""

    source: Path
    output: Path
    trained: bool
    """True where the source is a run or adapter folder."""
    ollama: bool
    base: str | None
    trust_remote_code: bool

    @property
    def name(self) -> str:
        return self.source.resolve().name


def export(
    source: str | Path,
    output: str | Path,
    *,
    quant: str = "auto",
    adapter: bool = False,
    ollama: bool = False,
    llama_quantize: str | None = None,
    base: str | None = None,
    onto: str = "original",
    trust_remote_code: bool = False,
) -> Path:
    """Write a run, adapter or plain model folder as one GGUF file, read it back and compare it with its source.

    Args:
        source: run or adapter folder, which is merged first, or a folder with a plain transformers model.
        output: GGUF file to write; it must not exist, and appears complete or not at all.
        quant: f32, f16, bf16, q8_0, ...; auto: 16 bits, bfloat16 where the weights are.
        adapter: write the adapter alone, as a LoRA file for a GGUF file of its base.
        ollama: write a Modelfile beside it.
        llama_quantize: llama.cpp's llama-quantize program, for types such as q4_k_m.
        base, onto, trust_remote_code: as in `merge`.

    Raises:
        RequestError: nothing to export, an architecture, tokenizer or type that cannot be written, output in use.
        RuntimeError: a tool failed, or the file differs from its source; nothing is kept.
    """
    try:
        from orpo_lite.export.gguf_types import kind_of
    except ImportError as error:
        raise RequestError(
            f"GGUF is read back through the gguf package ({error}): pip install 'orpo-lite[export]'"
        ) from error

    source, output = Path(source).expanduser(), Path(output).expanduser()
    trained = check_request(source, output, adapter, ollama, quant)
    check_adapter(source) if trained else check_links(source)
    kind = None if adapter or quant == "auto" else kind_of(quant, llama_quantize)
    request = Request(source, output, trained, ollama, base, trust_remote_code)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as folder:
        if adapter:
            lines = adapter_alone(request, Path(folder))
        else:
            lines = whole_model(request, Path(folder), kind, llama_quantize, onto)
    if trained:
        lines.append(vllm_line(source))
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)
    return output


def check_request(source: Path, output: Path, adapter: bool, ollama: bool, quant: str) -> bool:
    """Refuse a wrong request before anything is done; return True where the source is an adapter."""
    trained = (source / "adapter_config.json").is_file()
    if not trained and not (source / "config.json").is_file():
        raise RequestError(
            f"{source}: found neither adapter_config.json nor config.json, expected a run, adapter or model folder"
        )
    if adapter and not trained:
        raise RequestError(f"--adapter: {source} holds a whole model, no adapter")
    if adapter and quant not in ("auto", "f32"):
        raise RequestError(f"--quant: found {quant} with --adapter, which is always written as f32 (it is small)")
    if output.suffix != ".gguf":
        raise RequestError(f"--output: found {output}, expected a file name that ends in .gguf")
    for path in (output, *([output.parent / "Modelfile"] if ollama else [])):
        if path.exists():
            raise RequestError(f"--output: {path} exists: choose another name or folder, or remove it first")
    return trained


def whole_model(request: Request, work: Path, kind: Any, llama_quantize: str | None, onto: str) -> list[str]:
    """Merge where needed, convert, quantize and check a model, then give the file its name; return lines to print.

    Args:
        request: the request.
        work: an empty folder for intermediate files, on the output's disk.
        kind: type of file (`Kind`); None for the 16 bits that fit the weights.
        llama_quantize, onto: as in `export`.
    """
    from orpo_lite.export.gguf_types import CONVERTER, quantize_file
    from orpo_lite.export.gguf_verify import check_fields, compare

    config, tokenizer = read_source(request)
    kind = kind or CONVERTER["bf16" if config.dtype == torch.bfloat16 else "f16"]
    vocabulary = work / "vocabulary"
    conversion = conversion_request(request, config, tokenizer, kind, vocabulary)
    write_vocabulary(tokenizer, config, vocabulary)
    if request.trained:
        run_converter(conversion)  # refuses an unknown architecture before the merge
    check_space(config, request.output.parent, kind.bits, request.trained, kind.by != "converter")

    folder = request.source
    if request.trained:
        folder = merged_source(request, work / "merged", onto)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=request.trust_remote_code)
        write_vocabulary(tokenizer, config, vocabulary)
    generation = GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").is_file() else None
    stops = stop_ids(tokenizer, generation)
    fields: dict[str, Any] = token_fields(tokenizer, stops) | {"general.name": request.name}
    made = work / "made.gguf"
    conversion |= {"task": "model", "model": str(folder.resolve()), "fields": fields, "output": str(made)}
    with console.status(f"converting to {kind.name}"):
        run_converter(conversion)
        if kind.by != "converter":
            quantize_file(made, work / "quantized.gguf", kind, llama_quantize)
            made.unlink()
            made = work / "quantized.gguf"
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    with console.status("reading it back"):
        check_fields(made, tokenizer, fields, context)
        verdict = compare(made, folder, kind.limit, exact=kind.name in ("f32", "f16", "bf16"))
    lines = [f"wrote {request.output} ({kind.name}, {made.stat().st_size / 1e6:,.1f} MB)", *verdict]
    text, notes = None, []
    if request.ollama:
        adds_bos = fields["tokenizer.ggml.add_bos_token"]
        text, notes = modelfile(f"./{request.output.name}", tokenizer, stops, generation, context, adds_bos)
    put_in_place(made, request.output, text)
    command = ollama_command(request.output)
    return [*lines, *notes, f"next: {command}" if request.ollama else
            f"next: llama-cli -m {request.output}, or with --ollama a Modelfile for Ollama"]  # fmt: skip


def conversion_request(request: Request, config: Any, tokenizer: Any, kind: Any, vocabulary: Path) -> dict[str, Any]:
    """Return the converter's request that writes the vocabulary alone (see llama_cpp_driver.py)."""
    exact = {torch.bfloat16: "MOSTLY_BF16", torch.float16: "MOSTLY_F16"}.get(config.dtype, "ALL_F32")
    direct = {"f32": "ALL_F32"}.get(kind.name, f"MOSTLY_{kind.name.upper()}")
    bytes_ = byte_level(tokenizer)
    return {
        "task": "vocabulary",
        "model": str(vocabulary),
        "vocabulary": str(vocabulary),
        "type": direct if kind.by == "converter" else exact,
        "name": request.name,
        "fields": {},
        "output": f"{vocabulary}.gguf",
        "byte_level": bytes_,
        "pre": splitting_rule(tokenizer) if bytes_ else None,
    }


def merged_source(request: Request, folder: Path, onto: str) -> Path:
    """Merge the adapter into a temporary folder, with the run's card: the converter reads license and base from it."""
    from orpo_lite.merge.run import merge

    merge(request.source, folder, base=request.base, onto=onto, trust_remote_code=request.trust_remote_code)
    if (request.source / "README.md").is_file() and not (folder / "README.md").exists():
        shutil.copy(request.source / "README.md", folder)
    return folder


def adapter_alone(request: Request, work: Path) -> list[str]:
    """Write the adapter as a LoRA file; return lines to print."""
    from orpo_lite.export.gguf_adapter import trained_base, write_adapter

    config, tokenizer = read_source(request)
    written = write_adapter(request.source, config, tokenizer, work / "adapter.gguf", work, request.name)
    base = request.base or trained_base(request.source)
    lines = [f"wrote {request.output} ({written}); it goes with a GGUF file of {base}"]
    text, notes = None, []
    if request.ollama:
        stops = stop_ids(tokenizer)
        adds_bos = token_fields(tokenizer, stops)["tokenizer.ggml.add_bos_token"]
        context = getattr(config.get_text_config(), "max_position_embeddings", None)
        lora = f"./{request.output.name}"
        text, notes = modelfile("./base.gguf", tokenizer, stops, None, context, adds_bos, lora)
    put_in_place(work / "adapter.gguf", request.output, text)
    return [*lines, *notes, f"next: put a GGUF file of {base} beside it as base.gguf (or write its Ollama name after "
            f"FROM in the Modelfile), then {ollama_command(request.output)}" if request.ollama else
            f"next: llama-cli -m BASE.gguf --lora {request.output}"]  # fmt: skip


def read_source(request: Request) -> tuple[Any, Any]:
    """Return configuration (of the base, for an adapter) and tokenizer, as trained with."""
    source = request.source
    spec = ModelSection(name_or_path=str(source), quantization="none", trust_remote_code=request.trust_remote_code)
    if request.trained:
        spec = base_section(source, request.base, request.trust_remote_code)
    config = read_config(spec)
    if config.is_encoder_decoder:
        raise RequestError(f"{spec.name_or_path}: encoder-decoder models are not exported to GGUF")
    tokenizer = tokenizer_of(source, spec)
    if not config.architectures:
        with torch.device("meta"):
            config.architectures = [type(AutoModelForCausalLM.from_config(config)).__name__]
    text = config.get_text_config()
    text.vocab_size = max(text.vocab_size, len(tokenizer))
    return config, tokenizer


def check_space(config: Any, folder: Path, bits: float, trained: bool, twice: bool) -> None:
    """Raise RequestError where merged model, intermediate file and result do not fit on the disk together."""
    with torch.device("meta"):
        weights = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    stored = weights * (config.dtype or torch.float32).itemsize
    needed = int(weights * bits / 8) + stored * (int(trained) + int(twice)) + SMALL
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise RequestError(
            f"--output: {folder} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed"
            + (" (the merged model lies there while it is converted)" if trained else "")
        )


def put_in_place(made: Path, output: Path, modelfile: str | None) -> None:
    """Give the finished file its name and the usual permissions, and write the Modelfile beside it."""
    umask = os.umask(0)
    os.umask(umask)
    made.chmod(0o666 & ~umask)
    if modelfile is not None:
        write_atomically(output.parent / "Modelfile", modelfile)
    os.rename(made, output)


def ollama_command(output: Path) -> str:
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in output.stem.lower())
    there = "" if output.parent == Path() else f"cd {output.parent} && "
    return f"{there}ollama create {name} -f Modelfile"


def vllm_line(source: Path) -> str:
    """Say whether vLLM can serve the adapter as it is."""
    problems = vllm_problems(source)
    if problems:
        return f"vLLM --enable-lora cannot serve {source} as it is: {'; '.join(problems)}; serve the merged model"
    return f"vLLM --enable-lora can serve {source} as it is, with --max-lora-rank {vllm_rank(source)}"
