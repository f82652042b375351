"""Answers of every side to a file of questions, in batches, written as they come."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from orpo_lite.common.console import errors
from orpo_lite.common.errors import RequestError
from orpo_lite.evaluate.answering import Answerer, Sampling
from orpo_lite.evaluate.ledger import Ledger
from orpo_lite.evaluate.model_source import Found
from orpo_lite.evaluate.prompts import Question
from orpo_lite.trainer.out_of_memory import named


def answer_questions(
    open_answerer: Callable[[], Answerer],
    found: Found,
    questions: list[Question],
    sampling: Sampling,
    seed: int,
    batch_size: int,
    output: Path | None,
) -> list[dict[str, Any]]:
    """Rows of what was asked, and under `answers`, `tokens` and `ended` what each side said, a list of its turns.

    Greedy answers depend on nothing but the model; drawn ones on the seed and the batch size too. None stands for an
    answer for which the conversation left no room.

    Args:
        open_answerer: loads the models; not called where everything is in `output` already.
    """
    settings = {"model": found.path, "weights": fingerprint(found), "max_new_tokens": sampling.max_new_tokens}
    if sampling.temperature:
        settings |= {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed,
            "batch_size": batch_size,
        }
    ledger = Ledger(output, [one.as_dict() | {"settings": settings} for one in questions])
    if len(ledger.rows) == len(questions):
        return ledger.rows
    answerer = open_answerer()
    check_room(answerer, questions)
    columns = (TextColumn("answering"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True) as progress:
        task = progress.add_task("answering", total=len(questions), completed=len(ledger.rows))
        for start in range(0, len(questions), batch_size):
            part = questions[start : start + batch_size]
            missing = start + len(part) - len(ledger.rows)
            if missing <= 0:
                continue
            said = {
                name: converse(answerer, name, part, sampling, (seed, start, n))
                for n, name in enumerate(answerer.names)
            }
            for place in range(len(part) - min(missing, len(part)), len(part)):
                ledger.append(
                    {
                        key: {name: [each and each[key] for each in said[name][place]] for name in answerer.names}
                        for key in ("answers", "tokens", "ended")
                    }
                )
            progress.update(task, completed=len(ledger.rows))
    return ledger.rows


def converse(
    answerer: Answerer, name: str, questions: list[Question], sampling: Sampling, seeds: tuple[int, ...]
) -> list[list[dict[str, Any] | None]]:
    """One side's answers to the turns of each question."""
    talks = [list(one.opening) for one in questions]
    said: list[list[dict[str, Any] | None]] = [[] for _ in questions]
    for turn in range(1 + max(len(one.more) for one in questions)):
        asked = [n for n, one in enumerate(questions) if turn <= len(one.more)]
        if turn:
            for n in asked:
                talks[n].append({"role": "user", "content": questions[n].more[turn - 1]})
        prompts = dict(zip(asked, answerer.prompts([talks[n] for n in asked]), strict=True))
        room = {n: answerer.room(ids, sampling.max_new_tokens) for n, ids in prompts.items()}
        together = [n for n in asked if room[n] == sampling.max_new_tokens]
        # a limit of its own for what has less room, so that no answer depends on its neighbours
        groups = [
            group for group in (together, *([n] for n in asked if 0 < room[n] < sampling.max_new_tokens)) if group
        ]
        torch.manual_seed(int.from_bytes(hashlib.sha256(repr((*seeds, turn)).encode()).digest()[:7], "little"))
        for group in groups:
            limit = replace(sampling, max_new_tokens=room[group[0]])
            with named("answering", "set a smaller --batch-size or --max-new-tokens"):
                replies = answerer.replies(name, [prompts[n] for n in group], limit)
            for n, reply in zip(group, replies, strict=True):
                said[n].append({"answers": reply.text, "tokens": reply.tokens, "ended": reply.ended})
                talks[n].append({"role": "assistant", "content": reply.text})
        for n in asked:
            if room[n] < 1:  # and so it is for all that follows
                said[n].append(None)
                talks[n].append({"role": "assistant", "content": ""})
    return said


def check_room(answerer: Answerer, questions: list[Question]) -> None:
    """Raise RequestError for a question that the model cannot be asked, before anything is generated."""
    for one in questions:
        try:
            [ids] = answerer.prompts([one.opening])
        except RequestError as error:
            raise RequestError(f"--prompts: {one.id}: {error}") from None
        if answerer.room(ids, 1) < 1:
            raise RequestError(
                f"--prompts: {one.id} has {len(ids):,} tokens, and the model takes {answerer.context:,}: leave it out"
            )


def fingerprint(found: Found) -> str | None:
    """Of an adapter's weights, so that another one's answers are not taken for its own."""
    file = Path(found.path) / "adapter_model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else None
