"""Fields of a recipe's training section: transformers.TrainingArguments' own, read without importing it, and ours."""

from __future__ import annotations

import ast
import functools
import importlib.util
import math
import re
import typing
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from orpo_lite.common.text import nearest, shown

OURS: dict[str, Any] = {"save_minutes": float | None, "early_stopping_patience": int | None,
                        "on_nonfinite": typing.Literal["stop", "skip"]}  # fmt: skip
"""Fields that transformers does not have; ORPOConfig documents them."""
CHOICES = {
    "include_num_input_tokens_seen": ("all", "non_padding", "no"),
    "train_sampling_strategy": ("random", "sequential"),
    **dict.fromkeys(("log_level", "log_level_replica"), ("detail", "debug", "info", "warning", "error", "critical", "passive")),
}  # fmt: skip
"""Values of fields that are plain text to transformers, or where not all of its values work here."""
HUB_WORD = (
    "publish with `python -m orpo_lite.push RUN --repo USER/NAME`, which lists the files first, uploads no checkpoint, and creates "
    "a private repository unless asked otherwise"
)
ELSEWHERE = {
    "hub_token": "a token in a recipe would be written to the run folder: leave it out, and log in with `hf auth login` or set HF_TOKEN",
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision"),
                    f"a run uploads nothing to the hub: leave it out, and {HUB_WORD}"),
    "resume_from_checkpoint": "leave it out: the same command resumes from the newest good checkpoint by itself, and --resume asks for it",
    "label_smoothing_factor": "has no effect, as ORPO's loss has no label smoothing: leave it out",
}  # fmt: skip
"""Fields that a run does not use: why not, and what to do instead."""

UNSIGNED = {"weight_decay", "max_grad_norm", "warmup_steps", "adam_epsilon", "dataloader_num_workers",
            "neftune_noise_alpha"}  # fmt: skip
SEEDS = {"seed", "data_seed"}
BETAS = {"adam_beta1", "adam_beta2"}
POSITIVE = {"learning_rate", "num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size",
            "gradient_accumulation_steps", "logging_steps", "eval_steps", "save_steps", "save_minutes",
            "early_stopping_patience", "eval_accumulation_steps", "save_total_limit"}  # fmt: skip


def source_of(module: str) -> ast.Module:
    """Parse a module of transformers from its source: importing the package takes seconds."""
    found = importlib.util.find_spec("transformers")
    assert found and found.origin, "transformers is a dependency"
    return ast.parse(Path(found.origin).with_name(f"{module}.py").read_text("utf-8"))


def enums_of(tree: ast.Module) -> Iterator[tuple[str, Any]]:
    """Yield the enumerations that a module defines, by name, as classes of our own with the same members."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and any("Enum" in ast.unparse(base) for base in node.bases):
            assigned = [part for part in node.body if isinstance(part, ast.Assign)]
            members = {ast.unparse(part.targets[0]): ast.literal_eval(part.value) for part in assigned}
            yield node.name, Enum(node.name, members, type=str)


class Names(dict):
    """Names that annotations of fields use; a class that is not known here, such as an accelerate config, is Any."""

    def __missing__(self, name: str) -> Any:
        return Any


@functools.cache
def declared_fields() -> dict[str, tuple[Any, tuple[str, ...]]]:
    """Map every field of transformers.TrainingArguments to its type and to the choices in its metadata."""
    tree = source_of("training_args")
    names = Names(
        vars(typing) | {kind.__name__: kind for kind in (bool, int, float, str, list, dict, tuple, set, type(None))}
    )
    for module in (source_of("trainer_utils"), source_of("debug_utils"), tree):
        names.update(enums_of(module))
    found = {}
    [body] = [node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments"]
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and not node.target.id.startswith("_"):
            hint = eval(ast.unparse(node.annotation), {"__builtins__": {}}, names)  # noqa: S307 (transformers' own source)
            found[node.target.id] = hint, choices_in(node.value)
    return found


def choices_in(default: ast.expr | None) -> tuple[str, ...]:
    """Return the literal `choices` in the metadata of a `field(...)`."""
    for node in ast.walk(default) if default else ():
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "choices" and isinstance(value, ast.List):
                    return tuple(ast.literal_eval(value))
    return ()


@functools.cache
def training_fields() -> dict[str, Any]:
    """Map the name of every field of the training section to its type."""
    return {key: hint for key, (hint, _) in declared_fields().items()} | OURS


def choices_of(key: str) -> list[str]:
    """Return the texts that a training field takes where these are few: transformers' enums are `Enum | str` there."""
    hint, listed = declared_fields().get(key, (None, ()))
    options = [option for option in typing.get_args(hint) if isinstance(option, type) and issubclass(option, Enum)]
    return list(CHOICES.get(key, listed)) or [choice.value for option in options for choice in option]


def check_training_field(key: str, value: Any) -> Any:
    """Convert a value to its field's type (5e-6, which YAML reads as text, becomes a number).

    Raises:
        ValueError: not a field, or not a value that it takes; the message says what was found and expected.
    """
    if key in ELSEWHERE and value:
        found = "" if key == "hub_token" else f"found {shown(value)}, "
        raise ValueError(f"training.{key}: {found}{ELSEWHERE[key]}")
    fields = training_fields()
    if key not in fields:
        raise ValueError(f"training.{key}: not a field of transformers.TrainingArguments{nearest(key, fields)}")
    if key == "train_sampling_strategy" and value in ("group_by_length", "batch_rebalance"):
        raise ValueError(
            f"training.{key}: found {shown(value)}, expected random or sequential; set orpo.tokens_per_batch instead, which puts "
            "pairs of similar length together inside each optimizer step and deals them out evenly"
        )
    choices = choices_of(key)
    value = "no" if value is False and "no" in choices else value  # YAML reads an unquoted no as false
    if choices and isinstance(value, str) and value not in choices:
        raise ValueError(
            f"training.{key}: found {shown(value)}{nearest(value, choices)}, expected one of {', '.join(choices)}"
        )
    try:
        clean = TypeAdapter(fields[key], config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        raise ValueError(f"training.{key}: found {shown(value)}, expected: {wanted(error.errors()[0])}") from None
    if expected := broken_limit(key, clean):
        raise ValueError(f"training.{key}: found {shown(value)}, expected {expected}")
    return clean.value if isinstance(clean, Enum) else clean


def broken_limit(key: str, value: Any) -> str | None:
    """Return what a training field expects if its value, of the right type, is outside of its limits."""
    if key == "optim_args" and value and not all(re.fullmatch(r"[^=]+=[^=]+", part) for part in value.split(",")):
        return "name=value, several with commas between them"
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    if not isinstance(value, int | float):
        return None
    limits = {
        "a number above 0": key in POSITIVE and not value > 0,
        "0 or more": key in UNSIGNED and value < 0,
        "a number from 0 to below 1": key in BETAS and not 0 <= value < 1,
        "a number from 0 to 4294967295": key in SEEDS and not 0 <= value < 2**32,
        "a number above 0, or -1 to train num_train_epochs": key == "max_steps" and value < 1 and value != -1,
    }
    return next((expected for expected, broken in limits.items() if broken), None)


def wanted(item: Any) -> str:
    """Return pydantic's words for what it expected."""
    return item["msg"].removeprefix("Input should be ")
