"""Values looked at one by one: what no field takes, fields of the training section, and words for both."""

from __future__ import annotations

import difflib
import functools
import math
import re
import typing
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

SECRET = re.compile(
    r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}|\b[a-z][a-z0-9+.-]*://[^\s/:@]+:[^\s/@]+@|\bgh[pousr]_[A-Za-z0-9]{20,}"
    r"|(?<![A-Za-z0-9])sk-[A-Za-z0-9_-]{20,}"
)
"""Shapes of credentials that a field may hold by mistake; `publish.SECRETS` has more, for whole files."""


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """', did you mean X?' where a known name is close, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def shown(value: Any, width: int = 100) -> str:
    """A value as Python writes it, cut: what a file holds can be of any size."""
    text = repr(str(value) if isinstance(value, Path) else value)
    return text if len(text) <= width else f"{text[:width]}..."


def leaves(value: Any, place: str = "") -> typing.Iterator[tuple[str, Any]]:
    """Every value that is neither mapping nor list, and every key that is text, with its dotted place."""
    if isinstance(value, dict):
        for key, item in value.items():
            inside = f"{place}.{key}".removeprefix(".")
            if isinstance(key, str) and unfit(key):
                yield f"{place or 'recipe'}, key {shown(key)}", key
            else:
                yield from leaves(item, inside)
    elif isinstance(value, list | tuple | set):
        for number, item in enumerate(value):
            yield from leaves(item, f"{place}.{number}")
    else:
        yield place, value


def unfit(value: Any) -> str | None:
    """What is wrong with a value wherever it stands, or None."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"found {value}, expected a finite number"
    if isinstance(value, str) and "\0" in value:
        return f"found {shown(value)}, which holds a NUL character: leave it out"
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        return f"found {shown(value)}, which holds half a character: write the character itself, not its escapes"
    if isinstance(value, str) and SECRET.search(value):
        return (
            "holds what looks like a token or password, and recipes are kept, shown and published: leave it out, and log in "
            "with `hf auth login` or set HF_TOKEN (WANDB_API_KEY) instead"
        )
    return None


def checked_pattern(pattern: Any) -> Any:
    """The value as it is, or ValueError if it is text but no regular expression."""
    try:
        if isinstance(pattern, str):
            re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"found {shown(pattern)}, which is no regular expression: {error}") from None
    return pattern


@functools.cache
def training_fields() -> dict[str, Any]:
    """Name -> type of every transformers.TrainingArguments field, and of ours (imports transformers)."""
    from transformers import TrainingArguments

    theirs = typing.get_type_hints(TrainingArguments)
    return {key: hint for key, hint in theirs.items() if not key.startswith("_")} | OURS


@functools.cache
def choices_of(key: str) -> tuple[str, ...]:
    """The texts that a training field takes, where transformers' help lists them and all work here, or we do."""
    from transformers import TrainingArguments

    own = {
        "include_num_input_tokens_seen": ("all", "non_padding", "no"),
        "train_sampling_strategy": ("random", "sequential"),
    }
    if key in own:
        return own[key]
    field = TrainingArguments.__dataclass_fields__.get(key)
    return tuple(field.metadata.get("choices") or ()) if field else ()


OURS: dict[str, Any] = {"save_minutes": float | None, "early_stopping_patience": int | None,
                        "on_nonfinite": typing.Literal["stop", "skip"]}  # fmt: skip
"""Fields of a recipe's training section that transformers does not have; ORPOConfig documents them."""


HUB_WORD = (
    "publish with `python -m orpo_lite.push RUN --repo USER/NAME`, which lists the files first, sends no checkpoint, and makes a "
    "private repository unless told otherwise"
)
ELSEWHERE = {
    "hub_token": "a token in a recipe would be written to the run folder: leave it out, and log in with `hf auth login` or set HF_TOKEN",
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision"),
                    f"a run sends nothing to the hub: leave it out, and {HUB_WORD}"),
    "resume_from_checkpoint": "leave it out: the same command goes on from the newest good checkpoint by itself, and --resume asks for it",
    "label_smoothing_factor": "without effect, as ORPO's loss has no label smoothing: leave it out",
}  # fmt: skip
"""Fields that do something else than a run does, or nothing: why not, and what to do."""


UNSIGNED = {"weight_decay", "max_grad_norm", "warmup_steps", "adam_epsilon", "dataloader_num_workers",
            "neftune_noise_alpha"}  # fmt: skip

SEEDS = {"seed", "data_seed"}

BETAS = {"adam_beta1", "adam_beta2"}

POSITIVE = {"learning_rate", "num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size",
            "gradient_accumulation_steps", "logging_steps", "eval_steps", "save_steps", "save_minutes",
            "early_stopping_patience", "eval_accumulation_steps", "save_total_limit"}  # fmt: skip


def check_training_field(key: str, value: Any) -> Any:
    """The value in its field's type, or ValueError in words: 5e-6, which YAML reads as text, becomes a number."""
    if key in ELSEWHERE and value:
        found = "" if key == "hub_token" else f"found {shown(value)}, "
        raise ValueError(f"training.{key}: {found}{ELSEWHERE[key]}")
    fields = training_fields()
    if key not in fields:
        raise ValueError(f"training.{key}: not a field of transformers.TrainingArguments{nearest(key, fields)}")
    if key == "train_sampling_strategy" and value in ("group_by_length", "batch_rebalance"):
        raise ValueError(
            f"training.{key}: found {shown(value)}, expected random or sequential; set orpo.tokens_per_batch instead, which puts "
            "pairs of like length together inside each optimizer step and deals them evenly"
        )
    # their types are `Enum | str`: without this, a misspelt choice would pass here and fail once the model is loaded
    choices = [
        choice.value
        for option in typing.get_args(fields[key])
        if isinstance(option, type) and issubclass(option, Enum)
        for choice in option
    ] or list(choices_of(key))
    value = "no" if value is False and "no" in choices else value  # YAML reads an unquoted no as false
    if choices and isinstance(value, str) and value not in choices:
        raise ValueError(
            f"training.{key}: found {shown(value)}{nearest(value, choices)}, expected one of {', '.join(choices)}"
        )
    try:
        clean = TypeAdapter(fields[key], config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        raise ValueError(f"training.{key}: found {shown(value)}, expected: {wanted(error.errors()[0])}") from None
    if key == "optim_args" and clean and not all(re.fullmatch(r"[^=]+=[^=]+", part) for part in clean.split(",")):
        raise ValueError(
            f"training.optim_args: found {shown(value)}, expected name=value, several with commas between them"
        )
    if isinstance(clean, float) and not math.isfinite(clean):
        raise ValueError(f"training.{key}: found {shown(value)}, expected a finite number")
    if isinstance(clean, int | float):
        limits = {
            "a number above 0": key in POSITIVE and not clean > 0,
            "0 or more": key in UNSIGNED and clean < 0,
            "a number from 0 to below 1": key in BETAS and not 0 <= clean < 1,
            "a number from 0 to 4294967295": key in SEEDS and not 0 <= clean < 2**32,
            "a number above 0, or -1 to train num_train_epochs": key == "max_steps" and clean < 1 and clean != -1,
        }
        for expected, broken in limits.items():
            if broken:
                raise ValueError(f"training.{key}: found {shown(value)}, expected {expected}")
    return clean.value if isinstance(clean, Enum) else clean


def wanted(item: Any) -> str:
    """Pydantic's words for what it expected."""
    return item["msg"].removeprefix("Input should be ")
