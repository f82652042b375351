"""Formats of other tools, which name or nest the same things differently -> the columns that `row_shapes` knows.

To add one: an entry of FORMATS, and its columns in COLUMNS.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from orpo_lite.data.dropped_rows import TIE, UNPAIRED, Dropped

COLUMNS = ("prompt", "chosen", "rejected", "tools", "system", "conversations", "instruction", "input", "history",
           "chat_template_kwargs", "messages", "preferred_output", "non_preferred_output", "rejected_response",
           "rejected_messages", "accepted", "question", "response_j", "response_k", "response_a", "response_b",
           "conversation_a", "conversation_b", "winner", "completions", "answers", "responses", "scores",
           "completion", "label", "query", "trajectory")  # fmt: skip
"""Columns of any format; no others are read from data sets."""


def standard(row: Any) -> Any:
    """Return a row in the columns that `row_shape` knows.

    Raises:
        Dropped: the row names no better answer.
    """
    if not isinstance(row, dict):
        return row
    if "chosen" not in row or "rejected" not in row:
        for format_ in FORMATS:
            if format_.columns <= row.keys():
                row = row | format_.convert(row)
                break
    if "prompt" not in row and "chosen" in row:
        names = ("messages",) if "instruction" in row else ("messages", "question", "query", "input", "trajectory")
        named = next((row[name] for name in names if isinstance(row.get(name), str | list) and row[name]), None)
        row = row if named is None else row | {"prompt": named}
    return row


class Format(NamedTuple):
    """Preference rows of another tool: the columns that all of them have, and their conversion into standard ones."""

    columns: set[str]
    convert: Callable[[dict[str, Any]], dict[str, Any]]


def from_openai(row: dict[str, Any]) -> dict[str, Any]:
    """Convert OpenAI's file format for preference fine-tuning."""
    given = row["input"] if isinstance(row["input"], dict) else {}
    sides = {"chosen": row["preferred_output"], "rejected": row["non_preferred_output"]}
    return {"prompt": given.get("messages"), "tools": given.get("tools"), **sides}


def from_swift(row: dict[str, Any]) -> dict[str, Any]:
    """Convert ms-swift's rows: a conversation with the chosen answer, and the rejected answer or conversation."""
    turns, other = row["messages"], row.get("rejected_response") or row.get("rejected_messages")
    if not isinstance(turns, list) or len(turns) < 2:
        return {"chosen": turns, "rejected": other}
    if isinstance(other, list) and len(other) > 1:
        return {"chosen": turns, "rejected": other, "messages": None}
    return {"prompt": turns[:-1], "chosen": turns[-1:], "rejected": other}


def from_arena(row: dict[str, Any]) -> dict[str, Any]:
    """Convert a comparison of two answers with its winner.

    Raises:
        Dropped: it is a tie.
    """
    name = "response" if "response_a" in row else "conversation"
    one, other, winner = row.get(f"{name}_a"), row.get(f"{name}_b"), str(row["winner"]).lower()
    if winner not in ("a", "model_a", "response_a", "b", "model_b", "response_b"):
        raise Dropped(TIE, f"the winner is {winner[:40]!r}, expected model_a or model_b")
    won = winner.endswith("a")
    return {"chosen": one if won else other, "rejected": other if won else one}


def from_scores(row: dict[str, Any]) -> dict[str, Any]:
    """Convert a prompt with several scored or ranked answers: the best against the worst.

    Raises:
        Dropped: fewer than two answers have a score, or all have the same.
    """
    known = scored_answers(row)
    best, worst = max(known, key=lambda one: one[0]), min(known, key=lambda one: one[0])
    return scored_pair(row, best[1], worst[1])


def spread(row: Any, pairing: str) -> list[Any]:
    """Return the rows that a row stands for: with `all`, each scored answer against every one with a lower score.

    Raises:
        Dropped: fewer than two answers have a score, or all have the same.
    """
    if pairing != "all" or not isinstance(row, dict) or {"chosen", "rejected"} <= row.keys():
        return [row]
    if next((one.convert for one in FORMATS if one.columns <= row.keys()), None) is not from_scores:
        return [row]
    known = scored_answers(row)
    return [row | scored_pair(row, better, worse) for high, better in known for low, worse in known if high > low]


def scored_pair(row: dict[str, Any], chosen: Any, rejected: Any) -> dict[str, Any]:
    """Return the columns of one pair of a row's answers."""
    asked = "\n\n".join(str(row[name]) for name in ("instruction", "input") if row.get(name))
    prompt = row.get("prompt") or row.get("messages") or asked or row.get("question") or row.get("query")
    return {"prompt": prompt, "instruction": None, "chosen": chosen, "rejected": rejected}


def scored_answers(row: dict[str, Any]) -> list[tuple[float, Any]]:
    """Return score and text of a row's answers that have a score.

    Raises:
        Dropped: fewer than two answers have a score, or all have the same.
    """
    given = next((row[name] for name in ("completions", "answers", "responses") if isinstance(row.get(name), list)), [])
    scores = row.get("scores")
    scored = (
        list(zip(scores, given, strict=False)) if isinstance(scores, list) else [scored_answer(one) for one in given]
    )
    known = [
        (float(score), answer) for score, answer in scored if isinstance(score, int | float | str) and is_number(score)
    ]
    if len(known) < 2:
        raise Dropped(TIE, f"{len(known)} of {len(given)} answers have a score, expected two or more")
    if len({score for score, _ in known}) == 1:
        raise Dropped(TIE, f"all answers have the score {known[0][0]:g}")
    return known


def scored_answer(given: Any) -> tuple[Any, Any]:
    """Return score and text of one answer of a list; a rank of 1 is the best."""
    if not isinstance(given, dict):
        return None, given
    text = next((given[name] for name in ("response", "answer", "content", "text") if name in given), None)
    if "rank" in given and is_number(given["rank"]):
        return -float(given["rank"]), text
    names = ("overall_score", "score", "fine-grained_score", "rating", "reward")
    return next((given[name] for name in names if given.get(name) is not None), None), text


def is_number(value: Any) -> bool:
    """Return whether a value is a number, or text that holds one."""
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def from_kto(row: dict[str, Any]) -> dict[str, Any]:
    """Refuse a single rated answer: `paired_by_prompt` makes pairs of those that have a partner.

    Raises:
        Dropped: always.
    """
    label = rated(row["label"])
    if label is None:
        raise Dropped(UNPAIRED, f"its label is {str(row['label'])[:40]!r}, expected true or false")
    raise Dropped(UNPAIRED, f"no answer with label {str(not label).lower()} to the same prompt is left")


def rated(label: Any) -> bool | None:
    """Return what the label of a rated answer says; None where it says neither."""
    words = str(label).strip().lower().removesuffix(".0")
    good, bad = ("true", "1", "desirable"), ("false", "0", "-1", "undesirable")
    return True if words in good else False if words in bad else None


FORMATS = (
    Format({"input", "preferred_output", "non_preferred_output"}, from_openai),
    Format({"messages", "rejected_response"}, from_swift),
    Format({"messages", "rejected_messages"}, from_swift),
    Format({"accepted", "rejected"}, lambda row: {"chosen": row["accepted"]}),
    Format({"response_j", "response_k"}, lambda row: {"chosen": row["response_j"], "rejected": row["response_k"]}),
    Format({"response_a", "response_b", "winner"}, from_arena),
    Format({"conversation_a", "conversation_b", "winner"}, from_arena),
    Format({"completions"}, from_scores),
    Format({"answers"}, from_scores),
    Format({"responses", "scores"}, from_scores),
    Format({"prompt", "completion", "label"}, from_kto),
)


Numbered = tuple[int, Any]
"""A row with its index in its source."""
BATCH_ROWS = 250
"""Rows that are looked at first, and converted at a time: few enough that rows of 100 KB, and their tokens, fit in memory."""


def paired_by_prompt(rows: Iterator[Numbered]) -> Iterator[Numbered]:
    """Pair rated answers (prompt, completion, label: true or false, as for KTO) that have the same prompt.

    Other rows come back as they are. A pair has the number of its better answer. Pairs come first; a rated
    answer without a partner comes after them, for `to_pair` to drop.
    """
    first = list(itertools.islice(rows, BATCH_ROWS))
    rows = itertools.chain(first, rows)
    single = [row for _, row in first if isinstance(row, dict) and {"prompt", "completion"} <= row.keys()]
    if not single or len(single) < len(first) or not any("label" in row for row in single):
        yield from rows
        return
    by_prompt: dict[str, tuple[list[Numbered], list[Numbered]]] = {}
    alone: list[Numbered] = []
    for number, row in rows:
        prompt = json.dumps(row.get("prompt"), sort_keys=True, default=str)
        if (label := rated(row.get("label"))) is None:
            alone.append((number, row | {"label": row.get("label")}))
        else:
            by_prompt.setdefault(prompt, ([], []))[label].append((number, row))
    for worse, better in by_prompt.values():
        for (number, good), (_, bad) in zip(better, worse, strict=False):
            kept = {name: value for name, value in good.items() if name not in ("completion", "label")}
            yield number, kept | {"chosen": good["completion"], "rejected": bad["completion"]}
        together = min(len(better), len(worse))
        alone += [*better[together:], *worse[together:]]
    yield from alone
