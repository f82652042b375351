"""An adapter and its base as one plain transformers model.

The merge reads the base's files tensor by tensor and writes the output's: neither model is ever in memory as a whole.
"""

from __future__ import annotations

import errno
import glob
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from orpo_lite.common.console import console, progress_bar
from orpo_lite.common.errors import RequestError
from orpo_lite.merge.base import Base, trained_dtype
from orpo_lite.merge.plan import Plan, make_plan
from orpo_lite.merge.verify import check_merged
from orpo_lite.merge.write import one_torch_thread, write_shards
from orpo_lite.model import stop_token_ids
from orpo_lite.model.locating import adapter_folder, renaming_field
from orpo_lite.model.untrusted_files import check_adapter, subfolders_hint
from orpo_lite.recipe import ModelSection
from orpo_lite.report.model_card import model_card
from orpo_lite.trainer.run_folder import base_section, tokenizer_of

SPARE_BYTES = 100 * 10**6
"""Room for tokenizer, configuration and card beside the weights."""
FROM_BASE = ("preprocessor_config.json", "processor_config.json", "*.py", "LICENSE*", "NOTICE*", "USE_POLICY*")
"""Files of the base that the merged model needs or has to come with."""


def merge(
    source: str | Path,
    output: str | Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    onto: str = "original",
    verify: bool | None = None,
    trust_remote_code: bool = False,
    facts: dict[str, Any] | None = None,
) -> Path:
    """Merge an adapter into its base and write a folder that transformers loads without peft.

    Every weight is W + scale * B A in float32, cast once (DoRA, trained embeddings, biases and experts in their own
    way). Memory stays below 1 GB plus twice the largest tensor of the checkpoint, whatever the size of the model; DoRA on
    embeddings takes five times theirs.

    Args:
        source: run folder, adapter folder, or hub id of an adapter.
        output: folder to write; it must not exist or be empty. It appears complete or not at all.
        base: hub id or folder to merge into, where it is not the one that the run or adapter names.
        dtype: bfloat16, float16 or float32; default: as each weight of the base is stored.
        onto: original: the base as its author published it; outputs differ a little from those of the quantized base
            in training. quantized: that base's weights, dequantized, for the outputs seen in training.
        verify: run the merged model and base with adapter, layer by layer, and compare their logits. Default: yes,
            unless a single layer needs more memory than the merge.
        trust_remote_code: run Python code of the base's repository. The folder's own recipe.yaml has no say in it,
            since an adapter may come from anybody.
        facts: receives what the merge prints: base, dtype, bytes, seconds, and the results of the check.

    Raises:
        RequestError: no adapter, no base in the dtype asked for, an adapter that cannot be merged, an output folder in
            use, too little disk space; before anything is written.
        RuntimeError: weights that are not finite, or logits that are not the adapter model's.
    """
    source, output = adapter_folder(source), Path(output)
    if output.is_symlink() or output.name in ("", ".."):  # only the folder itself can be renamed
        output = output.resolve()
    check_request(source, output)
    check_adapter(source)
    spec = base_section(source, base, trust_remote_code)
    trained = trained_dtype(source, spec)
    named = f"{source / 'adapter_config.json'}, base_model_name_or_path"
    named = "--base" if base else "model.name_or_path" if (source / "recipe.yaml").is_file() else named
    with renaming_field(named, "" if base else " (--base names another base)"):
        tokenizer = tokenizer_of(source, spec)
        origin = Base(spec, onto, trained)
    plan = make_plan(source, origin, tokenizer, getattr(torch, dtype) if dtype else None)
    check_disk(output, plan.nbytes + SPARE_BYTES)
    named = f"{spec.name_or_path}/{spec.gguf_file}" if spec.gguf_file else spec.name_or_path
    written = str(plan.dtype).removeprefix("torch.")
    lines = [f"base: {named}, {onto} weights; merged weights: {written}"]
    if plan.untied:
        lines.append(
            f"{' and '.join(plan.untied)}: one tensor in the base, two here, since they are adapted differently"
        )
    console.print("\n".join(lines), soft_wrap=True, markup=False)
    start = time.monotonic()
    with finished_as(output) as folder, one_torch_thread():
        with progress_bar("merging", plan.nbytes, in_bytes=True) as advance:
            write_shards(folder, plan.shards, advance)
        seconds = time.monotonic() - start
        notes = [f"Merged onto the {onto} weights of the base, in {written}."]
        own = named_base(source, trust_remote_code) if base else spec
        if base and own and own.name_or_path != base:
            notes.append(f"The adapter was trained on {own.name_or_path}; --base says to merge it into {base}.")
        write_configuration(folder, plan, tokenizer)
        other = (own, trained) if own and own.quantization != "none" and onto == "original" else None
        notes += check_merged(plan, folder, source, tokenizer, other, verify)
        (folder / "README.md").write_text(model_card(source, "merged", notes=notes, base=base), "utf-8")
        if (source / "curves.png").is_file():
            shutil.copyfile(source / "curves.png", folder / "curves.png")
    size = plan.nbytes / 1e9
    done = f"merged {source} into {output}: {size:.2f} GB in {seconds:.1f} s ({size / seconds:.2f} GB/s)"
    console.print("\n  ".join([done, *notes[1:]]), soft_wrap=True, markup=False)
    if facts is not None:
        facts |= {"output": str(output), "base": named, "onto": str(onto), "dtype": written, "bytes": plan.nbytes,
                  "seconds": round(seconds, 3), "untied": list(plan.untied), "notes": notes}  # fmt: skip
    return output


def named_base(source: Path, trust_remote_code: bool) -> ModelSection | None:
    """Return the base that the run or adapter names, if it names any."""
    try:
        return base_section(source, None, trust_remote_code)
    except RequestError:
        return None


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


def check_disk(output: Path, needed: int) -> None:
    """Raise RequestError where the disk has too little room for what is written until the output is finished."""
    parent = next(p for p in (output.absolute(), *output.absolute().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise RequestError(
            f"--output: this takes {needed / 1e9:.1f} GB, and {parent} has {free / 1e9:.1f} GB free: make room, or "
            "choose another disk"
        )


@contextmanager
def finished_as(output: Path) -> Iterator[Path]:
    """Yield a folder beside `output` that is renamed to it at the end, or removed where the body fails.

    Raises:
        RuntimeError: the disk is full.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    for left in output.parent.glob(f".{glob.escape(output.name)}.partial-*"):
        owner = left.name.rpartition("-")[2]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(left)  # left by a merge that was killed
    folder = output.parent / f".{output.name}.partial-{os.getpid()}"
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
    """Write everything beside the weights: configuration, generation defaults, tokenizer, files of the base."""
    model, home = plan.base.model, next(iter(plan.base.files.values())).parent
    config = model.config
    config.dtype = plan.dtype
    config.architectures = config.architectures or [type(model).__name__]
    config.save_pretrained(folder)
    generation = GenerationConfig.from_model_config(config)
    if (home / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(home)
    generation.eos_token_id = sorted(stop_token_ids(tokenizer, generation)) or None
    generation.pad_token_id = tokenizer.pad_token_id
    if generation.temperature is not None or generation.top_p is not None:
        # some bases ship sampling settings with sampling off, which transformers refuses to write
        generation.do_sample = True
    generation.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for pattern in FROM_BASE:
        for file in home.glob(pattern):
            if file.is_file() and not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)
