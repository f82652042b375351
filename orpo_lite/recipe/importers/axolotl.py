"""axolotl's `rl: orpo` YAML (fields as of 0.18) as a recipe."""

from __future__ import annotations

from typing import Any

from orpo_lite.recipe.importers import draft as words
from orpo_lite.recipe.importers.draft import RecipeDraft, as_list, number, table
from orpo_lite.recipe.loading import find_template
from orpo_lite.recipe.training_fields import check_training_field

FIELDS = table("axolotl")
WORDS: dict[str, str] = FIELDS["words"]
LEFT: dict[str, str] = FIELDS["left"]


def convert(draft: RecipeDraft) -> None:
    """Fill the draft's recipe from an axolotl configuration."""
    draft.carry("base_model", "model.name_or_path", draft.place_of)
    draft.note("rl", draft.take("rl"), "orpo")
    if isinstance(draft.source.get("trl"), dict):
        draft.source.update({f"trl.{name}": value for name, value in draft.take("trl").items()})
    draft.carry_all(FIELDS["places"], {"orpo.beta": 0.1, "data.max_length": 512, "data.completion_end": "trl"})
    betas = [name for name in ("trl.beta", "rl_beta", "orpo_alpha") if name in draft.source]
    for name in betas[:1]:
        draft.carry(name, "orpo.beta")
    for name in betas[1:]:
        draft.leave(name, f"{betas[0]} takes precedence, as in axolotl")
    convert_weights(draft)
    convert_attention(draft)
    convert_template(draft)
    convert_data(draft)
    convert_training(draft)
    draft.rest(LEFT)


def convert_weights(draft: RecipeDraft) -> None:
    """Convert quantization, adapter and precision."""
    adapter, four, eight = draft.take("adapter"), draft.flag("load_in_4bit"), draft.flag("load_in_8bit")
    nf4 = adapter and (four or four is None and adapter == "qlora")
    draft.put("model.quantization", "nf4" if nf4 else "int8" if adapter and eight else "none")
    options = draft.source.get("bnb_config_kwargs")
    if nf4 and isinstance(options, dict) and options:
        draft.note("bnb_config_kwargs", draft.take("bnb_config_kwargs"), "model.quantization")
        known = {"bnb_4bit_quant_type": "model.quantization", "bnb_4bit_use_double_quant": "model.double_quant"}
        for name, value in options.items():
            if name in known:
                draft.put(known[name], value)
            else:
                draft.leave_value(f"bnb_config_kwargs.{name}", value, "chosen by the device")
    for name, value in (("adapter", adapter), ("load_in_4bit", four), ("load_in_8bit", eight)):
        if value is not None:
            draft.note(name, value, "model.quantization")
    if adapter:
        if adapter not in ("lora", "qlora"):
            draft.differ("adapter", adapter, "a LoRA is trained in its place")
        convert_adapter(draft)
    else:
        draft.put("adapter", None)
        if four or eight:
            draft.differ("adapter", None, WORDS["full"])
        for name in [name for name in draft.source if name.startswith(("lora_", "peft_"))]:
            draft.leave(name, "no adapter is trained")
    if draft.source.get("float32"):
        draft.put("model.dtype", "float32")
        draft.note("float32", draft.take("float32"), "model.dtype")
    draft.dtypes("bf16", "fp16", "bfloat16", "float16", "float32")


def convert_adapter(draft: RecipeDraft) -> None:
    """Convert LoRA's own settings."""
    draft.carry("lora_model_dir", "adapter.init_from", draft.place_of)
    draft.carry_all(FIELDS["adapter"], {"adapter.dropout": 0.0})
    draft.carry("lora_target_parameters", "adapter.target_parameters", lambda it: [it] if isinstance(it, str) else it)
    linear, targets = draft.flag("lora_target_linear"), draft.take("lora_target_modules")
    place = "adapter.target_modules" + (": all-linear" if linear else "")
    for name, value in (("lora_target_linear", linear), ("lora_target_modules", targets or None)):
        if value is not None:
            draft.note(name, value, place)
    if linear or targets:
        draft.put("adapter.target_modules", "all-linear" if linear else targets)
    else:
        draft.differ("lora_target_modules", None, WORDS["lora_target_modules"])


def convert_attention(draft: RecipeDraft) -> None:
    """Convert the choice of an attention kernel, which axolotl spells in several ways."""
    for name in FIELDS["attention"]:
        if (wanted := draft.take(name)) is None:
            continue
        if wanted == "eager" or wanted and name == "eager_attention":
            draft.put("model.attention", "eager")
            draft.note(name, wanted, "model.attention")
        elif wanted in (False, "sdpa") or name == "sdp_attention":
            draft.note(name, wanted, "model.attention: auto")
        else:
            draft.differ(name, wanted, words.ATTENTION)


def convert_template(draft: RecipeDraft) -> None:
    """Convert the chat template, if it is known by its name."""
    template = draft.source.get("chat_template")
    if not isinstance(template, str):
        return
    draft.take("chat_template")
    if template == "tokenizer_default":
        draft.note("chat_template", template, "model.chat_template: null")
    elif name := find_template(template.removeprefix("tokenizer_default_fallback_")):
        draft.put("model.chat_template", name)
        draft.note("chat_template", template, "model.chat_template")
        if template.startswith("tokenizer_default"):
            draft.differ("chat_template", template, "set whether or not the tokenizer has one of its own")
    else:
        draft.leave_value("chat_template", template, WORDS["chat_template"])


def convert_data(draft: RecipeDraft) -> None:
    """Convert data sets and the treatment of long pairs."""
    draft.put("data.train", sources_of(draft, "datasets"))
    if "test_datasets" in draft.source:
        draft.put("data.eval", sources_of(draft, "test_datasets"))
    wanted = draft.take("excess_length_strategy")
    if wanted is not None:
        draft.note("excess_length_strategy", wanted, "data.overlong")
    if wanted == "raise":
        draft.differ("excess_length_strategy", wanted, "pairs that are too long are dropped and counted")
    draft.put("data.overlong", "truncate" if wanted == "truncate" else "drop")
    draft.held_out("val_set_size")


def sources_of(draft: RecipeDraft, field: str) -> list[dict[str, Any]]:
    """Convert the entries of `datasets` or `test_datasets` into data sources."""
    found: list[dict[str, Any]] = []
    for place, given in enumerate(as_list(draft.take(field, []))):
        entry, where = dict(given) if isinstance(given, dict) else {"path": str(given)}, f"{field}.{place}"
        path, source = entry.pop("path", None), {}
        files = [str(file) for file in as_list(entry.pop("data_files", None) or [])]
        local = path in (None, "json", "jsonl", "csv", "parquet", "text") or draft.place_of(path).startswith(("/", "."))
        if files and not local:
            draft.leave_value(f"{where}.data_files", files, WORDS["data_files"])
            files = []
        if path:
            draft.note(f"{where}.path", path, "data path")
        for name in ("name", "split", "revision"):
            if entry.get(name) is not None:
                source[name] = entry.pop(name)
                draft.note(f"{where}.{name}", source[name], name)
        if columns := columns_of(draft, where, entry):
            source["columns"] = columns
        for name, value in entry.items():
            if value is not None:
                draft.leave_value(f"{where}.{name}", value, LEFT.get(name, WORDS["shape"]))
        found += [{"path": draft.place_of(file)} | source for file in files or [path]]
    return found


def columns_of(draft: RecipeDraft, where: str, entry: dict[str, Any]) -> dict[str, str]:
    """Take the names of columns and the type off a data set's entry."""
    kind = entry.pop("type", None)
    inside = dict(kind) if isinstance(kind, dict) else {}
    columns = {}
    for ours in ("prompt", "chosen", "rejected", "system", "tools"):
        given = [
            one for one in (entry.pop(f"field_{ours}", None), inside.pop(f"field_{ours}", None)) if one is not None
        ]
        if given:
            columns[ours] = str(given[-1])
            draft.note(f"{where}.field_{ours}", columns[ours], f"columns.{ours}")
    for name, value in inside.items():
        if value is not None:
            draft.leave_value(f"{where}.type.{name}", value, WORDS["type"])
    if kind in ("chat_template.argilla", "chat_template"):
        draft.note(f"{where}.type", kind, "detected from the rows")
    elif kind is not None and not isinstance(kind, dict):
        draft.leave_value(f"{where}.type", kind, WORDS["shape"])
    return columns


def convert_training(draft: RecipeDraft) -> None:
    """Convert batches, optimizer, schedule, checkpointing and logging."""
    training = draft.recipe.setdefault("training", {})
    training.setdefault("per_device_eval_batch_size", training.get("per_device_train_batch_size", 1))
    ratio, steps = draft.take("warmup_ratio"), draft.take("warmup_steps")
    if steps is not None:
        draft.note("warmup_steps", steps, "training.warmup_steps")
        if ratio is not None:
            draft.leave_value("warmup_ratio", ratio, "warmup_steps takes precedence")
    elif ratio is not None:
        draft.note("warmup_ratio", ratio, "training.warmup_steps, below 1 a share of all steps")
    if ratio is not None or steps is not None:
        training["warmup_steps"] = ratio if steps is None else steps
    convert_optimizer(draft)
    convert_checkpointing(draft)
    found = []
    for name, (flag, project) in FIELDS["trackers"].items():
        if (wanted := draft.flag(flag)) is not None:
            draft.note(flag, wanted, "training.report_to")
        if wanted or wanted is None and draft.source.get(project):
            found.append(name)
    if found:
        training["report_to"] = found
    convert_pace(draft)
    if draft.source.get("tf32") == "auto":
        draft.leave("tf32", "set training.tf32: true on a card that has it")
    elif not draft.source.get("tf32", True):  # false is the default, and a card without it refuses the field
        draft.note("tf32", draft.take("tf32"), "training.tf32")
    draft.training(FIELDS["defaults"], LEFT)
    accumulation = draft.recipe["training"]["gradient_accumulation_steps"]
    if (number(accumulation) or 1) > 1:
        draft.put("orpo.nll_mean", "micro")
        draft.differ("gradient_accumulation_steps", accumulation, WORDS["gradient_accumulation_steps"])


def convert_optimizer(draft: RecipeDraft) -> None:
    """Convert optimizer and schedule, where transformers has one of that name."""
    for theirs, ours in (("optimizer", "optim"), ("lr_scheduler", "lr_scheduler_type")):
        if (wanted := draft.take(theirs)) is None:
            continue
        try:
            draft.put(f"training.{ours}", check_training_field(ours, "adamw_torch" if wanted == "adamw_hf" else wanted))
            draft.note(theirs, wanted, f"training.{ours}")
        except ValueError:
            draft.leave_value(
                theirs,
                wanted,
                f"transformers has none of this name: training.{ours} is {FIELDS['defaults'][ours]}, axolotl's default",
            )
    schedule = draft.recipe["training"].get("lr_scheduler_type", "cosine")
    if schedule == "cosine" and (floor := draft.take("cosine_min_lr_ratio")) is not None:
        draft.put("training.lr_scheduler_type", "cosine_with_min_lr")
        draft.put("training.lr_scheduler_kwargs", {"min_lr_rate": floor})
        draft.note("cosine_min_lr_ratio", floor, "training.lr_scheduler_kwargs.min_lr_rate")


def convert_checkpointing(draft: RecipeDraft) -> None:
    """Convert gradient checkpointing and the offload of activations."""
    wanted, offload = draft.take("gradient_checkpointing"), draft.source.get("activation_offloading")
    draft.put("memory.checkpointing", "all" if wanted or offload else "none")
    if wanted is not None:
        draft.note("gradient_checkpointing", wanted, "memory.checkpointing")
    if wanted == "offload_disk":
        draft.differ("gradient_checkpointing", wanted, WORDS["offload_disk"])
    if offload:
        draft.note("activation_offloading", draft.take("activation_offloading"), "memory.offload_activations")
    if offload or wanted in ("offload", "offload_disk"):
        draft.put("memory.offload_activations", True)


def convert_pace(draft: RecipeDraft) -> None:
    """Convert when to evaluate and to save: axolotl counts by epoch, transformers by a share of all steps."""
    training = draft.recipe["training"]
    epochs = number(training.get("num_train_epochs")) or 1
    for kind, field in (("eval", "evals_per_epoch"), ("save", "saves_per_epoch")):
        times, steps = draft.take(field), draft.source.get(f"{kind}_steps")
        count = number(times)
        if steps:
            if times is not None:
                draft.leave_value(field, times, f"{kind}_steps takes precedence")
            if not count:
                training[f"{kind}_strategy"] = "steps"
        elif count and count != 1 and 1 / (count * epochs) < 1:
            training |= {f"{kind}_strategy": "steps", f"{kind}_steps": 1 / (count * epochs)}
            draft.note(field, times, f"training.{kind}_steps, a share of all steps")
        elif count:
            training[f"{kind}_strategy"] = "epoch"
            draft.note(field, times, f"training.{kind}_strategy")
        elif times is not None:
            draft.leave_value(field, times, f"not a number of times: {kind}_steps and {kind}_strategy are used")
    if not draft.recipe["data"]["eval_fraction"] and "eval" not in draft.recipe["data"]:
        training["eval_strategy"] = "no"
        draft.leave("eval_strategy", WORDS["no_pairs"])
        draft.leave("eval_steps", WORDS["no_pairs"])
        training.pop("eval_steps", None)
    elif "eval_strategy" not in training and "eval_strategy" not in draft.source:
        training["eval_strategy"] = "no"
        draft.leave_value("eval_strategy", None, WORDS["eval_strategy"])
