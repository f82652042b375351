"""What was left out of the data, row by row, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from orpo_lite.common import safe_yaml
from orpo_lite.common.errors import RequestError
from orpo_lite.common.text import counted

EMPTY = "empty or missing side"
EMPTY_PROMPT = "empty prompt"
EQUAL = "chosen equal to rejected"
CUT_EQUAL = "chosen equal to rejected once cut"
PROMPTS_DIFFER = "prompts differ"
PROMPT_TOO_LONG = "prompt too long"
COMPLETION_TOO_LONG = "completion does not fit"
WRONG_TYPES = "wrong types"
REFUSED = "refused by the template"
CHANGED = "rewritten by the template"
TIE = "no better answer"
UNPAIRED = "rated answer without a partner"
TEMPLATED = "text that carries a chat template already"
NO_LABELS = "no completion tokens left"
REMEDIES: dict[str, str] = safe_yaml.read(Path(__file__).with_suffix(".yaml"))
"""What to do about rows that were dropped for a reason."""
FEW = 5, 0.02
"""Rows rewritten by the template that are accepted: so many, or this share of all."""
WITHOUT_TEMPLATE = (
    "plain strings get no chat template, though the tokenizer has one; a chat model trained that way answers badly in "
    "chats: data.apply_template=true writes them as a user's and an assistant's turn"
)


class Dropped(Exception):
    """Raised while a row is converted or tokenized: the row is left out and counted."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class Drop(NamedTuple):
    """One row that was left out; `row` counts from 0 in its source."""

    source: str
    row: int
    reason: str
    detail: str


@dataclass
class DropReport:
    """Rows kept, cut and dropped, over one source or several."""

    kept: int = 0
    drops: list[Drop] = field(default_factory=list)
    """Every dropped row, in order."""
    prompt_cut: int = 0
    """Pairs whose prompt lost its oldest content."""
    completion_cut: int = 0
    """Pairs of which at least one completion lost its end."""
    notes: list[str] = field(default_factory=list)
    """Whatever else the user should know, one sentence each."""

    @property
    def rows(self) -> int:
        """Rows read, kept or dropped."""
        return self.kept + len(self.drops)

    @property
    def dropped(self) -> dict[str, int]:
        """Reason -> dropped rows, most frequent first."""
        return dict(Counter(drop.reason for drop in self.drops).most_common())

    @classmethod
    def merge(cls, reports: list[DropReport]) -> DropReport:
        """Return the sum of several reports."""
        return cls(
            kept=sum(report.kept for report in reports),
            drops=[drop for report in reports for drop in report.drops],
            prompt_cut=sum(report.prompt_cut for report in reports),
            completion_cut=sum(report.completion_cut for report in reports),
            notes=list(dict.fromkeys(note for report in reports for note in report.notes)),
        )

    def problem(self, what: str) -> str | None:
        """Return the error if nothing, or less than half, is left, or the template rewrites more than a few rows, or None.

        Args:
            what: names the data in the error.
        """
        rewritten = self.dropped.get(CHANGED, 0) > max(FEW[0], FEW[1] * self.rows)
        mostly = not self.kept or len(self.drops) > self.rows / 2
        if not (rewritten or mostly):
            return None
        if not self.rows:
            return f"{what}: no rows at all"
        counts = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
        reasons = [CHANGED] if rewritten else list(self.dropped)[:2]
        first = next(drop for drop in self.drops if drop.reason == reasons[0])
        share = "" if not mostly else f", which is {'more than half' if self.kept else 'all of them'}"
        return (
            f"{what}: {len(self.drops):,} of {counted(self.rows, 'row')} dropped ({counts}){share}; the first: row {first.row} of "
            f"{first.source}, {first.reason}: {first.detail}. To fix the data: "
            f"{'; '.join(REMEDIES.get(reason, 'leave these rows out') for reason in reasons)}. "
            "`orpo-lite data --recipe ... --list-drops` lists every row"
        )

    def as_dict(self, rows: bool = False) -> dict[str, Any]:
        """Return plain values for run.json; with `rows`, every dropped row as well."""
        content: dict[str, Any] = {
            "rows": self.rows,
            "kept": self.kept,
            "dropped": self.dropped,
            "truncated": {"prompt": self.prompt_cut, "completion": self.completion_cut},
            "notes": self.notes,
        }
        return content | {"drops": [drop._asdict() for drop in self.drops]} if rows else content

    def remarks(self) -> list[str]:
        """Return what was cut and what else the user should know, one line each."""
        cut = {"prompt cut from the left": self.prompt_cut, "completion cut at the end": self.completion_cut}
        lines = [f"{what} in {counted(pairs, 'pair')}" for what, pairs in cut.items() if pairs]
        return lines + [f"note: {note}" for note in self.notes]

    def __str__(self) -> str:
        lines = [f"dropped {count:,}: {reason}" for reason, count in self.dropped.items()] + self.remarks()
        return "\n  ".join([f"{self.kept:,} of {counted(self.rows, 'row')} kept", *lines])


class TooManyDropped(RequestError):
    """More than half of the rows, or all, were dropped. `report` has which and why; the rest is as in Pairs."""

    def __init__(self, message: str, report: DropReport, shapes: dict[str, Any] | None = None, sources: Any = ()):
        super().__init__(message)
        self.report, self.shapes, self.sources = report, shapes or {}, sources
