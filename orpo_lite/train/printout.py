"""What a run says of itself: before it starts, when it is done, and in run.json."""

from __future__ import annotations

import importlib.metadata
import itertools
import math
import platform
from typing import TYPE_CHECKING, Any

import torch
from rich.markup import escape
from rich.table import Table

from orpo_lite.common.console import console, errors
from orpo_lite.common.memory import held_by, peak_memory_bytes
from orpo_lite.data.dropped_rows import WITHOUT_TEMPLATE
from orpo_lite.data.lengths import length_histograms
from orpo_lite.evaluate.held_out import show
from orpo_lite.model import BaseFacts, trainable_share
from orpo_lite.report.provenance import find_licence, hub_id
from orpo_lite.trainer.checkpoint_folder import newest_good
from orpo_lite.trainer.distributed import world
from orpo_lite.trainer.nonfinite_report import NonFinite
from orpo_lite.trainer.out_of_memory import OutOfMemory

if TYPE_CHECKING:
    from orpo_lite.data import Pairs
    from orpo_lite.plan.predict import Plan
    from orpo_lite.recipe import Recipe
    from orpo_lite.trainer.run_folder import RunFolder
    from orpo_lite.trainer.trainer import ORPOTrainer

PACKAGES = ("orpo-lite", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes")
FEW = 20
"""Held-out pairs below which an accuracy is known to 20 points at best."""


def resolved(
    recipe: Recipe,
    pairs: Pairs,
    facts: BaseFacts,
    trainer: ORPOTrainer,
    checkpointing: int | None,
    folder: RunFolder | None,
) -> None:
    """Print every derived number before anything is spent."""
    args = trainer.args
    steps, batch = total_steps(trainer), effective_batch(trainer)
    trainable, total = trainable_share(trainer.model)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")

    def row(name: str, value: Any) -> None:
        table.add_row(name, escape(str(value)))

    row("recipe", f"{recipe.name}: {recipe.description}" if recipe.description else recipe.name)
    row(
        "run folder",
        "none: dry run"
        if folder is None
        else f"{folder.path}" + (f" (going on from {folder.checkpoint.name})" if folder.checkpoint else ""),
    )
    for note in folder.notes if folder else ():
        row("", note)
    for i, sentence in enumerate(facts.sentences):
        row("" if i else "base model", sentence.removeprefix("base: "))
    row("adapter", describe_adapter(recipe))
    row("trainable", f"{trainable:,} of {total:,} parameters ({trainable / total:.2%})")
    row("data", f"{len(pairs.train):,} training pairs, {len(pairs.eval) if pairs.eval is not None else 0:,} held out")
    for line in str(pairs.report).splitlines():
        row("", line)
    row("layout", f"{trainer.layout.name}: {trainer.layout.why}")
    row(
        "loss",
        f"beta {recipe.orpo.beta:g}, NLL over {recipe.orpo.nll_scope}, means over the {'optimizer step' if recipe.orpo.nll_mean == 'window' else 'micro-batch'}",
    )
    row(
        "batch",
        f"{batch} pairs a step, in micro-batches of at most {args.tokens_per_batch:,} tokens, on {args.world_size} processes"
        if args.tokens_per_batch
        else f"{batch // args.world_size // trainer.accumulation_steps} pairs x {trainer.accumulation_steps} accumulation x {args.world_size} processes = {batch} pairs a step",
    )
    if args.world_size > 1:
        joined = world(trainer.accelerator)
        row(
            "processes",
            f"{joined['processes']} by {joined['strategy']} over {joined['backend']}, {joined['processes_per_node']} on each of {joined['nodes']} machines, "
            "each step's pairs dealt by their cost",
        )
    row(
        "steps",
        f"{steps:,} ({steps / math.ceil(max(1, len(pairs.train)) / batch):.2f} epochs), learning rate {args.learning_rate:g}, {name_of(args.lr_scheduler_type)} schedule, {name_of(args.optim)}",
    )
    row("checkpointing", {None: "all layers", 0: "off"}.get(checkpointing, f"first {checkpointing} layers"))
    console.print(table)
    held = len(pairs.eval) if pairs.eval is not None else 0
    if WITHOUT_TEMPLATE in pairs.report.notes:
        warn(WITHOUT_TEMPLATE)
    if 0 < held < FEW:
        pairs_held = "pair is" if held == 1 else "pairs are"
        warn(
            f"{held} held-out {pairs_held} too few to tell a change from chance: raise data.eval_fraction, or name a file in data.eval"
        )


def warn(text: str) -> None:
    console.print(f"[bold yellow]warning:[/] {escape(text)}", soft_wrap=True)


def name_of(value: Any) -> str:
    return str(getattr(value, "value", value))


def describe_adapter(recipe: Recipe) -> str:
    a = recipe.adapter
    if a is None:
        return "none: full fine-tuning"
    if a.init_from:
        return f"going on from {a.init_from}"
    kind = "DoRA" if a.use_dora else "rsLoRA" if a.use_rslora else "LoRA"
    init = "" if a.init_lora_weights is True else f", init {a.init_lora_weights}"
    plus = f", LoRA+ ratio {a.loraplus_lr_ratio:g}" if a.loraplus_lr_ratio else ""
    return f"{kind}, r={a.r}, alpha={a.alpha:g}, on {a.target_modules}{init}{plus}"


def effective_batch(trainer: ORPOTrainer) -> int:
    args = trainer.args
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def total_steps(trainer: ORPOTrainer) -> int:
    """Optimizer steps of the run."""
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    micro = math.ceil(len(trainer.train_dataset) / (args.per_device_train_batch_size * args.world_size))  # type: ignore[arg-type]
    return math.ceil(math.ceil(micro / args.gradient_accumulation_steps) * args.num_train_epochs)


def first_step(trainer: ORPOTrainer) -> None:
    """Forward and backward of the first optimizer step, and no step: what a dry run ends with."""
    trainer.model.train()
    batches, totals = trainer.get_batch_samples(
        iter(trainer.get_train_dataloader()), trainer.args.gradient_accumulation_steps, trainer.args.device
    )
    loss = 0.0
    for batch in batches:
        loss += trainer.training_step(trainer.model, batch, totals).item()
    trainer.model.zero_grad()
    peak = peak_memory_bytes(trainer.args.device) / 1e9
    console.print(f"dry run: the first step's loss is {loss:.4f}, peak memory {peak:.2f} GB; nothing was written")


def record(recipe: Recipe, pairs: Pairs, facts: BaseFacts, trainer: ORPOTrainer) -> dict[str, Any]:
    """The part of run.json that is known without training."""
    device = trainer.args.device
    trainable, total = trainable_share(trainer.model)
    return {
        "name": recipe.name,
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)",
        "processes": trainer.args.world_size,
        "world": world(trainer.accelerator),
        "seed": trainer.args.seed,
        "base_model": {
            "name_or_path": recipe.model.name_or_path,
            "revision": recipe.model.revision,
            "commit": facts.revision,
            "hub_id": hub_id(recipe.model.name_or_path),
            "licence": find_licence(recipe.model.name_or_path, facts.revision or recipe.model.revision),
            "quantization": facts.quantization,
            "dtype": str(facts.precision.dtype).removeprefix("torch."),
            "facts": facts.sentences,
        },
        "data": {
            "fingerprint": pairs.fingerprint,
            "sources": pairs.shapes,
            "train_pairs": len(pairs.train),
            "eval_pairs": len(pairs.eval) if pairs.eval is not None else 0,
            "drops": pairs.report.as_dict(),
            "lengths": length_histograms(pairs),
        },
        "probe": probe_rows(pairs),
        "layout": trainer.layout._asdict(),
        "parameters": {"trainable": trainable, "total": total},
        "effective_batch": effective_batch(trainer),
    }


def probe_rows(pairs: Pairs) -> list[list[int]]:
    """Where the chosen answers of a few training rows begin, for a later merge to compare models on.

    A few tokens of the prompt and some of the answer; run.json is never published.
    """
    found: list[list[int]] = []
    row: Any
    for row in itertools.islice(pairs.train, 3):
        ids, start = row["chosen_ids"], row.get("chosen_start", 0)
        found.append(list(ids)[max(0, min(start - 4, len(ids) - 16)) :][:32])
    return [row for row in found if len(row) >= 4]


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def which_adapter(trainer: ORPOTrainer) -> str:
    """Whether the weights left in the run folder are the last or the best by evaluation."""
    best = trainer.state.best_model_checkpoint
    if trainer.args.load_best_model_at_end and best:
        return f"best by {trainer.args.metric_for_best_model}: {trainer.state.best_metric:.4f} at step {trainer.state.best_global_step}"
    return f"last, step {trainer.state.global_step}"


def memory(made: Plan | None, device: torch.device) -> dict[str, Any] | None:
    """What run.json says of memory: the plan and, on CUDA, what torch measured; `error` is (planned - measured) / measured."""
    record = made.as_dict() if made else {}
    if device.type != "cuda":
        return record or None
    measured = {
        "allocated_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
    }
    allocated, error = measured["allocated_bytes"], None
    line = f"memory: measured {allocated / 1e9:.2f} GB in tensors at most, {measured['reserved_bytes'] / 1e9:.2f} GB reserved"
    if made and allocated:
        error = made.peak / allocated - 1
        line += f"; planned {made.peak / 1e9:.2f} GB, {error:+.1%}"
    console.print(line)
    return record | {"measured": measured, "error": error}


def stopped(folder: RunFolder, why: BaseException, step: int) -> None:
    """Where an unfinished run stands, and how to go on with it."""
    left, _ = newest_good(folder.checkpoints)
    say = "no checkpoint was written yet"
    if left is not None:
        say = f"{left.name} is kept; go on with the same command, or with --recipe {folder.path} --resume"
        if isinstance(why, OutOfMemory):
            say += ", which takes other settings of memory (memory.*, orpo.tokens_per_batch) with it"
        if isinstance(why, NonFinite):
            say += ", which meets the same step again unless something is changed: training.on_nonfinite=skip leaves it out"
    errors.print(f"\nstopped at step {step}: {escape(say)}", soft_wrap=True)


def finished(folder: RunFolder, facts: dict[str, Any]) -> None:
    """Results, sample answers, and what to type next."""
    before, after = facts["eval"]["before"], facts["eval"]["after"]
    console.print()
    if before and after:
        show({"before": before, "after": after})
    old, new = facts["rule"]["before"], facts["rule"]["after"]
    if old and new:
        count = len(facts["samples"]["after"])
        console.print(
            f"greedy answers in the chosen style: {old['chosen']:.0%} before, {new['chosen']:.0%} after ({count} held-out prompts)"
        )
    for first, last in list(zip(facts["samples"]["before"], facts["samples"]["after"], strict=True))[:3]:
        console.print(f"\n[dim]{escape(first['prompt'][-300:])}[/]")
        console.print(f"  [bold]before[/] {escape(first['answer'][:300])}")
        console.print(f"  [bold]after [/] {escape(last['answer'][:300])}")
    said = [f"{one['kind']} (step {one['step']})" for one in facts["warnings"]]
    counts = {"steps left out, not finite": len(facts["skipped_steps"]), "fp16 overflows": facts["overflow_steps"]}
    said += [f"{count} {what}" for what, count in counts.items() if count]
    if said:
        console.print(f"\n[bold]warnings during training:[/] {', '.join(said)}; run.json has them in full")
    console.print(
        f"\n{facts['steps']} steps in {facts['train_seconds']:.0f} s ({facts['pairs_per_second']:.1f} pairs/s), peak memory "
        f"{facts['peak_memory_bytes'] / 1e9:.2f} GB {held_by(facts)}. {folder.path} holds the adapter ({facts['adapter']}).\nNext:",
        markup=False,
    )
    merged = folder.path.with_name(f"{folder.path.name}-merged")
    console.print(
        f"  open {folder.path / 'report.html'} in a browser\n  python -m orpo_lite.evaluate {folder.path}\n  python -m orpo_lite.merge {folder.path} --output {merged}",
        soft_wrap=True,
        markup=False,
    )
