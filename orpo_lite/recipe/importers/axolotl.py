"""axolotl's `rl: orpo` YAML (fields as of 0.18) as a recipe."""

from __future__ import annotations

from typing import Any

from orpo_lite.recipe.importers.draft import ATTENTION, RecipeDraft, as_list, number, table

FIELDS = table("axolotl")
WORDS: dict[str, str] = FIELDS["words"]
ROWS_OF_A_FILE = (None, "json", "jsonl", "csv", "parquet", "text")
"""Paths of a data set that leave it to `data_files`."""


def convert(draft: RecipeDraft) -> None:
    """Fill the draft's recipe from an axolotl configuration."""
    draft.carry("base_model", "model.name_or_path", draft.place_of)
    draft.take("rl", "orpo")
    draft.flatten("trl")
    draft.carry_all(FIELDS["places"], {"orpo.beta": 0.1, "data.max_length": 512, "data.completion_end": "trl"})
    convert_weights(draft)
    convert_attention(draft)
    convert_template(draft)
    convert_data(draft)
    convert_training(draft)
    draft.rest(FIELDS["left"])


def convert_weights(draft: RecipeDraft) -> None:
    """Convert quantization, adapter and precision."""
    place = "model.quantization"
    kind = draft.take("adapter", place)
    four, eight = draft.flag("load_in_4bit", place), draft.flag("load_in_8bit", place)
    nf4 = kind and (four or four is None and kind == "qlora")
    draft.put(place, "nf4" if nf4 else "int8" if kind and eight else "none")
    draft.flatten("bnb_config_kwargs")
    if nf4:
        draft.carry_all(FIELDS["nf4"])
    if kind:
        if kind not in ("lora", "qlora"):
            draft.differ("adapter", kind, "a LoRA is trained in its place")
        convert_adapter(draft)
    else:
        draft.put("adapter", None)
        if four or eight:
            draft.differ("adapter", None, WORDS["full"])
        for name in [name for name in draft.source if name.startswith(("lora_", "peft_"))]:
            draft.leave(name, "no adapter is trained")
    if draft.take("float32", "model.dtype"):
        draft.put("model.dtype", "float32")
    draft.dtypes("bf16", "fp16", "bfloat16", "float16")


def convert_adapter(draft: RecipeDraft) -> None:
    """Convert LoRA's own settings."""
    draft.carry("lora_model_dir", "adapter.init_from", draft.place_of)
    draft.carry_all(FIELDS["adapter"], {"adapter.dropout": 0.0})
    draft.carry("lora_target_parameters", "adapter.target_parameters", as_list)
    place = "adapter.target_modules"
    linear, targets = draft.flag("lora_target_linear", place), draft.take("lora_target_modules", place)
    if linear or targets:
        draft.put(place, "all-linear" if linear else targets)
    else:
        draft.differ("lora_target_modules", None, WORDS["lora_target_modules"])


def convert_attention(draft: RecipeDraft) -> None:
    """Convert the choice of an attention kernel, which axolotl spells in several ways."""
    for name in FIELDS["attention"]:
        wanted = draft.take(name, "model.attention")
        if wanted == "eager" or wanted and name == "eager_attention":
            draft.put("model.attention", "eager")
        elif wanted not in (None, False, "sdpa") and name != "sdp_attention":
            draft.differ(name, wanted, ATTENTION)


def convert_template(draft: RecipeDraft) -> None:
    """Convert the chat template, if it is known by its name."""
    template = str(draft.take("chat_template", "model.chat_template", "tokenizer_default"))
    if template != "tokenizer_default":
        draft.template("chat_template", template, WORDS["chat_template"])


def convert_data(draft: RecipeDraft) -> None:
    """Convert data sets and the treatment of long pairs."""
    draft.put("data.train", sources_of(draft, "datasets", "data.train"))
    if "test_datasets" in draft.source:
        draft.put("data.eval", sources_of(draft, "test_datasets", "data.eval"))
    wanted = draft.take("excess_length_strategy", "data.overlong")
    if wanted == "raise":
        draft.differ("excess_length_strategy", wanted, "pairs that are too long are dropped and counted")
    draft.put("data.overlong", "truncate" if wanted == "truncate" else "drop")
    draft.held_out("val_set_size", WORDS["no_pairs"])


def sources_of(draft: RecipeDraft, field: str, place: str) -> list[dict[str, Any]]:
    """Convert the entries of `datasets` or `test_datasets` into data sources."""
    found: list[dict[str, Any]] = []
    for index, given in enumerate(as_list(draft.take(field, place, []))):
        entry = draft.inside(given if isinstance(given, dict) else {"path": given}, f"{field}.{index}")
        path, files = entry.take("path", "path"), as_list(entry.source.get("data_files", []))
        if path in ROWS_OF_A_FILE or draft.place_of(path).startswith(("/", ".")):
            entry.take("data_files", "path")
        else:
            entry.leave("data_files", WORDS["data_files"])
            files = []
        entry.flatten("type")
        entry.carry_all(FIELDS["dataset"])
        entry.rest(FIELDS["left"] | FIELDS["dataset_left"])
        found += [{"path": draft.place_of(file)} | entry.recipe for file in files or [path]]
    return found


def convert_training(draft: RecipeDraft) -> None:
    """Convert batches, optimizer, schedule, checkpointing and logging."""
    training = draft.recipe.setdefault("training", {})
    training.setdefault("per_device_eval_batch_size", training.get("per_device_train_batch_size", 1))
    convert_checkpointing(draft)
    found = []
    for name, (flag, project) in FIELDS["trackers"].items():
        wanted = draft.flag(flag, "training.report_to")
        if wanted or wanted is None and draft.source.get(project):
            found.append(name)
    if found:
        training["report_to"] = found
    if draft.source.get("tf32") in ("auto", False):  # a card without it refuses the field
        draft.leave("tf32", "set training.tf32: true on a card that has it")
    convert_pace(draft)
    draft.training(FIELDS)
    training = draft.recipe["training"]
    if training["lr_scheduler_type"] == "cosine" and "cosine_min_lr_ratio" in draft.source:
        draft.carry("cosine_min_lr_ratio", "training.lr_scheduler_kwargs.min_lr_rate")
        training["lr_scheduler_type"] = "cosine_with_min_lr"
    accumulation = training["gradient_accumulation_steps"]
    if (number(accumulation) or 1) > 1:
        draft.put("orpo.nll_mean", "micro")
        draft.differ("gradient_accumulation_steps", accumulation, WORDS["gradient_accumulation_steps"])


def convert_checkpointing(draft: RecipeDraft) -> None:
    """Convert gradient checkpointing and the offload of activations."""
    wanted = draft.take("gradient_checkpointing", "memory.checkpointing")
    offload = draft.take("activation_offloading", "memory.offload_activations")
    draft.put("memory.checkpointing", "all" if wanted or offload else "none")
    if wanted == "offload_disk":
        draft.differ("gradient_checkpointing", wanted, WORDS["offload_disk"])
    if offload or wanted in ("offload", "offload_disk"):
        draft.put("memory.offload_activations", True)


def convert_pace(draft: RecipeDraft) -> None:
    """Convert when to evaluate and to save: axolotl counts by epoch, transformers by a share of all steps."""
    training = draft.recipe["training"]
    epochs = number(training.get("num_train_epochs")) or 1
    for kind, name in (("eval", "evals_per_epoch"), ("save", "saves_per_epoch")):
        times = draft.take(name, f"training.{kind}_strategy")
        count = number(times)
        if draft.source.get(f"{kind}_steps"):
            training[f"{kind}_strategy"] = "steps"
            if times is not None:
                draft.leave_value(name, times, f"{kind}_steps takes precedence")
        elif count and count != 1 and 1 / (count * epochs) < 1:
            training |= {f"{kind}_strategy": "steps", f"{kind}_steps": 1 / (count * epochs)}
        elif count:
            training[f"{kind}_strategy"] = "epoch"
        elif times is not None:
            draft.leave_value(name, times, f"not a number of times: {kind}_steps and {kind}_strategy are used")
    if "eval_strategy" not in training | draft.source | draft.given:
        draft.leave_value("eval_strategy", None, WORDS["eval_strategy"])
