"""Data sets of an axolotl configuration."""

from __future__ import annotations

from typing import Any

from orpo_lite.recipe.importers.draft import Draft, number


def convert_data(draft: Draft) -> None:
    draft.put("data.train", sources(draft, "datasets"))
    if "test_datasets" in draft.source:
        draft.put("data.eval", sources(draft, "test_datasets"))
    draft.carry("sequence_len", "data.max_length", 512)
    wanted = draft.take("excess_length_strategy")
    if wanted is not None:
        draft.carried_as("excess_length_strategy", wanted, "data.overlong")
        if wanted == "raise":
            draft.differ("excess_length_strategy", wanted, "pairs that are too long are dropped and counted")
    draft.put("data.overlong", "truncate" if wanted == "truncate" else "drop")
    held = draft.take("val_set_size")
    size = number(held) or 0
    if held is not None:
        draft.carried_as("val_set_size", held, "data.eval_fraction")
    if size >= 1:
        draft.put("data.max_eval_rows", int(size))
        draft.differ("val_set_size", held, f"data.eval_fraction is 0.05, and no more than {int(size)} of those pairs are kept (data.max_eval_rows)")  # fmt: skip
        size = 0.05
    draft.put("data.eval_fraction", size)
    for name in ("dataset_num_proc", "dataset_processes"):
        draft.carry(name, "data.num_proc")
    draft.put("data.completion_end", "trl")


def sources(draft: Draft, field: str) -> list[dict[str, Any]]:
    """Entries of `datasets` or `test_datasets` as data sources."""
    given = draft.take(field, [])
    entries = given if isinstance(given, list) else [given]
    found = []
    for place, entry in enumerate(entries):
        entry = (
            {"path": entry}
            if isinstance(entry, str)
            else dict(entry)
            if isinstance(entry, dict)
            else {"path": str(entry)}
        )
        where, source = f"{field}.{place}", {}
        path, files = entry.pop("path", None), entry.pop("data_files", None)
        if files:
            files = [files] if isinstance(files, str) else list(files) if isinstance(files, list) else [str(files)]
            if (
                path
                and path not in ("json", "jsonl", "csv", "parquet", "text")
                and not draft.place_of(str(path)).startswith(("/", "."))
            ):
                draft.leave_value(
                    f"{where}.data_files",
                    files,
                    "whole splits are read: name the split, or download the files and give their paths",
                )
                files = None
        if path:
            draft.carried_as(f"{where}.path", path, "data path")
        for name in ("name", "split", "revision"):
            if entry.get(name) is not None:
                source[name] = entry.pop(name)
                draft.carried_as(f"{where}.{name}", source[name], name)
        columns = columns_of(draft, where, entry)
        if columns:
            source["columns"] = columns
        for name, value in entry.items():
            if value is not None:
                draft.leave_value(f"{where}.{name}", value, DATASET.get(name, "the shape of the rows is read off the rows: see `python -m orpo_lite.data --recipe FILE`"))  # fmt: skip
        for file in files or [path]:
            found.append({"path": draft.place_of(str(file))} | source)
    return found


DATASET = {"ds_type": "the format is told by the file itself", "trust_remote_code": "code of a data set is never run"}


def columns_of(draft: Draft, where: str, entry: dict[str, Any]) -> dict[str, str]:
    """Column names in a dataset's entry, and its type."""
    kind = entry.pop("type", None)
    fields = dict(entry) | (kind if isinstance(kind, dict) else {})
    columns = {}
    for ours in ("prompt", "chosen", "rejected", "system", "tools"):
        name = f"field_{ours}"
        if fields.get(name) is not None:
            columns[ours] = str(fields.pop(name))
            entry.pop(name, None)
            draft.carried_as(f"{where}.{name}", columns[ours], f"columns.{ours}")
    if isinstance(kind, dict):
        for name, value in kind.items():
            if value is not None and name.removeprefix("field_") not in columns:
                draft.leave_value(f"{where}.type.{name}", value, "the chat template writes the turns: set data.apply_template for plain text, or write the text into the data")  # fmt: skip
    elif kind in ("chat_template.argilla", "chat_template"):
        draft.carried_as(f"{where}.type", kind, "read off the rows")
    elif kind is not None:
        draft.leave_value(
            f"{where}.type",
            kind,
            "the shape of the rows is read off the rows: see `python -m orpo_lite.data --recipe FILE`",
        )
    return columns
