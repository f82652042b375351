"""What a run prints: the resolved numbers before it starts, where it stands if it is stopped, its results."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch.distributed
from rich.markup import escape
from rich.table import Table

from orpo_lite.common.console import console, errors, peak_memory_bytes
from orpo_lite.common.text import duration, format_gb
from orpo_lite.data.dropped_rows import WITHOUT_TEMPLATE
from orpo_lite.evaluate.held_out import show
from orpo_lite.model import BaseFacts, trainable_share
from orpo_lite.trainer.checkpoint_folder import newest_good
from orpo_lite.trainer.health import NonFinite
from orpo_lite.trainer.interruptions import OutOfMemory
from orpo_lite.trainer.run_record import RunRecord, describe_adapter

if TYPE_CHECKING:
    from orpo_lite.data import Pairs
    from orpo_lite.recipe import Recipe
    from orpo_lite.trainer.run_folder import RunFolder
    from orpo_lite.trainer.trainer import ORPOTrainer

FEW = 20
"""Held-out pairs below which an accuracy is known to 20 points at best."""


def print_plan_of_run(
    recipe: Recipe,
    pairs: Pairs,
    base: BaseFacts,
    trainer: ORPOTrainer,
    checkpointing: int | None,
    folder: RunFolder | None,
) -> None:
    """Print every derived number before anything is spent."""
    trainable, total = trainable_share(trainer.model)
    held_out = len(pairs.eval) if pairs.eval is not None else 0
    means = "the optimizer step" if recipe.orpo.nll_mean == "window" else "the micro-batch"
    rows = [
        ("recipe", f"{recipe.name}: {recipe.description}" if recipe.description else recipe.name),
        ("run folder", describe_folder(folder)),
        *[("", note) for note in (folder.notes if folder else ())],
        *[("" if n else "base model", line.removeprefix("base: ")) for n, line in enumerate(base.sentences)],
        ("adapter", describe_adapter(recipe.adapter)),
        ("trainable", f"{trainable:,} of {total:,} parameters ({trainable / total:.2%})"),
        ("data", f"{len(pairs.train):,} training pairs, {held_out:,} held out"),
        *[("", line) for line in str(pairs.report).splitlines()],
        ("layout", f"{trainer.layout.name}: {trainer.layout.why}"),
        ("kernels", trainer.kernels),
        ("loss", f"beta {recipe.orpo.beta:g}, NLL over {recipe.orpo.nll_scope}, means over {means}"),
        ("batch", describe_batch(trainer)),
        *describe_processes(trainer),
        ("steps", describe_steps(trainer, len(pairs.train))),
        ("checkpointing", {None: "all layers", 0: "off"}.get(checkpointing, f"first {checkpointing} layers")),
    ]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    for name, value in rows:
        table.add_row(name, escape(str(value)))
    console.print(table)
    if WITHOUT_TEMPLATE in pairs.report.notes:
        warn(WITHOUT_TEMPLATE)
    if 0 < held_out < FEW:
        are = "pair is" if held_out == 1 else "pairs are"
        warn(f"{held_out} held-out {are} too few to tell a change from chance: raise data.eval_fraction, or name a file in data.eval")  # fmt: skip


def warn(text: str) -> None:
    """Print a warning."""
    console.print(f"[bold yellow]warning:[/] {escape(text)}", soft_wrap=True)


def describe_folder(folder: RunFolder | None) -> str:
    """Name the run folder, and the checkpoint that the run resumes from."""
    if folder is None:
        return "none: dry run"
    return f"{folder.path}" + (f" (resuming from {folder.checkpoint.name})" if folder.checkpoint else "")


def describe_batch(trainer: ORPOTrainer) -> str:
    """Describe how many pairs an optimizer step takes, and how they are split."""
    args, accumulation = trainer.args, trainer.accumulation_steps
    batch = trainer.get_total_train_batch_size(args)
    if args.tokens_per_batch:
        return f"{batch} pairs a step, in micro-batches of at most {args.tokens_per_batch:,} tokens, on {args.world_size} processes"  # fmt: skip
    each = batch // args.world_size // accumulation
    return f"{each} pairs x {accumulation} accumulation x {args.world_size} processes = {batch} pairs a step"


def describe_processes(trainer: ORPOTrainer) -> list[tuple[str, str]]:
    """Describe the processes of a run, if there are several."""
    if trainer.args.world_size == 1:
        return []
    how = f"{trainer.args.world_size} by ddp over {torch.distributed.get_backend()}"
    return [("processes", f"{how}, the pairs of each step distributed by cost")]


def describe_steps(trainer: ORPOTrainer, pairs: int) -> str:
    """Describe steps, epochs, learning rate and optimizer."""
    args, steps = trainer.args, total_steps(trainer)
    epochs = steps / math.ceil(max(1, pairs) / trainer.get_total_train_batch_size(args))
    schedule, optimizer = (str(getattr(one, "value", one)) for one in (args.lr_scheduler_type, args.optim))
    return f"{steps:,} ({epochs:.2f} epochs), learning rate {args.learning_rate:g}, {schedule} schedule, {optimizer}"


def total_steps(trainer: ORPOTrainer) -> int:
    """Return the optimizer steps of the run."""
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    micro = math.ceil(len(trainer.train_dataset) / (args.per_device_train_batch_size * args.world_size))  # type: ignore[arg-type]
    return math.ceil(math.ceil(micro / args.gradient_accumulation_steps) * args.num_train_epochs)


def dry_run_step(trainer: ORPOTrainer) -> None:
    """Run forward and backward of the first optimizer step, without the step, and print the loss and peak memory."""
    trainer.model.train()
    batches, totals = trainer.get_batch_samples(
        iter(trainer.get_train_dataloader()), trainer.args.gradient_accumulation_steps, trainer.args.device
    )
    loss = sum(trainer.training_step(trainer.model, batch, totals).item() for batch in batches)
    trainer.model.zero_grad()
    peak = format_gb(peak_memory_bytes(trainer.args.device), 2)
    console.print(f"dry run: the first step's loss is {loss:.4f}, peak memory {peak}; nothing was written")


def print_stopped(folder: RunFolder, why: BaseException, step: int) -> None:
    """Print where an unfinished run stands, and how to resume it."""
    left, _ = newest_good(folder.checkpoints)
    say = "no checkpoint was written yet"
    if left is not None:
        say = f"{left.name} is kept; resume with the same command, or with --recipe {folder.path} --resume"
        if isinstance(why, OutOfMemory):
            say += ", which may change the memory settings (memory.*, orpo.tokens_per_batch)"
        if isinstance(why, NonFinite):
            say += ", which reaches the same step again unless something is changed: training.learning_rate, with --resume=force"
    errors.print(f"\nstopped at step {step}: {escape(say)}", soft_wrap=True)


def print_finished(folder: RunFolder, record: RunRecord) -> None:
    """Print results, sample answers, and what to type next."""
    before, after = record.evaluation("before"), record.evaluation("after")
    console.print()
    if before and after:
        show({"before": before, "after": after})
    first, last = record.samples["before"], record.samples["after"]
    old, new = record.rule["before"], record.rule["after"]
    if old and new:
        count = f"{len(last)} held-out prompts"
        console.print(
            f"greedy answers in the chosen style: {old['chosen']:.0%} before, {new['chosen']:.0%} after ({count})"
        )
    for one, other in list(zip(first, last, strict=True))[:3]:
        console.print(f"\n[dim]{escape(one.prompt[-300:])}[/]")
        console.print(f"  [bold]before[/] {escape(one.answer[:300])}")
        console.print(f"  [bold]after [/] {escape(other.answer[:300])}")
    found = [f"{one.kind} (step {one.step})" for one in record.warnings]
    if record.overflow_steps:
        found.append(f"{record.overflow_steps} fp16 overflows")
    if found:
        console.print(f"\n[bold]warnings during training:[/] {', '.join(found)}; run.json has them in full")
    peak, merged = format_gb(record.peak_memory_bytes or 0, 2), folder.path.with_name(f"{folder.path.name}-merged")
    console.print(
        f"\n{record.steps} steps in {duration(record.train_seconds or 0)} ({record.pairs_per_second or 0:.1f} pairs/s), peak memory "
        f"{peak} {record.held_by}. {folder.path} holds the adapter ({record.adapter}).\nNext:",
        markup=False,
    )
    console.print(
        f"  open {folder.path / 'report.html'} in a browser\n  python -m orpo_lite.evaluate {folder.path}\n"
        f"  python -m orpo_lite.merge {folder.path} --output {merged}",
        soft_wrap=True,
        markup=False,
    )
