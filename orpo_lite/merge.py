"""`python -m orpo_lite.merge RUN_OR_ADAPTER --output DIR`: adapter and base as one plain transformers model."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from orpo_lite.cli import console, run_command
from orpo_lite.errors import RequestError
from orpo_lite.model import load_adapter, load_base, load_tokenizer, stop_token_ids
from orpo_lite.model.base import grow_vocabulary, read_config, read_model, shipped_quantization
from orpo_lite.recipe import ModelSection, Recipe

PROBE_TOKENS = 16


class Onto(StrEnum):
    """Weights to merge into: the original 16- or 32-bit ones, or the quantised ones that training saw."""

    original = "original"
    quantized = "quantized"


class Dtype(StrEnum):
    """Dtype of the merged weights."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


def merge(
    source: str | Path,
    output: str | Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    onto: str = "original",
) -> Path:
    """Merge an adapter into its base and write a folder that transformers loads without peft.

    Args:
        source: run folder or adapter folder.
        output: folder to write; it must not exist or be empty. It appears whole or not at all.
        base: hub id or folder to merge into, where it is not the one that the run or adapter names.
        dtype: bfloat16, float16 or float32; default: the base's own.
        onto: original: the base as its author published it; its outputs differ a little from the quantised base that
            training saw. quantized: that base's weights, dequantised, for the outputs seen in training.

    Raises:
        RequestError: no adapter, no unquantised base, an adapter that cannot be merged, an output folder in use.
        RuntimeError: the merged model's logits are not the adapter model's.
    """
    source, output = Path(source), Path(output)
    if not (source / "adapter_config.json").is_file():
        hint = (
            "it is a plain model already" if (source / "config.json").is_file() else "expected a run or adapter folder"
        )
        raise RequestError(f"{source}: holds no adapter_config.json, so there is nothing to merge: {hint}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RequestError(f"--output: {output} exists and is not empty: choose another folder, or remove it first")
    spec = base_section(source, base)
    if (source / "tokenizer_config.json").is_file():
        tokenizer = load_tokenizer(
            spec.model_copy(update={"name_or_path": str(source), "gguf_file": None, "revision": None})
        )
    else:
        tokenizer = load_tokenizer(spec)
    model = quantised_weights(source, spec, dtype) if onto == Onto.quantized else original_weights(spec, dtype)
    grow_vocabulary(model, tokenizer)
    peft_model = load_adapter(model, source).eval()
    named = f"{spec.name_or_path}/{spec.gguf_file}" if spec.gguf_file else spec.name_or_path
    console.print(f"base: {named}, {onto} weights in {str(model.dtype).removeprefix('torch.')}")
    before = probe(peft_model)
    merged = merged_model(peft_model)
    drift = compare(before, probe(merged), merged.dtype)
    generation = merged.generation_config
    if generation is not None:
        generation.eos_token_id = sorted({*stop_token_ids(tokenizer), *as_list(generation.eos_token_id)})
        generation.pad_token_id = tokenizer.pad_token_id
        if generation.temperature is not None or generation.top_p is not None:
            # some bases ship sampling settings with sampling off, which transformers refuses to write
            generation.do_sample = True
    write_aside(output, lambda folder: (merged.save_pretrained(folder), tokenizer.save_pretrained(folder)))
    console.print(f"merged {source} into {output}; against base and adapter unmerged, on these weights: {drift}")
    auto = "AutoModelForSeq2SeqLM" if merged.config.is_encoder_decoder else "AutoModelForCausalLM"
    console.print(f"next: transformers.{auto}.from_pretrained({str(output)!r})", soft_wrap=True)
    return output


def base_section(source: Path, base: str | None) -> ModelSection:
    """The model to merge into: --base, else the run's recipe, else what the adapter names."""
    if (source / "recipe.yaml").is_file():
        # by its file: a folder may have the name of a shipped recipe
        spec = Recipe.load(source / "recipe.yaml").model
        return spec.model_copy(update={"name_or_path": base, "revision": None, "gguf_file": None}) if base else spec
    config = PeftConfig.from_pretrained(str(source))
    name = base or config.base_model_name_or_path
    if not name:
        raise RequestError(f"{source}: adapter_config.json names no base model: give it with --base")
    return ModelSection(name_or_path=name, revision=None if base else config.revision, quantization="none")


def original_weights(spec: ModelSection, dtype: str | None) -> PreTrainedModel:
    """The base in 16 or 32 bits, on the CPU."""
    config = read_config(spec)
    if shipped_quantization(config):
        raise RequestError(
            f"{spec.name_or_path} ships quantised, so it has no 16-bit weights to merge into: name the model that it was "
            "made from with --base (for NAME-bnb-4bit as a rule NAME), or take --onto quantized"
        )
    return read_model(spec, config, dtype=dtype or "auto", device_map={"": "cpu"})


def quantised_weights(source: Path, spec: ModelSection, dtype: str | None) -> PreTrainedModel:
    """A plain model with the weights that training computed with: the base quantised as then, and dequantised."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    config = read_config(spec)
    if spec.quantization == "none" and not shipped_quantization(config):
        raise RequestError(
            f"--onto quantized: {source} says of no quantised base (no recipe.yaml, or model.quantization=none): take "
            "--onto original"
        )
    stored = config.dtype or torch.float32
    # float32 holds any stored weight exactly; only a run that computed in fewer bits rounded before it quantised
    quantised, facts = load_base(spec.model_copy(update={"dtype": trained_dtype(source, spec)}), device="cpu")
    if facts.quantized_share is None:
        raise RequestError(f"--onto quantized: {spec.name_or_path} is quantised with {facts.quantization}: give --base")
    if facts.quantization == "int8":
        console.print("int8 training also rounds activations, which no merged model repeats: expect a little drift")
    if hasattr(quantised.config, "quantization_config"):
        del quantised.config.quantization_config  # type: ignore[attr-defined]
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(quantised.config, trust_remote_code=spec.trust_remote_code)
    target = getattr(torch, dtype) if dtype else stored
    weights = dict(quantised.named_parameters(remove_duplicate=False))
    for name, module in quantised.named_modules():
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
            weight: torch.Tensor = dequantize_bnb_weight(module.weight, getattr(module, "state", None))  # type: ignore[arg-type]
            turned = isinstance(model.get_submodule(name), Conv1D)
            weights[f"{name}.weight"] = nn.Parameter(weight.T.contiguous() if turned else weight, requires_grad=False)
    for name, weight in weights.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(weight.to(target), requires_grad=False))
    for name, buffer in quantised.named_buffers(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        if leaf in model.get_submodule(owner)._buffers:
            model.get_submodule(owner)._buffers[leaf] = buffer
    model.tie_weights()
    model.config.dtype = target
    model.generation_config = quantised.generation_config
    model.name_or_path = quantised.name_or_path
    return model.eval()


def trained_dtype(source: Path, spec: ModelSection) -> Any:
    """Compute dtype of the run, where run.json or the recipe says so, else float32."""
    known = spec.dtype
    if (source / "run.json").is_file():
        known = json.loads((source / "run.json").read_text("utf-8"))["base_model"].get("dtype", known)
    # float16 cannot be asked for on the CPU; it rounds stored weights far less than 4 bits do
    return known if known == "bfloat16" else "float32"


def merged_model(model: PeftModel) -> PreTrainedModel:
    """PEFT's merge: float32 products added in place with one rounding (safe_merge would round twice).

    Where embedding and output head are one tensor and only one of the two is adapted, they are parted first: PEFT
    would add the adapter to both.
    """
    inner: Any = model.get_base_model()
    config = model.peft_config["default"]
    ends = [inner.get_input_embeddings(), inner.get_output_embeddings()]
    adapted = [hasattr(end, "base_layer") for end in ends]
    if inner.config.get_text_config().tie_word_embeddings and any(adapted):
        if getattr(config, "ensure_weight_tying", False) or inner.config.is_encoder_decoder:
            raise RequestError(
                "this adapter has LoRA on tied embeddings (ensure_weight_tying, or an encoder-decoder), which no plain "
                "merge reproduces: keep base and adapter apart"
            )
        head = getattr(ends[1], "base_layer", ends[1])
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        inner.config.tie_word_embeddings = inner.config.get_text_config().tie_word_embeddings = False
        inner.all_tied_weights_keys = {}
    merged = model.merge_and_unload()
    broken = [name for name, parameter in merged.named_parameters() if not parameter.isfinite().all()]
    if broken:
        raise RuntimeError(
            f"merging made NaN or infinite weights in {broken[0]}: is the adapter sound? try --dtype float32"
        )
    return merged


@torch.no_grad()
def probe(model: nn.Module) -> torch.Tensor:
    """Logits (T, V) of a few fixed tokens, in float32."""
    generator = torch.Generator().manual_seed(0)
    vocabulary: int = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    tokens = torch.randint(vocabulary, (1, PROBE_TOKENS), generator=generator)
    extra = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}  # type: ignore[union-attr]
    with torch.autocast("cpu", enabled=False):
        return model(input_ids=tokens, **extra).logits[0].float()


def compare(before: torch.Tensor, after: torch.Tensor, dtype: torch.dtype) -> str:
    """The drift between adapter model and merged model in words; an error where it is more than rounding."""
    drift = ((after - before).abs().mean() / before.std()).item()
    same = (after.argmax(-1) == before.argmax(-1)).float().mean().item()
    words = f"logits differ by {drift:.1e} of their spread, the most likely token agrees at {same:.0%} of positions"
    if not drift < (1e-3 if dtype == torch.float32 else 0.1):
        raise RuntimeError(f"the merged model is not the adapter model ({words}); nothing was written")
    return words


def as_list(value: int | list[int] | None) -> list[int]:
    return [] if value is None else value if isinstance(value, list) else [value]


def write_aside(output: Path, write: Any) -> None:
    """Let `write(folder)` fill a folder beside the target, then give it the target's name."""
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}-"))
    try:
        write(aside)
        # mkdtemp and safetensors write for the owner's eyes only
        umask = os.umask(0)
        os.umask(umask)
        aside.chmod(0o777 & ~umask)
        for file in aside.iterdir():
            file.chmod(0o666 & ~umask)
        if output.exists():
            output.rmdir()
        os.rename(aside, output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def command(
    source: Annotated[str, typer.Argument(metavar="RUN_OR_ADAPTER", help="run folder or adapter folder")],
    output: Annotated[str, typer.Option(help="folder to write; must not exist or be empty")],
    base: Annotated[str | None, typer.Option(help="hub id or folder of another base to merge into")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="dtype of the merged weights; default: the base's own")] = None,
    onto: Annotated[
        Onto, typer.Option(help="original weights, or the quantised ones that training saw (dequantised)")
    ] = Onto.original,
) -> None:
    """Merge an adapter into its base: a plain transformers model."""
    merge(source, output, base=base, dtype=dtype, onto=onto)


if __name__ == "__main__":
    run_command(command)
