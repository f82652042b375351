"""An adapter and its base as one plain transformers model.

The merge reads the base's files tensor by tensor and writes the output's: neither model is ever in memory as a whole.
"""

import errno
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from orpo_lite.common.console import console, progress
from orpo_lite.common.errors import RequestError
from orpo_lite.merge.base import Base, trained_dtype
from orpo_lite.merge.plan import Plan, make_plan
from orpo_lite.merge.verify import check_merged
from orpo_lite.merge.write import one_torch_thread, write_shards
from orpo_lite.model import stop_token_ids
from orpo_lite.model.base import method_name, read_config, shipped_quantization
from orpo_lite.model.locating import adapter_folder, locate, same_model
from orpo_lite.model.untrusted_files import check_adapter, read_object, subfolders_hint
from orpo_lite.recipe import ModelSection
from orpo_lite.report.model_card import hub_id, model_card, public_name
from orpo_lite.trainer.run_folder import base_section, naming_base, tokenizer_of

FROM_BASE = ("preprocessor_config.json", "processor_config.json", "*.py", "LICENSE*", "NOTICE*", "USE_POLICY*")
"""Files of the base that the merged model needs or has to come with."""


def merge(
    source: str | Path | Sequence[tuple[str | Path, float]],
    output: str | Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    onto: str = "original",
    quantization: str | None = None,
    double_quant: bool = False,
    verify: bool = True,
    trust_remote_code: bool = False,
    dry_run: bool = False,
) -> Path:
    """Merge an adapter, or a weighted sum of several, into its base and write a folder that transformers loads without peft.

    Every weight is W + scale * B A in float32, cast once (DoRA, trained embeddings, biases and experts in their own
    way). Memory stays below 1 GB plus twice the largest tensor of the checkpoint, whatever the size of the model; DoRA on
    embeddings takes five times theirs.

    Args:
        source: run folder, adapter folder, or hub id of an adapter; or several of one base, each with its weight: their
            LoRA products are added, and tokenizer and card are those of the first.
        output: folder to write; it must not exist or be empty. It appears complete or not at all.
        base: hub id or folder to merge into, where it is not the one that the run or adapter names.
        dtype: bfloat16, float16 or float32; default: as each weight of the base is stored.
        onto: original: the base as its author published it; outputs differ a little from those of the quantized base
            in training. quantized: that base's weights, dequantized, for the outputs seen in training.
        quantization: nf4 or fp4: what the base of training was quantized with, for an adapter without a recipe.
        double_quant: the constants of nf4 or fp4 were quantized too.
        verify: run the merged model and base with adapter, layer by layer, and compare their logits; a layer with DoRA takes
            five times its weights for it, and stacked experts once theirs, in float32.
        trust_remote_code: run Python code of the base's repository. The folder's own recipe.yaml has no say in it,
            since an adapter may come from anybody.
        dry_run: check all that can be checked without the weights, and write nothing.

    Raises:
        RequestError: no adapter, no base in the dtype asked for, an adapter that cannot be merged, or an output folder
            in use; before anything is written.
        RuntimeError: weights that are not finite, or logits that are not the adapter model's.
    """
    given = [(source, 1.0)] if isinstance(source, str | Path) else list(source)
    adapters = [(adapter_folder(one), weight) for one, weight in given]
    folders = [folder for folder, _ in adapters]
    source, output = adapters[0][0], Path(output)
    if output.is_symlink() or output.name in ("", ".."):  # only the folder itself can be renamed
        output = output.resolve()
    for folder in folders:
        check_request(folder, output)
        check_adapter(folder)
    if quantization or double_quant:
        check_quantization(source, quantization)
    spec = common_base(folders, base, trust_remote_code)
    if quantization:
        spec = spec.model_copy(update={"quantization": quantization, "double_quant": double_quant})
    trained = trained_dtype(source, spec)
    with naming_base(source, spec):
        if quantization and shipped_quantization(read_config(spec)):
            raise RequestError(f"--quantization: {spec.name_or_path} ships quantized and says itself how: leave it out")
        tokenizer = tokenizer_of(source, spec)
        for folder in folders[1:]:
            if tokenizer_of(folder, spec).get_vocab() != tokenizer.get_vocab():
                raise RequestError(f"--adapter: {source} and {folder} have different vocabularies: merge each alone")
        origin = Base(spec, onto, trained)
    plan = make_plan(adapters, origin, tokenizer, getattr(torch, dtype) if dtype else None)
    named = f"{spec.name_or_path}/{spec.gguf_file}" if spec.gguf_file else spec.name_or_path
    written = str(plan.dtype).removeprefix("torch.")
    lines = [f"base: {named}, {onto} weights; merged weights: {written}"]
    if plan.untied:
        lines.append(
            f"{' and '.join(plan.untied)}: one tensor in the base, two here, since they are adapted differently"
        )
    if plan.rowless:
        lines.append(f"{', '.join([*plan.rowless][:8])}: no embedding here, though the base's own tokenizer writes it")
    if dry_run:
        lines.append(f"dry run: {plan.nbytes / 1e9:.2f} GB would be written to {output}; nothing was")
    console.print("\n".join(lines), soft_wrap=True, markup=False)
    if dry_run:
        return output
    notes = [f"Merged onto the {onto} weights of the base, in {written}."]
    if len(adapters) > 1 or adapters[0][1] != 1:
        names = [public_name(str(one), hub_id(str(one)) is not None) for one, _ in given]
        parts = " + ".join(f"{weight:g} x {name}" for name, (_, weight) in zip(names, given, strict=True))
        notes.append(f"A weighted sum of LoRA products, {parts}; everything else here is about the first.")
    own = spec
    if base and not quantization:
        with suppress(RequestError):  # the adapter names no base, or one that is not here
            own = base_section(source, None, trust_remote_code)
            if own.name_or_path != base:
                notes.append(f"The adapter was trained on {own.name_or_path}; --base says to merge it into {base}.")
            if shipped := shipped_quantization(read_config(own)):
                own = own.model_copy(update={"quantization": method_name(shipped)})
    with finished_as(output) as folder, one_torch_thread():
        # what could fail comes before the weights
        write_configuration(folder, plan, tokenizer)
        write_card(folder, source, notes, base)
        start = time.monotonic()
        with progress("merging", plan.nbytes, in_bytes=True) as advance:
            write_shards(folder, plan.shards, advance)
        seconds = time.monotonic() - start
        other = (own, trained) if onto == "original" and own.quantization != "none" else None
        unchecked = ["outputs not compared with those of base and adapter (--no-verify)"]
        notes += check_merged(plan, folder, tokenizer, other) if verify else unchecked
        write_card(folder, source, notes, base)
    size = plan.nbytes / 1e9
    done = f"merged {source} into {output}: {size:.2f} GB in {seconds:.1f} s ({size / seconds:.2f} GB/s)"
    console.print("\n  ".join([done, *notes[1:]]), soft_wrap=True, markup=False)
    return output


def check_quantization(source: Path, quantization: str | None) -> None:
    """Raise RequestError where --quantization contradicts the run, or is no type."""
    if (source / "recipe.yaml").is_file():
        raise RequestError(f"--quantization: {source / 'recipe.yaml'} says how the base was quantized: leave it out")
    if quantization not in ("nf4", "fp4"):
        raise RequestError(f"--quantization, --double-quant: found --quantization {quantization}, expected nf4 or fp4")


def common_base(folders: list[Path], base: str | None, trust_remote_code: bool) -> ModelSection:
    """Return the base that all adapters belong to, quantized as in training.

    Raises:
        RequestError: they belong to different ones.
    """
    first, *others = (base_section(folder, base, trust_remote_code) for folder in folders)
    for folder, spec in zip(folders[1:], others, strict=True):
        if not same_model(first.name_or_path, spec.name_or_path) or first.gguf_file != spec.gguf_file:
            raise RequestError(
                f"--adapter: {folders[0]} belongs to {first.name_or_path}, but {folder} to {spec.name_or_path}: take adapters "
                "of one base, or name the base of both with --base"
            )
        if (first.quantization, first.double_quant) != (spec.quantization, spec.double_quant):
            first = first.model_copy(update={"quantization": "none"})  # no one base of training
    return first


def check_request(source: Path, output: Path) -> None:
    """Raise RequestError where the source is no adapter or the output is in use."""
    if not (source / "adapter_config.json").is_file():
        plain = (source / "config.json").is_file()
        hint = "it is a plain model already" if plain else f"expected a run or adapter folder{subfolders_hint(source)}"
        raise RequestError(f"{source}: holds no adapter_config.json, so there is nothing to merge: {hint}")
    if output.exists() and not output.is_dir():
        raise RequestError(f"--output: {output} is a file, expected a folder to write: choose another name")
    if output.exists() and any(output.iterdir()):
        raise RequestError(f"--output: {output} exists and is not empty: choose another folder, or remove it first")


@contextmanager
def finished_as(output: Path) -> Iterator[Path]:
    """Yield a folder beside `output` that is renamed to it at the end, or removed where the body fails.

    Raises:
        RuntimeError: the disk is full.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = output.parent / f".{output.name}.partial"
    shutil.rmtree(folder, ignore_errors=True)  # left by a merge that was killed
    try:
        folder.mkdir()
        yield folder
        if output.exists():
            output.rmdir()
        os.rename(folder, output)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise RuntimeError(
                f"{output.parent} takes no more data ({error.strerror}); nothing was left there"
            ) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_configuration(folder: Path, plan: Plan, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write configuration, generation defaults, tokenizer and files of the base."""
    model, home = plan.base.model, next(iter(plan.base.files.values())).parent
    config = model.config
    config.dtype = plan.dtype
    config.architectures = config.architectures or [type(model).__name__]
    config.save_pretrained(folder)
    generation = generation_defaults(plan.base, tokenizer)
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", "utf-8")
    tokenizer.save_pretrained(folder)
    for pattern in FROM_BASE:
        for file in home.glob(pattern):
            if file.is_file() and not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)


def generation_defaults(base: Base, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the base's generation_config.json as it is, plus the tokenizer's stop tokens and padding where it lacks them.

    Raises:
        RequestError: transformers cannot read it.
    """
    optional = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    path = cached_file(locate(base.spec), "generation_config.json", revision=base.spec.revision, **optional)
    if path:
        held = read_object(Path(path))
        try:
            GenerationConfig.from_pretrained(Path(path).parent)
        except (TypeError, ValueError, OSError) as error:
            why = " ".join(str(error).split())[:300]
            raise RequestError(f"{path}: no model loads with it ({why}): mend or remove it") from error
    else:
        held = GenerationConfig.from_model_config(base.model.config).to_diff_dict()
        held.pop("_from_model_config", None)
    stops = held.get("eos_token_id")
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    if more := set(stop_token_ids(tokenizer)) - set(stops):
        held["eos_token_id"] = sorted([*stops, *more])
    if held.get("pad_token_id") is None:
        held["pad_token_id"] = tokenizer.pad_token_id
    return held


def write_card(folder: Path, source: Path, notes: list[str], base: str | None) -> None:
    """Write README.md and its picture."""
    (folder / "README.md").write_text(model_card(source, "merged", notes=notes, base=base), "utf-8")
    if (source / "curves.png").is_file():
        shutil.copyfile(source / "curves.png", folder / "curves.png")
