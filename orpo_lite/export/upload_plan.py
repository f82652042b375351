"""The plan of an upload: which files, with which card, and without paths of this machine."""

import json
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orpo_lite.common import safe_yaml
from orpo_lite.common.credentials import ALLOWED, COMMON, STAYS, Table, match, published, walk
from orpo_lite.common.errors import RequestError
from orpo_lite.model.untrusted_files import check_adapter, subfolders_hint
from orpo_lite.recipe.loading import BUILTIN
from orpo_lite.recipe.validation import leaves
from orpo_lite.report.model_card import Kind, hub_id, last_part, model_card
from orpo_lite.report.page import read_json

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
        allowed: what may be uploaded.
        files: name in the repository -> a file, or the content where it differs from the file.
        kept: name -> path and reason.
    """

    kind: Kind
    allowed: Table
    files: dict[str, Path | bytes]
    kept: dict[str, tuple[Path, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def text(self, name: str) -> str:
        """Return a file's content; nothing where the plan has no such file."""
        content = self.files.get(name, b"")
        return (content if isinstance(content, bytes) else content.read_bytes()).decode("utf-8")


def plan_upload(folder: Path) -> UploadPlan:
    """Sort a run folder or a merged model's folder into what is uploaded and what is kept.

    Raises:
        RequestError: the folder is neither, lacks weights, or has a link that leads out of it for one of the files.
    """
    if not folder.is_dir():
        raise RequestError(f"{folder}: no such folder; expected a run folder or a merged model")
    folder = folder.resolve()
    kind: Kind = "adapter" if (folder / "adapter_config.json").is_file() else "merged"
    if kind == "merged" and not (folder / "config.json").is_file():
        raise RequestError(
            f"{folder}: found neither adapter_config.json nor config.json, expected a finished run folder or a model "
            f"folder that orpo_lite.merge has written{subfolders_hint(folder)}"
        )
    allowed = ALLOWED[kind]
    required = {"adapter_config.json", "adapter_model.safetensors"}
    if kind == "merged":
        index = folder / "model.safetensors.index.json"
        required = set(read_json(index)["weight_map"].values()) if index.is_file() else {"model.safetensors"}
        if "auto_map" in read_json(folder / "config.json"):
            allowed = allowed | ALLOWED["merged with code"]
    files = published(folder, allowed)
    if missing := required - set(files):
        if kind == "adapter" and (folder / "adapter_model.bin").is_file():
            check_adapter(folder)  # which says what to do about a pickle
        raise RequestError(
            f"{folder}: {', '.join(sorted(missing))} missing, so nobody could load it: was it written completely?"
        )
    kept = {name: (path, match(name.rstrip("/"), STAYS) or "") for name, path in walk(folder) if name not in files}
    return UploadPlan(kind, allowed, dict(files), kept)


def plan_gguf(file: Path) -> UploadPlan:
    """Plan to upload a GGUF file and the Modelfile beside it."""
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
    plan, modelfile = UploadPlan("gguf", ALLOWED["gguf"], {file.name: file}), file.with_name("Modelfile")
    if modelfile.is_file():
        if f"./{file.name}\n" in modelfile.read_text("utf-8"):
            plan.files["Modelfile"] = modelfile
        else:
            plan.kept["Modelfile"] = (modelfile, f"does not name ./{file.name}")
    return plan


def add_files_of_run(run: UploadPlan, plan: UploadPlan) -> None:
    """Add the run's files that describe the weights of the plan; what the run keeps stays kept."""
    shared = {"recipe.yaml", "curves.png", *COMMON["license"]} & run.files.keys()
    plan.files = {name: run.files[name] for name in shared} | plan.files
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
    if plan.kind == "adapter" and "README.md" in plan.files and plan.text("README.md") != model_card(folder):
        plan.notes.append("README.md is not the card that run.json gives (edited?), so it is uploaded as it is")
        return
    text = model_card(folder, plan.kind, repo=repo, base=base_repo)
    found = NOTES.search(plan.text("README.md"))
    if found and plan.kind == "merged":  # only the merged model's own card has the results of the merge
        text = NOTES.sub(lambda _: found[0], text)
    plan.files["README.md"] = text.encode("utf-8")


def remove_local_paths(plan: UploadPlan, run: Path, base_repo: str | None = None) -> None:
    """Replace this machine's paths in the plan's texts; a note names each file and what was replaced.

    The base becomes `base_repo`, or the hub id by which recipe or download cache know it, or `local:` and its name. Of
    every other path the last name stays. Files on disk stay as they are.

    Args:
        run: the folder whose recipe.yaml and adapter_config.json name the base and the data.
    """
    recipe: Any = safe_yaml.read(run / "recipe.yaml") if (run / "recipe.yaml").is_file() else {}
    texts = {name: plan.text(name) for name in TEXTS if name in plan.files}
    contents = [recipe, *(json.loads(text) for name, text in texts.items() if name.endswith(".json"))]
    values = [str(run.resolve()), *(str(value) for _, value in leaves(contents))]
    swaps = {path: last_part(path) for path in values if ABSOLUTE.match(path)}
    output = recipe.get("training", {}).get("output_dir")
    if output in swaps:
        swaps[output] = f"outputs/{last_part(output)}"  # where a run of this recipe would go without it
    named = read_json(run / "adapter_config.json").get("base_model_name_or_path")
    names = {recipe.get("model", {}).get("name_or_path"), named} - {None, ""}
    known = sorted(map(public_base, names), key=lambda name: (name.startswith(LOCAL), name.startswith(BUILTIN), name))
    base = base_repo or next(iter(known), "")
    swaps |= {name: base for name in names if name != base}
    if len(Path.home().parts) > 1:
        swaps[str(Path.home())] = "~"
    swaps |= {json.dumps(path)[1:-1]: new for path, new in swaps.items()}  # backslashes are doubled there
    for name, text in texts.items():
        done = [path for path in sorted(swaps, key=len, reverse=True) if path in text]
        for path in done:
            text = text.replace(path, swaps[path])
        if done:
            plan.files[name] = text.encode("utf-8")
            swapped = "; ".join(f"{path} -> {swaps[path]}" for path in done)
            plan.notes.append(f"{name} is uploaded without this machine's paths: {swapped}")
    if base.startswith(LOCAL):
        plan.notes.append(
            f"WARNING: the base is a folder of this machine ({base.removeprefix(LOCAL)}), which nobody else has: if the "
            "hub has that model, name it with --base-repo USER/NAME"
        )


def public_base(name: str) -> str:
    """Return a base's name for readers: its hub id, also by the download cache, or `local:` and the last part."""
    if cached := re.search(r"models--([^/\\]+)[/\\]snapshots[/\\]", name):
        return cached[1].replace("--", "/", 1)
    return name if name.startswith(BUILTIN) or hub_id(name) else LOCAL + last_part(name)
