"""One run, from recipe to finished run folder: `run` reads from top to bottom in the order of the data flow."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import PrinterCallback
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from orpo_lite.common.console import console, progress
from orpo_lite.common.errors import ReportedElsewhere, RequestError
from orpo_lite.data import Pairs, load_pairs
from orpo_lite.model import BaseFacts, attach_adapter, load_base, load_tokenizer
from orpo_lite.model.activation_offload import check_count, checkpointing_layers
from orpo_lite.model.base import local_device
from orpo_lite.model.tokenizer import check_variables
from orpo_lite.recipe import Recipe
from orpo_lite.train import printout
from orpo_lite.train.results import finish, measure_before, measure_held_out, record_of, rescued, save_weights
from orpo_lite.trainer import distributed
from orpo_lite.trainer.callbacks import Figures, MetricsFile, check_trackers
from orpo_lite.trainer.config_from_recipe import DEFAULTS, arguments, checkpointed, field_named
from orpo_lite.trainer.health import NonFinite
from orpo_lite.trainer.interruptions import OutOfMemory, named
from orpo_lite.trainer.run_folder import Resume, RunFolder, check_tokens_have_rows
from orpo_lite.trainer.run_record import RunRecord
from orpo_lite.trainer.trainer import ORPOTrainer

if TYPE_CHECKING:
    from orpo_lite.plan.predict import Plan


@dataclass
class Run:
    """A finished run: its folder and the content of its run.json."""

    folder: Path
    record: RunRecord


def run(
    recipe: Recipe,
    *,
    dry_run: bool = False,
    resume: Resume = False,
    plan: bool = False,
    force: bool = False,
    again: str = "",
    verbose: bool = False,
    base_figures: Path | None = None,
) -> Run | None:
    """Train what the recipe says and write the run folder.

    Args:
        dry_run: stop before the first optimizer step, and write nothing.
        resume: resume from the folder's newest good checkpoint, and never start over; "force": in spite of changes.
        plan: predict the memory on the CPU as well; on a GPU it always is.
        force: start even what cannot fit the GPU.
        again: the command line that asked for this run, for messages that say what to type next.
        verbose: print every derived number.
        base_figures: folder with what other runs have measured before training, see `measure_before`.

    Returns:
        The finished run, or None after a dry run.

    Raises:
        RequestError: the recipe, its data or its model cannot be used as they are, or cannot fit the GPU.
        OutOfMemory: memory ran out in a way that smaller micro-batches do not help.
        Stopped: a signal asked for the end; the run can be resumed.
    """
    started = time.monotonic()
    check_trackers(recipe.training.get("report_to"))
    recipe = recipe.model_copy(update={"training": DEFAULTS | recipe.training})
    tokenizer = load_tokenizer(recipe.model, recipe.adapter and recipe.adapter.init_from)
    check_variables(tokenizer, recipe.data.template_kwargs, "data.template_kwargs")
    pairs = load_pairs(recipe.data, tokenizer)
    asked = recipe
    recipe, planned = plan_memory(recipe, pairs, plan, force, again)
    torch.manual_seed(recipe.training["seed"])  # a new adapter's weights are random
    model, base, checkpointing = load_model(recipe, tokenizer)
    if base.quantization == "none":  # where bitsandbytes is missing, whatever the recipe asked for
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"quantization": "none"})})
    distributed.init_process_group(recipe.training.get("ddp_timeout", 1800), bool(recipe.training.get("use_cpu")))

    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        args = arguments(recipe, scratch, base, has_eval=pairs.eval is not None, checkpointing=checkpointing)
        with field_named(recipe.training):
            trainer = ORPOTrainer(model, args, None, pairs.train, pairs.eval, tokenizer)
        if dry_run:
            connect(trainer, recipe, pairs, None)
            printout.print_plan_of_run(recipe, pairs, base, trainer, checkpointing, None, verbose)
            printout.dry_run_step(trainer)
            return None
        # without what was planned: resumed on another card, it is planned anew
        kept = asked.model_copy(update={"model": recipe.model})
        folder = on_first_process(lambda: RunFolder.create(kept, resume, args.world_size))
        stack.callback(folder.unlock)
        first = trainer.is_world_process_zero()
        connect(trainer, recipe, pairs, folder)
        printout.print_plan_of_run(recipe, pairs, base, trainer, checkpointing, folder, verbose)

        before = measure_before(folder, recipe, trainer, pairs, tokenizer, base, base_figures)
        outcome = train(trainer, folder)
        if first:  # before anything else can fail
            with rescued(folder, trainer, tokenizer):
                save_weights(folder.path, trainer, tokenizer)
        after = measure_held_out(recipe, trainer, pairs, tokenizer, before)

        record = record_of(recipe, pairs, base, trainer, before, after, planned, outcome.metrics)
        record.total_seconds = round(time.monotonic() - started, 3)
        if first:
            with rescued(folder, trainer, tokenizer):
                finish(folder, record, {"before": before.pairs, "after": after.pairs, "beta": trainer.args.beta})
            printout.print_finished(folder, record)
    return Run(folder.path, record)


def plan_memory(recipe: Recipe, pairs: Pairs, asked: bool, force: bool, again: str) -> tuple[Recipe, Plan | None]:
    """Fit the recipe to the card that it names and predict its memory: always on a GPU, else where asked.

    Returns:
        The recipe, and its plan if one was made.
    """
    device = local_device()
    if device.type != "cuda" and not (asked or recipe.memory.gpu_gb or recipe.plans_batches):
        return recipe, None
    from orpo_lite.plan.before_training import Lengths, plan_before_loading

    again = again or f"python -m orpo_lite.train --recipe {recipe.name}"
    return plan_before_loading(recipe, Lengths.of(pairs), device, force, again, asked)


def load_model(recipe: Recipe, tokenizer: Any) -> tuple[Any, BaseFacts, int | None]:
    """Load the base and attach the adapter.

    Returns:
        The model, facts about its base, and the number of layers that checkpoint (None: all).
    """
    with named("loading the base model"):
        base, facts = load_base(recipe.model, tokenizer)
    checkpointing = checkpointed(recipe, local_device())
    if checkpointing:
        check_count(checkpointing, len(checkpointing_layers(base)))
    model: Any = attach_adapter(base, recipe.adapter, tokenizer=tokenizer, checkpointing=checkpointing != 0)
    if recipe.adapter and recipe.adapter.init_from:
        rows = len(model.get_input_embeddings().weight)
        check_tokens_have_rows(tokenizer, rows, Path(recipe.adapter.init_from), recipe.model)
    return model, facts, checkpointing


def connect(trainer: ORPOTrainer, recipe: Recipe, pairs: Pairs, folder: RunFolder | None) -> None:
    """Tell the trainer where its files go and what its rows are called, and add the callbacks of a run."""
    trainer.remove_callback(DEFAULT_PROGRESS_CALLBACK)  # a different one in a notebook than in a terminal
    trainer.remove_callback(PrinterCallback)
    trainer.guard.sources = [name for name, one in pairs.shapes.items() if one["section"] == "train"]
    if folder is None:
        return
    trainer.args.output_dir = str(folder.checkpoints)
    # trackers see one run, also in what is measured after training, and where it is resumed
    trainer.args.run_name = trainer.args.run_name or folder.path.name
    trainer.add_callback(MetricsFile(folder.metrics, resumed=folder.checkpoint is not None))
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            # otherwise the first evaluation, before training, would be logged to the working directory
            callback.logging_dir = str(folder.path / "tensorboard")


def train(trainer: ORPOTrainer, folder: RunFolder) -> Any:
    """Train from the folder's checkpoint, if it has one, and say how to resume if training is stopped."""
    try:
        with named("training, outside of the passes over a micro-batch"), progress("training", 0) as update:
            trainer.add_callback(figures := Figures(update))
            found = trainer.train(resume_from_checkpoint=str(folder.checkpoint) if folder.checkpoint else None)
            trainer.remove_callback(figures)
            return found
    except (KeyboardInterrupt, OutOfMemory, NonFinite) as stop:
        printout.print_stopped(folder, stop, trainer.state.global_step)
        raise


def on_first_process(make: Callable[[], RunFolder]) -> RunFolder:
    """Return to every process what the first one makes; an error there ends all of them."""
    if PartialState().num_processes == 1:
        return make()
    made: Any = None
    first = PartialState().is_main_process
    if first:
        try:
            made = make()
        except RequestError as error:  # the others would wait for it
            made = error
    made = broadcast_object_list([made])[0]
    if isinstance(made, RequestError):
        raise made if first else ReportedElsewhere(str(made))
    return made


def silence_other_ranks() -> None:
    """Print nothing but errors in this process: the first one prints for all of them."""
    console.quiet = True
    logging.getLogger("orpo_lite").setLevel(logging.ERROR)
    set_verbosity_error()
    disable_progress_bar()
    warnings.simplefilter("ignore")
