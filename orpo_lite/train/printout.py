"""What a run prints: the resolved numbers before it starts, where it stands if it is stopped, its results."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch.distributed
from rich.markup import escape

from orpo_lite.common.console import console, errors, peak_memory_bytes
from orpo_lite.common.text import at_words, counted, duration, format_gb, next_command
from orpo_lite.data.dropped_rows import WITHOUT_TEMPLATE
from orpo_lite.evaluate.held_out import show, too_few
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

SHOWN = ("rewards/accuracies", "rewards/margins", "nll_loss")
"""Metrics that a run prints; run.json has all."""


def print_plan_of_run(
    recipe: Recipe,
    pairs: Pairs,
    base: BaseFacts,
    trainer: ORPOTrainer,
    checkpointing: int | None,
    folder: RunFolder | None,
    verbose: bool,
) -> None:
    """Print what a run does before anything is spent; if `verbose`, every derived number."""
    trainable, total = trainable_share(trainer.model)
    held_out = len(pairs.eval) if pairs.eval is not None else 0
    means = "the optimizer step" if recipe.orpo.nll_mean == "window" else "the micro-batch"
    kept, *remarks = (line.strip() for line in str(pairs.report).splitlines())
    model, *loaded = (line.removeprefix("base: ") for line in base.sentences)
    template = [WITHOUT_TEMPLATE] if WITHOUT_TEMPLATE in pairs.report.notes else []
    targets = f" on {recipe.adapter.target_modules}" if recipe.adapter and not recipe.adapter.init_from else ""
    rows = [
        ("recipe", recipe.name),
        ("run folder", describe_folder(folder)),
        *(("", note) for note in (folder.notes if folder else ())),
        ("base model", model.partition(";")[0]),
        ("adapter", f"{describe_adapter(recipe.adapter)}{targets}: {trainable:,} parameters"),
        ("data", f"{counted(len(pairs.train), 'training pair')}, {held_out:,} held out"),
        *(("", line) for line in [kept, *remarks] if remarks and WITHOUT_TEMPLATE not in line),
        ("steps", describe_steps(trainer, len(pairs.train))),
        ("layout", f"{trainer.layout.name}: {trainer.layout.why.rpartition('; ')[2]}"),
        *([("batch", describe_batch(trainer))] if verbose or trainer.args.world_size > 1 else ()),
    ]
    if verbose:
        schedule, optimizer = (
            str(getattr(one, "value", one)) for one in (trainer.args.lr_scheduler_type, trainer.args.optim)
        )
        rows += [
            *(("loaded", line) for line in (model, *loaded)),
            ("trainable", f"{trainable:,} of {total:,} parameters ({trainable / total:.2%})"),
            ("rows", kept),
            ("exact", trainer.layout.why),
            ("kernels", trainer.kernels),
            ("loss", f"beta {recipe.orpo.beta:g}, NLL over {recipe.orpo.nll_scope}, means over {means}"),
            ("optimizer", f"{optimizer}, {schedule} schedule"),
            ("checkpointing", {None: "all layers", 0: "off"}.get(checkpointing, f"first {checkpointing} layers")),
        ]
    indent = " " * (2 + max(len(name) for name, _ in rows))
    for name, value in rows:
        text = at_words(str(value), indent, console.width)
        console.print(f"[bold]{name:<{len(indent)}}[/]{escape(text[len(indent) :])}", soft_wrap=True)
    for text in [*template, *filter(None, [too_few(held_out)])]:
        warn(text)


def warn(text: str) -> None:
    """Print a warning."""
    console.print(f"[bold yellow]warning:[/] {escape(text)}")


def describe_folder(folder: RunFolder | None) -> str:
    """Name the run folder, and the checkpoint that the run resumes from."""
    if folder is None:
        return "none: dry run"
    return f"{folder.path}" + (f" (resuming from {folder.checkpoint.name})" if folder.checkpoint else "")


def describe_batch(trainer: ORPOTrainer) -> str:
    """Describe how the pairs of an optimizer step are split."""
    args, accumulation = trainer.args, trainer.accumulation_steps
    on = counted(args.world_size, "process")
    if args.world_size > 1:
        on += f" by ddp over {torch.distributed.get_backend()}, the pairs of each step distributed by cost"
    if args.tokens_per_batch:
        return f"micro-batches of at most {counted(args.tokens_per_batch, 'token')}, on {on}"
    each = trainer.get_total_train_batch_size(args) // args.world_size // accumulation
    return f"{counted(each, 'pair')} x {accumulation} accumulation x {on}"


def describe_steps(trainer: ORPOTrainer, pairs: int) -> str:
    """Describe steps, epochs and learning rate."""
    steps, batch = total_steps(trainer), trainer.get_total_train_batch_size(trainer.args)
    epochs = steps / math.ceil(max(1, pairs) / batch)
    each = counted(batch, "pair")
    return f"{steps:,} of {each} ({epochs:.2f} epochs), learning rate {trainer.args.learning_rate:g}"


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
    """Print results, a sample answer, and what to type next."""
    before, after = record.evaluation("before"), record.evaluation("after")
    first, last = record.samples["before"], record.samples["after"]
    styles = [f"{rule['chosen']:.0%}" for when in ("before", "after") if (rule := record.rule.get(when))]
    console.print()
    if before and after:
        show({"before": before, "after": after}, SHOWN, **{"answers in the chosen style": styles} if styles[1:] else {})
    two = zip(first, last, strict=False)
    for one, other in sorted(two, key=lambda pair: pair[0].answer == pair[1].answer)[:1]:
        console.print(f"[dim]{escape(brief(one.prompt[-300:]))}[/]")
        console.print(f"  [bold]before[/] {escape(brief(one.answer))}\n  [bold]after [/] {escape(brief(other.answer))}")
    found = [f"{one.kind} (step {one.step})" for one in record.warnings]
    if record.overflow_steps:
        found.append(counted(record.overflow_steps, "fp16 overflow"))
    if found:
        console.print(f"[bold]warnings during training:[/] {', '.join(found)}; run.json has them in full")
    console.print(
        f"{counted(record.steps or 0, 'step')} in {duration(record.train_seconds or 0)} ({record.pairs_per_second or 0:.1f} "
        f"pairs/s), peak memory {format_gb(record.peak_memory_bytes or 0, 2)} {record.held_by.partition(',')[0]}"
    )
    merged = folder.path.with_name(f"{folder.path.name}-merged")
    console.print(
        f"{folder.path}: the adapter ({record.adapter}) and report.html\nnext:\n  {next_command('chat', folder.path)}\n"
        f"  {next_command('merge', folder.path, '--output', merged)}",
        soft_wrap=True,
        markup=False,
    )


def brief(text: str) -> str:
    """Return the beginning of a text in one line."""
    return " ".join(text.split())[:150] or "(ended at once)"
