"""Pairs that repeat or contradict others, left out: of a run (data.deduplicate), or in a new file (`orpo-lite data --fix`)."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from orpo_lite.common.errors import RequestError
from orpo_lite.common.text import counted
from orpo_lite.data.dropped_rows import Drop
from orpo_lite.data.lengths import numbers
from orpo_lite.data.quality import REPEATS, end_to_end, namer, repeats
from orpo_lite.data.sources import open_source

if TYPE_CHECKING:
    from orpo_lite.data.token_cache import Tokenized
    from orpo_lite.recipe import DataSection


def note_on_repeats(done: list[Tokenized], field: str) -> list[str]:
    """Return a sentence on the repeats and contradictions of a section, or nothing if it has none."""
    counts = Counter(why for why, _ in repeats(end_to_end(done)).values())
    told = " and ".join(f"{counted(count, 'pair')} ({reason}s)" for reason in REPEATS if (count := counts[reason]))
    remedy = "`orpo-lite data --fix FILE` writes the data without them, data.deduplicate=true leaves them out"
    return [f"{field} holds {told}: {remedy}"] if told else []


def without_repeats(done: list[Tokenized], near: bool = False) -> list[Tokenized]:
    """Return the sources without the pairs that `repeats` finds; their reports count and list these."""
    rows, result, start = end_to_end(done), [], 0
    found, name = repeats(rows, near), namer(done)
    if len(found) == len(rows):
        raise RequestError(
            f"all {len(rows):,} pairs contradict each other (a>b and b>a), and none is left: correct them"
        )
    for one in done:
        row = numbers(one.rows, "row")
        out = {place - start: why for place, why in found.items() if 0 <= place - start < len(row)}
        drops = [Drop(one.label, int(row[n]), reason, f"of {name(other)}") for n, (reason, other) in out.items()]
        kept = np.delete(np.arange(len(row)), list(out))
        report = replace(one.report, kept=len(kept), drops=one.report.drops + drops)
        result.append(one._replace(rows=one.rows.select(kept), report=report))
        start += len(row)
    return result


def check_target(spec: DataSection, path: Path) -> None:
    """Raise RequestError if the data cannot be repaired into this path."""
    listed = path.with_name(f"{path.name}.changes.jsonl")
    for problem, found in {
        "expected a name that ends in .jsonl": path.suffix != ".jsonl",
        "repairs one source at a time: name one in data.train, or set data.deduplicate=true": len(spec.train) > 1,
        f"reads all rows, data.max_rows is {spec.max_rows}: set data.max_rows=null": spec.max_rows,
        f"{path} or {listed} exists, and is not overwritten: give another name": path.exists() or listed.exists(),
        f"there is no folder {path.parent}: make it first": not path.absolute().parent.is_dir(),
    }.items():
        if found:
            raise RequestError(f"--fix {path}: {problem}")


def write_fixed(spec: DataSection, one: Tokenized, path: Path) -> dict[str, Any]:
    """Write the rows of a source that a run would keep, as they were, without repeats, and a list of those left out."""
    listed, left = path.with_name(f"{path.name}.changes.jsonl"), without_repeats([one], near=True)[0]
    stay = set(numbers(left.rows, "row").tolist())  # a row may be several pairs
    out = {drop.row: drop for drop in left.report.drops if drop.row not in stay}
    changes = [{"row": row, "reason": out[row].reason, "detail": out[row].detail} for row in sorted(out)]
    given = open_source(spec.train[0], spec.split, spec.columns).raw()
    first = next(given, {})
    if isinstance(first, dict) and "completion" in first and "chosen" not in first:
        raise RequestError(
            f"--fix {path}: repairs rows that are pairs, and these are rated answers: set data.deduplicate=true"
        )
    given = itertools.chain([first], given)
    kept, written = (row for number, row in enumerate(given) if number not in out), 0
    try:
        for file, rows in ((listed, changes), (path, kept)):
            # half a character stays an escape
            with file.open("w", encoding="utf-8", errors="backslashreplace") as stream:
                lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
                written = sum(stream.write(line) > 0 for line in lines)
    except OSError as error:
        raise RequestError(f"--fix {path}: cannot be written: {error.strerror}") from None
    reasons = Counter(one["reason"] for one in changes)
    return {"path": str(path), "changes": str(listed), "written": written, "left_out": reasons}
