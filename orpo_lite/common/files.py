"""Files that are replaced as a whole, folders that one process uses at a time, and errors of disks."""

import contextlib
import errno
import os
from pathlib import Path

from filelock import FileLock, Timeout

from orpo_lite.common.errors import RequestError

LOCK = ".lock"
TRAINING = "another process is training in this folder; wait for it or stop it, or choose another training.output_dir"
_held: dict[tuple[int, Path], FileLock] = {}
"""Locks by process and file: a forked child inherits this table, but not the right to what it locks."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file's content, so that a reader, or a run that is killed here, finds the old file or the new one.

    Raises:
        OSError: the disk is full, or the path cannot be written; the old file is unchanged.
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


def append_line(path: Path, line: str) -> None:
    """Append a line to a file: it is on the disk when this returns.

    Raises:
        OSError: the disk is full, or the file cannot be written; it is then as it was.
    """
    content = line.encode("utf-8") + b"\n"
    with path.open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            if file.write(content) != len(content):
                raise OSError(errno.ENOSPC, "no room on the disk")
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


def sync_folder(path: Path) -> None:
    """Make a folder's new names survive a power cut, where its file system can (Drive's and Windows' cannot)."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def lock_folder(folder: Path, name: str = LOCK, why: str = TRAINING) -> None:
    """Keep other processes out of a run folder, or from what another name stands for, until `unlock_folder` or this process's end.

    On file systems without locks (some network drives) no process is kept out.

    Raises:
        RequestError: another process has it; `why` says what that means.
        OSError: the folder cannot be written.
    """
    key = (os.getpid(), folder.resolve() / name)
    if key in _held:  # a notebook may have interrupted a run in this process
        return
    lock = FileLock(folder / name, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise RequestError(f"{folder}: {why}") from None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        return
    _held[key] = lock


def unlock_folder(folder: Path, name: str = LOCK) -> None:
    """Let other processes in."""
    if lock := _held.pop((os.getpid(), folder.resolve() / name), None):
        (folder / name).unlink(missing_ok=True)
        lock.release()


def is_locked(folder: Path) -> bool:
    """Return True if a process is training in this folder now; False where that cannot be known."""
    held = (os.getpid(), folder.resolve() / LOCK) in _held
    if held or not os.access(folder / LOCK, os.W_OK):
        return held
    try:
        lock_folder(folder)
    except (RequestError, OSError) as error:
        return isinstance(error, RequestError)
    unlock_folder(folder)
    return False


def disk_trouble(error: Exception) -> str | None:
    """Return what went wrong with a disk, by what Python, torch, safetensors and tokenizers raise, or None."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text = str(error).partition("\n")[0]
    # Rust's libraries put the system's error into an exception of their own, tokenizers into a bare Exception
    rust = type(error).__name__ == "SafetensorError" or "(os error " in text
    return text if rust or "PytorchStreamWriter" in text or "inline_container" in text else None
