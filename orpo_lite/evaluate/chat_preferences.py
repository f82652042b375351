"""The user's own choices as a file of preference pairs, which `train` takes as it is."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from orpo_lite.common.errors import RequestError
from orpo_lite.data.row_shapes import row_shape

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class PreferenceFile:
    """JSON lines that choices are appended to, each whole and on the disk before the chat goes on.

    Several chats may write to one file. What is in it stays: a line that a crash left unfinished is closed first.

    Raises:
        RequestError: the place cannot be written, or the file holds something else.
    """

    def __init__(self, path: str | Path):
        self.path = Path(os.path.expanduser(path))
        folder = self.path.absolute().parent
        if self.path.is_dir() or not folder.is_dir():
            raise RequestError(f"--preferences: {self.path} is no file that could be written: choose another name")
        if not os.access(self.path if self.path.exists() else folder, os.W_OK):
            raise RequestError(f"--preferences: {self.path} cannot be written: choose another place")
        self.held = 0
        """Pairs that were in it."""
        if self.path.exists():
            self.held = self.count()

    def count(self) -> int:
        held = number = 0
        try:
            with self.path.open(encoding="utf-8") as lines:
                for line in lines:
                    number += 1
                    if line.strip():
                        if row_shape(json.loads(line)) is None:
                            raise ValueError
                        held += 1
        except (ValueError, RecursionError):
            raise RequestError(
                f"--preferences: line {number} of {self.path} is no preference pair in JSON, so it is not written to: mend "
                "the line, or choose another file"
            ) from None
        return held

    def append(self, row: dict[str, Any]) -> None:
        """Write one row as a line.

        Raises:
            RequestError: it cannot be written; then the file is as it was.
        """
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        try:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                if fcntl is not None:
                    fcntl.flock(handle, fcntl.LOCK_EX)  # until it is closed
                size = os.fstat(handle).st_size
                if size and os.pread(handle, 1, size - 1) != b"\n":
                    line = b"\n" + line
                try:
                    if os.write(handle, line) != len(line):
                        raise OSError("no room on the disk")
                    os.fsync(handle)
                except OSError:
                    os.ftruncate(handle, size)
                    raise
            finally:
                os.close(handle)
        except OSError as error:
            raise RequestError(
                f"{self.path} cannot be written ({error.strerror or error}): the choice is not kept"
            ) from None
