"""What a run measures of its model before and after training, and what a finished run folder consists of."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

from orpo_lite import announce
from orpo_lite.card import write_card
from orpo_lite.data import Pairs
from orpo_lite.evaluate import evaluate
from orpo_lite.generate import answer
from orpo_lite.model import autocast, save_adapter
from orpo_lite.outofmemory import named
from orpo_lite.recipe import Recipe
from orpo_lite.report import write_report
from orpo_lite.runfolder import RunFolder
from orpo_lite.trainer import ORPOTrainer
from orpo_lite.writing import check_mounted, disk_trouble, write_whole


def held_out(
    recipe: Recipe, trainer: ORPOTrainer, pairs: Pairs, tokenizer: Any
) -> tuple[dict[str, Any] | None, list[dict[str, str]]]:
    """Metrics and sample answers of the model as it stands."""
    if pairs.eval is None:
        return None, []
    model = trainer.unwrapped()
    with named("evaluating"):
        metrics = evaluate(trainer)
    with (
        named("answering held-out prompts", "set a smaller evaluation.max_new_tokens or evaluation.samples"),
        autocast(model),
    ):
        samples = answer(model, tokenizer, pairs.eval, recipe.evaluation.samples, recipe.evaluation.max_new_tokens)
    return metrics, samples


def before_training(
    folder: RunFolder, recipe: Recipe, trainer: ORPOTrainer, pairs: Pairs, tokenizer: Any
) -> tuple[dict[str, Any] | None, list[dict[str, str]]]:
    """`held_out` of the base, kept in the run folder for a run that goes on."""
    asked = recipe.evaluation.model_dump(mode="json")
    if folder.checkpoint is not None and (kept := folder.read_before()) and kept.get("asked") == asked:
        return kept["eval"], kept["samples"]
    before, samples = held_out(recipe, trainer, pairs, tokenizer)
    if trainer.is_world_process_zero():
        with contextlib.suppress(OSError):  # it can be made again
            write_whole(folder.before, json.dumps({"asked": asked, "eval": before, "samples": samples}))
    return before, samples


def finish(folder: RunFolder, record: dict[str, Any], trainer: ORPOTrainer, tokenizer: Any, disk: int) -> None:
    """Write what a finished run consists of; where its folder cannot be written, the adapter to a temporary one.

    Args:
        disk: the file system that the folder was on when training began.

    Raises:
        OSError: the folder cannot be written; the message says where the adapter is.
    """
    model = trainer.unwrapped()

    def weights(path: Path) -> None:
        save_adapter(model, path)
        tokenizer.save_pretrained(path)

    try:
        check_mounted(folder.path, disk)
        weights(folder.path)
        folder.write(record | {"finished": False})
        write_report(folder)
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
