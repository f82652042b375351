"""`python -m orpo_lite.train --recipe NAME [key=value ...]`: one recipe, one run folder."""

from __future__ import annotations

import contextlib
import itertools
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

from orpo_lite.common.console import console
from orpo_lite.common.errors import ReportedElsewhere, RequestError
from orpo_lite.common.files import disk_of
from orpo_lite.common.memory import peak_memory_bytes
from orpo_lite.data import Pairs, load_pairs
from orpo_lite.data.collate import PaddedCollator
from orpo_lite.model import BaseFacts, attach_adapter, initialize_eva, load_base, load_tokenizer
from orpo_lite.model.activation_offload import check_count, checkpointing_layers
from orpo_lite.model.base import local_device, read_config
from orpo_lite.recipe import Recipe
from orpo_lite.train import printout as announce
from orpo_lite.train.results import before_training, finish, held_out, record_of
from orpo_lite.trainer import distributed
from orpo_lite.trainer.callbacks import Bar, MetricsFile
from orpo_lite.trainer.config_from_recipe import DEFAULTS, arguments, checkpointed, field_named
from orpo_lite.trainer.deepspeed import zero_stage_asked
from orpo_lite.trainer.distributed import shards_by_launcher
from orpo_lite.trainer.nonfinite_report import NonFinite
from orpo_lite.trainer.out_of_memory import OutOfMemory, named
from orpo_lite.trainer.run_folder import Resume, RunFolder
from orpo_lite.trainer.trackers import SameRun, check_trackers, log_table, sample_rows
from orpo_lite.trainer.trackers import end as end_trackers
from orpo_lite.trainer.trainer import ORPOTrainer

if TYPE_CHECKING:
    from orpo_lite.plan.predict import Plan


@dataclass
class Run:
    """A finished run: its folder and run.json's content."""

    folder: Path
    facts: dict[str, Any]


def run(
    recipe: Recipe,
    *,
    dry_run: bool = False,
    resume: Resume = False,
    plan: bool = False,
    force: bool = False,
    again: str = "",
) -> Run | None:
    """Train what the recipe says and write the run folder; the whole story, in the order of the data flow.

    Args:
        dry_run: stop before the first optimizer step, and write nothing.
        resume: go on from the folder's newest good checkpoint, and never start anew; "force": in spite of changes.
        plan: predict the memory on the CPU as well; on a GPU it always is.
        force: start even what cannot fit the GPU.
        again: the command-line that asked for this run, for what it says to type next.

    Returns:
        The finished run, or None after a dry run.

    Raises:
        RequestError: the recipe, its data or its model cannot be used as they are, or cannot fit the GPU.
        OutOfMemory: memory ran out in a way that smaller micro-batches do not help.
        Stopped: a signal asked for the end; the run can be gone on with.
    """
    started = time.monotonic()
    check_trackers(recipe.training.get("report_to"))
    recipe = recipe.model_copy(update={"training": DEFAULTS | recipe.training})
    tokenizer = load_tokenizer(recipe.model)
    encoder_decoder = bool(read_config(recipe.model).is_encoder_decoder)
    pairs = load_pairs(recipe.data, tokenizer, encoder_decoder=encoder_decoder)
    recipe, planned = plan_memory(recipe, pairs, encoder_decoder, plan, force, again)
    torch.manual_seed(recipe.training["seed"])  # a new adapter's weights are random
    model, facts, checkpointing = load_model(recipe, pairs, tokenizer)
    if facts.quantization == "none":  # where bitsandbytes is missing, whatever the recipe asked for
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"quantization": "none"})})
    distributed.init_process_group(recipe.training.get("ddp_timeout", 1800), bool(recipe.training.get("use_cpu")))

    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        args = arguments(recipe, scratch, facts, has_eval=pairs.eval is not None, checkpointing=checkpointing)
        with field_named(recipe.training):
            trainer = ORPOTrainer(model, args, None, pairs.train, pairs.eval, tokenizer)
        processes = args.world_size
        folder = None if dry_run else on_first_process(lambda: RunFolder.create(recipe, resume, processes))
        if folder is not None:
            stack.callback(folder.unlock)
            disk = disk_of(folder.path)
            args.output_dir = str(folder.checkpoints)
        trainer.remove_callback(DEFAULT_PROGRESS_CALLBACK)  # in a notebook another than in a terminal
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Bar())
        trainer.add_callback(SameRun())
        trainer.guard.data, trainer.guard.folder = recipe.data, folder.path if folder else None
        trainer.guard.sources = [name for name, one in pairs.shapes.items() if one["section"] == "train"]
        announce.resolved(recipe, pairs, facts, trainer, checkpointing, folder)
        if folder is None:
            announce.first_step(trainer)
            return None
        trainer.add_callback(MetricsFile(folder.metrics, resumed=folder.checkpoint is not None))
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                # it takes the working directory for what is logged before training, such as the first evaluation
                callback.logging_dir = str(folder.path / "tensorboard")

        before = before_training(folder, recipe, trainer, pairs, tokenizer)
        try:
            with named("training, outside of the passes over a micro-batch"):
                outcome = trainer.train(resume_from_checkpoint=str(folder.checkpoint) if folder.checkpoint else None)
        except (KeyboardInterrupt, OutOfMemory, NonFinite) as stop:
            announce.stopped(folder, stop, trainer.state.global_step)
            raise
        after = held_out(recipe, trainer, pairs, tokenizer, before)
        log_table(trainer, "samples", *sample_rows(before.samples, after.samples))
        end_trackers(trainer)

        record = announce.record(recipe, pairs, facts, trainer)
        record |= {
            "steps": outcome.global_step,
            "train_seconds": round(trainer.train_seconds, 3),
            "total_seconds": round(time.monotonic() - started, 3),
            "pairs_per_second": round(outcome.metrics["train_samples_per_second"], 3),
            "peak_memory_bytes": peak_memory_bytes(args.device),
            "plan": announce.memory(planned, args.device),
            "out_of_memory": {"training": trainer.micro_limit.ooms, "evaluation": trainer.eval_limit.ooms},
            **trainer.health_record(),
            "adapter": announce.which_adapter(trainer),
            **record_of(before, after, recipe),
        }
        whole = trainer.whole_weights()
        if trainer.is_world_process_zero():
            finish(folder, record, trainer, tokenizer, disk, {"before": before.pairs, "after": after.pairs}, whole)
    return Run(folder.path, record)


def load_model(recipe: Recipe, pairs: Pairs, tokenizer: Any) -> tuple[Any, BaseFacts, int | None]:
    """Base and adapter, what is known of the base, and how many layers checkpoint."""
    fsdp = shards_by_launcher() or bool(recipe.training.get("fsdp"))
    to_shard = fsdp or zero_stage_asked(recipe.training.get("deepspeed")) == 3
    if to_shard and recipe.adapter and recipe.adapter.init_lora_weights in ("eva", "pissa", "olora"):
        raise RequestError(
            f"adapter.init_lora_weights: {recipe.adapter.init_lora_weights} takes the whole base on one process, which {'FSDP' if fsdp else 'ZeRO-3'} "
            "spreads over all of them: set adapter.init_lora_weights=true, or train with DDP"
        )
    with named("loading the base model"):
        base, facts = load_base(recipe.model, tokenizer, to_shard=to_shard)
    checkpointing = checkpointed(recipe, local_device())  # a base that is to be sharded is not there yet
    if checkpointing:
        check_count(checkpointing, len(checkpointing_layers(base)))
    model: Any = attach_adapter(base, recipe.adapter, tokenizer=tokenizer, checkpointing=checkpointing != 0)
    if recipe.adapter and recipe.adapter.init_lora_weights == "eva":
        initialize_eva(model, eva_batches(recipe, pairs, tokenizer, base.device))
    return model, facts, checkpointing


def plan_memory(
    recipe: Recipe, pairs: Pairs, encoder_decoder: bool, asked: bool, force: bool, again: str
) -> tuple[Recipe, Plan | None]:
    """The recipe, fitted where it says to which card, and its plan, said in a line: on a GPU always, else where asked."""
    device = local_device()
    if device.type != "cuda" and not asked and not recipe.memory.gpu_gb:
        return recipe, None
    from orpo_lite.plan.before_training import Lengths, fit_to_card, plan_before_loading

    again = again or f"python -m orpo_lite.train --recipe {recipe.name}"
    lengths = Lengths.of(pairs, encoder_decoder)
    recipe = fit_to_card(recipe, lengths, device)
    if device.type != "cuda" and not asked:
        return recipe, None
    return recipe, plan_before_loading(recipe, lengths, device, force, again)


def on_first_process(make: Callable[[], RunFolder]) -> RunFolder:
    """What the first process makes, known to all of them."""
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


def eva_batches(recipe: Recipe, pairs: Pairs, tokenizer: Any, device: torch.device) -> list[dict[str, torch.Tensor]]:
    """The first training pairs in micro-batches, padded, since EVA runs the model on its own."""
    assert recipe.adapter is not None
    collate = PaddedCollator(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0)
    size = recipe.training.get("per_device_train_batch_size", 8)
    first = list(itertools.islice(pairs.train, recipe.adapter.eva_batches * size))
    batches = []
    for start in range(0, len(first), size):
        batch = collate(first[start : start + size])
        batches.append({key: batch[key].to(device) for key in ("input_ids", "attention_mask")})
    return batches
