"""Files written whole or not at all: aside, synced to the disk, and renamed."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace a file's content, so that a reader, or a run that is killed here, meets the old one or the new one.

    Raises:
        OSError: the disk is full, or the place cannot be written; the old file is as it was.
    """
    aside = path.with_name(path.name + ".part")
    try:
        with aside.open("wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make a folder's new names last through a power cut, where its file system can (Drive's and Windows' cannot)."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def disk_of(path: Path) -> int:
    """The file system that a path is on, or would be once it is made."""
    while True:
        try:
            return path.stat().st_dev
        except FileNotFoundError:
            if path == path.parent:
                raise
            path = path.absolute().parent


def check_mounted(path: Path, disk: int) -> None:
    """Raise OSError if a path is no longer on the file system that `disk_of` gave for it.

    What is written to a bare mount point would be gone with the machine, or hidden by the next mount.
    """
    if disk_of(path) != disk:
        raise OSError(errno.ENODEV, "its drive is no longer mounted", str(path))


def disk_trouble(error: Exception) -> str | None:
    """What went wrong with a disk, by what Python, torch, safetensors and tokenizers raise for it; None if nothing did."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text = str(error).partition("\n")[0]
    # Rust's libraries put the system's error into an exception of their own, tokenizers into a bare Exception
    rust = type(error).__name__ == "SafetensorError" or "(os error " in text
    return text if rust or "PytorchStreamWriter" in text or "inline_container" in text else None
