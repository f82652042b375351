"""Tables that the documentation takes from the code hold all that is there."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import sys
import tomllib
import typing
from types import ModuleType

import pytest
from pydantic import BaseModel

from orpo_lite.__main__ import COMMANDS
from orpo_lite.recipe import Recipe
from orpo_lite.recipe.training_fields import training_fields
from orpo_lite.trainer.config import ORPOConfig
from orpo_lite.trainer.config_from_recipe import DEFAULTS
from tests.docs.blocks import ROOT, parser


@pytest.fixture(scope="module")
def hooks() -> typing.Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / ".docs" / "hooks.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path


def fields(model: type[BaseModel], prefix: str = "") -> typing.Iterator[str]:
    """Dotted names of every field of a schema, through optional sections and lists of them."""
    for name, field in model.model_fields.items():
        yield prefix + name
        hints = [field.annotation]
        while hints:
            hint = hints.pop()
            if isinstance(hint, type) and issubclass(hint, BaseModel):
                yield from fields(hint, "" if name in ("train", "eval") else f"{prefix}{name}.")
            hints += typing.get_args(hint)


def test_every_field_of_a_recipe_is_in_the_reference(hooks: ModuleType) -> None:
    page = hooks.recipe_fields()
    rows = {match[1]: match[2] for match in re.finditer(r"^\| `([\w.]+)` \|(.*)\|$", page, re.MULTILINE)}
    names = set(fields(Recipe))
    assert len(names) > 60 and names <= rows.keys(), names - rows.keys()
    for name, row in rows.items():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)]
        assert len(cells) == 3 and all(cells), f"{name}: type, default and meaning: {cells}"
    assert "`nf4`, `fp4`, `none`" in rows["model.quantization"] and "`nf4`" in rows["model.quantization"]
    assert "**required**" in rows["model.name_or_path"] and "at least 1" in rows["adapter.r"]


def test_every_training_field_is_in_the_reference(hooks: ModuleType) -> None:
    page = hooks.training_fields()
    missing = [name for name in training_fields() if f"| `training.{name}` |" not in page]
    assert len(training_fields()) > 100 and not missing


def test_what_is_read_from_the_source_is_what_is_there(hooks: ModuleType) -> None:
    """The site is built without torch, so the modules that import it are not."""
    there = {f.name: f for f in dataclasses.fields(ORPOConfig) if f.metadata.get("help") and f.name in ORPOConfig.__annotations__}  # fmt: skip
    read = hooks.orpo_fields()
    assert {name: (default, meaning) for name, (_, default, meaning) in read.items() if name in there} == {
        name: (field.default, field.metadata["help"]) for name, field in there.items()
    }
    assert hooks.recipe_defaults() == DEFAULTS


def test_the_sites_requirements_are_the_packages() -> None:
    """Without torch, and with the bounds of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    asked = (ROOT / ".docs" / "requirements.txt").read_text("utf-8").split("\n\n")[1].split()
    assert len(asked) > 5 and set(asked) <= set(project["dependencies"])
    assert not any(line.startswith("torch") for line in asked)


def test_every_field_of_ORPOConfig_is_in_the_reference(hooks: ModuleType) -> None:
    page = hooks.orpo_config()
    own = [f.name for f in dataclasses.fields(ORPOConfig) if f.name in ORPOConfig.__annotations__]
    assert "beta" in own and not [name for name in own if f"| `{name}` |" not in page]


def test_every_command_and_option_is_in_the_reference(hooks: ModuleType) -> None:
    for name, text in zip(COMMANDS, hooks.commands().split("\n## ")[0:], strict=True):
        assert text.removeprefix("## ").startswith(f"{name}\n")
        options = [flag for each in parser(name).params if not each.hidden for flag in each.opts if flag[0] == "-"]
        assert not [flag for flag in options if flag not in text and flag not in ("-h", "--help")], name
