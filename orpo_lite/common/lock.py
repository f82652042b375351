"""One process at a time in a run folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

from orpo_lite.common.errors import RequestError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"
_HELD: dict[tuple[int, Path], IO[str]] = {}
"""By process, since a forked child inherits this table and not the right to the folder."""


def lock(folder: Path) -> None:
    """Keep other processes out of a run folder until `unlock`, or until this process ends, however it ends.

    Where the file system knows no locks (some network drives, Windows) nothing is kept out.

    Raises:
        RequestError: another process is in it.
        OSError: the folder cannot be written.
    """
    here = (os.getpid(), folder.resolve())
    if here in _HELD:  # by this process, which a notebook may have stopped in mid-run
        return
    path = folder / LOCK
    file = path.open("a+", encoding="ascii")
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read(20).strip()
        file.close()
        raise RequestError(
            f"{folder}: another process{f' ({holder})' if holder.isdigit() else ''} is training in this folder; wait for it or "
            "stop it, or choose another training.output_dir"
        ) from None
    except OSError:
        pass
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    _HELD[here] = file


def taken(folder: Path) -> bool:
    """Whether a process trains in a run folder now; False where that cannot be known."""
    if (os.getpid(), folder.resolve()) in _HELD:
        return True
    try:
        with (folder / LOCK).open("r", encoding="ascii") as file:
            if fcntl is None:
                return False
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def unlock(folder: Path) -> None:
    """Let others in."""
    if file := _HELD.pop((os.getpid(), folder.resolve()), None):
        (folder / LOCK).unlink(missing_ok=True)
        file.close()
