"""Completion for bash, zsh, fish and PowerShell: commands, options, recipes, run folders, and `key=value` words.

A shell asks at every press of the key, so nothing is imported to answer: options and fields are read off the source.
"""

from __future__ import annotations

import ast
import functools
import glob
import importlib.util
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
RUN_WORDS = ("source", "run", "runs", "folder", "folders")
"""What commands call an argument that is a run folder."""
PATHS = {"train", "eval", "path", "name_or_path", "init_from", "chat_template", "output_dir"}
"""Fields that a file or folder may stand in."""

Candidate = tuple[str, str]
"""A word and what it means."""


@dataclass
class Options:
    """What a command takes."""

    flags: dict[str, str] = field(default_factory=dict)
    """Flag -> help."""
    values: dict[str, list[str]] = field(default_factory=dict)
    """Flag that takes a value -> the values that there are; none where they are free."""
    arguments: list[str] = field(default_factory=list)


def candidates(line: str, commands: Mapping[str, str]) -> list[Candidate]:
    """What the last word of a command line may become."""
    words, current = split(line)
    words = words[1:]
    if not words:
        more = {"--help": "what there is", "--version": "", "--install-completion": "", "--show-completion": ""}
        return matching({**commands, **(more if current.startswith("-") else {})}, current)
    options = options_of(words[0])
    if options is None:
        return []
    if (known := options.values.get(words[-1])) is not None:
        return matching(dict.fromkeys(recipes(current) if words[-1] == "--recipe" else known, ""), current)
    if current.startswith("-"):
        return matching(options.flags, current)
    found: list[Candidate] = []
    if any(name in RUN_WORDS for name in options.arguments):
        found += matching(dict.fromkeys(run_folders(current), "run"), current)
    if "overrides" in options.arguments:
        found += fields(current)
    return found


def split(line: str) -> tuple[list[str], str]:
    """The words before the cursor's, and the one that it stands in; quotes that are still open are no matter."""
    for end in ("", "'", '"'):
        try:
            words = shlex.split(line + end, posix=os.name != "nt")
            break
        except ValueError:
            continue
    else:
        words = line.split()
    return (words, "") if line[-1:].isspace() or not words else (words[:-1], words[-1])


def matching(known: Mapping[str, str], start: str) -> list[Candidate]:
    return [(word, about) for word, about in known.items() if word.startswith(start)]


def recipes(start: str) -> list[str]:
    """Shipped recipes, YAML files and run folders."""
    folder = PACKAGE / "recipes" if (PACKAGE / "recipes").is_dir() else PACKAGE.parent / "recipes"
    files = [file for end in ("yaml", "yml") for file in glob.glob(f"{glob.escape(start)}*.{end}")]
    return [*sorted(path.stem for path in folder.glob("*.yaml")), *sorted(files), *run_folders(start)]


def run_folders(start: str) -> list[str]:
    """Folders that hold a recipe.yaml: in outputs/, and where the word points to."""
    places = {
        *glob.glob(f"{glob.escape(start)}*{os.sep}recipe.yaml"),
        *glob.glob(f"outputs{os.sep}*{os.sep}recipe.yaml"),
    }
    return sorted(os.path.dirname(place) for place in places)


# ---- read off the source ------------------------------------------------------------------------------------------


def parsed(module: str) -> ast.Module | None:
    """The syntax tree of a module of this package."""
    place = PACKAGE.joinpath(*module.split(".")[1:])
    for file in (place.with_suffix(".py"), place / "__init__.py"):
        if file.is_file():
            return ast.parse(file.read_text("utf-8"))
    return None


def options_of(command: str, module: str | None = None) -> Options | None:
    """Flags and arguments of a command, or None where there is none of this name."""
    tree = parsed(module or f"orpo_lite.{command}")
    if tree is None:
        return None
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == "command":
            return read_signature(node, choices(tree))
    for node in ast.walk(tree):  # it is defined elsewhere
        if isinstance(node, ast.ImportFrom) and node.module and any(name.name == "command" for name in node.names):
            return options_of(command, node.module)
    return None


def choices(tree: ast.Module) -> dict[str, list[str]]:
    """The values of a module's enumerations."""
    return {
        node.name: [
            str(part.value.value)
            for part in node.body
            if isinstance(part, ast.Assign) and isinstance(part.value, ast.Constant)
        ]
        for node in tree.body
        if isinstance(node, ast.ClassDef) and any("Enum" in ast.unparse(base) for base in node.bases)
    }


def read_signature(function: ast.FunctionDef, enums: Mapping[str, list[str]]) -> Options:
    """What typer makes of a signature of `Annotated[type, typer.Option(...)]`."""
    options = Options({"--help": "what it does and takes"})
    for argument in function.args.args:
        annotation = argument.annotation
        if not (isinstance(annotation, ast.Subscript) and isinstance(annotation.slice, ast.Tuple)):
            continue
        kind, call = annotation.slice.elts[0], annotation.slice.elts[-1]
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
            continue
        given = {word.arg: word.value.value for word in call.keywords if isinstance(word.value, ast.Constant)}
        if given.get("hidden"):
            continue
        if call.func.attr == "Argument":
            options.arguments.append(argument.arg)
            continue
        switch = "bool" in {name.id for name in ast.walk(kind) if isinstance(name, ast.Name)}
        declared = [
            word.value for word in call.args if isinstance(word, ast.Constant) and str(word.value).startswith("--")
        ]
        plain = f"--{argument.arg.replace('_', '-')}"
        names = [name for one in declared for name in str(one).split("/")] or [
            plain,
            *([f"--no-{plain[2:]}"] if switch else []),
        ]
        for name in names:
            options.flags[name] = str(given.get("help", ""))
            if not switch:
                named = [
                    value for part in ast.walk(kind) if isinstance(part, ast.Name) for value in enums.get(part.id, [])
                ]
                options.values[name] = literals(kind) + named
    return options


def literals(annotation: ast.expr) -> list[str]:
    """The values of a Literal inside an annotation; true and false of a bool."""
    found: list[str] = []
    for node in ast.walk(annotation):
        if (
            isinstance(node, ast.Subscript)
            and isinstance(node.value, ast.Name | ast.Attribute)
            and "Literal" in ast.unparse(node.value)
        ):
            found += [str(word.value) for word in ast.walk(node.slice) if isinstance(word, ast.Constant)]
        elif isinstance(node, ast.Name) and node.id == "bool":
            found += ["true", "false"]
    return found


@functools.cache
def schema() -> dict[str, list[str]]:
    """Every field of a recipe in dotted form -> its values where they are few."""
    trees = [parsed(name) for name in ("orpo_lite.recipe", "orpo_lite.recipe.schema")]
    sections = {node.name: node for tree in trees if tree for node in tree.body if isinstance(node, ast.ClassDef)}

    def inside(name: str, prefix: str) -> Iterator[tuple[str, list[str]]]:
        for node in sections[name].body:
            if (
                not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name))
                or node.target.id == "model_config"
            ):
                continue
            place = f"{prefix}{node.target.id}"
            section = next((part.id for part in ast.walk(node.annotation) if isinstance(part, ast.Name) and part.id in sections and part.id.endswith("Section")), None)  # fmt: skip
            if section:
                yield from inside(section, f"{place}.")
            elif place == "training":
                yield from ((f"training.{name}", values) for name, values in training().items())
            else:
                yield place, literals(node.annotation)

    return dict(inside("Recipe", ""))


def training() -> dict[str, list[str]]:
    """Fields of transformers.TrainingArguments, and ours."""
    ours: dict[str, list[str]] = {"save_minutes": [], "early_stopping_patience": []}
    found = importlib.util.find_spec("transformers")
    file = Path(str(found.origin)).with_name("training_args.py") if found else None
    if file is None or not file.is_file():
        return ours
    tree = ast.parse(file.read_text("utf-8"))
    body = next(
        (node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments"), []
    )
    return {node.target.id: literals(node.annotation) for node in body if isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name) and not node.target.id.startswith("_")} | ours | {"on_nonfinite": ["stop", "skip"]}  # fmt: skip


def fields(current: str) -> list[Candidate]:
    """`key=` of a recipe's fields; after it, the values or the files that there are."""
    key, equals, value = current.partition("=")
    if not equals:
        return [(f"{name}=", "") for name in schema() if name.startswith(key)]
    if key.rpartition(".")[2] in PATHS:
        files = [place + os.sep * os.path.isdir(place) for place in sorted(glob.glob(f"{glob.escape(value)}*"))]
        return [(f"{key}={place}", "") for place in files]
    return [(f"{key}={one}", "") for one in schema().get(key, []) if one.startswith(value)]


def answer(shell: str, line: str, commands: Mapping[str, str]) -> str:
    """What a shell's script is told: a word a line, with its meaning after a tab where the shell shows it."""
    found = candidates(line, commands)
    if shell == "bash":  # it takes `=` for the end of a word, and replaces what follows
        current = split(line)[1]
        keep = current.rindex("=") + 1 if "=" in current else 0
        return "\n".join(word[keep:] for word, _ in found)
    if shell == "zsh":
        return "\n".join(word for word, _ in found)
    return "\n".join(f"{word}\t{about}" if about else word for word, about in found)
