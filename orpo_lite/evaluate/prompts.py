"""Files of prompts to be answered: MT-bench's form, rows with a prompt, or lines of text."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orpo_lite.common.errors import RequestError
from orpo_lite.data.dropped_rows import Dropped
from orpo_lite.data.file_formats import read_file
from orpo_lite.data.messages import describe_columns, messages
from orpo_lite.data.sources import local_files
from orpo_lite.recipe.loading import resolve_path

FORMS = 'expected {"turns": ["...", "..."]}, {"prompt": "..."} or {"prompt": [messages that end with the user\'s]}'


@dataclass(frozen=True)
class Question:
    """A conversation to be had: how it begins, and what the user goes on to say, whatever the answers are."""

    id: str
    category: str | None
    opening: list[dict[str, Any]]
    more: list[str]

    def as_dict(self) -> dict[str, Any]:
        """The part of an answer's row that says what was asked."""
        return {"id": self.id, "category": self.category, "prompt": self.opening, "turns": self.more}


def read_questions(path: str) -> list[Question]:
    """Questions of a .txt file (a line each) or of rows (.jsonl, .json, .csv, .parquet; compressed ones and globs too).

    Raises:
        RequestError: no such file, nothing in it, or a row that is no question; it names the row.
    """
    name = os.path.expanduser(resolve_path(path))
    if name.lower().endswith(".txt") and os.path.isfile(name):
        try:
            lines = Path(name).read_text("utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise RequestError(f"{path}: not UTF-8 text (byte {error.start}): convert it to UTF-8") from None
        rows: list[Any] = [{"id": number, "prompt": line} for number, line in enumerate(lines, 1) if line.strip()]
    else:
        files = local_files(name, "test")
        if not files:
            raise RequestError(f"--prompts: {path}: there is no such file: {FORMS}, or a .txt file of a prompt a line")
        rows = [row for file in files for batch in read_file(file) for row in batch]
    if not rows:
        raise RequestError(f"--prompts: {path} holds no prompt: {FORMS}")
    return [question(row, number, path) for number, row in enumerate(rows, 1)]


def question(row: Any, number: int, path: str) -> Question:
    """One row.

    Raises:
        RequestError: it is none.
    """
    place = f"--prompts: {path}: row {number}"
    if not isinstance(row, dict):
        raise RequestError(f"{place} is a {type(row).__name__}, {FORMS}")
    given = row.get("id", row.get("question_id", number))
    category = row.get("category")
    turns, prompt = row.get("turns"), row.get("prompt")
    try:
        if isinstance(turns, list) and turns and all(isinstance(turn, str) and turn.strip() for turn in turns):
            opening, more = [{"role": "user", "content": turns[0]}], turns[1:]
        elif turns is not None:
            raise RequestError(f"{place}: turns is not a list of texts: {FORMS}")
        elif isinstance(prompt, str) and prompt.strip():
            opening, more = [{"role": "user", "content": prompt}], []
        elif isinstance(prompt, list | dict) and prompt:
            opening, more = messages(prompt, "prompt", False), []
        else:
            raise RequestError(f"{place}: found {describe_columns(row)}: {FORMS}")
    except Dropped as error:
        raise RequestError(f"{place}: {error.detail}: {FORMS}") from None
    if opening[-1]["role"] != "user":
        raise RequestError(f"{place}: the prompt ends with a turn of the {opening[-1]['role']}: {FORMS}")
    return Question(str(given), None if category is None else str(category), opening, more)
