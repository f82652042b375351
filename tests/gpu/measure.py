"""`python -m tests.gpu.measure --out FOLDER`: what a card does, in one run of some minutes; gpu.json and gpu.md are written.

A model of Mistral-7B's shape gets random NF4 weights on the card itself, so nothing is downloaded. Every section is written as
soon as it is measured, and one that no time is left for is named, so a run that is cut off loses nothing else. `--toy` runs
the same code on the CPU with a tiny model: a rehearsal, whose figures mean nothing.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from accelerate import init_empty_weights
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers.auto import AutoHfQuantizer

from orpo_lite.common.console import console, run_command
from orpo_lite.model.activation_offload import checkpointing_layers, offload
from orpo_lite.model.base import BaseFacts
from orpo_lite.model.inspection import keep_4bit_differentiable, unwrap
from orpo_lite.model.precision import choose_precision, default_device, quantization_settings
from orpo_lite.plan.gpus import Target
from orpo_lite.plan.meta_model import shipped_config
from orpo_lite.plan.predict import Plan
from orpo_lite.plan.step import Shape
from orpo_lite.recipe import Recipe
from orpo_lite.train.bench import Contest, interleaved
from orpo_lite.trainer.interruptions import ran_out
from tests.plans import plan

SHAPE = "mistralai/Mistral-7B-v0.1"
VOCABULARY = 3000
"""Tokens that the pairs are drawn from, and the size of the toy's vocabulary."""
PAIR = (150, 320, 280)
"""Tokens of prompt, chosen and rejected answer: about UltraFeedback's means."""
KERNELS = ("flash", "fmha", "efficient", "softmax", "varlen", "cutlass")
"""Parts of the names of kernels that compute attention, or stand for the plain formula."""
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "liger-kernel", "xformers", "triton")


class Report:
    """What was measured so far, written after every section.

    Args:
        seconds: time for all sections together.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self.ends = folder, time.monotonic() + seconds
        self.content: dict[str, Any] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def section(self, name: str, make: Callable[[], Any], least: float = 5) -> None:
        """Measure a section where at least so many seconds are left; whatever it raises is its result."""
        started = time.monotonic()
        if self.ends - started < least:
            self.content[name] = {"skipped": "no time was left"}
        else:
            try:
                self.content[name] = make()
            except Exception as error:  # the other sections are worth having
                self.content[name] = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        console.print(f"{name}: {time.monotonic() - started:.0f} s", markup=False)
        (self.folder / "gpu.json").write_text(json.dumps(self.content, indent=1), "utf-8")
        (self.folder / "gpu.md").write_text(as_markdown(self.content), "utf-8")


def environment() -> dict[str, Any]:
    """Describe the card and the packages."""
    found: dict[str, Any] = {"card": "none: a rehearsal on the CPU"}
    if torch.cuda.is_available():
        found["card"] = torch.cuda.get_device_name()
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        found["gigabytes"] = round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1)
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def correctness(toy: bool) -> dict[str, Any]:
    """Run tests/gpu: layouts, head, offloading, running out of memory, the plan, the quickstart."""
    words = ["-q", "-p", "no:cacheprovider", "-k", "head" if toy else ""]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/gpu/test_cuda.py", *words], capture_output=True, text=True
    )
    lines = done.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"pytest": lines[-1] if lines else done.stderr[-500:], "failed": failed}


# ---- the step of a large model --------------------------------------------------------------------------------------------


def random_base(config: Any, recipe: Recipe, device: torch.device) -> tuple[Any, BaseFacts]:
    """Build a model on the device with random weights, its linear layers in 4 bits, one matrix at a time."""
    from bitsandbytes.nn import Params4bit

    precision = choose_precision(recipe.model.dtype, device)
    config._attn_implementation = "sdpa"
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=precision.dtype)
    quantizer = AutoHfQuantizer.from_config(quantization_settings(recipe.model, precision.dtype))
    quantizer._process_model_before_weight_loading(model, device_map=None)
    torch.manual_seed(0)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            weight = torch.empty(parameter.shape, dtype=precision.dtype, device=device)
            weight.normal_(0, 0.02) if weight.ndim > 1 else weight.fill_(1)
            if isinstance(parameter, Params4bit):
                kept = {
                    key: getattr(parameter, key)
                    for key in ("blocksize", "compress_statistics", "quant_type", "quant_storage")
                }
                value: Any = Params4bit(weight, requires_grad=False, module=module, **kept)._quantize(device)
            else:
                value = nn.Parameter(weight, requires_grad=False)
            setattr(module, name, value)
    model.tie_weights()
    model.to(device)
    model.hf_quantizer, model.is_loaded_in_4bit = quantizer, True
    keep_4bit_differentiable(model)
    return model.eval(), BaseFacts(SHAPE, None, precision, "sdpa", "nf4", 1.0, [])


def model_and_recipe(toy: bool, layers: int | None) -> tuple[Any, Recipe, tuple[int, int, int]]:
    """Return the model's configuration, a recipe with its adapter, and a pair's lengths."""
    words = ["model.quantization=nf4", "adapter.r=16", "adapter.alpha=32", "evaluation.samples=0", "orpo.layout=auto"]
    recipe = Recipe.load("quickstart", words)
    config = shipped_config(SHAPE)
    assert config is not None
    pair = PAIR
    if toy:
        pair = (15, 32, 28)
        more = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
                "num_key_value_heads": 2, "head_dim": 32, "sliding_window": None, "vocab_size": VOCABULARY}  # fmt: skip
        config = AutoConfig.for_model(**config.to_dict() | more)
    elif layers:
        config.num_hidden_layers = layers
    return config, recipe, pair


def contest(toy: bool, layers: int | None, checkpointing: bool) -> tuple[Contest, Any, tuple[int, int, int]]:
    """Make ours and TRL's trainer around one model of the large one's shape, and eight pairs."""
    config, recipe, pair = model_and_recipe(toy, layers)
    device = default_device()
    with mock.patch("orpo_lite.model.load_base", lambda *_, **__: random_base(config, recipe, device)):
        made = Contest(recipe, 8, ["trl"], checkpointing)
    g = torch.Generator().manual_seed(1)
    prompt, *answers = pair
    made.rows = []
    for _ in range(8):
        first = torch.randint(3, VOCABULARY, (prompt,), generator=g).tolist()
        chosen, rejected = (first + torch.randint(3, VOCABULARY, (n,), generator=g).tolist() for n in answers)
        made.rows.append(
            {"chosen_ids": chosen, "rejected_ids": rejected, "chosen_start": prompt, "rejected_start": prompt}
        )
    return made, config, pair


def planned(config: Any, pair: tuple[int, int, int], pairs: int, checkpointing: bool, folder: Path) -> Plan:
    """Plan the step that is measured."""
    config.save_pretrained(folder)
    words = ["model.quantization=nf4", "adapter.r=16", "adapter.alpha=32", f"model.name_or_path={folder}",
             f"memory.checkpointing={'all' if checkpointing else 'none'}",
             f"training.per_device_train_batch_size={pairs}", "training.gradient_accumulation_steps=1"]  # fmt: skip
    target = Target("cuda", torch.cuda.get_device_capability()) if torch.cuda.is_available() else Target("cpu")
    return plan(Recipe.load("quickstart", words), target, lambda layout: Shape((pair,) * pairs, "measured"))


def steps(report: Report, toy: bool, layers: int | None, checkpointing: bool) -> list[dict[str, Any]]:
    """Measure the step at 1, 2, 4 and 8 pairs a micro-batch: pairs/s, peak memory beside the plan's, against TRL's."""
    made, config, pair = contest(toy, layers, checkpointing)
    every = made.rows
    rows = []
    for pairs in (1, 2, 4, 8):
        if report.ends - time.monotonic() < 20:
            rows.append({"pairs": pairs, "skipped": "no time was left"})
            continue
        made.rows = every[:pairs]
        row: dict[str, Any] = {"pairs": pairs, "layout": made.setting["layout"]}
        works = {name: made.steps(name, pairs) for name in made.trainers}
        for name in list(works):
            try:
                row[name] = {"loss": works[name](), "peak_over_weights": made.peak(name, pairs)}
            except RuntimeError as error:
                if not ran_out(error):
                    raise
                row[name] = {"out_of_memory": True}
                works.pop(name)
                made.model.zero_grad()
                gc.collect()
                torch.cuda.empty_cache()
        for name, seconds in interleaved(works, 1 if toy else 3).items():
            row[name] |= {"seconds": min(seconds), "pairs_per_second": pairs / min(seconds)}
        if "ours" in works and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            works["ours"]()
            row["peak"] = torch.cuda.max_memory_allocated()
        with tempfile.TemporaryDirectory() as folder:
            made_plan = planned(config, pair, pairs, checkpointing, Path(folder))
        row["planned"] = max(made_plan.phases[name].total() for name in ("forward", "backward", "step"))
        if all("seconds" in row.get(name, {}) for name in ("ours", "trl")):
            row["times_as_fast"] = row["trl"]["seconds"] / row["ours"]["seconds"]
            row["memory_share"] = row["ours"]["peak_over_weights"] / row["trl"]["peak_over_weights"]
        rows.append(row)
        report.content["in progress"] = rows
    report.content.pop("in progress", None)
    return rows


def attention(toy: bool, layers: int | None) -> dict[str, Any]:
    """Name the attention kernels of a step, and what launches most, by torch's profiler."""
    made, _, _ = contest(toy, 2 if layers is None else min(2, layers), False)
    found: dict[str, Any] = {}
    on_card = torch.cuda.is_available()
    for name in made.trainers:
        work = made.steps(name, 8)
        work()
        with profile(activities=[ProfilerActivity.CUDA if on_card else ProfilerActivity.CPU]) as profiler:
            work()
        events = profiler.key_averages()
        told = [event for event in events if any(part in event.key.lower() for part in (*KERNELS, "attention"))]
        found[name] = {
            "kernels": {event.key[:100]: event.count for event in sorted(told, key=lambda event: -event.count)[:12]},
            "launches": sum(event.count for event in events),
        }
    return found


def offloading(toy: bool, layers: int | None) -> dict[str, Any]:
    """Measure the step of 8 pairs with its kept activations in host memory."""
    made, _, _ = contest(toy, layers, True)
    row: dict[str, Any] = {}
    for name, away in (("on the card", False), ("offloaded", True)):
        if away:
            offload(checkpointing_layers(unwrap(made.model)), save_on_cpu(pin_memory=torch.cuda.is_available()))
        work = made.steps("ours", 8)
        row[name] = {"loss": work(), "peak_over_weights": made.peak("ours", 8)}
        row[name]["seconds"] = min(interleaved({"ours": work}, 2)["ours"])
    return row


def quickstart() -> dict[str, Any]:
    """Time the README's first command, as its user would."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        words = ["--recipe", "quickstart", f"training.output_dir={folder}/run"]
        done = subprocess.run([sys.executable, "-m", "orpo_lite.train", *words], capture_output=True, text=True)
        if done.returncode:
            return {"failed": done.stderr[-800:]}
        record = json.loads((Path(folder) / "run" / "run.json").read_text("utf-8"))
    return {"seconds": round(time.monotonic() - started, 1), "train_seconds": record["train_seconds"],
            "accuracy": record["eval"]["after"]["rewards/accuracies"], "plan": record["plan"]}  # fmt: skip


# ---- the table ------------------------------------------------------------------------------------------------------------


def as_markdown(content: dict[str, Any]) -> str:
    """Return the results as the README's table."""
    where = content.get("environment", {})
    versions = ", ".join(f"{name} {where[name]}" for name in PACKAGES if name in where)
    lines = [f"# {where.get('card', 'unknown card')}", "", versions, ""]
    for name, rows in content.items():
        if name.startswith("7B") and isinstance(rows, list):
            lines += [f"## {name}", "", "| pairs | pairs/s | TRL | times as fast | peak | planned | memory over weights, of TRL's |",
                      "|---|---|---|---|---|---|---|"]  # fmt: skip
            lines += [table_row(row) for row in rows] + [""]
        elif name != "environment":
            lines += [f"## {name}", "", "```json", json.dumps(rows, indent=1), "```", ""]
    return "\n".join(lines)


def table_row(row: dict[str, Any]) -> str:
    """Format one size of micro-batch."""

    def speed(name: str) -> str:
        side = row.get(name, {})
        return "out of memory" if "out_of_memory" in side else f"{side['pairs_per_second']:.2f}" if side else "-"

    if "skipped" in row:
        return f"| {row['pairs']} | {row['skipped']} | | | | | |"
    ratio = f"{row['times_as_fast']:.2f}" if "times_as_fast" in row else "-"
    share = f"{row['memory_share']:.0%}" if "memory_share" in row else "-"
    peak = f"{row['peak'] / 1e9:.2f} GB" if "peak" in row else "-"
    return f"| {row['pairs']} | {speed('ours')} | {speed('trl')} | {ratio} | {peak} | {row['planned'] / 1e9:.2f} GB | {share} |"


def command(
    out: Annotated[Path, typer.Option(help="folder for gpu.json and gpu.md")],
    toy: Annotated[bool, typer.Option("--toy", help="rehearse on the CPU with a tiny model")] = False,
    seconds: Annotated[float, typer.Option(help="time for all of it")] = 440,
    layers: Annotated[int | None, typer.Option(help="take this many of the 32 layers, for cards under 8 GB")] = None,
) -> None:
    """Measure on this machine's card what the README claims of cards."""
    if not toy and not torch.cuda.is_available():
        raise typer.BadParameter("there is no CUDA device here; --toy rehearses on the CPU")
    report = Report(out, seconds)
    report.section("environment", environment, 0)
    report.section("7B, all layers checkpointed", lambda: steps(report, toy, layers, True), 30)
    report.section("attention kernels", lambda: attention(toy, layers))
    report.section("correctness", lambda: correctness(toy), 30)
    report.section("7B, no layer checkpointed", lambda: steps(report, toy, layers, False), 30)
    report.section("offloading", lambda: offloading(toy, layers), 20)
    report.section("quickstart", quickstart, 20)
    console.print(f"written to {out}/gpu.json and gpu.md", markup=False)


if __name__ == "__main__":
    run_command(command)
