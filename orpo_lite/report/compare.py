"""Several runs over one another: their curves, what differs in their recipes, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from orpo_lite.evaluate.held_out import ROWS
from orpo_lite.report.charts import Chart
from orpo_lite.report.curves import curves, margin_chart, margins
from orpo_lite.report.run_record import Told
from orpo_lite.report.run_shapes import number
from orpo_lite.report.sections import adapter, answer_part, figures, part
from orpo_lite.report.words import gigabytes, seconds, sentence, table, value

HOUSEKEEPING = {"name", "description", "needs", "training.output_dir"}
"""Fields that say nothing of the weights."""


def labels(runs: Sequence[Told]) -> list[str]:
    """A letter and a name for each run: of its folder, where names are not all different."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [run.path.resolve().name if run.path else run.name for run in runs]
    if len(set(names)) < len(names) and all(run.path for run in runs):
        names = ["/".join(run.path.resolve().parts[-2:]) for run in runs if run.path]
    letters = (chr(ord("A") + i % 26) + (str(i // 26) if i >= 26 else "") for i in range(len(names)))
    return [
        f"{letter} · {name if len(name) <= 60 else name[:59] + '…'}"
        for letter, name in zip(letters, names, strict=True)
    ]


def flat(recipe: Any, place: str = "") -> dict[str, Any]:
    """A recipe's leaves by their dotted names."""
    if not isinstance(recipe, dict) or not recipe:
        return {place: recipe}
    found: dict[str, Any] = {}
    for name, inner in recipe.items():
        found |= flat(inner, f"{place}.{name}".strip("."))
    return found


def differing(runs: Sequence[Told]) -> dict[str, list[Any]]:
    """Field -> its value in each run, of those in which the recipes differ; None where a run does not have it."""
    recipes = [flat(run.recipe) for run in runs]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe if key not in HOUSEKEEPING)
    rows = {key: [recipe.get(key) for recipe in recipes] for key in keys}
    return {key: row for key, row in rows.items() if any(one != row[0] for one in row[1:])}


def comparison(runs: Sequence[Told]) -> tuple[str, list[Chart]]:
    """The body of the page, and its charts."""
    names = labels(runs)
    marks = "".join(
        f"<li><span>{escape(name)}</span>{escape(sentence(run))}"
        + "".join(f"<p class=warn>{escape(note)}</p>" for note in run.notes)
        + "</li>"
        for name, run in zip(names, runs, strict=True)
    )
    parts = [
        f"<header><p class=kicker>ORPO runs compared</p><h1>{len(runs)} runs</h1><ul class=tiles style='grid-template-columns:"
        f"repeat(auto-fill,minmax(min(100%,20rem),1fr))'>{marks}</ul></header>"
    ]
    parts.append(part("Results", results(names, runs)))
    rows = [(escape(key), *(escape(shown(one)) for one in row)) for key, row in differing(runs).items()]
    same = "<p class=note>The recipes do not differ.</p>"
    parts.append(part("What differs in the recipes", table(("field", *names), rows, kind="cards") if rows else same))
    charts, notes = curves(list(zip(names, runs, strict=True)))
    lead = "Solid and dashed lines are training pairs, square marks held-out ones. Hover or tap to read; drag to zoom."
    if len({run.beta for run in runs}) > 1:
        notes.append(
            "Rewards, margins and the odds term are scaled by orpo.beta, which differs: compare log-odds and accuracy."
        )
    drawn = "".join(f"<p class=note>{escape(note)}</p>" for note in notes)
    parts.append(part("Curves", drawn + figures(charts), lead))
    # without beta, which may not be the same
    apart = {name: margins(run, "after", scale=1.0) for name, run in zip(names, runs, strict=True)}
    spread = margin_chart(apart, "chosen minus rejected, mean log-prob")
    if spread is not None:
        spread.title = "Held-out pairs after training"
        spread.hint = (
            "Mean log-prob of the chosen answer minus that of the rejected one. Left of 0 the rejected one is likelier."
        )
        parts.append(part("Margins", figures([spread])))
        charts.append(spread)
    parts.append(side_by_side(names, runs))
    return "".join(parts), charts


def results(names: list[str], runs: Sequence[Told]) -> str:
    rows: list[tuple[str, ...]] = []
    for key, label in ROWS.items():
        cells = [" → ".join(filter(None, (value({key: run.evaluation("before").get(key)}, key), value(run.evaluation("after"), key))))
                 for run in runs]  # fmt: skip
        rows.append((f"{label}, held out", *cells))

    def plain(name: str, get: Any) -> None:
        cells = [get(run) for run in runs]
        if any(cells):
            rows.append((name, *(escape(str(cell)) for cell in cells)))

    plain("held-out pairs", lambda run: (run.evaluation("after") or run.evaluation("before")).get("pairs", ""))
    plain("training pairs", lambda run: (run.facts.get("data") or {}).get("train_pairs", ""))
    plain("state", lambda run: run.state)
    plain("adapter", adapter)
    plain("steps", lambda run: run.facts.get("steps", ""))
    plain("pairs a step", lambda run: run.facts.get("effective_batch", ""))
    plain("training time", lambda run: seconds(run.facts.get("train_seconds")))
    plain("pairs a second", lambda run: f"{found:.1f}" if number(found := run.facts.get("pairs_per_second")) else "")
    plain("peak memory", lambda run: gigabytes(run.facts.get("peak_memory_bytes")))
    plain("device", lambda run: run.facts.get("device", ""))
    prints = {(run.facts.get("data") or {}).get("fingerprint") for run in runs}
    warn = (
        "<p class=warn>The runs were not made from the same pairs, so their held-out results are not of the same pairs "
        "either.</p>"
        if len(prints - {None}) > 1
        else ""
    )
    return warn + table(("", *names), rows, kind="cards")


def side_by_side(names: list[str], runs: Sequence[Told]) -> str:
    """Answers of all runs to the same prompts; nothing where the prompts are not the same."""
    with_answers = [(name, run.samples("after")) for name, run in zip(names, runs, strict=True) if run.samples("after")]
    if len(with_answers) < 2:
        return ""
    count = min(len(some) for _, some in with_answers)
    prompts = [[one.get("prompt") for one in some[:count]] for _, some in with_answers]
    if any(one != prompts[0] for one in prompts[1:]):
        return ""
    return answer_part([(name, some[:count]) for name, some in with_answers])


def shown(found: Any) -> str:
    """A field's value as a recipe has it; of data sources their paths."""
    if isinstance(found, list) and found and all(isinstance(one, dict) and "path" in one for one in found):
        found = ", ".join(str(one["path"]) for one in found)
    text = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False, default=str)
    return text if len(text) <= 300 else text[:299] + "…"
