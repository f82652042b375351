"""The plan of an upload: which files, with which card, and without paths of this machine."""

from __future__ import annotations

import json
import re
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any, Literal

from orpo_lite.common import safe_yaml
from orpo_lite.common.console import console
from orpo_lite.common.credentials import find_secrets
from orpo_lite.common.errors import RequestError
from orpo_lite.common.published_files import ALLOWED, COMMON, refuse, sort_files
from orpo_lite.recipe.loading import BUILTIN

Kind = Literal["adapter", "merged", "gguf"]
NOTES = re.compile(r"(?m)^## Notes\n\n(?:- .*\n)+")
ABSOLUTE = re.compile(r"(?:file:/)?/[^/\s]+/|[A-Za-z]:[\\/]|\\\\")
"""The start of a path from the root, at least two names deep, on this or another kind of system."""
LOCAL = "local:"
"""Stands before the name of a base that only this machine has, so that no loader takes it for a hub id."""
TEXTS = ("README.md", "Modelfile", "recipe.yaml", "adapter_config.json", "config.json", "generation_config.json",
         "tokenizer_config.json")  # fmt: skip
"""Files from which paths of this machine are removed."""


@dataclass
class UploadPlan:
    """The files to upload, those that are kept and why, and notes for the user.

    Attributes:
        files: name in the repository -> a file, or the content where it differs from the file.
        kept: name -> path and reason.
    """

    kind: Kind
    files: dict[str, Path | bytes]
    kept: dict[str, tuple[Path, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def read(self, name: str) -> bytes:
        """Return a file's content; nothing where the plan has no such file."""
        content = self.files.get(name, b"")
        return content if isinstance(content, bytes) else content.read_bytes()

    def sizes(self) -> dict[str, int]:
        """Return the size of every file in bytes, in the order of names."""
        return {name: len(content) if isinstance(content, bytes) else content.stat().st_size
                for name, content in sorted(self.files.items())}  # fmt: skip


@contextmanager
def temporary_folder_beside(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside the run, whose disk is likelier to have room for a model than that of /tmp."""
    folder = folder.resolve()
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-merged-") as place:
        yield Path(place)


def plan_upload(folder: Path, token: str | None = None) -> UploadPlan:
    """Sort a run folder or a merged model's folder into what is uploaded and what is kept.

    Args:
        folder: the folder, by any path.
        token: the user's own, to be searched for as well.

    Raises:
        RequestError: the folder is neither, lacks weights, or holds what must not be published (see `sort_files`).
    """
    if not folder.is_dir():
        raise RequestError(f"{folder}: no such folder; expected a run folder or a merged model")
    folder = folder.resolve()
    kind: Kind = "adapter" if (folder / "adapter_config.json").is_file() else "merged"
    if kind == "merged" and not (folder / "config.json").is_file():
        raise RequestError(
            f"{folder}: found neither adapter_config.json nor config.json, expected a finished run folder or a model "
            "folder that orpo_lite.merge has written"
        )
    allowed = ALLOWED[kind]
    required = {"adapter_config.json", "adapter_model.safetensors"}
    if kind == "merged":
        index = folder / "model.safetensors.index.json"
        required = set(read_json(index)["weight_map"].values()) if index.is_file() else {"model.safetensors"}
        if "auto_map" in read_json(folder / "config.json"):
            allowed = allowed | {"*.py": "the model's own code, which config.json names"}
    files, kept = sort_files(folder, allowed, token)
    if missing := required - set(files):
        raise RequestError(
            f"{folder}: {', '.join(sorted(missing))} missing, so nobody could load it: was it written completely?"
        )
    return UploadPlan(kind, dict(files), kept)


def plan_merged(run: Path, place: Path, of_run: UploadPlan, token: str | None) -> UploadPlan:
    """Merge the run's adapter into its base; the upload has the run's recipe and curves."""
    from orpo_lite.merge.run import merge

    console.print("merging into a temporary folder beside the run, removed after the push")
    plan = plan_upload(merge(run, place / run.resolve().name), token)
    add_files_of_run(of_run, plan)
    return plan


def plan_gguf(file: Path, of_run: UploadPlan, token: str | None) -> UploadPlan:
    """Plan to upload a GGUF file, the Modelfile beside it, and the run's recipe and curves."""
    head = b""
    if file.is_file():
        with file.open("rb") as opened:
            head = opened.read(4096)
    if head[:4] != b"GGUF":
        found = f"{file} is not a GGUF file" if file.is_file() else f"no such file: {file}"
        raise RequestError(f"--gguf: {found}; write one with python -m orpo_lite.export")
    # a string field of the header: name, kind of value (8), length, text
    if struct.pack("<IQ", 8, 7).join((b"general.type", b"adapter")) in head:
        raise RequestError(
            f"--gguf: {file} is an adapter, whose card would be that of a whole model: push the run itself, or the GGUF "
            "file of the merged model (export without --adapter)"
        )
    plan = UploadPlan("gguf", {file.name: file})
    modelfile = file.with_name("Modelfile")
    if modelfile.is_file():
        refuse(file.parent, [f"Modelfile, {found}" for found in find_secrets(modelfile, token)])
        # a reader has the two side by side, wherever the file was exported to
        line = re.compile(rf"(?m)^((?:FROM|ADAPTER)\s+)\S*?{re.escape(file.name)}\s*$")
        text, count = line.subn(lambda found: f"{found[1]}./{file.name}", modelfile.read_text("utf-8"))
        if count:
            plan.files["Modelfile"] = text.encode("utf-8")
        else:
            plan.kept["Modelfile"] = (modelfile, f"does not name {file.name}")
    add_files_of_run(of_run, plan)
    return plan


def add_files_of_run(run: UploadPlan, plan: UploadPlan) -> None:
    """Add the run's files that describe the weights of the plan; what the run keeps stays kept."""
    for name, content in run.files.items():
        if name in ("recipe.yaml", "curves.png") or COMMON.get(name) == COMMON["LICENSE"]:
            plan.files.setdefault(name, content)
    plan.kept = {name: why for name, why in run.kept.items() if name not in plan.files} | plan.kept


def add_card(plan: UploadPlan, folder: Path, repo: str, base_repo: str | None) -> None:
    """Add the run's model card with the repository's name in its commands, unless it was edited by hand."""
    if not ((folder / "recipe.yaml").is_file() and (folder / "run.json").is_file()):
        plan.notes.append(
            f"README.md is uploaded as it is: commands in it may name the folder, not {repo}"
            if "README.md" in plan.files
            else "WARNING: no model card: the folder holds neither README.md nor a run's run.json"
        )
        return
    from orpo_lite.report.model_card import model_card

    readme = folder / "README.md"
    if plan.kind == "adapter" and readme.is_file() and readme.read_text("utf-8") != model_card(folder):
        plan.notes.append("README.md is not the card that run.json gives (edited?), so it is uploaded as it is")
        return
    text = model_card(folder, plan.kind, repo=repo, base=base_repo)
    found = NOTES.search(plan.read("README.md").decode("utf-8"))
    if found and plan.kind == "merged":  # only the merged model's own card has the results of the merge
        text = NOTES.sub(lambda _: found[0], text)
    plan.files["README.md"] = text.encode("utf-8")


def remove_local_paths(plan: UploadPlan, run: Path, base_repo: str | None = None) -> None:
    """Replace this machine's paths in the plan's texts; a note names each file and what was replaced.

    The base becomes `base_repo`, or the hub id by which recipe or download cache know it, or `local:` and its name. Of
    every other path the last name stays. Files on disk stay as they are.

    Args:
        plan: changed in place.
        run: the folder whose recipe.yaml and adapter_config.json name the base and the data.
        base_repo: hub id to name as the base, whatever the run says.
    """
    recipe = read_recipe(run)
    base, names = base_names(run, base_repo)
    texts = {name: plan.read(name).decode("utf-8") for name in TEXTS if name in plan.files}
    sections = [recipe.get(name) for name in ("model", "adapter", "data", "training")]
    fields = [field for name, text in texts.items() if name.endswith(".json") for field in json.loads(text).items()]
    values = [*strings(sections), *(value for key, value in fields if re.search("path|file|dir", key))]
    swaps = {path: last_part(path) for path in (str(run.resolve()), *filter(is_absolute, values))}
    output = recipe.get("training", {}).get("output_dir")
    if is_absolute(output):
        swaps[output] = f"outputs/{last_part(output)}"  # where a run of this recipe would go without it
    swaps |= {name: base for name in names if name != base}
    if len(Path.home().parts) > 1:
        swaps[str(Path.home())] = "~"
    for name, text in texts.items():
        done = []
        for path in sorted(swaps, key=len, reverse=True):
            text, count = path_pattern(path).subn(lambda _, new=swaps[path]: new, text)
            done += [f"{path} -> {swaps[path]}"] * bool(count)
        if done:
            plan.files[name] = text.encode("utf-8")
            plan.notes.append(f"{name} is uploaded without this machine's paths: {'; '.join(done)}")
    if base.startswith(LOCAL):
        plan.notes.append(
            f"WARNING: the base is a folder of this machine ({base.removeprefix(LOCAL)}), which nobody else has: if the "
            "hub has that model, name it with --base-repo USER/NAME"
        )


def base_names(run: Path, base_repo: str | None = None) -> tuple[str, set[str]]:
    """Return the name of the base for readers ('' where nothing names it), and every name that the run has for it."""
    adapter = read_json(run / "adapter_config.json") if (run / "adapter_config.json").is_file() else {}
    found = (read_recipe(run).get("model", {}).get("name_or_path"), adapter.get("base_model_name_or_path"))
    names = {name for name in found if name}
    cached = {name: re.search(r"models--([^/\\]+)[/\\]snapshots[/\\]", name) for name in names}
    known = [match[1].replace("--", "/", 1) if match else name for name, match in sorted(cached.items())]
    public = sorted((name for name in known if not is_local(name)), key=lambda name: name.startswith(BUILTIN))
    return base_repo or (public[0] if public else LOCAL + last_part(known[0]) if known else ""), names


def is_absolute(value: Any) -> bool:
    return isinstance(value, str) and bool(ABSOLUTE.match(value))


def is_local(name: str) -> bool:
    """Return True for the name of a base that can only be a folder of this machine."""
    return not name.startswith(BUILTIN) and (
        is_absolute(name) or name.startswith((".", "/", "~")) or Path(name).expanduser().is_dir()
    )


def last_part(path: str) -> str:
    """Return the name of a file or folder, on this or another kind of system."""
    return (PureWindowsPath(path) if "\\" in path else PurePath(path)).name


def strings(value: Any) -> Iterator[str]:
    """Yield every string in nested lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings(inner)


def path_pattern(path: str) -> re.Pattern[str]:
    """Match a path in a text, also with JSON's doubled backslashes, but not as a part of a longer path."""
    forms = "|".join(re.escape(form) for form in dict.fromkeys((path, json.dumps(path)[1:-1])))
    tail = r"(?![\w-])" if is_absolute(path) else r"(?![\w/-])"
    return re.compile(rf"(?<![\w/.-])(?:{forms}){tail}")


def read_recipe(run: Path) -> dict[str, Any]:
    file = run / "recipe.yaml"
    return safe_yaml.read(file) or {} if file.is_file() else {}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file; RequestError where it is none."""
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise RequestError(f"{path}: not JSON ({error})") from None
