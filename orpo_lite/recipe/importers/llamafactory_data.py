"""Data sets of a LLaMA-Factory configuration, through dataset_info.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from orpo_lite.common.errors import RequestError
from orpo_lite.recipe.importers.draft import Draft, number, spelt


def listed(draft: Draft, name: str, place: str) -> list[str]:
    """A field that holds names with commas between them."""
    value = draft.take(name)
    if value is None:
        return []
    draft.carried_as(name, value, place)
    if isinstance(value, str):
        return [word.strip() for word in value.split(",")]
    return [str(one) for one in (value if isinstance(value, list) else [value])]


def convert_data(draft: Draft) -> None:
    folder, info = dataset_info(draft)
    draft.put(
        "data.train",
        [source for name in listed(draft, "dataset", "data.train") for source in source_of(draft, name, folder, info)],
    )
    if held := listed(draft, "eval_dataset", "data.eval"):
        draft.put("data.eval", [source for name in held for source in source_of(draft, name, folder, info)])
    draft.carry("cutoff_len", "data.max_length", 2048)
    draft.put("data.overlong", "truncate")
    draft.differ("cutoff_len", draft.recipe["data"]["max_length"], "of a longer pair the answer is cut at its end (data.overlong: truncate); LLaMA-Factory shares the cut between prompt and answer")  # fmt: skip
    size = number(draft.source.get("val_size")) or 0
    if "val_size" in draft.source:
        draft.carried_as("val_size", draft.take("val_size"), "data.eval_fraction")
    if size >= 1:
        draft.put("data.max_eval_rows", int(size))
        draft.differ("val_size", size, f"data.eval_fraction is 0.05, and no more than {int(size)} of those pairs are kept (data.max_eval_rows)")  # fmt: skip
        size = 0.05
    draft.put("data.eval_fraction", size)
    if "max_samples" in draft.source:
        many = len(draft.recipe["data"]["train"]) > 1
        draft.carry("max_samples", "data.max_rows")
        if many:
            draft.differ(
                "max_samples",
                draft.recipe["data"]["max_rows"],
                "of all sources together, in their order, where LLaMA-Factory means each",
            )
        if "eval" in draft.recipe["data"]:
            draft.put("data.max_eval_rows", draft.recipe["data"]["max_rows"])
    draft.carry("preprocessing_num_workers", "data.num_proc")


def dataset_info(draft: Draft) -> tuple[Path, dict[str, Any]]:
    """The folder of the data sets and what its dataset_info.json says of them; empty where there is none."""
    given = draft.take("dataset_dir")
    if given is not None:
        draft.carried_as("dataset_dir", given, "paths in data.train")
    places = [Path(str(given))] if given is not None else []
    places += [draft.folder / place for place in places] + [Path("data"), draft.folder / "data", draft.folder]
    for place in places:
        if (place / "dataset_info.json").is_file():
            try:
                info = json.loads((place / "dataset_info.json").read_text("utf-8"))
            except (ValueError, OSError, RecursionError) as error:
                raise RequestError(f"{place / 'dataset_info.json'}: not readable as JSON ({error}): mend it") from error
            if not isinstance(info, dict):
                raise RequestError(
                    f"{place / 'dataset_info.json'}: found {type(info).__name__}, expected names of data sets"
                )
            return place, info
    return places[0], {}


def source_of(draft: Draft, name: str, folder: Path, info: dict[str, Any]) -> list[dict[str, Any]]:
    """A named data set as a data source."""
    about = info.get(name)
    if not isinstance(about, dict):
        draft.differ("dataset", name, "no dataset_info.json beside the file names it: taken as a path or a data set of the hub; give its file in data.train")  # fmt: skip
        return [{"path": draft.place_of(name)}]
    about = dict(about)
    where = f"dataset_info.{name}"
    hub, file = about.pop("hf_hub_url", None), about.pop("file_name", None)
    source: dict[str, Any] = {"path": str(hub or (folder / str(file) if file else name))}
    draft.carried_as(f"{where}.{'hf_hub_url' if hub else 'file_name'}", hub or file, "data path")
    if hub and file:
        draft.leave_value(f"{where}.file_name", file, "hf_hub_url goes before it, as in LLaMA-Factory")
    for theirs, ours in (("subset", "name"), ("split", "split")):
        if (value := about.pop(theirs, None)) is not None:
            if hub:
                source[ours] = value
            draft.carried_as(f"{where}.{theirs}", value, ours)
    formatting = about.pop("formatting", "alpaca")
    columns = about.pop("columns", None)
    if not spelt("ranking", about.pop("ranking", False)):
        draft.differ(f"{where}.ranking", False, "not marked as preference data: its rows must have chosen and rejected")
    names = columns_of(draft, where, formatting, columns if isinstance(columns, dict) else {})
    if names:
        source["columns"] = names
    for key, value in about.items():
        draft.leave_value(f"{where}.{key}", value, INFO.get(key, "nothing here answers to it"))
    return [source]


INFO = {"num_samples": "set data.max_rows", "folder": "give data.train the files", "ms_hub_url": "the Hugging Face hub is asked",
        "om_hub_url": "the Hugging Face hub is asked", "script_url": "code of a data set is never run", "cloud_file_name": "download it, and give its path",
        "tags": "the names of roles and contents are read off the rows"}  # fmt: skip


STANDARD = {"alpaca": {"prompt": "instruction", "query": "input", "history": "history", "system": "system", "chosen": "chosen", "rejected": "rejected"},
            "sharegpt": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected", "system": "system", "tools": "tools"}}  # fmt: skip
"""Column names that are read off the rows, by what LLaMA-Factory calls them."""


def columns_of(draft: Draft, where: str, formatting: Any, given: dict[str, Any]) -> dict[str, str]:
    """The column map of a data set whose columns are not named as usual."""
    usual = STANDARD.get(str(formatting), STANDARD["sharegpt"])
    found: dict[str, str] = {}
    for theirs, actual in given.items():
        if usual.get(theirs) == actual:
            draft.carried_as(f"{where}.columns.{theirs}", actual, "read off the rows")
        elif theirs in ("prompt", "chosen", "rejected", "system", "tools"):
            found[theirs] = str(actual)
            draft.carried_as(f"{where}.columns.{theirs}", actual, f"columns.{theirs}")
        elif theirs == "messages":
            found["prompt"] = str(actual)
            draft.carried_as(f"{where}.columns.messages", actual, "columns.prompt")
        else:
            draft.leave_value(f"{where}.columns.{theirs}", actual, f"name the column {usual.get(theirs, theirs)} in the data" if theirs in usual else "not used for preference pairs of text")  # fmt: skip
    if "prompt" in found and formatting == "alpaca":
        draft.put("data.apply_template", True)
    return found
