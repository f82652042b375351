"""`python -m orpo_lite.export RUN_OR_DIR --output FILE.gguf`: what llama.cpp, Ollama and LM Studio run."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from orpo_lite.common.console import console, json_alone
from orpo_lite.common.errors import RequestError

SMALL = 50 * 10**6
"""Bytes allowed for tokenizer and metadata when disk space is checked."""


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
        output: GGUF file to write; it must not exist, and appears whole or not at all.
        quant: f32, f16, bf16, q8_0, ...; auto: 16 bits, bfloat16 where the weights are.
        adapter: write the adapter alone, as a LoRA file to be used with a GGUF file of its base.
        ollama: write a Modelfile beside it.
        llama_quantize: llama.cpp's llama-quantize program, for types such as q4_k_m.
        base, onto, trust_remote_code: as in `merge`.

    Raises:
        RequestError: nothing to export, an architecture, tokenizer or type that cannot be written, output in use.
        RuntimeError: a tool failed, or the file is not what its source is; nothing is kept.
    """
    try:
        from orpo_lite.export.gguf_types import kind_of
    except ImportError as error:
        raise RequestError(
            f"GGUF is read back through the gguf package ({error}): pip install 'orpo-lite[export]'"
        ) from error

    from orpo_lite.model.untrusted_files import check_adapter, check_links

    source, output = Path(source).expanduser(), Path(output).expanduser()
    trained = check_request(source, output, adapter, ollama, quant)
    check_adapter(source) if trained else check_links(source)
    kind = None if adapter or quant == "auto" else kind_of(quant, llama_quantize)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as folder:
        work = Path(folder)
        if adapter:
            lines = adapter_alone(source, output, work, ollama, base, trust_remote_code)
        else:
            lines = whole_model(source, output, work, trained, kind, ollama, llama_quantize, base, onto,
                                trust_remote_code)  # fmt: skip
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)
    if trained:
        say_vllm(source)
    return output


def check_request(source: Path, output: Path, adapter: bool, ollama: bool, quant: str) -> bool:
    """Refuse before anything is done; whether the source is an adapter."""
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


def whole_model(
    source: Path,
    output: Path,
    work: Path,
    trained: bool,
    kind: Any,
    ollama: bool,
    llama_quantize: str | None,
    base: str | None,
    onto: str,
    trust_remote_code: bool,
) -> list[str]:
    """Merge where need be, convert, quantise, check; then give the file its name. Lines for the screen."""
    from transformers import AutoConfig, GenerationConfig

    from orpo_lite.export.gguf_types import CONVERTER, quantise
    from orpo_lite.export.gguf_verify import check_fields, compare
    from orpo_lite.export.gguf_vocabulary import stop_ids, token_fields, write_vocabulary
    from orpo_lite.export.llama_cpp import run_converter

    config, tokenizer = read_source(source, trained, base, trust_remote_code)
    kind = kind or CONVERTER["bf16" if config.dtype == torch.bfloat16 else "f16"]
    exact = {torch.bfloat16: "MOSTLY_BF16", torch.float16: "MOSTLY_F16"}.get(config.dtype, "ALL_F32")  # type: ignore[arg-type]
    direct = {"f32": "ALL_F32"}.get(kind.name, f"MOSTLY_{kind.name.upper()}")
    request = tokenizer_request(tokenizer) | {
        "task": "vocabulary",
        "model": str(work / "vocabulary"),
        "vocabulary": str(work / "vocabulary"),
        "type": direct if kind.by == "converter" else exact,
        "name": source.resolve().name,
        "fields": {},
        "output": str(work / "vocabulary.gguf"),
    }
    write_vocabulary(tokenizer, config, work / "vocabulary")
    if trained:
        run_converter(request)  # refuses what it does not know, before the merge
    check_space(config, output.parent, kind.bits, trained, kind.by != "converter")

    folder = source
    if trained:
        from orpo_lite.merge.run import merge

        folder = merge(source, work / "merged", base=base, onto=onto, trust_remote_code=trust_remote_code)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        write_vocabulary(tokenizer, config, work / "vocabulary")
        if (source / "README.md").is_file() and not (folder / "README.md").exists():
            shutil.copy(source / "README.md", folder)  # the converter takes licence and base from the model card
    generation = GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").is_file() else None
    stops = stop_ids(tokenizer, generation)
    fields: dict[str, Any] = token_fields(tokenizer, stops) | {"general.name": source.resolve().name}
    made = work / "made.gguf"
    with console.status(f"converting to {kind.name}"):
        run_converter(
            request | {"task": "model", "model": str(folder.resolve()), "fields": fields, "output": str(made)}
        )
        if kind.by != "converter":
            quantise(made, work / "quantised.gguf", kind, llama_quantize)
            made.unlink()
            made = work / "quantised.gguf"
    with console.status("reading it back"):
        context = getattr(config.get_text_config(), "max_position_embeddings", None)
        check_fields(made, tokenizer, fields, context)
        verdict = compare(made, folder, kind.limit, exact=kind.name in ("f32", "f16", "bf16"))
    size = made.stat().st_size
    lines = [f"wrote {output} ({kind.name}, {size / 1e6:,.1f} MB)", *verdict]
    text = None
    if ollama:
        from orpo_lite.export.ollama import modelfile

        adds_bos = fields["tokenizer.ggml.add_bos_token"]
        text, notes = modelfile(f"./{output.name}", tokenizer, stops, generation, context, adds_bos)
        lines += notes
    place(made, output, text)
    if ollama:
        lines.append(f"next: {ollama_command(output)}")
    else:
        lines.append(f"next: llama-cli -m {output}, or with --ollama a Modelfile for Ollama")
    return lines


def adapter_alone(
    source: Path, output: Path, work: Path, ollama: bool, base: str | None, trust_remote_code: bool
) -> list[str]:
    """Write the adapter as a LoRA file. Lines for the screen."""
    from orpo_lite.export.gguf_adapter import trained_base, write_adapter

    config, tokenizer = read_source(source, True, base, trust_remote_code)
    said = write_adapter(source, config, tokenizer, work / "adapter.gguf", work, source.resolve().name)
    named = base or trained_base(source)
    lines = [f"wrote {output} ({said}); it goes with a GGUF file of {named}"]
    text = None
    if ollama:
        from orpo_lite.export.gguf_vocabulary import stop_ids, token_fields
        from orpo_lite.export.ollama import modelfile

        stops = stop_ids(tokenizer)
        adds_bos = token_fields(tokenizer, stops)["tokenizer.ggml.add_bos_token"]
        context = getattr(config.get_text_config(), "max_position_embeddings", None)
        text, notes = modelfile("./base.gguf", tokenizer, stops, None, context, adds_bos, f"./{output.name}")
        lines += notes
    place(work / "adapter.gguf", output, text)
    if ollama:
        lines.append(
            f"next: put a GGUF file of {named} beside it as base.gguf (or write its Ollama name after FROM in the "
            f"Modelfile), then {ollama_command(output)}"
        )
    else:
        lines.append(f"next: llama-cli -m BASE.gguf --lora {output}")
    return lines


def read_source(source: Path, trained: bool, base: str | None, trust_remote_code: bool) -> tuple[Any, Any]:
    """Configuration (of the base, for an adapter) and tokenizer, as trained with."""
    from transformers import AutoModelForCausalLM

    from orpo_lite.model import load_tokenizer, read_config
    from orpo_lite.recipe import ModelSection

    if trained:
        from orpo_lite.trainer.run_folder import base_section

        spec = base_section(source, base, trust_remote_code)
    else:
        spec = ModelSection(name_or_path=str(source), quantization="none", trust_remote_code=trust_remote_code)
    config = read_config(spec)
    if config.is_encoder_decoder:
        raise RequestError(f"{spec.name_or_path}: encoder-decoder models are not exported to GGUF")
    has_own = (source / "tokenizer_config.json").is_file()
    own = spec.model_copy(update={"name_or_path": str(source), "gguf_file": None, "revision": None})
    tokenizer = load_tokenizer(own if has_own else spec)
    if not config.architectures:
        with torch.device("meta"):
            config.architectures = [type(AutoModelForCausalLM.from_config(config)).__name__]
    text = config.get_text_config()
    text.vocab_size = max(text.vocab_size, len(tokenizer))
    return config, tokenizer


def tokenizer_request(tokenizer: Any) -> dict[str, Any]:
    from orpo_lite.export.gguf_vocabulary import byte_level, splitting_rule

    bytes_ = byte_level(tokenizer)
    return {"byte_level": bytes_, "pre": splitting_rule(tokenizer) if bytes_ else None}


def check_space(config: Any, folder: Path, bits: float, trained: bool, twice: bool) -> None:
    """Refuse where merged model, intermediate file and result do not fit on the disk together."""
    from transformers import AutoModelForCausalLM

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


def place(made: Path, output: Path, modelfile: str | None) -> None:
    """Give the finished file its name, readable as other files are, and write the Modelfile."""
    from orpo_lite.export.ollama import write_modelfile

    umask = os.umask(0)
    os.umask(umask)
    made.chmod(0o666 & ~umask)
    os.rename(made, output)
    if modelfile is not None:
        write_modelfile(output.parent / "Modelfile", modelfile)


def ollama_command(output: Path) -> str:
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in output.stem.lower())
    there = "" if output.parent == Path() else f"cd {output.parent} && "
    return f"{there}ollama create {name} -f Modelfile"


def say_vllm(source: Path) -> None:
    from orpo_lite.common.vllm import vllm_problems, vllm_rank

    problems = vllm_problems(source)
    if problems:
        line = f"vLLM --enable-lora cannot serve {source} as it is: {'; '.join(problems)}; serve the merged model"
    else:
        line = f"vLLM --enable-lora can serve {source} as it is, with --max-lora-rank {vllm_rank(source)}"
    console.print(line, soft_wrap=True, markup=False)


def show_architectures(wanted: bool) -> None:
    if wanted:
        from orpo_lite.export.llama_cpp import run_converter

        print(run_converter({"task": "architectures"}), end="")
        raise typer.Exit


def command(
    source: Annotated[str, typer.Argument(metavar="RUN_OR_DIR", help="run, adapter or model folder")],
    output: Annotated[str, typer.Option(help="GGUF file to write; must not exist")],
    quant: Annotated[
        str,
        typer.Option(
            help="f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, mxfp4, tq1_0, tq2_0; q4_k_m and its like with llama.cpp's "
            "quantiser; auto: 16 bits, bf16 where the weights are"
        ),
    ] = "auto",
    adapter: Annotated[bool, typer.Option("--adapter", help="the adapter alone, as a LoRA file")] = False,
    ollama: Annotated[bool, typer.Option("--ollama", help="write a Modelfile beside it")] = False,
    llama_quantize: Annotated[str | None, typer.Option(metavar="PATH", help="llama.cpp's llama-quantize")] = None,
    base: Annotated[str | None, typer.Option(help="hub id or folder of another base to merge into")] = None,
    onto: Annotated[str, typer.Option(help="original or quantized, as in orpo_lite.merge")] = "original",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run Python code that the base's repository ships")
    ] = False,
    architectures: Annotated[
        bool,
        typer.Option("--architectures", is_eager=True, callback=show_architectures, help="list what can be converted"),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, and everything else to stderr")] = False,
) -> None:
    """Write a model as GGUF, for llama.cpp, Ollama and LM Studio."""
    if onto not in ("original", "quantized"):
        raise RequestError(f"--onto: found {onto}, expected original or quantized")
    with json_alone(as_json) as show:
        file = export(source, output, quant=quant, adapter=adapter, ollama=ollama, llama_quantize=llama_quantize, base=base,
                      onto=onto, trust_remote_code=trust_remote_code)  # fmt: skip
        if as_json:
            modelfile = file.with_name("Modelfile") if ollama else None
            show({"output": str(file), "bytes": file.stat().st_size, "quant": quant, "adapter": adapter,
                  "modelfile": str(modelfile) if modelfile else None})  # fmt: skip
