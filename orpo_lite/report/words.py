"""What a run comes to, in a sentence and in cells of tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from orpo_lite.report.charts import plain
from orpo_lite.report.run_record import Told
from orpo_lite.report.run_shapes import number


def verdict(facts: dict[str, Any]) -> str:
    """The result in a sentence: did the held-out accuracy move by more than chance?"""
    both = facts.get("eval")
    before, after = ((both or {}).get(when) or {} for when in ("before", "after"))
    old, new = before.get("rewards/accuracies"), after.get("rewards/accuracies")
    if old is None or new is None:
        none = both and not before and not after
        why = "no pairs were held out" if none else "held-out reward accuracy before or after was not recorded"
        steps = f"{facts['steps']:.0f}" if number(facts.get("steps")) else "?"
        return f"Trained for {steps} steps; {why}, so whether it helped is not known."
    pairs = f"{after['pairs']:.0f} pairs" if number(after.get("pairs")) else "pairs that were not counted"
    if not (number(old) and number(new)):
        return f"Held-out reward accuracy on {pairs} is not a number: something went wrong in this run."
    old_range, new_range = interval(before), interval(after)
    how = (
        "it did not improve"
        if new < old
        else "whether that is chance is not known"
        if old_range is None or new_range is None
        else "clearly more than chance would give"
        if new_range[0] > old_range[1]
        else "within what chance could give"
    )
    return f"Held-out reward accuracy went from {old:.1%} to {new:.1%} on {pairs}: {how}."


def interval(result: dict[str, Any], key: str = "rewards/accuracies") -> tuple[float, float] | None:
    """Where an accuracy lies, lowest and highest; None where that is not known."""
    found = result.get(f"{key}_interval") or ()
    return (found[0], found[1]) if len(found) == 2 and all(map(number, found)) else None


def sentence(run: Told) -> str:
    """`verdict`, or of an unfinished run where it stands."""
    if run.state == "finished":
        return verdict(run.facts)
    now = "This run is under way" if run.state == "under way" else "This run was stopped before its end"
    held = [line for line in run.metrics if number(line.get("eval_rewards/accuracies")) and line["step"]]
    step = f"{run.facts['steps']:g}" if number(run.facts.get("steps")) else "?"
    so_far = (
        f"; held-out reward accuracy was {held[-1]['eval_rewards/accuracies']:.1%} at step {held[-1]['step']:g}"
        if held
        else ""
    )
    return f"{now}, its last log line at step {step}{so_far}."


def value(result: dict[str, Any], key: str) -> str:
    """One metric of an evaluation, accuracy with its interval."""
    found = result.get(key)
    if not isinstance(found, int | float) or isinstance(found, bool):
        return ""
    if not key.startswith("rewards/accuracies"):
        return escape(f"{found:.4f}" if math.isfinite(found) else plain(found))
    text = f"{found:.1%}" if math.isfinite(found) else plain(found)
    if (found := interval(result, key)) is not None:
        text += f" <span class=dim>({found[0]:.1%} to {found[1]:.1%})</span>"
    return text


def table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "", kind: str = "") -> str:
    """A table of cells that are HTML already; the first of each row heads it."""
    body = "".join(
        f"<tr><th scope=row>{first}</th>"
        + "".join(f"<td data-of='{escape(of, True)}'>{cell}</td>" for of, cell in zip(head[1:], cells, strict=False))
        + "</tr>"
        for first, *cells in rows
    )
    said = f"<caption>{escape(caption)}</caption>" if caption else ""
    top = "".join(f"<th scope=col>{escape(name)}</th>" for name in head)
    top = f"<thead><tr>{top}</tr></thead>" if any(head) else ""
    return f"<div class=wide><table class='{kind}'>{said}{top}<tbody>{body}</tbody></table></div>"


def facts_table(rows: Iterable[tuple[str, Any]], caption: str = "") -> str:
    """Names and plain values; those that are not known are left out."""
    shown = [(escape(name), escape(str(found))) for name, found in rows if found not in (None, "")]
    return table(("", ""), shown, caption)


def seconds(spent: Any) -> str:
    """A time in the two largest units."""
    if not number(spent):
        return ""
    if spent < 100:
        return f"{spent:.0f} s"
    minutes, hours = round(spent / 60), int(spent // 3600)
    return f"{minutes} min" if minutes < 100 else f"{hours} h {round((spent - hours * 3600) / 60)} min"


def gigabytes(size: Any) -> str:
    return f"{size / 1e9:.2f} GB" if number(size) else ""
