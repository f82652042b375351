"""`python -m orpo_lite.train --recipe NAME [key=value ...]`: one recipe, one run folder."""

from __future__ import annotations

import contextlib
import itertools
import json
import shlex
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers import PrinterCallback
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_callback import ProgressCallback

from orpo_lite import announce
from orpo_lite.card import write_card
from orpo_lite.cli import console, run_command
from orpo_lite.config import ORPOConfig
from orpo_lite.data import DropReport, Pairs, load_pairs
from orpo_lite.data.batching import PaddedCollator
from orpo_lite.errors import RequestError
from orpo_lite.evaluate import base_only, evaluate, judge
from orpo_lite.generate import answer
from orpo_lite.measure import peak_memory_bytes
from orpo_lite.model import (
    BaseFacts,
    attach_adapter,
    autocast,
    initialise_eva,
    load_base,
    load_tokenizer,
    save_adapter,
)
from orpo_lite.model.base import local_device, read_config
from orpo_lite.model.offload import check_count, checkpointing_layers
from orpo_lite.outofmemory import OutOfMemory, named
from orpo_lite.progress import Bar, MetricsFile
from orpo_lite.recipe import DataSource, Recipe
from orpo_lite.report import write_report
from orpo_lite.runfolder import Resume, RunFolder
from orpo_lite.settings import checked_config
from orpo_lite.signals import Stopped
from orpo_lite.trainer import ORPOTrainer
from orpo_lite.watching.nonfinite import NonFinite
from orpo_lite.writing import write_whole

if TYPE_CHECKING:
    from orpo_lite.planning.predict import Plan

DEFAULTS: dict[str, Any] = {
    "learning_rate": 5e-5,
    "lr_scheduler_type": "cosine",
    "logging_steps": 10,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "report_to": "none",
    "seed": 42,
}
"""What a recipe's `training:` section takes where it is silent and transformers' own default serves QLoRA badly."""
STREAMED = DEFAULTS | {"eval_strategy": "steps", "eval_steps": 0.1, "save_strategy": "steps", "save_steps": 0.1}
"""The same for a stream, of which nobody knows when an epoch ends: every tenth of max_steps."""


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
    defaults = STREAMED if recipe.data.streaming else DEFAULTS
    recipe = recipe.model_copy(update={"training": defaults | recipe.training})
    tokenizer = load_tokenizer(recipe.model)
    encoder_decoder = bool(read_config(recipe.model).is_encoder_decoder)
    pairs = load_pairs(recipe.data, tokenizer, encoder_decoder=encoder_decoder)
    recipe, planned = plan_memory(recipe, pairs, encoder_decoder, plan, force, again)
    torch.manual_seed(recipe.training["seed"])  # a new adapter's weights are random
    model, facts, checkpointing = load_model(recipe, pairs, tokenizer)

    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        args = arguments(recipe, scratch, facts, has_eval=pairs.eval is not None, checkpointing=checkpointing)
        processes = args.world_size
        folder = None if dry_run else on_first_process(lambda: RunFolder.create(recipe, resume, processes))
        if folder is not None:
            stack.callback(folder.unlock)
            args.output_dir = str(folder.checkpoints)
        trainer = ORPOTrainer(model, args, None, pairs.train, pairs.eval, tokenizer)
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Bar())
        trainer.recipe, trainer.reproducer_folder = recipe, folder.path if folder else None
        trainer.sources = [name for name, one in pairs.shapes.items() if one["section"] == "train"]
        announce.resolved(recipe, pairs, facts, trainer, checkpointing, folder)
        if folder is None:
            announce.first_step(trainer)
            return None
        trainer.add_callback(MetricsFile(folder.metrics, resumed=folder.checkpoint is not None))
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                # it takes the working directory for what is logged before training, such as the first evaluation
                callback.logging_dir = str(folder.path / "tensorboard")

        before, samples_before = before_training(folder, recipe, trainer, pairs, tokenizer)
        try:
            with named("training, outside of the passes over a micro-batch"):
                outcome = trainer.train(resume_from_checkpoint=str(folder.checkpoint) if folder.checkpoint else None)
        except (KeyboardInterrupt, OutOfMemory, NonFinite) as stop:
            announce.stopped(folder, stop, trainer.state.global_step)
            raise
        after, samples_after = held_out(recipe, trainer, pairs, tokenizer)

    if trainer.stream_watch is not None:
        pairs.report = DropReport.merge([trainer.stream_watch.watched.report, pairs.report])
    record = announce.record(recipe, pairs, facts, trainer)
    record |= {
        "steps": outcome.global_step,
        "train_seconds": round(trainer.train_seconds, 3),
        "total_seconds": round(time.monotonic() - started, 3),
        "pairs_per_second": round(outcome.metrics["train_samples_per_second"], 3),
        "peak_memory_bytes": peak_memory_bytes(args.device),
        "plan": announce.memory(planned, args.device),
        "out_of_memory": {"training": trainer.micro_limit.met, "evaluation": trainer.eval_limit.met},
        **trainer.watched(),
        "adapter": announce.which_adapter(trainer),
        "eval": {"before": before, "after": after},
        "samples": {"before": samples_before, "after": samples_after},
        "rule": {
            "before": judge(samples_before, recipe.evaluation.rule),
            "after": judge(samples_after, recipe.evaluation.rule),
        },
    }
    if trainer.is_world_process_zero():
        finish(folder, record, trainer, tokenizer)
    return Run(folder.path, record)


def finish(folder: RunFolder, record: dict[str, Any], trainer: ORPOTrainer, tokenizer: Any) -> None:
    """Write what a finished run consists of; where its folder cannot be written, the adapter to a temporary one.

    Raises:
        OSError: the folder cannot be written; the message says where the adapter is.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)

    def weights(path: Path) -> None:
        save_adapter(model, path)
        tokenizer.save_pretrained(path)

    try:
        weights(folder.path)
        folder.write(record | {"finished": False})
        write_report(folder)
        write_card(folder)
        folder.write(record)
    except (OSError, SafetensorError) as error:
        rescue = Path(tempfile.mkdtemp(prefix="orpo_lite-"))
        weights(rescue)
        raise OSError(
            f"{folder.path} cannot be written ({error}): training is done, and the adapter is in {rescue}; copy it, or make "
            f"room and run again with --recipe {folder.path} --resume"
        ) from None
    announce.finished(folder, record)


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


def load_model(recipe: Recipe, pairs: Pairs, tokenizer: Any) -> tuple[Any, BaseFacts, int | None]:
    """Base and adapter, what is known of the base, and how many layers checkpoint."""
    with named("loading the base model"):
        base, facts = load_base(recipe.model, tokenizer)
    checkpointing = checkpointed(recipe, base.device)
    if checkpointing:
        check_count(checkpointing, len(checkpointing_layers(base)))
    model: Any = attach_adapter(base, recipe.adapter, tokenizer=tokenizer, checkpointing=checkpointing != 0)
    if recipe.adapter and recipe.adapter.init_lora_weights == "eva":
        initialise_eva(model, eva_batches(recipe, pairs, tokenizer, base.device))
    return model, facts, checkpointing


def plan_memory(
    recipe: Recipe, pairs: Pairs, encoder_decoder: bool, asked: bool, force: bool, again: str
) -> tuple[Recipe, Plan | None]:
    """The recipe, fitted where it says to which card, and its plan, said in a line: on a GPU always, else where asked."""
    device = local_device()
    if device.type != "cuda" and not asked and not recipe.memory.gpu_gb:
        return recipe, None
    from orpo_lite.planning.lengths import Lengths
    from orpo_lite.planning.start import before_loading, fitted

    again = again or f"python -m orpo_lite.train --recipe {recipe.name}"
    lengths = Lengths.of(pairs, encoder_decoder)
    recipe = fitted(recipe, lengths, device)
    if device.type != "cuda" and not asked:
        return recipe, None
    return recipe, before_loading(recipe, lengths, device, force, again)


def on_first_process(make: Callable[[], RunFolder]) -> RunFolder:
    """What the first process makes, known to all of them."""
    if PartialState().num_processes == 1:
        return make()
    box: list[Any] = [make() if PartialState().is_main_process else None]
    return broadcast_object_list(box)[0]


def held_out(
    recipe: Recipe, trainer: ORPOTrainer, pairs: Pairs, tokenizer: Any
) -> tuple[dict[str, Any] | None, list[dict[str, str]]]:
    """Metrics and sample answers of the model as it stands."""
    if pairs.eval is None:
        return None, []
    model = trainer.accelerator.unwrap_model(trainer.model)
    with named("evaluating"):
        metrics = evaluate(trainer)
    with (
        named("answering held-out prompts", "set a smaller evaluation.max_new_tokens or evaluation.samples"),
        autocast(model),
    ):
        samples = answer(model, tokenizer, pairs.eval, recipe.evaluation.samples, recipe.evaluation.max_new_tokens)
    return metrics, samples


def checkpointed(recipe: Recipe, device: torch.device) -> int | None:
    """How many layers recompute their activations: None for all, 0 for none."""
    wish = recipe.memory.checkpointing
    if wish == "auto":
        wish = "all" if device.type == "cuda" else "none"
    return {"all": None, "none": 0}.get(wish, wish)  # type: ignore[arg-type]


def arguments(
    recipe: Recipe, output: Path, facts: BaseFacts, *, has_eval: bool, checkpointing: int | None
) -> ORPOConfig:
    """The recipe as an ORPOConfig whose checkpoints go to `output`."""
    training: dict[str, Any] = recipe.training | {"output_dir": str(output)}
    if not has_eval:
        training["eval_strategy"] = "no"
    optim = str(training.get("optim", ""))
    if "8bit" in optim and not torch.cuda.is_available():
        console.print(f"training.optim: {optim} needs a CUDA device: adamw_torch is used here", markup=False)
        training["optim"] = "adamw_torch"
    for name in (
        "bf16",
        "fp16",
        "gradient_checkpointing",
        "activation_checkpointing",
    ):  # model.dtype, memory: say these
        training.pop(name, None)
    ours: dict[str, Any] = {
        "bf16": facts.precision.bf16,
        "fp16": facts.precision.fp16,
        "gradient_checkpointing": checkpointing != 0,
        "beta": recipe.orpo.beta,
        "nll_scope": recipe.orpo.nll_scope,
        "nll_mean": recipe.orpo.nll_mean,
        "layout": recipe.orpo.layout,
        "tokens_per_batch": recipe.orpo.tokens_per_batch,
        "head_chunk": None if recipe.memory.head_chunk == "auto" else recipe.memory.head_chunk,
        "checkpointed_layers": checkpointing or None,
        "offload_activations": recipe.memory.offload_activations,
        "disable_dropout": recipe.orpo.disable_dropout,
        "loraplus_lr_ratio": recipe.adapter.loraplus_lr_ratio if recipe.adapter else None,
    }
    return checked_config(training, ours)


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


@dataclass
class OpenRun:
    """A run folder brought back: model with adapter, tokenizer, pairs, and a trainer to evaluate with."""

    folder: RunFolder
    recipe: Recipe
    model: Any
    tokenizer: Any
    pairs: Pairs
    trainer: ORPOTrainer

    def base(self) -> contextlib.AbstractContextManager[None]:
        """The base alone, the adapter switched off."""
        return base_only(self.model)


def open_run(path: str, data: str | None = None, trust_remote_code: bool = False) -> OpenRun:
    """Load a run folder for evaluation; `data` replaces its held-out pairs.

    Code of the base's repository is run only where the caller says so: the folder may be anybody's.

    Raises:
        RequestError: not a run folder, full fine-tuning (there is no adapter to switch off), or unusable data.
    """
    folder = RunFolder.open(path)
    folder.read()  # an unfinished run holds no adapter
    recipe = folder.recipe()
    recipe.model.trust_remote_code = trust_remote_code
    if recipe.adapter is None:
        raise RequestError(
            f"{path}: a full fine-tuning has no adapter to switch off; evaluate the two models by their paths"
        )
    tokenizer = load_tokenizer(
        recipe.model.model_copy(update={"name_or_path": path, "gguf_file": None, "revision": None})
    )
    if data is not None:
        recipe.data.eval = [DataSource(path=data)]
    encoder_decoder = bool(read_config(recipe.model).is_encoder_decoder)
    if recipe.data.eval is not None:
        # only the held-out side is looked at: reading the training pairs as well would be waste
        section = recipe.data.model_copy(
            update={
                "train": recipe.data.eval,
                "eval": None,
                "eval_fraction": 0.0,
                "max_rows": recipe.data.max_eval_rows,
            }
        )
        field = "data.eval" if data is None else "--data"
        pairs = load_pairs(section, tokenizer, encoder_decoder=encoder_decoder, field=field)
        pairs.eval = pairs.train
    else:
        pairs = load_pairs(recipe.data, tokenizer, encoder_decoder=encoder_decoder)
    base, facts = load_base(recipe.model, tokenizer)
    adapter = recipe.adapter.model_copy(update={"init_from": path})
    model = attach_adapter(base, adapter, tokenizer=tokenizer, checkpointing=False)
    with tempfile.TemporaryDirectory() as scratch:
        args = arguments(recipe, Path(scratch), facts, has_eval=True, checkpointing=0)
        trainer = ORPOTrainer(model, args, None, None, pairs.eval, tokenizer)
    trainer.remove_callback(PrinterCallback)  # with TRANSFORMERS_VERBOSITY=error it would print between lines of JSON
    return OpenRun(folder, recipe, model, tokenizer, pairs, trainer)


def command(
    recipe: Annotated[
        str | None, typer.Option(help="name of a shipped recipe, path of a YAML file, or run folder")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, for example training.learning_rate=5e-6")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="do everything up to the first optimizer step; write nothing")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="go on from the newest good checkpoint, as the same command does by itself, and never start anew; "
            "--resume=force goes on in spite of changes",
        ),
    ] = False,
    resume_force: Annotated[bool, typer.Option("--resume-force", hidden=True)] = False,
    reproduce: Annotated[
        Path | None,
        typer.Option(
            "--reproduce", metavar="FILE", help="do a step again that was not finite, from a run's reproduce-step-N.zip"
        ),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="predict the memory on the CPU as well, as is done on a GPU")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="start even what cannot fit the GPU that is there")] = False,
) -> None:
    """Train an adapter with ORPO as a recipe says."""
    if reproduce is not None:
        if recipe is not None or dry_run or resume or resume_force or plan:
            raise RequestError(
                "--reproduce takes its recipe from the file: leave --recipe, --dry-run, --resume and --plan out"
            )
        from orpo_lite.watching.reproduce import reproduce as again_from

        raise typer.Exit(again_from(reproduce, overrides or []))
    if recipe is None:
        raise RequestError(
            "found no --recipe: name a shipped recipe (`orpo-lite recipes` lists them), a YAML file or a run folder"
        )
    resume_mode: Resume = "force" if resume_force else resume
    if dry_run and resume_mode:
        raise RequestError("--dry-run takes the first step of a new run: leave --resume out")
    again = shlex.join(["python", "-m", "orpo_lite.train", "--recipe", recipe, *(overrides or [])])
    try:
        run(
            Recipe.load(recipe, overrides or []),
            dry_run=dry_run,
            resume=resume_mode,
            plan=plan,
            force=force,
            again=again,
        )
    except Stopped as stop:
        raise typer.Exit(128 + stop.number) from None  # as a shell has it for a process that a signal ended


if __name__ == "__main__":
    run_command(command)
