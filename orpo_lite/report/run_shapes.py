"""What a report takes from a run's files, by type and range: all else is left out, and named with its field."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, TypeAlias

from orpo_lite.report.panels import PANELS

LARGEST = 1e40
"""No float32 reaches it, and sums, products and ranges of numbers up to it are finite."""
SLACK = 1e-6
"""Of a range: shares that were rounded."""
DEEPEST, DIGITS = 40, 300
"""Of values that are only passed on."""
SAID, LONGEST = 8, 120
"""Findings of a file that are named, and characters of a field's name or of a value."""


@dataclass(frozen=True)
class Number:
    low: float = -LARGEST
    high: float = LARGEST
    whole: bool = False
    undefined: bool = False
    """Whether NaN and the infinities are values too: what a run that went wrong has recorded."""

    def holds(self, value: Any) -> bool:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        # whole numbers may be too large for math.isfinite
        if isinstance(value, float) and not math.isfinite(value):
            return self.undefined
        return self.low - SLACK <= value <= self.high + SLACK and not (self.whole and value != int(value))

    def __str__(self) -> str:
        return f"a {'whole ' if self.whole else ''}number from {self.low:g} to {self.high:g}"


Shape: TypeAlias = type[str] | Number | dict[Any, "Shape"] | list["Shape"] | None
"""A dict names its fields, `...` those that it does not name; a list holds the shape of its items; None is anything."""

NUMBER, COUNT, AMOUNT, SHARE = Number(), Number(0, whole=True), Number(0), Number(0, 1)
RESULT, SHARE_RESULT = Number(undefined=True), Number(0, 1, undefined=True)

EVALUATION: Shape = {
    "rewards/accuracies": SHARE_RESULT, "rewards/accuracies_interval": [SHARE_RESULT], "rewards/margins": RESULT,
    "log_odds_chosen": RESULT, "nll_loss": RESULT, "loss": RESULT, "length_baseline": SHARE_RESULT, "pairs": COUNT,
}  # fmt: skip
SAMPLE: Shape = {
    "prompt": str, "answer": str, "tokens": COUNT, "logp": RESULT, "log_odds": RESULT, "logp_trained": RESULT,
    "log_odds_trained": RESULT,
}  # fmt: skip
RULE: Shape = {"chosen": SHARE_RESULT, "rejected": SHARE_RESULT}
HISTOGRAM: Shape = {"width": Number(1), "counts": [COUNT], "median": AMOUNT, "p95": AMOUNT, "max": COUNT}
LENGTHS: Shape = {"prompt": HISTOGRAM, "chosen": HISTOGRAM, "rejected": HISTOGRAM}
FACTS: Shape = {
    "name": str, "device": str, "adapter": str, "versions": {...: str}, "layout": {...: str}, "processes": COUNT,
    "seed": NUMBER, "steps": COUNT, "effective_batch": COUNT, "train_seconds": AMOUNT, "total_seconds": AMOUNT,
    "pairs_per_second": AMOUNT, "peak_memory_bytes": AMOUNT, "parameters": {"trainable": COUNT, "total": COUNT},
    "base_model": {"name_or_path": str, "revision": str, "commit": str, "quantization": str, "facts": [str]},
    "data": {
        "fingerprint": str, "train_pairs": COUNT, "eval_pairs": COUNT,
        "drops": {"rows": COUNT, "kept": COUNT, "dropped": {...: COUNT}, "truncated": {...: COUNT}, "notes": [str]},
        "sources": {...: {"section": str, "path": str, "shape": str, "rows": COUNT, "kept": COUNT}},
        "lengths": {"train": LENGTHS, "eval": LENGTHS},
    },
    "plan": {
        "recipe": str, "model": str, "peak_bytes": AMOUNT, "needed_bytes": AMOUNT, "fullest_phase": str,
        "phases": {...: {...: AMOUNT}}, "assumed": {...: AMOUNT},
        "measured": {"allocated_bytes": AMOUNT, "reserved_bytes": AMOUNT},
    },
    "out_of_memory": {...: [None]}, "warnings": [{"kind": str, "step": NUMBER, "message": str, "text": str}],
    "skipped_steps": [None], "overflow_steps": COUNT,
    "eval": {"before": EVALUATION, "after": EVALUATION}, "samples": {"before": [SAMPLE], "after": [SAMPLE]},
    "rule": {"before": RULE, "after": RULE},
}  # fmt: skip
"""run.json."""
RECIPE: Shape = {
    "name": str, "description": str, "model": {"name_or_path": str, "quantization": str}, "orpo": {"beta": NUMBER},
    "adapter": {"r": COUNT, "alpha": NUMBER},
}  # fmt: skip
BOTH: Shape = {"logps/chosen": [RESULT], "logps/rejected": [RESULT]}
HELD_OUT: Shape = {"beta": NUMBER, "before": BOTH, "after": BOTH}
STEP = Number(0, 1e15)
STEPS: dict[Any, Shape] = {"step": STEP}
LINE = STEPS | {
    f"{place}{metric.key}": SHARE_RESULT if panel.form == "%" else RESULT
    for panel in PANELS
    for metric in panel.metrics
    for place in ("", "eval_")
}
"""Of metrics.jsonl."""


def number(value: Any) -> bool:
    """Whether it is a number that can be drawn."""
    return NUMBER.holds(value)


def parsed(text: str) -> Any:
    """The value of JSON.

    Raises:
        ValueError: broken, or nested too deep.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def checked(found: Any, shape: Shape, place: str, said: list[str]) -> Any:
    """A value with None for all of it that has not its shape, as for what the run did not know; lists of other than
    numbers, which need no places, without such items.

    Args:
        said: gets a line for each of them.
    """
    if fits(found, shape):
        return found
    if isinstance(shape, dict) and isinstance(found, dict):
        rest, kept = shape.get(...), {}
        for key, value in found.items():
            if not isinstance(key, str):
                said.append(named(place, f"found {shown(key)} as a field's name, expected text"))
            elif fits(value, inner := shape.get(key, rest)):
                kept[key] = value
            else:
                kept[key] = checked(value, inner, f"{place}{'.' * (place[-1:] not in ('', ' '))}{key}", said)
        return kept
    if isinstance(shape, list) and isinstance(found, list):
        items = [checked(value, shape[0], f"{place}[{i}]", said) for i, value in enumerate(found)]
        return items if isinstance(shape[0], Number) else [item for item in items if item is not None]
    said.append(named(place, f"found {shown(found)}, expected {wanted(shape)}"))
    return None


def named(place: str, finding: str) -> str:
    return f"{place[:LONGEST]}{'…' * (len(place) > LONGEST)}: {finding}" if place else finding


def fits(found: Any, shape: Shape) -> bool:
    """Whether a value that need not be looked into is as it should be."""
    if found is None:
        return True
    if isinstance(shape, Number):
        return shape.holds(found)
    return plain(found) if shape is None else shape is str and isinstance(found, str)


def plain(value: Any, levels: int = DEEPEST) -> bool:
    """Whether it is a value of JSON of a bounded depth, NaN included."""
    if isinstance(value, dict):
        return levels > 0 and all(isinstance(key, str) and plain(inner, levels - 1) for key, inner in value.items())
    if isinstance(value, list):
        return levels > 0 and all(plain(inner, levels - 1) for inner in value)
    if isinstance(value, int):
        return abs(value) < 10**DIGITS
    return value is None or isinstance(value, str | float)


def wanted(shape: Shape) -> str:
    if isinstance(shape, Number):
        return str(shape)
    words = {dict: "an object", list: "a list", type: "text"}
    return words.get(type(shape), f"plain values at most {DEEPEST} deep, numbers of at most {DIGITS} digits")


def shown(value: Any) -> str:
    """A value in an error's words."""
    if value is None:
        return "nothing"
    if isinstance(value, dict | list | tuple | set):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and abs(value) >= 10**LONGEST:
        return "a number of more than 120 digits"
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, str | int | float) else repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def notes(file: str, said: list[str]) -> list[str]:
    """The findings in a file for who reads the report, and what to do."""
    if not said:
        return []
    more = f", {len(said) - SAID:,} more fields among them" if len(said) > SAID else ""
    return [f"{file}: {line}; left out" for line in said[:SAID]] + [
        f"{file} is not as orpo-lite writes it{more}: copy the run again, or mend these fields"
    ]
