"""What a run measures before and after training, what it records in run.json, and how its folder is finished."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.markup import escape

from orpo_lite.common.console import console, peak_memory_bytes, progress
from orpo_lite.common.files import disk_trouble, write_atomically
from orpo_lite.common.text import counted, format_gb
from orpo_lite.data import Pairs
from orpo_lite.evaluate.held_out import evaluate, rule_shares
from orpo_lite.model import BaseFacts, autocast, save_adapter, trainable_share
from orpo_lite.objective.metrics import COLUMNS
from orpo_lite.recipe import Recipe
from orpo_lite.report import write_report
from orpo_lite.report.model_card import draw_picture, find_license, hub_id, write_card
from orpo_lite.trainer.generate import answer, score_answers
from orpo_lite.trainer.interruptions import named
from orpo_lite.trainer.run_folder import RunFolder
from orpo_lite.trainer.run_record import RunRecord, versions
from orpo_lite.trainer.trainer import ORPOTrainer

if TYPE_CHECKING:
    from orpo_lite.plan.predict import Plan


ADDED = ("rewards/accuracies_interval", "length_baseline", "pairs", "by")
"""What `evaluate` adds to the metrics that a trainer logs."""


@dataclass
class HeldOut:
    """Measurements of a model on the held-out pairs."""

    metrics: dict[str, Any] | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)
    """Greedy answers: prompt, answer, tokens, and its mean log-prob and log-odds under the model that gave it."""
    pairs: dict[str, list[float]] = field(default_factory=dict)
    """logps/chosen and logps/rejected of every pair, in the order of evaluation, which is the same each time."""


@contextlib.contextmanager
def alone(what: str, trained: bool = True) -> Iterator[None]:
    """Do inside what a trained model can do without: an error is a line that says what is missing; without one it is raised."""
    try:
        yield
    except Exception as error:
        if not trained:
            raise
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        console.print(f"[bold yellow]missing:[/] {what} ({escape(why)})")


def measure_held_out(
    recipe: Recipe, trainer: ORPOTrainer, pairs: Pairs, tokenizer: Any, before: HeldOut | None = None
) -> HeldOut:
    """Measure metrics, sample answers and every pair of the model as it stands.

    Args:
        before: results before training, whose answers are scored once more: logp_trained, log_odds_trained. With them,
            what fails is left out.
    """
    found = HeldOut()
    if pairs.eval is None:
        return found
    model = trainer.unwrapped()
    count, longest = min(recipe.evaluation.samples, len(pairs.eval)), recipe.evaluation.max_new_tokens
    if trainer.is_world_process_zero():
        answers = f", {counted(count, 'answer')} of at most {counted(longest, 'token')}" if count else ""
        what = "adapter" if before else "base"
        console.print(f"measuring the {what}: {counted(len(pairs.eval), 'held-out pair')}{answers}")
    trained = before is not None and trainer.args.world_size == 1  # processes would wait for one that failed
    with alone("metrics of the held-out pairs", trained), named("evaluating"):
        found.metrics = evaluate(trainer)
        places = {name: COLUMNS.index(name) for name in ("logps/chosen", "logps/rejected")}
        # six digits: more than float32 holds
        found.pairs = {
            name: [float(f"{p:.6g}") for p in trainer.predictions[:, i].tolist()] for name, i in places.items()
        }
    with (
        alone("sample answers", trained),
        named("answering held-out prompts", "set a smaller evaluation.max_new_tokens or evaluation.samples"),
        autocast(model),
    ):
        found.samples = answer(model, tokenizer, pairs.eval, count, longest)
        score_answers(trainer, pairs.eval, found.samples, before.samples if before else [])
    return found


def measure_before(
    folder: RunFolder,
    recipe: Recipe,
    trainer: ORPOTrainer,
    pairs: Pairs,
    tokenizer: Any,
    base: BaseFacts,
    shared: Path | None = None,
) -> HeldOut:
    """Measure the base, and keep the results in the run folder for a run that is resumed.

    It draws no random numbers, so that training is the same wherever the results are from.

    Args:
        shared: folder of results by runs of the same base, pairs and settings, which this run takes or adds to.
    """
    asked = recipe.evaluation.model_dump(mode="json")
    if folder.checkpoint is not None and (kept := folder.read_before()) and kept.get("asked") == asked:
        return HeldOut(kept["eval"], kept["samples"], kept.get("pairs", {}))
    settings = what_measures(recipe, trainer, pairs, tokenizer, base) if shared else None
    store = shared / f"base-{hashlib.sha256(settings.encode()).hexdigest()[:12]}.json" if shared and settings else None
    if store and (kept := folder.read_before(store)):
        console.print(f"the base's figures: those in {store}, of the same base, pairs and settings", markup=False)
        before = HeldOut(kept["eval"], kept["samples"], kept["pairs"])
        trainer.log({f"eval_{name}": value for name, value in (before.metrics or {}).items() if name not in ADDED})
    else:
        devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            before = measure_held_out(recipe, trainer, pairs, tokenizer)
    if trainer.is_world_process_zero():
        known = {"asked": asked, "eval": before.metrics, "samples": before.samples, "pairs": before.pairs}
        for path in filter(None, (folder.before, store)):
            with contextlib.suppress(OSError):  # it can be measured again
                write_atomically(path, json.dumps(known))
    return before


def what_measures(recipe: Recipe, trainer: ORPOTrainer, pairs: Pairs, tokenizer: Any, base: BaseFacts) -> str | None:
    """Return everything that the base's figures depend on, as JSON; None where they may be this run's alone."""
    spec, adapter = recipe.model, recipe.adapter
    starts_as_base = adapter is None or not (
        adapter.init_from or adapter.use_dora or adapter.init_lora_weights == "orthogonal"
    )
    if not starts_as_base or spec.new_tokens or trainer.args.world_size > 1:
        return None
    parts: dict[str, Any] = dict.fromkeys(("model", "data", "orpo", "evaluation"), True) | {"memory": {"kernels"}}
    facts = recipe.model_dump(mode="json", include=parts)
    return json.dumps([facts, base.revision, pairs.fingerprint, tokenizer.chat_template, versions()], sort_keys=True)


def record_of(
    recipe: Recipe,
    pairs: Pairs,
    base: BaseFacts,
    trainer: ORPOTrainer,
    before: HeldOut,
    after: HeldOut,
    planned: Plan | None,
    metrics: dict[str, float],
) -> RunRecord:
    """Collect the record of a finished run, but for its total time; `metrics` are those that `train` returns."""
    args, device, sides = trainer.args, trainer.args.device, {"before": before, "after": after}
    trainable, total = trainable_share(trainer.model)
    name, revision = recipe.model.name_or_path, recipe.model.revision
    facts: dict[str, Any] = {
        "name": recipe.name,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)",
        "processes": args.world_size,
        "seed": args.seed,
        "base_model": {
            "name_or_path": name,
            "revision": revision,
            "commit": base.revision,
            "hub_id": hub_id(name),
            "quantization": base.quantization,
            "dtype": str(base.precision.dtype).removeprefix("torch."),
            "facts": base.sentences,
        },
        "data": {
            "fingerprint": pairs.fingerprint,
            "sources": pairs.shapes,
            "train_pairs": len(pairs.train),
            "eval_pairs": len(pairs.eval) if pairs.eval is not None else 0,
            "drops": pairs.report.as_dict(),
        },
        "layout": trainer.layout._asdict() | {"attention": trainer.layout.attention.name},
        "kernels": trainer.kernels,
        "parameters": {"trainable": trainable, "total": total},
        "effective_batch": trainer.get_total_train_batch_size(args),
        "steps": trainer.state.global_step,
        "train_seconds": round(trainer.train_seconds, 3),
        "pairs_per_second": round(metrics["train_samples_per_second"], 3),
        "peak_memory_bytes": peak_memory_bytes(device),
        "out_of_memory": {"training": trainer.micro_limit.ooms, "evaluation": trainer.eval_limit.ooms},
        "warnings": trainer.health.warnings,
        "overflow_steps": trainer.guard.overflows,
        "adapter": kept_adapter(trainer),
        "eval": {when: one.metrics for when, one in sides.items()},
        "samples": {
            when: [{key: value for key, value in sample.items() if key != "ids"} for sample in one.samples]
            for when, one in sides.items()
        },
    }
    with alone("versions in run.json"):
        facts["versions"] = versions()
    with alone("license of the base in run.json"):
        facts["base_model"]["license"] = find_license(name, base.revision or revision)
    with alone("rows in run.json on which a merge is checked"):
        facts["probe"] = probe_rows(pairs)
    with alone("memory in run.json"):
        facts["plan"] = memory_facts(planned, device)
    with alone("styles of the answers in run.json"):
        facts["rule"] = {when: rule_shares(one.samples, recipe.evaluation.rule) for when, one in sides.items()}
    return RunRecord.model_validate(facts)


def probe_rows(pairs: Pairs) -> list[list[int]]:
    """Return where the chosen answers of a few training rows begin, for a later merge to compare models on.

    A few tokens of the prompt and some of the answer; run.json is never published.
    """
    found: list[list[int]] = []
    row: Any
    for row in itertools.islice(pairs.train, 3):
        ids, start = row["chosen_ids"], row.get("chosen_start", 0)
        found.append(list(ids)[max(0, min(start - 4, len(ids) - 16)) :][:32])
    return [row for row in found if len(row) >= 4]


def kept_adapter(trainer: ORPOTrainer) -> str:
    """Say whether the weights left in the run folder are the last or the best by evaluation."""
    best, state = trainer.state.best_model_checkpoint, trainer.state
    if trainer.args.load_best_model_at_end and best:
        measured = f"{trainer.args.metric_for_best_model}: {state.best_metric:.4f}"
        return f"best by {measured} at step {state.best_global_step}"
    return f"last, step {state.global_step}"


def memory_facts(plan: Plan | None, device: torch.device) -> dict[str, Any] | None:
    """Return the planned memory and, on CUDA, what torch measured; `error` is (planned - measured) / measured."""
    facts = plan.as_dict() if plan else {}
    if device.type != "cuda":
        return facts or None
    allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    error = plan.peak / allocated - 1 if plan and allocated else None
    line = f"memory: measured {format_gb(allocated, 2)} in tensors at most, {format_gb(reserved, 2)} reserved"
    if plan and error is not None:
        line += f"; planned {format_gb(plan.peak, 2)}, {error:+.1%}"
    console.print(line)
    return facts | {"measured": {"allocated_bytes": allocated, "reserved_bytes": reserved}, "error": error}


@contextlib.contextmanager
def rescued(folder: RunFolder, trainer: ORPOTrainer, tokenizer: Any) -> Iterator[None]:
    """Write into the run folder inside; if its disk fails, the adapter goes elsewhere.

    Raises:
        OSError: the folder cannot be written; the message says where the adapter is.
    """
    try:
        folder.path.stat()  # PEFT would make a folder that is gone, as with its drive, anew
        yield
    except Exception as error:
        if not (trouble := disk_trouble(error)):
            raise
        rescue = Path(tempfile.mkdtemp(prefix="orpo_lite-"))
        save_weights(rescue, trainer, tokenizer)
        raise OSError(
            f"{folder.path} cannot be written ({trouble}): training is done, and the adapter is in {rescue}; copy it, or make "
            f"room and run again with --recipe {folder.path} --resume"
        ) from None


def save_weights(path: Path, trainer: ORPOTrainer, tokenizer: Any) -> None:
    """Write adapter and tokenizer."""
    save_adapter(trainer.unwrapped(), path)
    tokenizer.save_pretrained(path)


@progress("writing report and model card")
def finish(folder: RunFolder, record: RunRecord, pairs: dict[str, Any]) -> None:
    """Write what a finished run holds beside its adapter: run.json, held_out.json, the report and the card.

    Args:
        pairs: every held-out pair before and after and beta, for held_out.json.
    """
    facts = record.model_dump()
    folder.write(facts | {"finished": False})
    if pairs["before"] and pairs["after"]:
        write_atomically(folder.path / "held_out.json", json.dumps(pairs))
    with alone("report.html"):
        write_report(folder)
    with alone("curves.png, the card's picture"):
        draw_picture(folder)
    with alone("README.md, the model card"):
        write_card(folder)
    folder.write(facts)
    folder.before.unlink(missing_ok=True)
