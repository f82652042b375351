"""What a run measures of its model before and after training, and what a finished run folder consists of."""

from __future__ import annotations

import contextlib
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from orpo_lite.common.console import console
from orpo_lite.common.files import check_mounted, disk_trouble, write_atomically
from orpo_lite.data import Pairs
from orpo_lite.evaluate.held_out import evaluate, rule_shares
from orpo_lite.model import autocast, save_adapter
from orpo_lite.objective.metrics import COLUMNS
from orpo_lite.recipe import Recipe
from orpo_lite.report import write_report
from orpo_lite.report.model_card import write_card
from orpo_lite.report.run_record import RunRecord
from orpo_lite.train import printout as announce
from orpo_lite.trainer.distributed import sharded
from orpo_lite.trainer.generate import answer, score_answers
from orpo_lite.trainer.out_of_memory import named
from orpo_lite.trainer.run_folder import RunFolder
from orpo_lite.trainer.trainer import ORPOTrainer


@dataclass
class HeldOut:
    """What a model makes of the held-out pairs."""

    metrics: dict[str, Any] | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)
    """Greedy answers: prompt, answer, tokens, and its mean log-prob and log-odds under the model that gave it."""
    pairs: dict[str, list[float]] = field(default_factory=dict)
    """logps/chosen and logps/rejected of every pair, in the order of evaluation, which is the same each time."""


def held_out(
    recipe: Recipe, trainer: ORPOTrainer, pairs: Pairs, tokenizer: Any, before: HeldOut | None = None
) -> HeldOut:
    """Metrics, sample answers and every pair of the model as it stands.

    Args:
        before: of the model before training, whose answers are scored once more: logp_trained, log_odds_trained.
    """
    if pairs.eval is None:
        return HeldOut()
    model = trainer.unwrapped()
    if trainer.is_world_process_zero():
        count = min(recipe.evaluation.samples, len(pairs.eval))
        answers = f", {count:,} answers of at most {recipe.evaluation.max_new_tokens:,} tokens" if count else ""
        console.print(f"measuring the {'adapter' if before else 'base'}: {len(pairs.eval):,} held-out pairs{answers}")
    with named("evaluating"):
        metrics = evaluate(trainer)
    places = {name: COLUMNS.index(name) for name in ("logps/chosen", "logps/rejected")}
    # six digits: more than float32 has in it to tell apart
    each = {name: [float(f"{p:.6g}") for p in trainer.predictions[:, i].tolist()] for name, i in places.items()}
    with (
        named("answering held-out prompts", "set a smaller evaluation.max_new_tokens or evaluation.samples"),
        autocast(model),
    ):
        samples = answer_shared(trainer, model, tokenizer, pairs.eval, recipe)
        score_answers(trainer, pairs.eval, samples, before.samples if before else [])
    return HeldOut(metrics, samples, each)


def answer_shared(trainer: ORPOTrainer, model: Any, tokenizer: Any, pairs: Any, recipe: Recipe) -> list[dict[str, Any]]:
    """Answers to the first held-out prompts, each process its share; all together where they share the weights."""
    count, longest = min(recipe.evaluation.samples, len(pairs)), recipe.evaluation.max_new_tokens
    processes, mine = trainer.args.world_size, trainer.args.process_index
    if processes == 1 or sharded(trainer.model):
        return answer(model, tokenizer, pairs, count, longest)
    share = range(mine, count, processes)
    parts = gather_object([answer(model, tokenizer, pairs.select(share), len(share), longest)])
    return [parts[i % processes][i // processes] for i in range(count)]


def before_training(folder: RunFolder, recipe: Recipe, trainer: ORPOTrainer, pairs: Pairs, tokenizer: Any) -> HeldOut:
    """`held_out` of the base, kept in the run folder for a run that goes on."""
    asked = recipe.evaluation.model_dump(mode="json")
    if folder.checkpoint is not None and (kept := folder.read_before()) and kept.get("asked") == asked:
        return HeldOut(kept["eval"], kept["samples"], kept.get("pairs", {}))
    before = held_out(recipe, trainer, pairs, tokenizer)
    if trainer.is_world_process_zero():
        known = {"asked": asked, "eval": before.metrics, "samples": before.samples, "pairs": before.pairs}
        with contextlib.suppress(OSError):  # it can be made again
            write_atomically(folder.before, json.dumps(known))
    return before


def record_of(before: HeldOut, after: HeldOut, recipe: Recipe) -> dict[str, Any]:
    """Return the part of run.json on held-out pairs."""
    both = {"before": before, "after": after}
    return {
        "eval": {when: one.metrics for when, one in both.items()},
        "samples": {
            when: [{k: v for k, v in s.items() if k != "ids"} for s in one.samples] for when, one in both.items()
        },
        "rule": {when: rule_shares(one.samples, recipe.evaluation.rule) for when, one in both.items()},
    }


def finish(
    folder: RunFolder,
    record: dict[str, Any],
    trainer: ORPOTrainer,
    tokenizer: Any,
    disk: int,
    pairs: dict[str, Any],
    whole: Any = None,
) -> None:
    """Write what a finished run consists of; where its folder cannot be written, the adapter to a temporary one.

    Args:
        disk: the file system that the folder was on when training began.
        pairs: every held-out pair before and after, for held_out.json.
        whole: the trainer's `whole_weights`.

    Raises:
        OSError: the folder cannot be written; the message says where the adapter is.
    """
    notes: list[str] = []
    record = RunRecord.of(record, notes).model_dump()
    for note in notes:
        console.print(note, soft_wrap=True, markup=False)
    model = trainer.unwrapped()

    def weights(path: Path) -> None:
        save_adapter(model, path, whole)
        tokenizer.save_pretrained(path)

    try:
        check_mounted(folder.path, disk)
        weights(folder.path)
        folder.write(record | {"finished": False})
        if pairs["before"] and pairs["after"]:
            write_atomically(folder.path / "held_out.json", json.dumps(pairs | {"beta": trainer.args.beta}))
        report(folder)
        write_card(folder)
        folder.write(record)
        folder.before.unlink(missing_ok=True)
    except Exception as error:
        if not (trouble := disk_trouble(error)):
            raise
        rescue = Path(tempfile.mkdtemp(prefix="orpo_lite-"))
        weights(rescue)
        raise OSError(
            f"{folder.path} cannot be written ({trouble}): training is done, and the adapter is in {rescue}; copy it, or make "
            f"room and run again with --recipe {folder.path} --resume"
        ) from None
    announce.finished(folder, record)


def report(folder: RunFolder) -> None:
    """Write report.html; one that cannot be made is said and is no reason to fail a run."""
    try:
        write_report(folder)
    except Exception as error:
        if disk_trouble(error):
            raise
        console.print(f"report.html could not be made: {type(error).__name__}: {error}", markup=False)
