"""Batches, optimizer, schedule, checkpointing and logging of an axolotl configuration."""

from __future__ import annotations

from orpo_lite.recipe.importers.draft import Draft, number
from orpo_lite.recipe.training_fields import check_training_field

DEFAULTS = {"num_train_epochs": 1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1,
            "lr_scheduler_type": "cosine", "warmup_steps": 0.03, "optim": "adamw_torch_fused", "weight_decay": 0.0,
            "save_strategy": "epoch", "save_total_limit": 4, "report_to": "none"}  # fmt: skip
"""What axolotl does where the file is silent."""


NOT_BY_NAME = ("remove_unused_columns", "deepspeed", "fsdp", "fsdp_config", "resume_from_checkpoint", "torch_compile")
"""Fields that transformers has under the same name, and a recipe not."""
TRL_ORPO = "axolotl hands ORPO to TRL"


def convert_training(draft: Draft, words: dict[str, str]) -> None:
    """`words` say why fields have no equal."""
    for theirs, ours in (("num_epochs", "num_train_epochs"), ("micro_batch_size", "per_device_train_batch_size"),
                         ("eval_batch_size", "per_device_eval_batch_size"), ("learning_rate", "learning_rate"),
                         ("max_grad_norm", "max_grad_norm"), ("wandb_name", "run_name"),
                         ("early_stopping_patience", "early_stopping_patience")):  # fmt: skip
        draft.carry(theirs, f"training.{ours}")
    if "eval_batch_size" not in draft.source and "per_device_eval_batch_size" not in draft.recipe.get("training", {}):
        draft.put(
            "training.per_device_eval_batch_size",
            draft.recipe.get("training", {}).get("per_device_train_batch_size", 1),
        )
    ratio, steps = draft.take("warmup_ratio"), draft.take("warmup_steps")
    if steps is not None or ratio is not None:
        name, value = ("warmup_ratio", ratio) if steps is None else ("warmup_steps", steps)
        draft.put("training.warmup_steps", value)
        draft.carried_as(
            name, value, "training.warmup_steps" + (", below 1 a share of all steps" if steps is None else "")
        )
        if steps is not None and ratio is not None:
            draft.leave_value("warmup_ratio", ratio, "warmup_steps goes before it")
    named(draft, "optimizer", "optim")
    named(draft, "lr_scheduler", "lr_scheduler_type")
    if (floor := draft.source.get("cosine_min_lr_ratio")) is not None and draft.recipe["training"].get(
        "lr_scheduler_type", "cosine"
    ) == "cosine":
        draft.take("cosine_min_lr_ratio")
        draft.put("training.lr_scheduler_type", "cosine_with_min_lr")
        draft.put("training.lr_scheduler_kwargs", {"min_lr_rate": floor})
        draft.carried_as("cosine_min_lr_ratio", floor, "training.lr_scheduler_kwargs.min_lr_rate")
    wanted = draft.take("gradient_checkpointing")
    if wanted is not None:
        draft.carried_as("gradient_checkpointing", wanted, "memory.checkpointing")
        if wanted == "offload":
            draft.put("memory.offload_activations", True)
        elif wanted == "offload_disk":
            draft.put("memory.offload_activations", True)
            draft.differ(
                "gradient_checkpointing", wanted, "offloaded to the host's memory instead (memory.offload_activations)"
            )
    draft.put("memory.checkpointing", "all" if wanted else "none")
    draft.leave("gradient_checkpointing_kwargs", "checkpointing is the non-reentrant one")
    if draft.source.get("activation_offloading"):
        draft.put("memory.checkpointing", "all")
        draft.put("memory.offload_activations", True)
        draft.carried_as("activation_offloading", draft.take("activation_offloading"), "memory.offload_activations")
    report_to(draft)
    pace(draft)
    for name in NOT_BY_NAME:
        draft.leave(name, words[name])
    tf32 = draft.take("tf32")
    if tf32 == "auto":
        draft.leave_value("tf32", tf32, "set training.tf32: true on a card that has it")
    elif tf32 is not None:
        draft.carried_as("tf32", tf32, "training.tf32")
        if tf32:
            draft.put("training.tf32", True)
    draft.training(DEFAULTS)
    accumulation = draft.recipe["training"].get("gradient_accumulation_steps", 1)
    if (number(accumulation) or 1) > 1:
        draft.put("orpo.nll_mean", "micro")
        draft.differ("gradient_accumulation_steps", accumulation, f"{TRL_ORPO}, whose NLL is a mean of micro-batch means: orpo.nll_mean is micro; window, the default here, makes batch 8 x 1 and 1 x 8 the same")  # fmt: skip


def named(draft: Draft, theirs: str, ours: str) -> None:
    """Optimizer or schedule by transformers' name, where it has one of that name."""
    if (wanted := draft.take(theirs)) is None:
        return
    wanted = (
        {"adamw_hf": "adamw_torch", "adamw_8bit": "adamw_8bit"}.get(wanted, wanted)
        if isinstance(wanted, str)
        else wanted
    )
    try:
        draft.put(f"training.{ours}", check_training_field(ours, wanted))
        draft.carried_as(theirs, wanted, f"training.{ours}")
    except ValueError:
        draft.leave_value(
            theirs,
            wanted,
            f"transformers has none of this name: training.{ours} is {DEFAULTS[ours]}, axolotl's default",
        )


def report_to(draft: Draft) -> None:
    """Where metrics go: whatever is switched on, or has a project."""
    found = []
    for name, use, project in (("wandb", "use_wandb", "wandb_project"), ("mlflow", "use_mlflow", "mlflow_experiment_name"),
                               ("tensorboard", "use_tensorboard", ""), ("comet_ml", "use_comet", "comet_project_name"),
                               ("trackio", "use_trackio", "trackio_project_name")):  # fmt: skip
        wanted = draft.flag(use)
        if wanted is not None:
            draft.carried_as(use, wanted, "training.report_to")
        if wanted or wanted is None and draft.source.get(project):
            found.append(name)
    if found:
        draft.put("training.report_to", found)


def pace(draft: Draft) -> None:
    """When to evaluate and to save: axolotl counts by epoch, transformers by a share of all steps."""
    training = draft.recipe["training"]
    epochs = number(training.get("num_train_epochs")) or 1
    for kind, per in (("eval", "evals_per_epoch"), ("save", "saves_per_epoch")):
        times, steps = draft.take(per), draft.source.get(f"{kind}_steps")
        if (count := number(times)) and not steps:
            share = 1 / (count * epochs)
            training |= (
                {f"{kind}_strategy": "steps", f"{kind}_steps": share}
                if count != 1 and share < 1
                else {f"{kind}_strategy": "epoch"}
            )
            draft.carried_as(
                per,
                times,
                f"training.{kind}_strategy" if count == 1 else f"training.{kind}_steps, a share of all steps",
            )
        elif times is not None:
            draft.leave_value(per, times, f"{kind}_steps goes before it")
        elif steps:
            training[f"{kind}_strategy"] = "steps"
    if not draft.recipe["data"]["eval_fraction"] and "eval" not in draft.recipe["data"]:
        training["eval_strategy"] = "no"
        draft.leave("eval_strategy", "there are no held-out pairs (val_set_size, test_datasets)")
        draft.leave("eval_steps", "there are no held-out pairs (val_set_size, test_datasets)")
        training.pop("eval_steps", None)
    elif "eval_strategy" not in training and "eval_strategy" not in draft.source:
        training["eval_strategy"] = "no"
        draft.leave_value("eval_strategy", None, "not given, so nothing is evaluated while training, as in axolotl; before and after training it is")  # fmt: skip
