"""Answer files of prompts with every side, in batches, writing each row as it is done and resuming where it stopped."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo_lite.common.console import progress
from orpo_lite.common.errors import RequestError
from orpo_lite.common.files import append_line, lock_folder, unlock_folder
from orpo_lite.data.dropped_rows import Dropped
from orpo_lite.data.file_formats import read_file
from orpo_lite.data.messages import describe_columns, messages
from orpo_lite.data.sources import local_files
from orpo_lite.recipe.loading import resolve_path
from orpo_lite.trainer.run_folder import differences

if TYPE_CHECKING:
    from orpo_lite.evaluate.answering import Sampling, Side

FORMS = 'expected {"turns": ["...", "..."]}, {"prompt": "..."} or {"prompt": [messages, the last from the user]}'


@dataclass(frozen=True)
class Question:
    """A conversation to have: how it begins, and what the user says next, whatever the answers are."""

    id: str
    category: str | None
    prompt: list[dict[str, Any]]
    turns: list[str]


def read_questions(path: str) -> list[Question]:
    """Read questions from a .txt file (one per line) or from rows (.jsonl, .json, .csv, .parquet, compressed, globs).

    Raises:
        RequestError: no such file, an empty one, or a row that is not a question; it names the row.
    """
    name = os.path.expanduser(resolve_path(path))
    if name.lower().endswith(".txt") and os.path.isfile(name):
        try:
            lines = Path(name).read_text("utf-8-sig").split("\n")  # no other character ends a line
        except UnicodeDecodeError as error:
            raise RequestError(f"{path}: not UTF-8 text (byte {error.start}): convert it to UTF-8") from None
        rows: list[Any] = [{"id": number, "prompt": line} for number, line in enumerate(lines, 1) if line.strip()]
    else:
        files = local_files(name)
        if not files:
            raise RequestError(f"--prompts: {path}: no such file: {FORMS}, or a .txt file with one prompt per line")
        rows = [row for file in files for row in read_file(file)]
    if not rows:
        raise RequestError(f"--prompts: {path} holds no prompt: {FORMS}")
    return [parse_question(row, number, path) for number, row in enumerate(rows, 1)]


def parse_question(row: Any, number: int, path: str) -> Question:
    """Read one row.

    Raises:
        RequestError: it is not a question.
    """
    place = f"--prompts: {path}: row {number}"
    if not isinstance(row, dict):
        raise RequestError(f"{place} is a {type(row).__name__}, {FORMS}")
    given = row.get("id", row.get("question_id", number))
    category = row.get("category")
    turns, prompt = row.get("turns"), row.get("prompt")
    follow_ups: list[str] = []
    if isinstance(turns, list) and turns and all(isinstance(turn, str) and turn.strip() for turn in turns):
        prompt, *follow_ups = turns
    elif turns is not None:
        raise RequestError(f"{place}: turns is not a list of texts: {FORMS}")
    if isinstance(prompt, str) and prompt.strip():
        opening = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, list | dict) and prompt:
        try:
            opening = messages(prompt, "prompt", False)
        except Dropped as error:
            raise RequestError(f"{place}: {error.detail}: {FORMS}") from None
    else:
        raise RequestError(f"{place}: found the columns {describe_columns(row)}, {FORMS}")
    if opening[-1]["role"] != "user":
        raise RequestError(f"{place}: the prompt ends with a turn of the {opening[-1]['role']}: {FORMS}")
    return Question(str(given), None if category is None else str(category), opening, follow_ups)


class ResultFile:
    """A JSON-lines file with one row for each task, in order; or none, where nothing is to be written.

    Rows that are already there are kept if their fields show that they are of the same tasks. A line that a crash left
    unfinished is removed and done again.

    Args:
        path: None keeps everything in memory.
        tasks: fields that each row begins with.

    Raises:
        RequestError: the file holds other rows, cannot be written, or another process is writing to it.
    """

    def __init__(self, path: Path | None, tasks: list[dict[str, Any]]):
        self.path, self.tasks = path, tasks
        self.rows: list[dict[str, Any]] = []
        if path is None:
            return
        try:
            lock = path.absolute().parent, f".{path.name}.lock"
            why = f"another command is writing {path.name}; wait for it or stop it, or choose another --output"
            lock_folder(*lock, why)
            atexit.register(unlock_folder, *lock)
            content = path.read_bytes() if path.exists() else b""
            whole = content[: content.rfind(b"\n") + 1]
            self.rows = [json.loads(line) for line in whole.splitlines()]
            for number, row in enumerate(self.rows, 1):
                here = tasks[number - 1] if number <= len(tasks) else {}
                was = {key: row.get(key) for key in here} if isinstance(row, dict) else {}
                if was != here or not here:
                    why = "; ".join(differences(was, here)) or "there are more of them"
                    raise ValueError(f"it holds other rows than this command would write, line {number}: {why}")
            with path.open("ab") as file:
                file.truncate(len(whole))
        except RequestError:
            raise
        except ValueError as error:
            raise RequestError(
                f"--output: cannot resume from {path} ({error}): choose another file, or remove it"
            ) from None
        except OSError as error:
            raise RequestError(f"--output: {path} cannot be written ({error.strerror}): choose another place") from None

    def append(self, results: dict[str, Any]) -> None:
        """Add the results of the next task; the row is on the disk when this returns."""
        row = self.tasks[len(self.rows)] | results
        if self.path is not None:
            append_line(self.path, json.dumps(row, ensure_ascii=False))
        self.rows.append(row)


def answer_questions(
    sides: list[Side], questions: list[Question], sampling: Sampling, seed: int, batch_size: int, output: Path | None
) -> list[dict[str, Any]]:
    """Answer every question with every side; nothing is loaded where everything is in `output` already.

    Greedy answers depend on the model alone; sampled ones on the seed and the batch size too.

    Returns:
        Rows of the question's fields and of `answers`, `tokens` and `ended`: for each side a list over its turns, in
        which None stands for an answer that the conversation left no room for.
    """
    settings: dict[str, Any] = {"sides": {side.name: side.identity() for side in sides}}
    settings["max_new_tokens"] = sampling.max_new_tokens
    if sampling.temperature:
        sampled = {"temperature": sampling.temperature, "top_p": sampling.top_p}
        settings |= sampled | {"seed": seed, "batch_size": batch_size}
    results = ResultFile(output, [vars(one) | {"settings": settings} for one in questions])
    if len(results.rows) == len(questions):
        return results.rows
    for side in sides:
        check_room(side, questions)
    with progress("answering", len(questions), len(results.rows)) as advance:
        for start in range(0, len(questions), batch_size):
            part = questions[start : start + batch_size]
            done = max(0, len(results.rows) - start)
            if done >= len(part):
                continue
            answered = {one.name: converse(one, part, sampling, (seed, start, n)) for n, one in enumerate(sides)}
            for place in range(done, len(part)):
                turns = {name: conversations[place] for name, conversations in answered.items()}
                results.append({key: {name: [one and one[key] for one in each] for name, each in turns.items()}
                                for key in ("answers", "tokens", "ended")})  # fmt: skip
            advance(len(part) - done)
    return results.rows


def converse(
    side: Side, questions: list[Question], sampling: Sampling, seeds: tuple[int, ...]
) -> list[list[dict[str, Any] | None]]:
    """Have one side answer the turns of each question."""
    import torch

    from orpo_lite.trainer.interruptions import named

    conversations = [list(one.prompt) for one in questions]
    answered: list[list[dict[str, Any] | None]] = [[] for _ in questions]
    for turn in range(1 + max(len(one.turns) for one in questions)):
        asked = [n for n, one in enumerate(questions) if turn <= len(one.turns)]
        if turn:
            for n in asked:
                conversations[n].append({"role": "user", "content": questions[n].turns[turn - 1]})
        prompts = dict(zip(asked, side.prompts([conversations[n] for n in asked]), strict=True))
        room = {n: side.room(ids, sampling.max_new_tokens) for n, ids in prompts.items()}
        # prompts with less room get a batch and a limit of their own, so that no answer depends on its neighbors
        batch = [n for n in asked if room[n] == sampling.max_new_tokens]
        short = [[n] for n in asked if 0 < room[n] < sampling.max_new_tokens]
        torch.manual_seed(int.from_bytes(hashlib.sha256(repr((*seeds, turn)).encode()).digest()[:7], "little"))
        for group in filter(None, (batch, *short)):
            limit = replace(sampling, max_new_tokens=room[group[0]])
            with named("answering", "set a smaller --batch-size or --max-new-tokens"):
                replies = side.replies([prompts[n] for n in group], limit)
            for n, reply in zip(group, replies, strict=True):
                answered[n].append({"answers": reply.text, "tokens": reply.tokens, "ended": reply.ended})
                conversations[n].append({"role": "assistant", "content": reply.text})
        for n in asked:
            if room[n] < 1:  # nor will there be room for the turns that follow
                answered[n].append(None)
                conversations[n].append({"role": "assistant", "content": ""})
    return answered


def check_room(side: Side, questions: list[Question]) -> None:
    """Raise RequestError for a question that cannot be put to the model, before anything is generated."""
    for one in {id(one): one for one in questions}.values():  # one that is asked several times is the same object
        try:
            [ids] = side.prompts([one.prompt])
        except RequestError as error:
            raise RequestError(f"--prompts: {one.id}: {error}") from None
        if side.room(ids, 1) < 1:
            raise RequestError(
                f"--prompts: {one.id} has {len(ids):,} tokens, and the model takes {side.context:,}: leave it out"
            )
