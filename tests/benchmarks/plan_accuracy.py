"""`python -m tests.benchmarks.plan_accuracy`: plans for this CPU held against real training steps, as torch's profiler sees them.

Small random models are saved, loaded, given an adapter and trained for two optimizer steps by the commands' own code;
the peak of what was allocated is compared with the plan of the same recipe.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from datasets import Dataset
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    PrinterCallback,
    Qwen2Config,
)
from transformers.trainer_callback import ProgressCallback
from transformers.utils import logging as transformers_logging

from orpo_lite.common.console import console, run_command
from orpo_lite.model import attach_adapter, load_base
from orpo_lite.plan.allocations import Timeline
from orpo_lite.plan.gpus import Target
from orpo_lite.plan.meta_model import hold_model
from orpo_lite.plan.step import longest_pair
from orpo_lite.recipe import Recipe
from orpo_lite.recipe.loading import resolve_path
from orpo_lite.train.bench import trl_trainer
from orpo_lite.trainer.config import ORPOConfig
from orpo_lite.trainer.config_from_recipe import arguments, checkpointed
from orpo_lite.trainer.trainer import ORPOTrainer
from orpo_lite.trainer.trl_names import trl_columns
from tests.plans import plan

TOLERANCE, UNDER = 0.05, 0.03
"""Largest error of a plan, and largest where it promises too little."""

SIZES: dict[str, Any] = {
    "vocab_size": 8000,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**SIZES, sliding_window=64),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
}


@dataclass(frozen=True)
class Case:
    """A small model and how it is trained."""

    family: str
    quantization: str = "none"
    checkpointing: str | int = "all"
    """all, none, or how many layers."""
    layout: str = "shared"
    pairs: int = 1
    dtype: str = "float32"
    length: int = 192
    trl: bool = False
    """TRL's step instead of ours."""

    @property
    def name(self) -> str:
        words = ("trl",) * self.trl + (
            self.family,
            self.quantization,
            self.dtype,
            f"checkpointing {self.checkpointing}",
            self.layout,
        )
        return ", ".join(words) + f", {self.pairs} pair(s)"

    def recipe(self, folder: Path) -> Recipe:
        """A recipe whose base is the folder."""
        return Recipe.parse(
            {
                "name": "truth",
                "model": {
                    "name_or_path": str(folder),
                    "quantization": self.quantization,
                    "dtype": self.dtype,
                    "attention": "eager" if self.family == "gemma2" else "auto",
                },
                "adapter": {"r": 8},
                "data": {
                    "train": "unused.jsonl",
                    "max_length": self.length,
                    "max_prompt_length": self.length // 4,
                    "eval_fraction": 0,
                },
                "orpo": {"layout": self.layout},
                "memory": {"checkpointing": self.checkpointing},
                "training": {
                    "per_device_train_batch_size": self.pairs,
                    "gradient_accumulation_steps": 2,
                    "optim": "adamw_torch",
                    "max_steps": 2,
                    "report_to": "none",
                    "save_strategy": "no",
                    "eval_strategy": "no",
                    "logging_steps": 1000,
                    "use_cpu": True,
                },
            }
        )


CASES = [
    *(
        Case(family, quantization, checkpointing, layout, pairs)
        for i, family in enumerate(("llama", "qwen2", "gemma2"))
        for j, (quantization, checkpointing) in enumerate(
            [("nf4", "all"), ("nf4", "none"), ("none", "all"), ("none", "none")]
        )
        for layout, pairs in [(("shared", 1), ("padded", 4), ("shared", 4), ("padded", 1))[(i + j) % 4]]
    ),
    # experts are fused parameters, which bitsandbytes leaves alone: no NF4
    Case("mixtral"),
    Case("mixtral", checkpointing="none", layout="padded", pairs=4),
    Case("llama", "nf4", 2, pairs=4),
    Case("gemma2", checkpointing=1, layout="padded"),
    Case("llama", "nf4", dtype="bfloat16", length=64),
    Case("llama", "none", "none", dtype="bfloat16", length=64),
    *(
        Case(family, checkpointing=checkpointing, pairs=pairs, trl=True)
        for family in ("llama", "qwen2")
        for checkpointing in ("all", "none")
        for pairs in (1, 4)
    ),
]


@dataclass(frozen=True)
class Held:
    """A plan beside a real step, in bytes."""

    case: str
    planned: int
    measured: int
    before: int
    """Of the measured, what the model held before the first step."""

    @property
    def error(self) -> float:
        """Relative: above 0 where the plan promises too much."""
        return self.planned / self.measured - 1

    @property
    def step_error(self) -> float:
        """The same of what the step adds to the model."""
        return (self.planned - self.before) / (self.measured - self.before) - 1

    @property
    def good(self) -> bool:
        return -UNDER <= self.error <= TOLERANCE


def compare(case: Case) -> Held:
    """Plan a case and train it."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        one_thread(),
        quiet(),
        torch.backends.mkldnn.flags(enabled=False),
    ):  # kernels' scratch memory grows with the threads, and oneDNN's bfloat16 takes more: plans leave it out
        folder = Path(scratch) / "base"
        with torch.random.fork_rng():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(FAMILIES[case.family]).save_pretrained(folder)
        recipe = case.recipe(folder)
        predicted = plan(recipe, Target("cpu"))
        if case.trl:
            from tests.benchmarks.trl_memory import plan_trl

            predicted = plan_trl(recipe, predicted)
        before, measured = train(recipe, Path(scratch), case.trl)
    return Held(case.name, predicted.peak, measured, before)


def train(recipe: Recipe, scratch: Path, trl: bool = False) -> tuple[int, int]:
    """Bytes of the loaded model, and at the fullest moment of two real optimizer steps on the CPU, ours or TRL's."""
    base, facts = load_base(recipe.model, device="cpu")
    recomputed = checkpointed(recipe, torch.device("cpu"))
    model = attach_adapter(base, recipe.adapter, checkpointing=recomputed != 0)
    # autocast as on a GPU: left to itself the trainer goes without on a CPU
    with mock.patch.object(ORPOConfig, "_choose_precision", lambda self: None):
        args = arguments(recipe, scratch, facts, has_eval=False, checkpointing=recomputed)
    prompt, answer = longest_pair(recipe.data)
    row = {"chosen_ids": [1] * prompt + [2] * answer, "rejected_ids": [1] * prompt + [3] * answer}
    row |= {"chosen_start": prompt, "rejected_start": prompt}  # type: ignore[dict-item]
    rows = 2 * args.per_device_train_batch_size * args.gradient_accumulation_steps
    if trl:
        tokenizer = AutoTokenizer.from_pretrained(
            resolve_path("builtin:quickstart/model")
        )  # of TRL's first, unused row
        same = ("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "logging_steps", "use_cpu")
        trainer: Any = trl_trainer(
            model, args, tokenizer, str(scratch), save_strategy="no", **{name: getattr(args, name) for name in same}
        )
        trainer.train_dataset = Dataset.from_list([trl_columns(row)] * rows)
        if recomputed != 0:
            model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        trainer = ORPOTrainer(model, args, None, Dataset.from_list([row] * rows), None, processing_class=_Tokens())
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    timeline = Timeline(Target("cpu"))
    hold_model(timeline, model)
    held = sum(size for _, size, _ in timeline.events)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.train()
    return held, held + fullest(profiler)


def fullest(profiler: profile) -> int:
    """Most bytes that were allocated at a time while the profiler looked on, above what was there before."""
    results: Any = profiler.profiler.kineto_results  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    now = most = 0
    for _, size in changes:
        now += size
        most = max(most, now)
    return most


class _Tokens:
    """A tokenizer for rows that are tokens already."""

    pad_token_id, eos_token_id, bos_token_id, padding_side = 0, 2, 1, "right"
    is_fast = True
    model_input_names = ("input_ids", "attention_mask")

    def save_pretrained(self, *_: Any, **__: Any) -> None: ...


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, nor what a real run says of itself."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        transformers_logging.enable_progress_bar()
        transformers_logging.set_verbosity(level)


def command(
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Hold plans for this CPU against real steps of small models."""
    from rich.table import Table

    table = Table("case", "planned MB", "measured MB", "error", "of the step alone", box=None)
    found = []
    for case in CASES:
        held = compare(case)
        found.append(held)
        table.add_row(case.name, f"{held.planned / 1e6:.1f}", f"{held.measured / 1e6:.1f}", f"{held.error:+.2%}",
                      f"{held.step_error:+.2%}")  # fmt: skip
    if as_json:
        print(json.dumps([asdict(held) | {"error": held.error} for held in found], indent=1))
    else:
        console.print(table)
    if not all(held.good for held in found):
        raise typer.Exit(1)


if __name__ == "__main__":
    run_command(command)
