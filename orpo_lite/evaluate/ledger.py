"""Results written row by row, and gone on with."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from orpo_lite.common.errors import RequestError


class Ledger:
    """A file of JSON lines, one for each thing to be done, in their order; or none, where nothing is to be written.

    Rows that are there already are kept, if they are of the same work: their fields say so. A line that a crash left
    unfinished is taken away and done again.

    Args:
        path: None keeps everything in memory.
        work: fields that each row begins with.

    Raises:
        RequestError: the file holds other rows, or cannot be written.
    """

    def __init__(self, path: Path | None, work: list[dict[str, Any]], option: str = "--output"):
        self.path, self.work, self.option = path, work, option
        self.rows: list[dict[str, Any]] = []
        if path is None:
            return
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise RequestError(f"{option}: {path} is no file that could be written: choose another name")
        try:
            content = path.read_bytes() if path.exists() else b""
            whole = content[: content.rfind(b"\n") + 1]
            self.rows = [json.loads(line) for line in whole.splitlines()]
        except (OSError, ValueError) as error:
            raise RequestError(f"{option}: {path} cannot be gone on with ({error}): choose another file") from None
        for number, row in enumerate(self.rows, 1):
            expected = work[number - 1] if number <= len(work) else {}
            wrong = [key for key in expected if not isinstance(row, dict) or row.get(key) != expected[key]]
            if wrong or not expected:
                why = f"in {', '.join(wrong)}" if wrong else "there are more of them"
                raise RequestError(
                    f"{option}: {path} holds other rows than this command would write (line {number}: {why}): choose another "
                    "file, or remove it"
                )
        try:
            with path.open("r+b" if path.exists() else "xb") as file:
                file.truncate(len(whole))
        except OSError as error:
            raise RequestError(f"{option}: {path} cannot be written ({error.strerror}): choose another place") from None

    def append(self, results: dict[str, Any]) -> None:
        """The next row: what was to be done, and what came of it; on the disk when this returns."""
        row = self.work[len(self.rows)] | results
        self.rows.append(row)
        if self.path is not None:
            with self.path.open("ab") as file:
                file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
                file.flush()
                os.fsync(file.fileno())
