"""A model or adapter as a GGUF file, for llama.cpp, Ollama and LM Studio."""

import contextlib
import math
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.pytorch_utils import Conv1D

from orpo_lite.common.console import console, progress
from orpo_lite.common.errors import RequestError
from orpo_lite.common.files import write_atomically
from orpo_lite.export.llama_cpp import byte_level, run_converter, splitting_rule, token_fields, write_vocabulary
from orpo_lite.export.ollama import modelfile, stop_text
from orpo_lite.merge.run import merge
from orpo_lite.model import read_config, stop_token_ids
from orpo_lite.model.adapter import (
    CANNOT_REPEAT,
    CHANGES_BASE,
    adapter_gaps,
    check_complete,
    idle,
    lora_config,
    read_tensors,
)
from orpo_lite.model.untrusted_files import check_adapter, subfolders_hint
from orpo_lite.recipe import ModelSection
from orpo_lite.recipe.loading import FINISHED_FOLDER, check_folder
from orpo_lite.report.vllm import vllm_problems, vllm_rank
from orpo_lite.trainer.run_folder import base_section, check_tokens_have_rows, naming_base, tokenizer_of

KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
INSTEAD = "; export the merged model instead (without --adapter)"
STOPS = "the Modelfile of --ollama stops there; elsewhere give it as a stop text (llama-cli: --reverse-prompt)"
Pairs = dict[str, dict[str, torch.Tensor]]
"""Module -> {"A": (rank, in), "B": (out, rank)}, float32."""


def export(
    source: str | Path,
    output: str | Path,
    *,
    quant: str = "auto",
    adapter: bool = False,
    ollama: bool = False,
    llama_quantize: str | None = None,
    base: str | None = None,
    trust_remote_code: bool = False,
    dry_run: bool = False,
) -> Path:
    """Write a run, adapter or plain model folder as one GGUF file, read it back and compare it with its source.

    Args:
        source: run or adapter folder, which is merged first onto the original weights, or a folder with a plain
            transformers model.
        output: GGUF file to write; it must not exist, and appears complete or not at all.
        quant: f32, f16, bf16, q8_0, ...; auto: 16 bits, bfloat16 where the weights are.
        adapter: write the adapter alone, as a LoRA file for a GGUF file of its base.
        ollama: write a Modelfile beside it.
        llama_quantize: llama.cpp's llama-quantize program, for types such as q4_k_m. Default: that on the PATH, else the
            quantizer inside an installed wheel (xllamacpp, llama-cpp-python).
        base, trust_remote_code: as in `merge`.
        dry_run: check all that can be checked without the weights, and write nothing.

    Raises:
        RequestError: nothing to export, an architecture, tokenizer or type that cannot be written, output in use.
        RuntimeError: a tool failed, or the file differs from its source; nothing is kept.
    """
    try:
        from orpo_lite.export.gguf_file import kind_of
    except ImportError as error:
        raise RequestError(
            f"GGUF is read back through the gguf package ({error}): pip install 'orpo-lite[export]'"
        ) from error

    source, output = Path(source).expanduser(), Path(output).expanduser()
    trained = check_request(source, output, adapter, ollama, quant)
    kind = None if adapter or quant == "auto" else kind_of(quant, llama_quantize)
    spec = ModelSection(name_or_path=str(source), quantization="none", trust_remote_code=trust_remote_code)
    if trained:
        check_adapter(source)
        spec = base_section(source, base, trust_remote_code)
    pairs = read_pairs(source) if adapter else {}
    with naming_base(source, spec) if trained else contextlib.nullcontext():
        config, tokenizer = read_source(source, spec, adapter)
    merging: dict[str, Any] = {"base": base, "trust_remote_code": trust_remote_code, "dry_run": dry_run}
    if not dry_run:
        output.parent.mkdir(parents=True, exist_ok=True)
    place = None if dry_run else output.parent
    with tempfile.TemporaryDirectory(dir=place, prefix=f".{output.name}-") as folder:
        request = converter_request(source, config, tokenizer, Path(folder))
        if dry_run:
            run_converter(request | {"task": "vocabulary"})
            if trained and not adapter:
                merge(source, Path(folder) / "merged", **merging)
            form = "a LoRA file" if adapter else kind.name if kind else "16 bits"
            console.print(f"dry run: {output} would be written ({form}); nothing was", soft_wrap=True, markup=False)
            return output
        model, generation, text = source, None, None
        if adapter:
            made, words = write_adapter(request, source, config, pairs)
            lines = [f"wrote {output} ({words}); it goes with a GGUF file of {spec.name_or_path}"]
        else:
            kind = kind or kind_of("bf16" if config.dtype == torch.bfloat16 else "f16", None)
            if trained:
                run_converter(request | {"task": "vocabulary"})  # refuses an unknown architecture before the merge
                model = merge(source, Path(folder) / "merged", **merging)
                config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
                write_vocabulary(tokenizer, config, Path(request["vocabulary"]))
            if (model / "generation_config.json").is_file():
                generation = GenerationConfig.from_pretrained(model)
            made, words = write_model(request, model, config, tokenizer, generation, kind)
            lines = [f"wrote {output} ({kind.name}, {made.stat().st_size / 1e6:,.1f} MB)", *words]
        if ollama:
            stops = stop_token_ids(tokenizer, generation)
            adds_bos = token_fields(tokenizer, stops)["tokenizer.ggml.add_bos_token"]
            weights, lora = ("./base.gguf", f"./{output.name}") if adapter else (f"./{output.name}", None)
            text, notes = modelfile(weights, tokenizer, stops, generation, context_of(config), adds_bos, lora)
            lines += notes
        if text is not None:
            write_atomically(output.parent / "Modelfile", text)
        os.rename(made, output)
    if end := stop_text(tokenizer):
        lines.append(f"the chat template ends an answer with {end!r}, which is no single token: {STOPS}")
    lines.append(next_step(output, adapter, ollama, spec.name_or_path))
    if trained:
        lines.append(vllm_line(source))
    console.print("\n".join(lines), soft_wrap=True, markup=False)
    return output


def check_request(source: Path, output: Path, adapter: bool, ollama: bool, quant: str) -> bool:
    """Refuse a wrong request before anything is done; return True where the source is an adapter."""
    check_folder(source, FINISHED_FOLDER, on_hub=False)
    trained = (source / "adapter_config.json").is_file()
    if not trained and not (source / "config.json").is_file():
        raise RequestError(
            f"{source}: found neither adapter_config.json nor config.json, expected {FINISHED_FOLDER}"
            + subfolders_hint(source)
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


def read_source(source: Path, spec: ModelSection, adapter: bool) -> tuple[Any, Any]:
    """Return configuration (of the base, for an adapter) and tokenizer, as trained with.

    Raises:
        RequestError: an adapter alone, which holds no embeddings, needs some.
    """
    config, tokenizer = read_config(spec), tokenizer_of(source, spec)
    if adapter:
        check_tokens_have_rows(tokenizer, config.get_text_config().vocab_size, source, spec)
    if not config.architectures:
        with torch.device("meta"):
            config.architectures = [type(AutoModelForCausalLM.from_config(config)).__name__]
    text = config.get_text_config()
    text.vocab_size = max(text.vocab_size, len(tokenizer))
    return config, tokenizer


def converter_request(source: Path, config: Any, tokenizer: Any, work: Path) -> dict[str, Any]:
    """Write the vocabulary; return what every request to the converter says (see llama_cpp_driver.py)."""
    write_vocabulary(tokenizer, config, work / "vocabulary")
    bytes_ = byte_level(tokenizer)
    return {
        "model": str(work / "vocabulary"),
        "vocabulary": str(work / "vocabulary"),
        "type": "f32",
        "name": source.resolve().name,
        "fields": {"general.name": source.resolve().name},
        "output": str(work / "made.gguf"),
        "byte_level": bytes_,
        "pre": splitting_rule(tokenizer) if bytes_ else None,
    }


def context_of(config: Any) -> int | None:
    """Return the model's longest context in tokens, where its configuration says so."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def next_step(output: Path, adapter: bool, ollama: bool, base: str) -> str:
    """Say how to run what was written."""
    if not ollama:
        if adapter:
            return f"next: llama-cli -m BASE.gguf --lora {output}"
        return f"next (--ollama writes a Modelfile, too):\n  llama-cli -m {output}"
    first = f"put a GGUF file of {base} beside it as base.gguf, then " if adapter else ""
    there = "" if output.parent == Path() else f"cd {output.parent} && "
    name = re.sub(r"[^\w.-]", "-", output.stem.lower())
    return f"next: {first}{there}ollama create {name} -f Modelfile"


def vllm_line(source: Path) -> str:
    """Say whether vLLM can serve the adapter as it is."""
    problems = vllm_problems(source)
    if problems:
        return f"vLLM --enable-lora cannot serve {source} as it is: {'; '.join(problems)}; serve the merged model"
    return f"vLLM --enable-lora can serve {source} as it is, with --max-lora-rank {vllm_rank(source)}"


def write_model(
    request: dict[str, Any], model: Path, config: Any, tokenizer: Any, generation: GenerationConfig | None, kind: Any
) -> tuple[Path, list[str]]:
    """Convert, quantize and check a model's folder; return the file and what was found, in lines to print."""
    from orpo_lite.export.gguf_file import check_fields, compare_values, quantize_file, types_of

    made, tool = Path(request["output"]), kind.program or kind.library
    # what is quantized is 16-bit, since the converter then keeps in float32 what needs it
    between = "f16" if config.dtype == torch.float16 else "bf16"
    fields = request["fields"] | token_fields(tokenizer, stop_token_ids(tokenizer, generation))
    request |= {
        "task": "model",
        "model": str(model.resolve()),
        "fields": fields,
        "type": between if tool else kind.name,
    }
    with progress(f"converting to {kind.name}"):
        run_converter(request)
        if tool:
            floats, made = made, made.with_name("quantized.gguf")
            quantize_file(floats, made, kind)
            floats.unlink()
    with progress("reading it back"):
        check_fields(made, tokenizer, fields, context_of(config))
        lines = [compare_values(made, model, kind.limit)]
    if tool:
        lines.append(f"{types_of(made, kind)}; quantized by {tool}")
    return made, lines


def write_adapter(request: dict[str, Any], source: Path, config: Any, pairs: Pairs) -> tuple[Path, str]:
    """Write an adapter as a LoRA file and check it; return the file and a phrase to print.

    llama.cpp scales every pair by one alpha over the pair's rank; the factors of rsLoRA and patterns go into B.

    Args:
        pairs: from `read_pairs`.

    Raises:
        RequestError: it lacks tensors, or a layer of the base takes no LoRA in llama.cpp.
        Mismatch: the file does not read back.
    """
    from orpo_lite.export.gguf_file import check_pairs

    adapter = lora_config(str(source))
    with torch.device("meta"):
        base, skeleton = AutoModelForCausalLM.from_config(config), AutoModelForCausalLM.from_config(config)
    check_complete(source, adapter_gaps(source, skeleton))
    modules: dict[str, tuple[bool, float]] = {}
    tied = config.get_text_config().tie_word_embeddings
    for module, pair in pairs.items():
        try:
            layer: Any = base.get_submodule(module)
        except AttributeError:
            raise RequestError(f"{source}: LoRA on {module}, which {type(base).__name__} does not have") from None
        if isinstance(layer, nn.Embedding) or (tied and layer is base.get_output_embeddings()):
            raise RequestError(f"{source}: LoRA on {module}, which llama.cpp has no LoRA for{INSTEAD}")
        rank = pair["A"].shape[0]
        alpha = adapter.alpha_pattern.get(get_pattern_key(adapter.alpha_pattern, module), adapter.lora_alpha)  # type: ignore[union-attr, arg-type]
        scale = alpha / (math.sqrt(rank) if adapter.use_rslora else rank)
        modules[module] = (isinstance(layer, Conv1D), scale * rank / adapter.lora_alpha)
    made = Path(request["output"])
    matrices = {f"{module}.{side}": t.contiguous() for module, pair in pairs.items() for side, t in pair.items()}
    save_file(matrices, made.with_name("pairs"))
    fields = request["fields"] | {"adapter.type": "lora", "adapter.lora.alpha": float(adapter.lora_alpha)}
    request |= {"task": "adapter", "matrices": str(made.with_name("pairs")), "modules": modules, "fields": fields}
    run_converter(request)
    return made, check_pairs(made, pairs)


def refuse(source: Path, config: Any) -> None:
    """Raise RequestError that names what a LoRA file of llama.cpp cannot hold, if there is anything."""
    start = str(config.init_lora_weights).lower()
    reasons = {
        "use_dora (DoRA): llama.cpp has no weight decomposition": config.use_dora,
        f"bias={config.bias}: llama.cpp adds no trained biases": config.bias != "none",
        f"modules_to_save={config.modules_to_save}: whole weights are no LoRA matrices": config.modules_to_save,
        f"target_parameters={config.target_parameters}: LoRA on fused experts": config.target_parameters,
        "trainable_token_indices: trained token embeddings are no LoRA matrices": config.trainable_token_indices,
        f"init_lora_weights={start}: it alters the base, so the adapter does not fit the original": (
            start.startswith((*CHANGES_BASE, *CANNOT_REPEAT))
        ),
        "lora_alpha=0: nothing would be added": not config.lora_alpha,
    }
    found = [reason for reason, there in reasons.items() if there]
    if found:
        raise RequestError(f"{source}: --adapter cannot hold {'; '.join(found)}{INSTEAD}")


def read_pairs(source: Path) -> Pairs:
    """Sort an adapter's LoRA matrices by module.

    Raises:
        RequestError: it trained something else, or nothing.
    """
    config, tensors, pairs = lora_config(str(source)), read_tensors(source), Pairs()
    refuse(source, config)
    if dead := idle(source, config, tensors):
        raise RequestError(dead)
    for key, value in tensors.items():
        match = KEY.fullmatch(key)
        if not match:
            kind = "LoRA on embeddings" if "lora_embedding" in key else "not a LoRA matrix of a linear layer"
            raise RequestError(f"{source}: {key}: {kind}, which a LoRA file of llama.cpp cannot hold{INSTEAD}")
        pairs.setdefault(match[1], {})[match[2]] = value.float()
    return pairs
