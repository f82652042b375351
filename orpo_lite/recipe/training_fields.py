"""Fields of a recipe's training section: transformers.TrainingArguments' own, read without importing it, and ours."""

import ast
import functools
import importlib.util
import typing
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from orpo_lite.common import safe_yaml
from orpo_lite.common.console import refuse_sharding
from orpo_lite.common.text import nearest, shown

OURS: dict[str, Any] = {"save_minutes": float | None, "early_stopping_patience": int | None}
"""Fields that transformers does not have; ORPOConfig documents them."""
TABLES: dict[str, Any] = safe_yaml.read(Path(__file__).with_suffix(".yaml"))
CHOICES, ELSEWHERE = TABLES["choices"], TABLES["elsewhere"]
HUB_WORD = (
    "publish with `python -m orpo_lite.push RUN --repo USER/NAME`, which lists the files first, uploads no checkpoint, and creates "
    "a private repository unless asked otherwise"
)
LIMITS = {name: Field(**one["bounds"]) for one in TABLES["limits"] for name in one["fields"]}
"""Bounds of values, which transformers does not check or checks late."""


@functools.cache
def declared_fields() -> dict[str, Any]:
    """Map every field of transformers.TrainingArguments to its type; of an enumeration, to the texts of its members.

    They are read from the source: importing the package takes seconds.
    """
    found = importlib.util.find_spec("transformers")
    assert found and found.origin, "transformers is a dependency"
    plain = (bool, int, float, str, list, dict, tuple, set, type(None))
    # a class that is not known here, such as an accelerate config, is Any
    names, classes = defaultdict(lambda: Any, vars(typing) | {kind.__name__: kind for kind in plain}), {}
    for module in ("trainer_utils", "debug_utils", "training_args"):
        tree = ast.parse(Path(found.origin).with_name(f"{module}.py").read_text("utf-8"))
        classes |= {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    for name, node in classes.items():
        if any("Enum" in ast.unparse(base) for base in node.bases):
            members = [ast.literal_eval(part.value) for part in node.body if isinstance(part, ast.Assign)]
            names[name] = Literal[tuple(members)]
    fields = {}
    for node in classes["TrainingArguments"].body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and not node.target.id.startswith("_"):
            # transformers' own source
            fields[node.target.id] = eval(ast.unparse(node.annotation), {"__builtins__": {}}, names)  # noqa: S307
    return fields


@functools.cache
def training_fields() -> dict[str, Any]:
    """Map the name of every field of the training section to its type."""
    positive = Annotated[int, Field(gt=0)]
    special = {"max_steps": positive | Literal[-1], "per_device_train_batch_size": positive | Literal["auto"]}
    return declared_fields() | OURS | special


def choices_of(key: str) -> list[str]:
    """Return the texts that a training field takes where these are few: transformers' enums are `Enum | str` there."""
    options = [option for option in typing.get_args(declared_fields().get(key)) if typing.get_origin(option) is Literal]
    return list(CHOICES.get(key, ())) or [choice for option in options for choice in typing.get_args(option)]


def check_training_field(key: str, value: Any) -> Any:
    """Convert a value to its field's type (5e-6, which YAML reads as text, becomes a number).

    Raises:
        ValueError: not a field, or not a value that it takes; the message says what was found and expected.
    """
    if key in ELSEWHERE and value:
        found = "" if key == "hub_token" else f"found {shown(value)}, "
        raise ValueError(f"training.{key}: {found}{ELSEWHERE[key]}")
    if key in ("fsdp", "fsdp_config", "deepspeed"):
        refuse_sharding(**{f"training.{key}": value})
    fields = training_fields()
    if key not in fields:
        raise ValueError(f"training.{key}: unknown key")
    choices = choices_of(key)
    value = "no" if value is False and "no" in choices else value  # YAML reads an unquoted no as false
    if choices and isinstance(value, str) and value not in choices:
        # transformers also has group_by_length and batch_rebalance
        hint = "; to sort by length, set orpo.tokens_per_batch instead" if key == "train_sampling_strategy" else ""
        raise ValueError(
            f"training.{key}: found {shown(value)}{nearest(value, choices)}, expected one of {', '.join(choices)}{hint}"
        )
    kind: Any = Annotated[fields[key], LIMITS[key]] if key in LIMITS else fields[key]
    try:
        return TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False)).validate_python(value)
    except ValidationError as error:
        expected = " or ".join(dict.fromkeys(map(wanted, error.errors())))
        raise ValueError(f"training.{key}: found {shown(value)}, expected: {expected}") from None


def wanted(item: Any) -> str:
    """Return pydantic's words for what it expected."""
    if item["type"] == "dict_type":
        return "a mapping, on the command line in quotes and with a space after each colon: '{key: value}'"
    return item["msg"].removeprefix("Input should be ")
