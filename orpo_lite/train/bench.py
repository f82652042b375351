"""Our trainer and TRL's on the same pairs, in one run: what `python -m orpo_lite.bench` measures.

Memory is that of live tensors, on any device; times are taken in turn, so that other programs slow down all alike.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset

from orpo_lite.common.console import progress
from orpo_lite.model.inspection import unwrap
from orpo_lite.objective.kernels import fuse
from orpo_lite.objective.layout import disable_dropout
from orpo_lite.objective.packed_attention import plain_attention
from orpo_lite.recipe import Recipe
from orpo_lite.trainer.config import CHECKPOINTING, RENAMED
from orpo_lite.trainer.trl_names import trl_columns

if TYPE_CHECKING:
    from orpo_lite.trainer.trainer import ORPOTrainer


TRL_LIGER = "trl + liger"
"""TRL's trainer with the same fused kernels as ours."""


def attributes(model: Any) -> dict[Any, dict[str, Any]]:
    """Return the attributes of every module, some of which fused kernels replace; hooks are copied, for they change in place."""
    hooks = "_forward_pre_hooks"
    return {module: vars(module) | {hooks: vars(module)[hooks].copy()} for module in model.modules()}


def restore(kept: dict[Any, dict[str, Any]]) -> None:
    """Give modules the attributes back that `attributes` returned."""
    for module, values in kept.items():
        vars(module).pop("forward", None)  # of the instance, where kernels are fused
        vars(module).update(values)


class Contest:
    """The recipe's model with its adapter, the pairs, and the trainers that compute the same steps on them.

    Args:
        pairs: how many of the recipe's training pairs to take, drawn by its seed.
        against: trl, or layouts of ours.
        checkpointing: recompute all layers in the backward pass.
    """

    def __init__(self, recipe: Recipe, pairs: int, against: list[str], checkpointing: bool):
        from orpo_lite.data import load_pairs
        from orpo_lite.model import attach_adapter, load_base, load_tokenizer
        from orpo_lite.trainer.config_from_recipe import arguments
        from orpo_lite.trainer.trainer import ORPOTrainer

        data = recipe.data.model_copy(update={"eval": None, "eval_fraction": 0.0})
        tokenizer = load_tokenizer(recipe.model, recipe.adapter and recipe.adapter.init_from)
        found = load_pairs(data, tokenizer).train
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(data.seed)).tolist()
        self.rows: list[dict[str, Any]] = [found[i] for i in order[:pairs]]
        base, self.facts = load_base(recipe.model, tokenizer)
        self.model: Any = attach_adapter(base, recipe.adapter, tokenizer=tokenizer, checkpointing=checkpointing)
        for name, parameter in self.model.named_parameters():
            if "lora_B" in name:  # an untrained adapter's B is zero, and A would get no gradient
                torch.nn.init.normal_(parameter, std=0.02)
        disable_dropout(self.model)
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.trainers: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as scratch:
            layouts = [name for name in against if name != "trl"]
            for layout in [recipe.orpo.layout, *layouts]:
                args = arguments(recipe, Path(scratch), self.facts, has_eval=False, checkpointing=0)
                args.layout, wish, args.kernels = layout, recipe.memory.kernels, "none"
                trainer = ORPOTrainer(self.model, args, None, found.select([0]), None, tokenizer)
                self.trainers["ours" if not self.trainers else layout] = trainer
            if "trl" in against:
                self.trainers["trl"] = trl_trainer(self.model, args, tokenizer, scratch)
        ours: ORPOTrainer = self.trainers["ours"]
        self.plain = attributes(self.model)
        args.kernels = wish
        kernels = fuse(self.model, args)
        self.fused = attributes(self.model)
        if "trl" in self.trainers and kernels.startswith("liger"):
            self.trainers[TRL_LIGER] = self.trainers["trl"]
        self.setting = {
            "model": f"{self.facts.name}, {sum(p.numel() for p in self.model.parameters()):,} stored weights",
            "quantization": self.facts.quantization,
            "precision": self.facts.precision.why,
            "attention": self.facts.attention,
            "checkpointing": "all layers" if checkpointing else "off",
            "max_length": data.max_length,
            "layout": f"{ours.layout.name}: {ours.layout.why}",
            "kernels": kernels,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads",
            "pairs": len(self.rows),
            "tokens_per_pair": sum(len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in self.rows) / len(self.rows),
        }  # fmt: skip

    def steps(self, name: str, batch_size: int) -> Callable[[], float]:
        """Build the work to time: forward and backward over all pairs, in batches, and one optimizer step."""
        trainer: Any = self.trainers[name]
        is_trl = trainer is self.trainers.get("trl")
        shape = trl_columns if is_trl else dict
        rows = [shape(row) for row in self.rows]
        trainer.optimizer = None
        optimizer = trainer.create_optimizer()
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # the same work each time, and the same weights for every contestant

        base: Any = unwrap(self.model)

        def work() -> float:
            restore(self.plain if name == "trl" else self.fused)
            if is_trl:
                plain_attention(base)
            loss = 0.0
            for start in range(0, len(rows), batch_size):
                batch = trainer.data_collator(rows[start : start + batch_size])
                trainer.current_gradient_accumulation_steps = 1
                loss += trainer.training_step(self.model, batch).item()
            optimizer.step()
            self.model.zero_grad()
            return loss / -(-len(rows) // batch_size)

        return work

    def check(self, batch_size: int) -> dict[str, float]:
        """Compute every contestant's mean loss; they must agree before their times mean anything, else RuntimeError."""
        losses = {name: self.steps(name, batch_size)() for name in self.trainers}
        spread = max(losses.values()) - min(losses.values())
        allowed = 1e-4 if self.facts.precision.dtype is torch.float32 else 5e-2
        if not spread <= allowed:
            raise RuntimeError(f"the losses differ by {spread:.2g}, so the times cannot be compared: {losses}")
        return losses

    def race(self, batch_size: int, repeats: int) -> dict[str, Any]:
        """Measure times, throughput and memory at one batch size, with their ratios."""
        losses = self.check(batch_size)
        seconds = interleaved({name: self.steps(name, batch_size) for name in self.trainers}, repeats)
        peaks = {name: self.peak(name, batch_size) for name in self.trainers}
        tokens = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in self.rows)
        result: dict[str, Any] = {"batch_size": batch_size, "contestants": {}}
        for name in self.trainers:
            median = statistics.median(seconds[name])
            result["contestants"][name] = {
                "loss": losses[name], "seconds": seconds[name], "pairs_per_second": len(self.rows) / median,
                "tokens_per_second": tokens / median, "peak_bytes_over_weights": peaks[name],
            }  # fmt: skip
            if name != "ours":
                result["contestants"][name]["ours_is_times_as_fast"] = ratios(seconds[name], seconds["ours"])
                result["contestants"][name]["ours_memory_share"] = peaks["ours"] / peaks[name]
        return result

    def peak(self, name: str, batch_size: int) -> int:
        """Measure the bytes over the weights that the batch with the most tokens takes."""
        size = [len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in self.rows]
        largest = max(range(0, len(size), batch_size), key=lambda start: sum(size[start : start + batch_size]))
        rows, self.rows = self.rows, self.rows[largest : largest + batch_size]
        try:
            return peak_over(self.steps(name, batch_size), self.model.device)
        finally:
            self.rows = rows


def trl_trainer(model: Any, args: Any, tokenizer: Any, scratch: str, **settings: Any) -> Any:
    """Make TRL's ORPOTrainer around the same model, with the same precision and further settings of its ORPOConfig."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.orpo import ORPOConfig as TRLConfig
        from trl.experimental.orpo import ORPOTrainer as TRLTrainer
    checkpointing: dict[str, Any] = {
        CHECKPOINTING if RENAMED else "gradient_checkpointing": False
    }  # the model has it on already
    config = TRLConfig(output_dir=scratch, beta=args.beta, max_length=args.max_length, report_to="none", disable_dropout=True,
                       remove_unused_columns=False,
                       bf16=args.bf16, fp16=args.fp16, optim=args.optim, learning_rate=args.learning_rate,
                       dataloader_pin_memory=torch.cuda.is_available(), **checkpointing, **settings)  # fmt: skip
    row = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with progress("preparing TRL's trainer"):
        return TRLTrainer(model, config, train_dataset=row, processing_class=tokenizer)


def peak_over(work: Callable[[], Any], device: torch.device) -> int:
    """Measure the peak bytes that `work` allocates, over what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    recorded: Any = profiler.profiler
    changes = (event.nbytes() for event in recorded.kineto_results.events() if event.name() == "[memory]")
    return max(itertools.accumulate(changes), default=0)


def interleaved(
    works: dict[str, Callable[[], Any]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Time the contestants in turn, in seconds by a clock, after one round that is not counted."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            wait()
            started = clock()
            work()
            wait()
            if repeat:
                seconds[name].append(clock() - started)
    return seconds


def ratios(reference: list[float], other: list[float]) -> dict[str, float]:
    """Compute how many times as fast `other` is: median, lowest and highest over the repeats."""
    each = [a / b for a, b in zip(reference, other, strict=True)]
    return {"median": statistics.median(each), "min": min(each), "max": max(each)}
