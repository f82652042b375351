"""Checkpoint folders that are complete or do not count: sealed by a manifest of names and sizes."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from orpo_lite.common.errors import RequestError
from orpo_lite.common.files import sync_folder, write_atomically

MANIFEST = "manifest.json"
NAME = re.compile(r"checkpoint-(\d+)")
ASIDE = ".part"
"""Ending of the hidden folder in which a checkpoint is written."""
REPLACED = ".old"
"""Ending of the hidden name that a checkpoint has while another takes its place."""


def step_of(checkpoint: Path) -> int:
    """Return the optimizer steps done, by the folder's name."""
    match = NAME.fullmatch(checkpoint.name)
    assert match is not None, checkpoint
    return int(match[1])


def checkpoints(folder: Path) -> list[Path]:
    """List all checkpoints in a folder, good or not, oldest first.

    Raises:
        RequestError: the folder exists and cannot be read.
    """
    try:
        found = [path for path in folder.iterdir() if NAME.fullmatch(path.name) and path.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        remedy = "is the drive still mounted? Mount it again, then --resume"
        raise RequestError(f"{folder}: cannot be read ({error.strerror}): {remedy}") from None
    return sorted(found, key=step_of)


def files_in(checkpoint: Path) -> dict[str, Path]:
    """Return every file of a checkpoint but its manifest, subfolders included, by its name inside."""
    found = {
        path.relative_to(checkpoint).as_posix(): path for path in sorted(checkpoint.rglob("*")) if not path.is_dir()
    }
    found.pop(MANIFEST, None)
    return found


def seal(checkpoint: Path, facts: dict[str, Any]) -> None:
    """Sync every file to the disk and write the manifest: facts, and each file's size in bytes.

    Raises:
        OSError: the disk is full or gone.
    """
    listed = {}
    for name, path in files_in(checkpoint).items():
        with path.open("rb") as file:
            os.fsync(file.fileno())
        listed[name] = {"bytes": path.stat().st_size}
    for folder in [checkpoint, *(path for path in checkpoint.rglob("*") if path.is_dir())]:
        sync_folder(folder)
    write_atomically(checkpoint / MANIFEST, json.dumps(facts | {"files": listed}, indent=1))


def place(aside: Path, final: Path) -> None:
    """Give a sealed checkpoint its name; one of the same step that has the name already is deleted afterwards."""
    old = final.with_name(f".{final.name}{REPLACED}")
    if final.exists():
        final.rename(old)
    aside.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def clean(folder: Path) -> None:
    """Remove what a run that was killed while saving left behind."""
    for old in folder.glob(f".checkpoint-*{REPLACED}"):
        final = old.with_name(old.name.removeprefix(".").removesuffix(REPLACED))
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(final)
    for aside in folder.glob(f".checkpoint-*{ASIDE}"):
        shutil.rmtree(aside, ignore_errors=True)


def manifest(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest.

    Raises:
        ValueError: there is none, or it is damaged; the message says which.
    """
    try:
        return dict(json.loads((checkpoint / MANIFEST).read_bytes()))
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing, so the checkpoint is incomplete") from None
    except OSError as error:
        raise ValueError(f"{MANIFEST} cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{MANIFEST} is damaged") from None


def damage(checkpoint: Path) -> str | None:
    """Describe what is wrong with a checkpoint, naming the file; None where every file is there in its size."""
    try:
        for name, wanted in manifest(checkpoint)["files"].items():
            size = (checkpoint / name).stat().st_size
            if size != wanted["bytes"]:
                return f"{name} has {size:,} bytes, {wanted['bytes']:,} were written"
    except (KeyError, AttributeError, TypeError):
        return f"{MANIFEST} is damaged"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(checkpoint)} is missing"
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"{Path(error.filename or checkpoint).name} cannot be read ({error.strerror})"
    return None


def newest_good(folder: Path) -> tuple[Path | None, list[str]]:
    """Find the newest checkpoint without damage, and a line for each newer one that is damaged."""
    lines = []
    for checkpoint in reversed(checkpoints(folder)):
        wrong = damage(checkpoint)
        if wrong is None:
            return checkpoint, lines
        lines.append(f"{checkpoint}: {wrong}")
    return None, lines
