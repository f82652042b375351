"""What was left out of the data, row by row, and why."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from orpo_lite.common.errors import RequestError

if TYPE_CHECKING:
    from rich.table import Table

EMPTY = "empty or missing side"
EMPTY_PROMPT = "empty prompt"
EQUAL = "chosen equal to rejected"
PROMPTS_DIFFER = "prompts differ"
PROMPT_TOO_LONG = "prompt too long"
COMPLETION_TOO_LONG = "completion does not fit"
WRONG_TYPES = "wrong types"
REFUSED = "refused by the template"
NO_LABELS = "no completion tokens left"
WITHOUT_TEMPLATE = (
    "plain strings get no chat template, though the tokenizer has one; a chat model that is trained so answers badly in "
    "chats: data.apply_template=true writes them as a user's and an assistant's turn"
)


class Dropped(Exception):
    """Raised while a row is converted or tokenised: the row is left out and counted."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class Drop(NamedTuple):
    """One row that was left out; `row` counts from 0 in its source."""

    source: str
    row: int
    reason: str
    detail: str


class DropList(Sequence[Drop]):
    """Dropped rows in their order, read from files as they are looked at: there may be as many as there are rows.

    Args:
        files: (path, source, drops in it) of each; a line is the JSON list [row, reason, detail].
    """

    def __init__(self, files: Iterable[tuple[Path, str, int]] = ()):
        self.files = list(files)

    def __len__(self) -> int:
        return sum(count for _, _, count in self.files)

    def __iter__(self) -> Iterator[Drop]:
        for path, source, count in self.files:
            if count:
                with path.open(encoding="utf-8") as lines:
                    yield from (Drop(source, *json.loads(line)) for line in lines)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return list(self)[index]
        place = range(len(self))[index]  # IndexError outside of it
        return next(itertools.islice(self, place, None))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))  # fmt: skip

    def __repr__(self) -> str:
        return f"<{len(self)} dropped rows>"


@dataclass
class DropReport:
    """Rows kept, cut and dropped, over one source or several."""

    kept: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    """Reason -> dropped rows."""
    drops: Sequence[Drop] = field(default_factory=DropList)
    """Every dropped row; of a stream the first ones."""
    prompt_cut: int = 0
    """Pairs whose prompt lost its oldest content."""
    completion_cut: int = 0
    """Pairs of which at least one completion lost its end."""
    notes: list[str] = field(default_factory=list)
    """What else the user should know, one sentence each."""
    cached: bool = False
    """Whether the tokens came from the cache."""

    @property
    def rows(self) -> int:
        return self.kept + self.counts.total()

    @property
    def truncated(self) -> int:
        """Cuts of either kind."""
        return self.prompt_cut + self.completion_cut

    @property
    def dropped(self) -> dict[str, int]:
        """Reason -> dropped rows, most frequent first."""
        return dict(self.counts.most_common())

    @classmethod
    def merge(cls, reports: list[DropReport]) -> DropReport:
        """Sum of several reports; cached only if all of them were."""
        counts: Counter[str] = Counter()
        for report in reports:
            counts.update(report.counts)
        lists = [report.drops for report in reports]
        on_disk = [drops for drops in lists if isinstance(drops, DropList)]
        files = [file for drops in on_disk for file in drops.files]
        return cls(
            kept=sum(report.kept for report in reports),
            counts=counts,
            drops=DropList(files) if len(on_disk) == len(lists) else [drop for drops in lists for drop in drops],
            prompt_cut=sum(report.prompt_cut for report in reports),
            completion_cut=sum(report.completion_cut for report in reports),
            notes=list(dict.fromkeys(note for report in reports for note in report.notes)),
            cached=bool(reports) and all(report.cached for report in reports),
        )

    def check(self, what: str) -> None:
        """Raise TooManyDropped if nothing or less than half is left; `what` names the data in the message."""
        if self.kept and self.counts.total() <= self.rows / 2:
            return
        if not self.rows:
            raise TooManyDropped(f"{what}: no rows at all", self)
        counts = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
        first = self.drops[0]
        raise TooManyDropped(
            f"{what}: {self.counts.total()} of {self.rows} rows dropped ({counts}), which is "
            f"{'all of them' if not self.kept else 'more than half'}; the first: row {first.row} of {first.source}, "
            f"{first.reason}: {first.detail}. `orpo-lite data --recipe ... --list-drops` lists every row; mend the "
            "data, map its columns (data.columns), or if length is the reason raise max_length, or cut the prompts "
            "(max_prompt_length, with overlong=truncate); in a recipe these are data.max_length and so on",
            self,
        )

    def as_dict(self, rows: bool = False) -> dict[str, Any]:
        """Plain values for run.json; with `rows`, every dropped row as well."""
        content: dict[str, Any] = {
            "rows": self.rows,
            "kept": self.kept,
            "dropped": self.dropped,
            "truncated": {"prompt": self.prompt_cut, "completion": self.completion_cut},
            "notes": self.notes,
            "cached": self.cached,
        }
        return content | {"drops": [drop._asdict() for drop in self.drops]} if rows else content

    @classmethod
    def from_dict(cls, content: dict[str, Any], drops: Sequence[Drop] = ()) -> DropReport:
        """The inverse of `as_dict`; the rows are given apart."""
        return cls(
            kept=content["kept"],
            counts=Counter(content["dropped"]),
            drops=drops,
            prompt_cut=content["truncated"]["prompt"],
            completion_cut=content["truncated"]["completion"],
            notes=content["notes"],
            cached=content["cached"],
        )

    def __str__(self) -> str:
        lines = [f"{self.kept:,} of {self.rows:,} rows kept" + (" (tokens from the cache)" if self.cached else "")]
        lines += [f"  dropped {count:,}: {reason}" for reason, count in self.dropped.items()]
        if self.prompt_cut:
            lines.append(f"  prompt cut from the left in {self.prompt_cut:,} pairs")
        if self.completion_cut:
            lines.append(f"  completion cut at the end in {self.completion_cut:,} pairs")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])

    def table(self) -> Table:
        """The counts as a rich table, with the first rows of each reason."""
        from rich.table import Table

        table = Table("dropped", "rows", "share", "first rows, from 0", box=None)
        first: dict[str, list[str]] = {reason: [] for reason in self.counts}
        wanted = {reason: min(8, count) for reason, count in self.counts.items()}
        for drop in self.drops:
            if wanted.get(drop.reason):
                first[drop.reason].append(str(drop.row))
                wanted[drop.reason] -= 1
            if not any(wanted.values()):
                break
        for reason, count in self.dropped.items():
            rows = first[reason]
            places = ", ".join(rows) + (", ..." if count > len(rows) else "")
            table.add_row(reason, f"{count:,}", f"{count / self.rows:.1%}", places)
        return table


class TooManyDropped(RequestError):
    """More than half of the rows, or all, were dropped. `report` says which and why, `shapes` is that of Pairs."""

    def __init__(self, message: str, report: DropReport):
        super().__init__(message)
        self.report = report
        self.shapes: dict[str, dict[str, Any]] = {}
