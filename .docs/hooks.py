"""What mkdocs writes into the pages while it builds: tables from the code, so that they cannot fall behind it.

A line `<!-- generated: NAME -->` of a page is replaced by what GENERATED[NAME] returns. Nothing here imports torch: what stands
in modules that do is read from their source.
"""

from __future__ import annotations

import ast
import dataclasses
import html
import os
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).parent.parent
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch is not there

PLAIN = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null", Any: "anything",
         dict: "mapping", list: "list", Path: "path"}  # fmt: skip
LIMITS = {"ge": "at least {}", "gt": "above {}", "lt": "below {}", "le": "at most {}"}


def on_config(config: Any) -> Any:
    """Guides that the navigation does not name go to the end of its Guides, by name of the file."""
    sys.path.insert(0, str(ROOT))  # the code of this checkout is documented, whatever is installed
    guides = next(section["Guides"] for section in config["nav"] if isinstance(section, dict) and "Guides" in section)
    there = sorted(f"guides/{path.name}" for path in Path(config["docs_dir"], "guides").glob("*.md"))
    guides += [page for page in there if page not in guides]
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    return re.sub(r"^<!-- generated: (\S+) -->$", lambda match: GENERATED[match[1]](), markdown, flags=re.MULTILINE)


def cell(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def verbatim(text: str) -> str:
    """Code for a cell, whatever characters it holds."""
    return f"<code>{html.escape(text).replace('|', '&#124;')}</code>"


def code(value: Any) -> str:
    """A default as YAML has it."""
    text = {None: "null", True: "true", False: "false"}.get(value) if isinstance(value, bool | None) else None
    return f"`{text or (chr(34) * 2 if value == '' else value)}`"


def type_words(hint: Any) -> str:
    """A type in the words of somebody who writes YAML."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return with_limits(type_words(args[0]), args[1:])
    if origin is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_words(arg) for arg in args))
    if origin is list:
        return f"list of {type_words(args[0])}"
    if origin is dict:
        return "mapping" if Any in args else f"mapping of {type_words(args[0])} to {type_words(args[1])}"
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return f"mapping ([fields](#{anchor(hint)}))"
    return PLAIN.get(hint) or getattr(hint, "__name__", str(hint))


def with_limits(words: str, metadata: Any) -> str:
    for item in metadata:
        words = with_limits(words, item.metadata) if isinstance(item, FieldInfo) else words
        for name, phrase in LIMITS.items():
            if getattr(item, name, None) is not None:
                words += ", " + phrase.format(getattr(item, name))
    return words


def anchor(section: type[BaseModel]) -> str:
    return section.__name__.lower()


def section_table(section: type[BaseModel], prefix: str) -> str:
    """One row a field: name, type, default, meaning."""
    rows = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        default = field.get_default(call_default_factory=True) if not field.is_required() else None
        shown = "**required**" if field.is_required() else code(default)
        if isinstance(default, BaseModel):
            shown = "its defaults"
        words = "a path, a mapping ([fields](#datasource)) or a list of them" if name in ("train", "eval") else ""
        words = (
            words + " or null" * (name == "eval")
            if words
            else with_limits(type_words(field.annotation), field.metadata)
        )
        rows.append(f"| `{prefix}{name}` | {cell(words)} | {cell(shown)} | {cell(field.description or '')} |")
    return "\n".join(rows)


def recipe_fields() -> str:
    """Every field of the recipe's schema, section by section."""
    from orpo_lite.recipe import DataSource, Recipe, RuleSection

    parts = ["## The recipe itself {#recipe}\n", section_table(Recipe, "")]
    for name, field in Recipe.model_fields.items():
        for hint in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(hint, type) and issubclass(hint, BaseModel):
                parts += [f"\n## {name} {{#{anchor(hint)}}}\n", section_table(hint, f"{name}.")]
                if name == "data":
                    parts += [f"\n### A source of data {{#{anchor(DataSource)}}}\n", section_table(DataSource, "")]
                if name == "evaluation":
                    parts += [
                        f"\n### evaluation.rule {{#{anchor(RuleSection)}}}\n",
                        section_table(RuleSection, "evaluation.rule."),
                    ]
    return "\n".join(parts)


def training_fields() -> str:
    """The recipe's own training fields and defaults, then every field that transformers has."""
    from transformers import TrainingArguments

    from orpo_lite.recipe.training_fields import OURS

    configured = orpo_fields()
    rows = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for name, hint in OURS.items():
        _, default, meaning = configured[name]
        rows.append(f"| `training.{name}` | {type_words(hint)} | {code(default)} | {cell(meaning)} |")
    rows += ["", "Where a recipe is silent, these stand in place of transformers' own defaults:", ""]
    rows += ["| field | default of a recipe |", "|---|---|"]
    rows += [f"| `training.{name}` | {code(value)} |" for name, value in recipe_defaults().items()]
    hints = typing.get_type_hints(TrainingArguments)
    rows += [
        "",
        "All of transformers' fields (what they mean is in the docstring of `transformers.TrainingArguments`):",
        "",
    ]
    rows += ["| field | type | default |", "|---|---|---|"]
    for field in dataclasses.fields(TrainingArguments):
        if field.init and not field.name.startswith("_"):
            default = (
                "" if field.default is dataclasses.MISSING else code(getattr(field.default, "value", field.default))
            )
            rows.append(f"| `training.{field.name}` | {cell(python_type(hints[field.name]))} | {cell(default)} |")
    return "\n".join(rows)


def python_type(hint: Any) -> str:
    """A transformers type, whose choices are enums."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        enums = [arg for arg in args if hasattr(arg, "__members__")]
        if enums:
            return ", ".join(f"`{member.value}`" for member in enums[0])
    return type_words(hint)


def source(name: str) -> list[ast.stmt]:
    """The statements of a module of the package."""
    return ast.parse((ROOT / "orpo_lite" / name).read_text("utf-8")).body


def recipe_defaults() -> dict[str, Any]:
    """DEFAULTS of config_from_recipe: what a recipe has where it says nothing."""
    found = (
        node.value
        for node in source("trainer/config_from_recipe.py")
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "DEFAULTS"
    )
    return ast.literal_eval(next(found))  # type: ignore[arg-type]


def orpo_fields() -> dict[str, tuple[str, Any, str]]:
    """Type as it is written, default and meaning of ORPOConfig's own fields, and of those of transformers that it changes."""
    (config,) = (
        node for node in source("trainer/config.py") if isinstance(node, ast.ClassDef) and node.name == "ORPOConfig"
    )
    return {
        ast.unparse(node.target): (
            ast.unparse(node.annotation),
            ast.literal_eval(node.value.keywords[0].value),
            ast.literal_eval(node.value.args[0]),
        )
        for node in config.body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func) == "_help"
    }


def orpo_config() -> str:
    """ORPOConfig's own fields, beside transformers'."""
    rows = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for name, (kind, default, meaning) in orpo_fields().items():
        rows.append(f"| `{name}` | {verbatim(kind)} | {verbatim(repr(default))} | {cell(meaning)} |")
    return "\n".join(rows)


def commands() -> str:
    """Usage, arguments and options of every command, from the typer functions themselves."""
    from orpo_lite.__main__ import COMMANDS, load

    return "\n\n".join(command_text(name, load(name)) for name in COMMANDS)


def command_text(name: str, function: Any) -> str:
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(function)
    command = typer.main.get_command(app)
    context = command.make_context(f"python -m orpo_lite.{name}", [], resilient_parsing=True)
    usage = " ".join([context.info_name, *command.collect_usage_pieces(context)])
    lines = [f"## {name}", "", command.help or "", "", "```text", usage, "```", "", "| | meaning |", "|---|---|"]
    records = [parameter.get_help_record(context) for parameter in command.params]
    lines += [f"| {verbatim(record[0])} | {cell(record[1])} |" for record in records if record]
    return "\n".join(lines)


def included(name: str) -> str:
    """A file of the repository, without its title; links to files beside it become plain words."""
    text = (ROOT / name).read_text(encoding="utf-8").partition("\n")[2]
    return re.sub(r"\[([^]]+)\]\((?!https?://|#)[^)]+\)", r"\1", text)


GENERATED = {
    "recipe-fields": recipe_fields,
    "training-fields": training_fields,
    "orpo-config": orpo_config,
    "commands": commands,
    "recipes": lambda: included("recipes/README.md"),
    "changelog": lambda: included("CHANGELOG.md"),
}
