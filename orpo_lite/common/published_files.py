"""Which files of a folder may be uploaded to the hub: an allow-list, and the refusal of everything unexpected."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from orpo_lite.common.credentials import find_secrets
from orpo_lite.common.errors import RequestError

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
             "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")  # fmt: skip
LICENSES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt")
COMMON = dict.fromkeys(TOKENIZER, "tokenizer") | {
    "README.md": "model card",
    "recipe.yaml": "the run's recipe",
    "curves.png": "picture of the training and held-out curves",
    "chat_template.jinja": "chat template, as trained with",
    "additional_chat_templates/*.jinja": "chat template",
    **dict.fromkeys(LICENSES, "license"),
}
ALLOWED = {
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
    "gguf": COMMON | {"*.gguf": "weights, tokenizer and template in one file", "Modelfile": "for `ollama create`"},
}
"""File names that may be uploaded and what they are, by kind of upload."""

KEPT = {
    "checkpoints": "for resuming the run: weights, optimizer and random states",
    "tensorboard": "the tracker's log",
    "run.json": "facts of the run, with paths of this machine; the model card says what matters",
    "before.json": "the evaluation before training, for a run that resumes",
    **dict.fromkeys(("nonfinite-step-*", "reproduce-step-*.zip"), "rows of your data, from a step that was not finite"),
    ".lock": "held while a run uses the folder",
    "metrics.jsonl": "the curves' numbers",
    "held_out.json": "how likely every held-out pair was, before and after",
    **dict.fromkeys(("report.html", "compare.html"), "your own report; the model card says what matters"),
    "*.gguf": "an export: push it with --gguf",
    "Modelfile": "goes with the GGUF file that it names",
    **dict.fromkeys((".DS_Store", "Thumbs.db", "desktop.ini"), "the file manager's"),
    **dict.fromkeys((".gitattributes", ".gitignore"), "git's"),
}
"""Files that a run folder holds by design, or an operating system leaves anywhere: not uploaded, no reason to refuse."""

UNEXPECTED = (
    (r"optimizer.*|scheduler\.pt|scaler\.pt|rng_state.*|trainer_state\.json|training_args\.bin", "training state"),
    (r"\.env.*|.*\.env|\.netrc|.*\.pem|.*\.key|id_rsa.*|credentials.*|token", "usually holds secrets"),
    (r"\.git/", "git's database, with everything that was ever committed"),
    (r".*\.(bin|pt|pth|ckpt|pkl|pickle|npz)", "pickled file, which could run code when it is loaded"),
    (r".*", "not written by orpo_lite"),
)


def walk(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield (name in the repository, path) of everything in a folder; subfolders end in / and are not entered."""
    for path in sorted(folder.iterdir()):
        if path.name == "additional_chat_templates" and path.is_dir() and not path.is_symlink():
            yield from ((f"{path.name}/{inner.name}{'/' * inner.is_dir()}", inner) for inner in sorted(path.iterdir()))
        else:
            yield path.name + "/" * path.is_dir(), path


def match(name: str, table: dict[str, str]) -> str | None:
    """Return a table's text for the first pattern that fits the name."""
    return next((text for pattern, text in table.items() if fnmatchcase(name, pattern)), None)


def sort_files(
    folder: Path, allowed: dict[str, str], token: str | None = None
) -> tuple[dict[str, Path], dict[str, tuple[Path, str]]]:
    """Sort a folder into files to upload, by name, and files that are kept, with the reason.

    Args:
        folder: its absolute path, without links.
        allowed: names that may be uploaded, of `ALLOWED`.
        token: the user's own, to be searched for as well.

    Raises:
        RequestError: the folder holds stray files, caches, training states, links that lead out of it, or credentials
            in a text file. All are named at once.
    """
    uploaded: dict[str, Path] = {}
    kept: dict[str, tuple[Path, str]] = {}
    problems: list[str] = []
    for name, path in walk(folder):
        if match(name, allowed) and path.is_symlink() and not path.resolve().is_relative_to(folder):
            problems.append(f"{name}: a link that leads out of the folder")
            continue
        if match(name, allowed) and path.is_file():
            uploaded[name] = path
        elif reason := match(name.rstrip("/"), KEPT):
            kept[name] = (path, reason)
        else:
            problems.append(f"{name}: {next(text for pattern, text in UNEXPECTED if re.fullmatch(pattern, name))}")
        if path.is_file():
            problems += [f"{name}, {found}" for found in find_secrets(path, token)]
    refuse(folder, problems)
    return uploaded, kept


def refuse(place: Path, problems: list[str]) -> None:
    """Raise RequestError that names every problem, if there are any."""
    if problems:
        raise RequestError(
            "\n  - ".join([f"{place} holds what is not to be published, so nothing was uploaded:", *problems])
            + "\nmove these files out of the folder, and take credentials out of the text (revoke them if the folder "
            "was ever shared); then push again"
        )
