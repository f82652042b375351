"""axolotl's `rl: orpo` YAML (fields as of 0.18) as a recipe."""

from typing import Any

from orpo_lite.recipe.importers.draft import RecipeDraft, as_list, number, table

FIELDS = table("axolotl")
WORDS: dict[str, str] = FIELDS["words"]
ROWS_OF_A_FILE = (None, "json", "jsonl", "csv", "parquet", "text")
"""Paths of a data set that leave it to `data_files`."""


def convert(draft: RecipeDraft) -> None:
    """Fill the draft's recipe from an axolotl configuration."""
    draft.carry("base_model", "model.name_or_path", draft.place_of)
    draft.take("rl")
    for name in ("trl", "special_tokens"):
        draft.flatten(name)
    draft.fill(FIELDS)
    convert_weights(draft)
    template = str(draft.take("chat_template", "tokenizer_default"))
    if template != "tokenizer_default":
        draft.template("chat_template", template, WORDS["chat_template"])
    draft.put("data.train", sources_of(draft, "datasets"))
    if "test_datasets" in draft.source:
        draft.put("data.eval", sources_of(draft, "test_datasets"))
    draft.held_out("val_set_size", WORDS["no_pairs"])
    convert_training(draft)
    draft.rest(FIELDS["left"], FIELDS["same"])


def convert_weights(draft: RecipeDraft) -> None:
    """Convert quantization, and the adapter with LoRA's own settings."""
    kind, four, eight = draft.take("adapter"), draft.flag("load_in_4bit"), draft.flag("load_in_8bit")
    quantized = bool(kind and (four or eight or four is None and kind == "qlora"))
    draft.put("model.quantization", "nf4" if quantized else "none")
    draft.flatten("bnb_config_kwargs")
    if quantized:
        draft.carry_all(FIELDS["nf4"])
        if eight and not four:
            draft.differ("load_in_8bit", eight, WORDS["load_in_8bit"])
    if not kind:
        draft.put("adapter", None)
        if four or eight:
            draft.differ("adapter", None, WORDS["full"])
        for name in [name for name in draft.source if name.startswith(("lora_", "peft_"))]:
            draft.leave(name, "no adapter is trained")
        return
    if kind not in ("lora", "qlora"):
        draft.differ("adapter", kind, "a LoRA is trained in its place")
    draft.carry("lora_model_dir", "adapter.init_from", draft.place_of)
    draft.put("adapter.dropout", 0.0)
    draft.carry_all(FIELDS["adapter"])
    draft.carry("lora_target_parameters", "adapter.target_parameters", as_list)
    linear, targets = draft.flag("lora_target_linear"), draft.take("lora_target_modules")
    if linear or targets:
        draft.put("adapter.target_modules", "all-linear" if linear else targets)
    else:
        draft.differ("lora_target_modules", None, WORDS["lora_target_modules"])


def sources_of(draft: RecipeDraft, field: str) -> list[dict[str, Any]]:
    """Convert the entries of `datasets` or `test_datasets` into data sources."""
    found: list[dict[str, Any]] = []
    for index, given in enumerate(as_list(draft.take(field, []))):
        entry = draft.inside(given if isinstance(given, dict) else {"path": given}, f"{field}.{index}")
        path, files = entry.take("path"), as_list(entry.source.get("data_files", []))
        if path in ROWS_OF_A_FILE or draft.place_of(path).startswith(("/", ".")):
            entry.take("data_files")
        else:
            entry.leave("data_files", WORDS["data_files"])
            files = []
        if isinstance(entry.source.get("type"), str):
            entry.take("type")
        entry.flatten("type")
        entry.carry_all(FIELDS["dataset"])
        entry.rest(FIELDS["left"] | FIELDS["dataset_left"], FIELDS["same"])
        found += [{"path": draft.place_of(file)} | entry.recipe for file in files or [path]]
    return found


def convert_training(draft: RecipeDraft) -> None:
    """Convert batches, optimizer, schedule and logging."""
    training = draft.recipe.setdefault("training", {})
    training.setdefault("per_device_eval_batch_size", training.get("per_device_train_batch_size", 1))
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


def convert_pace(draft: RecipeDraft) -> None:
    """Convert when to evaluate and to save: axolotl counts by epoch, transformers by a share of all steps."""
    training = draft.recipe["training"]
    epochs = number(training.get("num_train_epochs")) or 1
    for kind, name in (("eval", "evals_per_epoch"), ("save", "saves_per_epoch")):
        count = number(draft.take(name))
        if draft.source.get(f"{kind}_steps"):
            training[f"{kind}_strategy"] = "steps"
        elif count and (count == 1 or count * epochs <= 1):
            training[f"{kind}_strategy"] = "epoch"
        elif count:
            training |= {f"{kind}_strategy": "steps", f"{kind}_steps": 1 / (count * epochs)}
