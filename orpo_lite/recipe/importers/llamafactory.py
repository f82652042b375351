"""LLaMA-Factory's `stage: dpo`, `pref_loss: orpo` YAML (fields as of 0.9.6) as a recipe."""

import json
from pathlib import Path
from typing import Any

from orpo_lite.common.errors import RequestError
from orpo_lite.recipe.importers.draft import RecipeDraft, number, table

FIELDS = table("llamafactory")
WORDS: dict[str, str] = FIELDS["words"]


def convert(draft: RecipeDraft) -> None:
    """Fill the draft's recipe from a LLaMA-Factory configuration."""
    for name in ("stage", "pref_loss"):
        draft.take(name)
    draft.carry("model_name_or_path", "model.name_or_path", draft.place_of)
    draft.fill(FIELDS)
    convert_weights(draft)
    convert_template(draft)
    convert_data(draft)
    convert_training(draft)
    draft.rest(FIELDS["left"], FIELDS["same"])


def convert_weights(draft: RecipeDraft) -> None:
    """Convert quantization, adapter and new tokens."""
    kind, held = draft.take("finetuning_type", "lora"), quantization_of(draft)
    if kind == "full":
        draft.put("adapter", None)
        if held != "none":
            draft.differ("quantization_bit", held, WORDS["full"])
            held = "none"
    else:
        if kind != "lora":
            draft.differ("finetuning_type", kind, "a LoRA is trained in its place")
        convert_adapter(draft)
    draft.put("model.quantization", held)
    tokens = [word for name in ("add_tokens", "add_special_tokens") for word in draft.names(name)]
    if tokens:
        draft.put("model.new_tokens", tokens)


def quantization_of(draft: RecipeDraft) -> str:
    """Return the recipe's quantization for the file's bits."""
    bits = draft.take("quantization_bit")
    if bits is None:
        return "none"
    if bits == 4:
        return draft.take("quantization_type", "nf4")
    draft.differ("quantization_bit", bits, WORDS["eight" if bits == 8 else "bits"])
    return "nf4" if bits == 8 else "none"


def convert_adapter(draft: RecipeDraft) -> None:
    """Convert LoRA's own settings."""
    folders = draft.names("adapter_name_or_path")
    if folders:
        draft.put("adapter.init_from", draft.place_of(folders[0]))
    if folders[1:]:
        draft.leave_value("adapter_name_or_path", ", ".join(folders[1:]), WORDS["adapter_name_or_path"])
    rank = number(draft.source.get("lora_rank", 8)) or 8
    for place, value in {"r": 8, "alpha": 2 * rank, "dropout": 0.0}.items():
        draft.put(f"adapter.{place}", value)
    draft.carry_all(FIELDS["adapter"])
    targets = draft.names("lora_target") or ["all"]
    draft.put("adapter.target_modules", "all-linear" if targets == ["all"] else targets)
    if more := draft.names("additional_target"):
        draft.put("adapter.modules_to_save", more)


def convert_template(draft: RecipeDraft) -> None:
    """Convert the chat template, if it is known by its name, and the thinking mode."""
    template = str(draft.take("template", ""))
    if template:
        draft.template("template", template, WORDS["template"])
    thinking = draft.take("enable_thinking", False if template.endswith("_nothink") else None)
    if thinking is not None:
        draft.put("data.template_kwargs", {"enable_thinking": thinking})


def convert_data(draft: RecipeDraft) -> None:
    """Convert data sets, by dataset_info.json, and their sizes."""
    folder, info = dataset_info(draft)
    for name, place in (("dataset", "data.train"), ("eval_dataset", "data.eval")):
        if name in draft.source or name == "dataset":
            draft.put(place, [source_of(draft, one, folder, info) for one in draft.names(name)])
    data = draft.recipe["data"]
    draft.differ("cutoff_len", data["max_length"], WORDS["cutoff_len"])
    draft.held_out("val_size", WORDS["no_pairs"])
    if "max_rows" in data:
        if len(data["train"]) > 1:
            draft.differ("max_samples", data["max_rows"], WORDS["max_samples"])
        if "eval" in data:
            data["max_eval_rows"] = data["max_rows"]


def dataset_info(draft: RecipeDraft) -> tuple[Path, dict[str, Any]]:
    """Return the folder of the data sets and the content of its dataset_info.json, empty where there is none.

    Raises:
        RequestError: the file is not JSON, or not a mapping.
    """
    given = Path(str(draft.take("dataset_dir", "data")))
    for place in (given, draft.folder / given, draft.folder):
        file = place / "dataset_info.json"
        if file.is_file():
            try:
                return place, dict(json.loads(file.read_text("utf-8")))
            except (ValueError, TypeError, OSError, RecursionError) as error:
                raise RequestError(f"{file}: not readable as names of data sets in JSON ({error}): fix it") from error
    return given, {}


def source_of(draft: RecipeDraft, name: str, folder: Path, info: dict[str, Any]) -> dict[str, Any]:
    """Convert a named data set into a data source."""
    known = info.get(name, FIELDS["datasets"].get(name))
    if not isinstance(known, dict):
        place = draft.place_of(name)
        if place == name and not (Path(name).exists() or "/" in name):
            where = f"dataset_info.json in {folder} has no such name"
            draft.leave_value("dataset", name, WORDS["dataset"].format(found=where, name=name))
        return {"path": place}
    entry = draft.inside(known, f"dataset_info.{name}")
    if hub := entry.take("hf_hub_url"):
        entry.leave("file_name", "hf_hub_url takes precedence, as in LLaMA-Factory")
        entry.carry_all({"subset": "name", "split": "split"})
    file = entry.take("file_name")
    path = str(hub or (folder / str(file) if file else name))
    if not hub and not Path(path).exists():
        draft.leave_value("dataset", name, WORDS["dataset"].format(found=f"{path} is not there", name=name))
    entry.put("path", path)
    if not entry.take("ranking"):
        entry.differ("ranking", False, WORDS["ranking"])
    formatting = str(entry.take("formatting", "alpaca"))
    usual = FIELDS["columns"].get(formatting, FIELDS["columns"]["sharegpt"])
    entry.flatten("columns")
    for field, actual in list(entry.source.items()):
        theirs = field.removeprefix("columns.")
        if theirs != field and usual.get(theirs) == actual:
            entry.take(field)
    entry.carry_all(FIELDS["dataset"])
    if formatting == "alpaca" and "prompt" in entry.recipe.get("columns", {}):
        draft.put("data.apply_template", True)
    entry.rest(FIELDS["dataset_left"])
    return entry.recipe


def convert_training(draft: RecipeDraft) -> None:
    """Convert batches, schedule and evaluation."""
    draft.training(FIELDS)
    training = draft.recipe["training"]
    batch = int(number(training["per_device_train_batch_size"]) or 1)
    if batch == 1:
        draft.put("orpo.nll_mean", "micro")
    steps = batch * int(number(training["gradient_accumulation_steps"]) or 1)
    draft.differ("pref_loss", "orpo", WORDS["one_pair" if batch == 1 else "nll"].format(steps=steps))
