"""What of a folder goes to the hub: an allow-list, and a search for what must never leave this machine."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from orpo_lite.common.errors import RequestError

Kind = Literal["adapter", "merged", "gguf"]

COMMON = {
    "README.md": "model card",
    "recipe.yaml": "the run's recipe",
    "curves.png": "picture of the training and held-out curves",
    "tokenizer.json": "tokenizer",
    "tokenizer_config.json": "tokenizer",
    "special_tokens_map.json": "tokenizer",
    "added_tokens.json": "tokenizer",
    "vocab.json": "tokenizer",
    "vocab.txt": "tokenizer",
    "merges.txt": "tokenizer",
    "tokenizer.model": "tokenizer",
    "spiece.model": "tokenizer",
    "sentencepiece.bpe.model": "tokenizer",
    "chat_template.jinja": "chat template, as trained with",
    "additional_chat_templates/*.jinja": "chat template",
    "LICENSE": "licence",
    "LICENSE.txt": "licence",
    "LICENSE.md": "licence",
    "NOTICE": "notice that the base's licence asks for",
    "NOTICE.txt": "notice that the base's licence asks for",
}
GOES: dict[str, dict[str, str]] = {
    "adapter": COMMON
    | {"adapter_model.safetensors": "adapter weights", "adapter_config.json": "adapter configuration"},
    "merged": COMMON
    | {
        "config.json": "model configuration",
        "generation_config.json": "generation defaults",
        "model.safetensors": "model weights",
        "model-*-of-*.safetensors": "model weights",
        "model.safetensors.index.json": "which shard holds which weight",
    },
}
"""File names that may be published, by kind of folder. Whatever is not here does not go."""

STAYS = {
    "checkpoints": "for resuming the run: weights, optimizer and random states",
    "tensorboard": "the tracker's log",
    "run.json": "facts of the run, with paths of this machine; the model card says what matters",
    "before.json": "the evaluation before training, for a run that goes on",
    "reproduce-step-*.zip": "a step that was not finite, with the adapter before it and rows of your data",
    ".lock": "held while a run is in the folder",
    "metrics.jsonl": "the curves' numbers",
    "held_out.json": "how likely every held-out pair was, before and after",
    "report.html": "your own report; the model card says what matters",
    "compare.html": "your own report of several runs",
    "*.gguf": "an export: push it with --gguf",
    "Modelfile": "goes with the GGUF file that it names",
    ".DS_Store": "the file manager's",
    "Thumbs.db": "the file manager's",
    "desktop.ini": "the file manager's",
    ".gitattributes": "git's",
    ".gitignore": "git's",
}
"""What a run folder holds by design, or an operating system leaves anywhere: never published, no reason to refuse."""

STRANGERS = (
    (r"optimizer.*|scheduler\.pt|scaler\.pt|rng_state.*|trainer_state\.json|training_args\.bin", "training state"),
    (r"checkpoint-\d+/|global_step\d+/|.*\.ckpt", "checkpoint"),
    (r"\.env.*|.*\.env|\.netrc|.*\.pem|.*\.key|id_rsa.*|credentials.*|token", "holds secrets as a rule"),
    (r"\.git/", "git's database, with everything that was ever committed"),
    (r"\.?cache.*/|__pycache__/|\.ipynb_checkpoints/|wandb/|mlruns/|runs/|\.locks/", "cache or log of a tool"),
    (r".*\.(bin|pt|pth|pkl|pickle|npz)", "pickled file, which could run code where it is loaded"),
    (r".*/", "folder that orpo_lite did not write"),
    (r".*", "file that orpo_lite did not write"),
)

SECRETS = {
    "Hugging Face token": rb"\b(?:hf|api_org)_[A-Za-z0-9]{16,}",
    "API key": rb"(?<![A-Za-z0-9])sk-[A-Za-z0-9_-]{20,}|(?<![A-Za-z0-9])[rs]k_live_[A-Za-z0-9]{16,}",
    "AWS key": rb"(?<![A-Za-z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])",
    "GitHub token": rb"\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_[A-Za-z0-9_]{20,}",
    "GitLab token": rb"\bglpat-[A-Za-z0-9_-]{16,}",
    "Slack token": rb"\bxox[abeoprs]-[A-Za-z0-9-]{10,}",
    "Google key": rb"\bAIza[A-Za-z0-9_-]{35}",
    "PyPI or npm token": rb"\bpypi-AgE[A-Za-z0-9_-]{16,}|\bnpm_[A-Za-z0-9]{30,}",
    "private key": rb"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY",
    "signed web token": rb"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
    "password in an address": rb"\b[a-z][a-z0-9+.-]*://[^\s/:@'\"<>]+:[^\s/:@'\"<>{}$]{3,}@",
    "secret": rb"(?i)(?:api_?key|(?:hub|hf|auth|access|refresh|bearer)_token|secret_(?:access_)?key|client_secret)"
    rb"[\"']?\s*[:=]\s*[\"']?(?=[^\s\"']*\d)(?=[^\s\"']*[a-z])[A-Za-z0-9_/+=.-]{16,}",
}
"""Shapes of credentials, in bytes. They are named by kind, file and line, and never shown."""


@dataclass(frozen=True)
class Entry:
    """One file to publish: its name in the repository, where its bytes are, and what it is."""

    name: str
    content: Path | bytes
    what: str

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    def read(self) -> bytes:
        return self.content if isinstance(self.content, bytes) else self.content.read_bytes()


@dataclass
class Parcel:
    """What goes, what stays and why, and what the user should know."""

    kind: Kind
    entries: list[Entry] = field(default_factory=list)
    stays: list[tuple[str, int, str]] = field(default_factory=list)
    """Name, bytes, reason."""
    notes: list[str] = field(default_factory=list)

    def entry(self, name: str) -> Entry | None:
        return next((e for e in self.entries if e.name == name), None)

    def bytes_of(self, name: str) -> bytes:
        """A file's content; of none, nothing."""
        entry = self.entry(name)
        return entry.read() if entry else b""

    def put(self, entry: Entry) -> None:
        """Add a file, in place of one of the same name."""
        self.entries = sorted([e for e in self.entries if e.name != entry.name] + [entry], key=lambda e: e.name)


def pack(folder: Path, token: str | None = None) -> Parcel:
    """Sort a run folder or a merged model's folder into what goes and what stays.

    Args:
        token: the user's own, to be looked for as well.

    Raises:
        RequestError: not such a folder, weights missing, or anything in it that is neither known nor harmless: stray
            files, caches, training states, links that lead out, credentials in a text file. All are named at once.
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
    parcel, problems = Parcel(kind), []
    allowed = dict(GOES[kind])
    if kind == "merged" and "auto_map" in read_json(folder / "config.json"):
        allowed["*.py"] = "the model's own code, which config.json names"
    for name, path in walk(folder):
        what, why = match(name, allowed), match(name.rstrip("/"), STAYS)
        if what and path.is_symlink() and not path.resolve().is_relative_to(folder):
            problems.append(f"{name}: a link that leads out of the folder")
            continue
        if what and path.is_file():
            parcel.entries.append(Entry(name, path, what))
        elif why:
            parcel.stays.append((name, size_of(path), why))
        else:
            problems.append(f"{name}: {next(text for pattern, text in STRANGERS if re.fullmatch(pattern, name))}")
        if path.is_file():
            problems += [f"{name}, {found}" for found in find_secrets(path, token)]
    refuse(folder, problems)
    lacking = set(required(folder, kind)) - {entry.name for entry in parcel.entries}
    if lacking:
        raise RequestError(
            f"{folder}: {', '.join(sorted(lacking))} missing, so nobody could load it: was it written whole?"
        )
    return parcel


def refuse(place: Path, problems: list[str]) -> None:
    if problems:
        raise RequestError(
            f"{place} holds what is not to be published, so nothing was uploaded:\n"
            + "\n".join(f"  - {line}" for line in problems)
            + "\nmove these files out of the folder, and take credentials out of the text (revoke them if the folder "
            "was ever shared); then push again"
        )


def walk(folder: Path) -> Iterator[tuple[str, Path]]:
    """Name in the repository and path of everything in the folder; folders (with a / behind) are not entered."""
    for path in sorted(folder.iterdir()):
        if path.name == "additional_chat_templates" and path.is_dir() and not path.is_symlink():
            yield from ((f"{path.name}/{inner.name}{'/' * inner.is_dir()}", inner) for inner in sorted(path.iterdir()))
        else:
            yield path.name + "/" * path.is_dir(), path


def match(name: str, table: dict[str, str]) -> str | None:
    return next((text for pattern, text in table.items() if fnmatchcase(name, pattern)), None)


def required(folder: Path, kind: Kind) -> list[str]:
    """Files without which the weights cannot be loaded."""
    if kind == "adapter":
        return ["adapter_config.json", "adapter_model.safetensors"]
    index = folder / "model.safetensors.index.json"
    return sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]


def size_of(path: Path) -> int:
    return sum(p.lstat().st_size for p in path.rglob("*")) if path.is_dir() else path.lstat().st_size


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise RequestError(f"{path}: not JSON ({error})") from None


def find_secrets(content: Path | bytes, token: str | None = None) -> list[str]:
    """'line N: looks like a ...' for every credential in a text file; nothing for a binary one."""
    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        head = file.read(1 << 16)
        wide = head.startswith((b"\xff\xfe", b"\xfe\xff"))
        if b"\0" in head and not wide:
            return []
        text = head + file.read()
    if wide:
        text = text.decode("utf-16", "replace").encode()
    found = [(m.start(), kind) for kind, pattern in SECRETS.items() for m in re.finditer(pattern, text)]
    if token and (place := text.find(token.encode())) >= 0:
        found.append((place, "Hugging Face token: your own"))
    lines = [(text.count(b"\n", 0, start) + 1, kind) for start, kind in sorted(found)]
    return list(dict.fromkeys(f"line {line}: looks like a {kind}" for line, kind in lines))
