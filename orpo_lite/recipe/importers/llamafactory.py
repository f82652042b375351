"""LLaMA-Factory's `stage: dpo`, `pref_loss: orpo` YAML (fields as of 0.9.6) as a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from orpo_lite.common.errors import RequestError
from orpo_lite.recipe.importers import draft as words
from orpo_lite.recipe.importers.draft import RecipeDraft, number, spelled, table
from orpo_lite.recipe.loading import find_template

FIELDS = table("llamafactory")
WORDS: dict[str, str] = FIELDS["words"]


def convert(draft: RecipeDraft) -> None:
    """Fill the draft's recipe from a LLaMA-Factory configuration."""
    for name in ("stage", "pref_loss"):
        if name in draft.source:
            draft.note(name, draft.take(name), "orpo")
    draft.carry("model_name_or_path", "model.name_or_path", draft.place_of)
    silent = {"orpo.beta": 0.1, "orpo.nll_scope": "chosen", "data.max_length": 2048, "data.overlong": "truncate"}
    draft.carry_all(FIELDS["places"], silent)
    draft.carry("orpo_beta" if "orpo_beta" in draft.source else "pref_beta", "orpo.beta")
    convert_weights(draft)
    convert_template(draft)
    convert_data(draft)
    convert_training(draft)
    draft.rest(FIELDS["left"])


def convert_weights(draft: RecipeDraft) -> None:
    """Convert quantization, adapter, precision, attention and new tokens."""
    kind, held = draft.take("finetuning_type", "lora"), quantization_of(draft)
    draft.note("finetuning_type", kind, "adapter")
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
    draft.dtypes("bf16", "fp16", "pure_bf16")
    wanted = draft.take("flash_attn")
    if wanted in ("disabled", False):
        draft.put("model.attention", "eager")
    if wanted in ("fa2", "fa3"):
        draft.differ("flash_attn", wanted, words.ATTENTION)
    elif wanted is not None:
        draft.note("flash_attn", wanted, "model.attention")
    off = draft.flag("disable_gradient_checkpointing")
    draft.put("memory.checkpointing", "none" if off else "all")
    if off:
        draft.note("disable_gradient_checkpointing", off, "memory.checkpointing")
    tokens = [word for name in ("add_tokens", "add_special_tokens") for word in draft.names(name, "model.new_tokens")]
    if tokens:
        draft.put("model.new_tokens", tokens)
        if draft.take("resize_vocab") is not None:
            draft.note("resize_vocab", True, "model.new_tokens")


def quantization_of(draft: RecipeDraft) -> str:
    """Return the recipe's quantization for the file's bits and method."""
    bits, method = draft.take("quantization_bit"), draft.take("quantization_method", "bnb")
    if bits is None:
        return "none"
    if str(method) not in ("bnb", "bitsandbytes"):
        draft.leave_value(
            "quantization_method",
            method,
            WORDS["quantization_method"],
        )
        draft.leave_value("quantization_bit", bits, f"of {method}: model.quantization is none")
        return "none"
    held = {4: draft.take("quantization_type", "nf4"), 8: "int8"}.get(int(number(bits) or 0), "none")
    draft.note("quantization_bit", bits, "model.quantization")
    draft.note("quantization_method", method, "model.quantization")
    if held == "none":
        draft.differ("quantization_bit", bits, WORDS["bits"])
    return held


def convert_adapter(draft: RecipeDraft) -> None:
    """Convert LoRA's own settings."""
    folders = draft.names("adapter_name_or_path", "adapter.init_from")
    if folders:
        draft.put("adapter.init_from", draft.place_of(folders[0]))
    for folder in folders[1:]:
        draft.leave_value(
            "adapter_name_or_path",
            folder,
            WORDS["adapter_name_or_path"],
        )
    rank = number(draft.source.get("lora_rank", 8)) or 8
    draft.carry_all(FIELDS["adapter"], {"adapter.r": 8, "adapter.alpha": 2 * rank, "adapter.dropout": 0.0})
    targets = draft.names("lora_target", "adapter.target_modules") or ["all"]
    draft.put("adapter.target_modules", "all-linear" if targets == ["all"] else targets)
    if more := draft.names("additional_target", "adapter.modules_to_save"):
        draft.put("adapter.modules_to_save", more)
    if draft.flag("pissa_init"):
        steps = draft.take("pissa_iter", 16)
        draft.put("adapter.init_lora_weights", f"pissa_niter_{steps}" if (number(steps) or 0) > 0 else "pissa")
        draft.note("pissa_init", True, "adapter.init_lora_weights")
        if draft.take("pissa_convert") is not None:
            draft.note("pissa_convert", True, "the adapter is always written as a plain LoRA")


def convert_template(draft: RecipeDraft) -> None:
    """Convert the chat template, if it is known by its name, and the thinking mode."""
    template, thinking = draft.take("template"), draft.take("enable_thinking")
    if isinstance(template, str):
        if name := find_template(template):
            draft.put("model.chat_template", name)
            draft.note("template", template, "model.chat_template")
        else:
            draft.leave_value(
                "template",
                template,
                WORDS["template"],
            )
        if template.endswith("_nothink") and thinking is None:
            thinking = False
    if thinking is not None:
        draft.put("data.template_kwargs", {"enable_thinking": thinking})
        draft.note("enable_thinking", thinking, "data.template_kwargs")


def convert_data(draft: RecipeDraft) -> None:
    """Convert data sets, by dataset_info.json, and their sizes."""
    folder, info = dataset_info(draft)
    for field, place in (("dataset", "data.train"), ("eval_dataset", "data.eval")):
        names = draft.names(field, place)
        if names or field == "dataset":
            draft.put(place, [source_of(draft, name, folder, info) for name in names])
    data = draft.recipe["data"]
    draft.differ("cutoff_len", data["max_length"], WORDS["cutoff_len"])
    draft.held_out("val_size")
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
    given = draft.take("dataset_dir")
    if given is not None:
        draft.note("dataset_dir", given, "paths in data.train")
    places = [] if given is None else [Path(str(given)), draft.folder / str(given)]
    places += [Path("data"), draft.folder / "data", draft.folder]
    for place in places:
        file = place / "dataset_info.json"
        if file.is_file():
            try:
                info = json.loads(file.read_text("utf-8"))
            except (ValueError, OSError, RecursionError) as error:
                raise RequestError(f"{file}: not readable as JSON ({error}): fix it") from error
            if not isinstance(info, dict):
                raise RequestError(f"{file}: found {type(info).__name__}, expected names of data sets")
            return place, info
    return places[0], {}


def source_of(draft: RecipeDraft, name: str, folder: Path, info: dict[str, Any]) -> dict[str, Any]:
    """Convert a named data set into a data source."""
    if not isinstance(info.get(name), dict):
        draft.differ("dataset", name, WORDS["dataset"])
        return {"path": draft.place_of(name)}
    about, where = dict(info[name]), f"dataset_info.{name}"
    hub, file = about.pop("hf_hub_url", None), about.pop("file_name", None)
    source: dict[str, Any] = {"path": str(hub or (folder / str(file) if file else name))}
    draft.note(f"{where}.{'hf_hub_url' if hub else 'file_name'}", hub or file, "data path")
    if hub and file:
        draft.leave_value(f"{where}.file_name", file, "hf_hub_url takes precedence, as in LLaMA-Factory")
    for theirs, ours in (("subset", "name"), ("split", "split")):
        if (value := about.pop(theirs, None)) is not None:
            draft.note(f"{where}.{theirs}", value, ours)
            source |= {ours: value} if hub else {}
    if not spelled("ranking", about.pop("ranking", False)):
        draft.differ(f"{where}.ranking", False, WORDS["ranking"])
    columns, formatting = about.pop("columns", None), str(about.pop("formatting", "alpaca"))
    if names := columns_of(draft, where, formatting, columns if isinstance(columns, dict) else {}):
        source["columns"] = names
    for key, value in about.items():
        draft.leave_value(f"{where}.{key}", value, FIELDS["dataset_left"].get(key, "no equivalent here"))
    return source


def columns_of(draft: RecipeDraft, where: str, formatting: str, given: dict[str, Any]) -> dict[str, str]:
    """Return the column map of a data set whose columns do not have their usual names."""
    usual = FIELDS["columns"].get(formatting, FIELDS["columns"]["sharegpt"])
    found: dict[str, str] = {}
    for theirs, actual in given.items():
        ours = "prompt" if theirs == "messages" else theirs
        if usual.get(theirs) == actual:
            draft.note(f"{where}.columns.{theirs}", actual, "detected from the rows")
        elif ours in ("prompt", "chosen", "rejected", "system", "tools"):
            found[ours] = str(actual)
            draft.note(f"{where}.columns.{theirs}", actual, f"columns.{ours}")
        else:
            why = f"name the column {usual[theirs]} in the data" if theirs in usual else "not used for pairs of text"
            draft.leave_value(f"{where}.columns.{theirs}", actual, why)
    if "prompt" in found and formatting == "alpaca":
        draft.put("data.apply_template", True)
    return found


def convert_training(draft: RecipeDraft) -> None:
    """Convert batches, schedule and evaluation."""
    if "warmup_ratio" in draft.source:
        ratio = draft.take("warmup_ratio")
        if draft.source.get("warmup_steps"):
            draft.leave_value("warmup_ratio", ratio, "warmup_steps takes precedence")
        else:
            draft.take("warmup_steps")
            draft.put("training.warmup_steps", ratio)
            draft.note("warmup_ratio", ratio, "training.warmup_steps, below 1 a share of all steps")
    if "evaluation_strategy" in draft.source:
        draft.source["eval_strategy"] = draft.take("evaluation_strategy")
    if not draft.recipe["data"]["eval_fraction"] and "eval" not in draft.recipe["data"]:
        for name in ("eval_strategy", "eval_steps"):
            draft.leave(name, WORDS["no_pairs"])
    if (sequential := draft.flag("disable_shuffling")) is not None:
        draft.note("disable_shuffling", sequential, "training.train_sampling_strategy")
        draft.put("training.train_sampling_strategy", "sequential" if sequential else "random")
    draft.training(FIELDS["defaults"], FIELDS["left"])
    training = draft.recipe["training"]
    batch = int(number(training["per_device_train_batch_size"]) or 1)
    if batch == 1:
        draft.put("orpo.nll_mean", "micro")
    steps = batch * int(number(training["gradient_accumulation_steps"]) or 1)
    draft.differ("pref_loss", "orpo", WORDS["one_pair" if batch == 1 else "nll"].format(steps=steps))
