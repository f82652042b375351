"""`python -m orpo_lite.merge RUN_OR_ADAPTER --output DIR`: adapter and base as one plain transformers model.

Tensor by tensor from the base's files to the output's: neither model is ever in memory.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from rich.markup import escape
from rich.progress import BarColumn, FileSizeColumn, Progress, TextColumn, TotalFileSizeColumn, TransferSpeedColumn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from orpo_lite.common.console import console, json_alone
from orpo_lite.common.errors import RequestError
from orpo_lite.merge.base import Base
from orpo_lite.merge.check import check_merged, probe_tokens
from orpo_lite.merge.plan import Plan, make_plan
from orpo_lite.merge.source import as_trained, trained_dtype
from orpo_lite.merge.workers import one_thread_each
from orpo_lite.merge.write import write_shards
from orpo_lite.merge.write_4bit import quantise_plan
from orpo_lite.model import stop_token_ids
from orpo_lite.model.locating import adapter_folder, renaming_field
from orpo_lite.model.tokenizer import new_tokens
from orpo_lite.model.untrusted_files import check_adapter
from orpo_lite.report.model_card import model_card
from orpo_lite.trainer.run_folder import base_section, tokenizer_of

SPARE_BYTES = 100 * 10**6
"""Room for tokenizer, configuration and card beside the weights."""
FROM_BASE = ("preprocessor_config.json", "processor_config.json", "*.py", "LICENSE*", "NOTICE*", "USE_POLICY*")
"""Files of the base that the merged model needs or has to carry along."""


class Onto(StrEnum):
    """Weights to merge into: the original 16- or 32-bit ones, or the quantised ones that training saw."""

    original = "original"
    quantized = "quantized"


class Dtype(StrEnum):
    """Dtype of the merged weights."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class FourBit(StrEnum):
    """bitsandbytes' 4-bit formats."""

    nf4 = "nf4"
    fp4 = "fp4"


def merge(
    source: str | Path,
    output: str | Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    onto: str = "original",
    quantize: str | None = None,
    verify: bool | None = None,
    trust_remote_code: bool = False,
    facts: dict[str, Any] | None = None,
) -> Path:
    """Merge an adapter into its base and write a folder that transformers loads without peft.

    Every weight is W + scale * B A in float32, cast once (DoRA, trained embeddings, biases and experts in their own
    way). Memory stays below 1 GB plus twice the largest tensor of the checkpoint, whatever the size of the model.

    Args:
        source: run folder, adapter folder, or hub id of an adapter.
        output: folder to write; it must not exist or be empty. It appears whole or not at all.
        base: hub id or folder to merge into, where it is not the one that the run or adapter names.
        dtype: bfloat16, float16 or float32; default: as each weight of the base is stored.
        onto: original: the base as its author published it; its outputs differ a little from the quantised base that
            training saw. quantized: that base's weights, dequantised, for the outputs seen in training.
        quantize: nf4 or fp4 to write linear layers in bitsandbytes' 4 bits; only with onto original.
        verify: run the merged model and base with adapter, layer by layer, and compare their logits. Default: yes,
            unless a single layer needs more memory than the merge.
        trust_remote_code: run Python code of the base's repository. The folder's own recipe.yaml has no say in it, for
            an adapter may come from anybody.
        facts: takes in what the merge says on screen: base, dtype, bytes, seconds, and what the check found.

    Raises:
        RequestError: no adapter, no base in the dtype asked for, an adapter that cannot be merged, an output folder in
            use, too little disk; before anything is written.
        RuntimeError: weights that are not finite, a change that 4 bits would round away, logits that are not the
            adapter model's.
    """
    source, output = adapter_folder(source), Path(output)
    if output.is_symlink() or output.name in ("", ".."):  # what can be renamed is the folder itself
        output = output.resolve()
    check_request(source, output, onto, quantize)
    check_adapter(source)
    spec = base_section(source, base, trust_remote_code)
    trained = torch.bfloat16 if trained_dtype(source, spec) == "bfloat16" else torch.float32
    named = f"{source / 'adapter_config.json'}, base_model_name_or_path"
    named = "--base" if base else "model.name_or_path" if (source / "recipe.yaml").is_file() else named
    with renaming_field(named, "" if base else " (--base names another base)"):
        tokenizer = tokenizer_of(source, spec)
        origin = Base(spec, onto, trained)
    ids: list[int] = [tokenizer.convert_tokens_to_ids(token) for token in new_tokens(tokenizer)]  # type: ignore[misc]
    plan = make_plan(source, origin, dtype=getattr(torch, dtype) if dtype else None, rows=1 + max(ids, default=-1))
    kept = quantise_plan(plan, quantize) if quantize else None
    check_disk(output, plan.nbytes)
    named = f"{spec.name_or_path}/{spec.gguf_file}" if spec.gguf_file else spec.name_or_path
    written = quantize or str(plan.dtype).removeprefix("torch.")
    console.print(f"base: {escape(named)}, {onto} weights; merged weights: {written}", soft_wrap=True)
    if plan.untied:
        console.print(
            f"{' and '.join(plan.untied)}: one tensor in the base, two here, for they are adapted differently",
            soft_wrap=True,
        )
    start = time.monotonic()
    with beside(output) as folder, one_thread_each():
        with bar(plan.nbytes) as advance:
            write_shards(folder, plan.shards, advance, plan.adapter.file.release)
        seconds = time.monotonic() - start
        notes = [f"Merged onto the {onto} weights of the base, in {written}."]
        notes += kept.report() if kept else []
        own = base_section(source, None).name_or_path if base else None
        if own != base:
            notes.append(f"The adapter was trained on {own}; --base says to merge it into {base}.")
        write_configuration(folder, plan, tokenizer)
        other = onto == Onto.original and as_trained(source, trust_remote_code)
        notes += check_merged(
            plan,
            folder,
            probe_tokens(source, tokenizer),
            (other, trained) if other else None,
            source,
            bool(quantize),
            verify,
        )
        (folder / "README.md").write_text(model_card(source, "merged", notes=notes, base=base), "utf-8")
        if (source / "curves.png").is_file():
            shutil.copyfile(source / "curves.png", folder / "curves.png")
    size = plan.nbytes / 1e9
    console.print(
        f"merged {source} into {output}: {size:.2f} GB in {seconds:.1f} s ({size / seconds:.2f} GB/s)",
        soft_wrap=True,
        markup=False,
    )
    for note in notes[1:]:
        console.print(f"  {escape(note)}", soft_wrap=True)
    if facts is not None:
        facts |= {"output": str(output), "base": named, "onto": str(onto), "dtype": written, "bytes": plan.nbytes,
                  "seconds": round(seconds, 3), "untied": list(plan.untied), "notes": notes}  # fmt: skip
    return output


def check_request(source: Path, output: Path, onto: str, quantize: str | None) -> None:
    if not source.exists():
        raise RequestError(
            f"{source}: there is no such folder: expected a run or adapter folder, or a hub id USER/NAME"
        )
    if not (source / "adapter_config.json").is_file():
        hint = (
            "it is a plain model already" if (source / "config.json").is_file() else "expected a run or adapter folder"
        )
        raise RequestError(f"{source}: holds no adapter_config.json, so there is nothing to merge: {hint}")
    if output.exists() and not output.is_dir():
        raise RequestError(f"--output: {output} is a file, expected a folder to write: choose another name")
    if output.exists() and any(output.iterdir()):
        raise RequestError(f"--output: {output} exists and is not empty: choose another folder, or remove it first")
    place = next(p for p in output.absolute().parents if p.exists())
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise RequestError(f"--output: {place} is no folder that you can write to: choose another one")
    if quantize and onto == Onto.quantized:
        raise RequestError(
            "--quantize with --onto quantized would round nearly every weight back to what it was before training: take "
            "--onto original"
        )


def check_disk(output: Path, nbytes: int) -> None:
    """Room for the weights where they will be written."""
    place = next(p for p in (output.absolute(), *output.absolute().parents) if p.exists())
    needed, free = nbytes + SPARE_BYTES, shutil.disk_usage(place).free
    if needed > free:
        raise RequestError(
            f"--output: the merged model takes {needed / 1e9:.1f} GB, and {place} has {free / 1e9:.1f} GB free: make room, "
            "or choose another disk"
        )


@contextmanager
def beside(output: Path) -> Iterator[Path]:
    """A folder beside the target that gets the target's name at the end, and is gone if it does not come to that."""
    output.parent.mkdir(parents=True, exist_ok=True)
    for left in output.parent.glob(f".{glob.escape(output.name)}.partial-*"):
        owner = left.name.rpartition("-")[2]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(left)  # of a merge that was killed
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


@contextmanager
def bar(total: int) -> Iterator[Any]:
    """Progress in bytes, with GB/s."""
    columns = (TextColumn("merging"), BarColumn(), FileSizeColumn(), TextColumn("of"), TotalFileSizeColumn())
    with Progress(*columns, TransferSpeedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("merging", total=total)
        yield lambda count: progress.advance(task, count)


def write_configuration(folder: Path, plan: Plan, tokenizer: PreTrainedTokenizerBase) -> None:
    """Everything beside the weights: configuration, generation defaults, tokenizer, files that belong to the base."""
    config, home = plan.config, next(iter(plan.base.files.values())).parent
    config.dtype = plan.dtype
    config.architectures = config.architectures or [type(plan.base.model).__name__]
    config.save_pretrained(folder)
    generation = GenerationConfig.from_model_config(config)
    if (home / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(home)
    generation.eos_token_id = sorted({*stop_token_ids(tokenizer), *as_list(generation.eos_token_id)})
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


def as_list(value: int | list[int] | None) -> list[int]:
    return [] if value is None else value if isinstance(value, list) else [value]


def command(
    source: Annotated[
        str, typer.Argument(metavar="RUN_OR_ADAPTER", help="run or adapter folder, or hub id of an adapter")
    ],
    output: Annotated[str, typer.Option(help="folder to write; must not exist or be empty")],
    base: Annotated[str | None, typer.Option(help="hub id or folder of another base to merge into")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="dtype of the merged weights; default: the base's own")] = None,
    onto: Annotated[
        Onto, typer.Option(help="original weights, or the quantised ones that training saw (dequantised)")
    ] = Onto.original,
    quantize: Annotated[FourBit | None, typer.Option(help="write linear layers in 4 bits (bitsandbytes)")] = None,
    verify: Annotated[
        bool | None,
        typer.Option("--verify/--no-verify", help="compare logits with the adapter model's; default: if it fits"),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run Python code that the base's repository ships")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, and everything else to stderr")] = False,
) -> None:
    """Merge an adapter into its base, tensor by tensor: a plain transformers model."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the unfinished folder is removed
    facts: dict[str, Any] = {}
    with json_alone(as_json) as show:
        folder = merge(source, output, base=base, dtype=dtype, onto=onto, quantize=quantize, verify=verify,
                       trust_remote_code=trust_remote_code, facts=facts)  # fmt: skip
        if as_json:
            return show(facts)
    seq2seq = json.loads((folder / "config.json").read_text("utf-8")).get("is_encoder_decoder", False)
    auto = "AutoModelForSeq2SeqLM" if seq2seq else "AutoModelForCausalLM"
    console.print(f"next: transformers.{auto}.from_pretrained({output!r})", soft_wrap=True, markup=False)
