"""What was left out of the data, row by row, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from orpo_lite.common.errors import RequestError

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
REMEDIES = {
    EMPTY: "write both answers into every row, or name the columns that hold them in data.columns",
    EMPTY_PROMPT: "write a prompt into every row, or name the column that holds it in data.columns",
    EQUAL: "leave out rows whose two answers are the same: nothing can be learned from them",
    CUT_EQUAL: "raise max_length, so that answers that differ late only are kept that far, or leave these rows out",
    PROMPTS_DIFFER: "give both answers of a row the same conversation before them, or the prompt a column of its own",
    PROMPT_TOO_LONG: "raise max_length, or cut prompts with max_prompt_length and overlong=truncate",
    COMPLETION_TOO_LONG: "raise max_length, or cut answers with overlong=truncate",
    WRONG_TYPES: "bring these rows into the form of the others",
    REFUSED: "write conversations as the template takes them (data.system=merge where it takes no system turn), or name "
    "another template in model.chat_template",
    CHANGED: "name a template that keeps answers as they are in model.chat_template (chat_template= in Python; TRL ships "
    "qwen3_training and others like it), or give the variables that this one asks for in data.template_kwargs",
    TIE: "leave these rows out, or give one answer the better score",
    UNPAIRED: "ORPO learns from pairs: give every prompt at least one answer of each label, or train these rows with KTO",
    TEMPLATED: "leave out data.apply_template (the text is trained as it is), or give the text without the template",
    NO_LABELS: "raise max_length, so that answers have room behind their prompts",
}
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

    def mostly_dropped(self) -> bool:
        """Return whether nothing, or less than half of the rows, is left."""
        return not self.kept or len(self.drops) > self.rows / 2

    def problem(self, what: str) -> str | None:
        """Return the error if nothing, or less than half, is left, or the template rewrites more than a few rows, or None.

        Args:
            what: names the data in the error.
        """
        rewritten = self.dropped.get(CHANGED, 0) > max(FEW[0], FEW[1] * self.rows)
        if not (rewritten or self.mostly_dropped()):
            return None
        if not self.rows:
            return f"{what}: no rows at all"
        counts = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
        reasons = [CHANGED] if rewritten else list(self.dropped)[:2]
        first = next(drop for drop in self.drops if drop.reason == reasons[0])
        share = "" if not self.mostly_dropped() else f", which is {'more than half' if self.kept else 'all of them'}"
        return (
            f"{what}: {len(self.drops)} of {self.rows} rows dropped ({counts}){share}; the first: row {first.row} of "
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
        lines = [f"{what} in {pairs:,} pairs" for what, pairs in cut.items() if pairs]
        return lines + [f"note: {note}" for note in self.notes]

    def __str__(self) -> str:
        lines = [f"dropped {count:,}: {reason}" for reason, count in self.dropped.items()] + self.remarks()
        return "\n  ".join([f"{self.kept:,} of {self.rows:,} rows kept", *lines])


class TooManyDropped(RequestError):
    """More than half of the rows, or all, were dropped. `report` has which and why; the rest is as in Pairs."""

    def __init__(self, message: str, report: DropReport, shapes: dict[str, Any] | None = None, sources: Any = ()):
        super().__init__(message)
        self.report, self.shapes, self.sources = report, shapes or {}, sources
