"""compare.html: several runs over one another, what differs in their recipes, and their results side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from orpo_lite.evaluate.held_out import ROWS
from orpo_lite.report.charts import curves, margin_chart, margins
from orpo_lite.report.page import adapter, answers, arrow, duration, gigabytes, metric, render, sentence
from orpo_lite.report.run_record import LoadedRun, Sample

HOUSEKEEPING = {"name", "description", "needs", "training.output_dir"}
"""Fields that do not shape the weights."""


def compare_page(runs: Sequence[LoadedRun]) -> bytes:
    """Render the page of several runs."""
    names = labels(runs)
    drawn, notes = curves(list(zip(names, runs, strict=True)))
    if len({run.beta for run in runs}) > 1:
        notes.append(
            "Rewards, margins and the odds term are scaled by orpo.beta, which differs: compare log-odds and accuracy."
        )
    # without beta, which may differ
    spread = margin_chart(
        {name: margins(run, "after", scale=1.0) for name, run in zip(names, runs, strict=True)},
        "chosen minus rejected, mean log-prob",
    )
    if spread is not None:
        spread.title = "Held-out pairs after training"
        spread.hint = (
            "Mean log-prob of the chosen answer minus that of the rejected one. Left of 0 the rejected one is likelier."
        )
    return render(
        "compare.html.jinja", runs, [*drawn, spread], title=f"ORPO runs: {', '.join(run.name for run in runs)}"[:200],
        runs=runs, compared=[(name, run, sentence(run)) for name, run in zip(names, runs, strict=True)],
        head=("", *names), results=results(runs), other_pairs=len({run.record.data.fingerprint for run in runs} - {None}) > 1,
        differences=[(key, *map(shown, row)) for key, row in differences(runs).items()],
        curves=drawn, notes=notes, margins=spread, answers=answers(same_prompts(names, runs)),
    )  # fmt: skip


def labels(runs: Sequence[LoadedRun]) -> list[str]:
    """Return a letter and a name for each run: that of its folder, where names are not all different."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [run.path.resolve().name if run.path else run.name for run in runs]
    if len(set(names)) < len(names) and all(run.path for run in runs):
        names = ["/".join(run.path.resolve().parts[-2:]) for run in runs if run.path]
    letters = (chr(ord("A") + i % 26) + (str(i // 26) if i >= 26 else "") for i in range(len(names)))
    short = (name if len(name) <= 60 else f"{name[:59]}…" for name in names)
    return [f"{letter} · {name}" for letter, name in zip(letters, short, strict=True)]


def leaves(recipe: Any, place: str = "") -> dict[str, Any]:
    """Return the leaves of a recipe by their dotted names."""
    if not isinstance(recipe, dict) or not recipe:
        return {place: recipe}
    found: dict[str, Any] = {}
    for name, inner in recipe.items():
        found |= leaves(inner, f"{place}.{name}".strip("."))
    return found


def differences(runs: Sequence[LoadedRun]) -> dict[str, list[Any]]:
    """Return the fields in which the recipes differ, each with its value in every run; None where a run does not have it."""
    recipes = [leaves(run.recipe.model_dump(exclude_unset=True)) for run in runs]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe if key not in HOUSEKEEPING)
    rows = {key: [recipe.get(key) for recipe in recipes] for key in keys}
    return {key: row for key, row in rows.items() if any(one != row[0] for one in row[1:])}


def results(runs: Sequence[LoadedRun]) -> list[tuple[Any, ...]]:
    """Return the rows of the results: a name, and a cell for each run."""
    rows: list[tuple[Any, ...]] = []
    for key, label in ROWS.items():
        # before without the interval, for the width of the table
        cells = [
            arrow(metric({key: run.evaluation("before").get(key)}, key), metric(run.evaluation("after"), key))
            for run in runs
        ]
        rows.append((f"{label}, held out", *cells))
    plain: dict[str, Callable[[LoadedRun], Any]] = {
        "held-out pairs": lambda run: run.last_evaluation.get("pairs"),
        "training pairs": lambda run: run.record.data.train_pairs,
        "state": lambda run: run.state,
        "adapter": adapter,
        "steps": lambda run: run.record.steps,
        "pairs per step": lambda run: run.record.effective_batch,
        "training time": lambda run: duration(run.record.train_seconds),
        "pairs per second": lambda run: (
            "" if run.record.pairs_per_second is None else f"{run.record.pairs_per_second:.1f}"
        ),
        "peak memory": lambda run: gigabytes(run.record.peak_memory_bytes),
        "device": lambda run: run.record.device,
    }
    for name, get in plain.items():
        cells = [get(run) for run in runs]
        if any(cells):
            rows.append((name, *cells))
    return rows


def same_prompts(names: list[str], runs: Sequence[LoadedRun]) -> list[tuple[str, list[Sample]]]:
    """Return the answers of all runs that have any; none where there are not two, or their prompts differ."""
    sides = [
        (name, samples) for name, run in zip(names, runs, strict=True) if (samples := run.record.samples.get("after"))
    ]
    total = min((len(some) for _, some in sides), default=0)
    prompts = [[one.prompt for one in some[:total]] for _, some in sides]
    return sides if len(sides) > 1 and all(one == prompts[0] for one in prompts) else []


def shown(value: Any) -> str:
    """Write a field's value as a recipe has it; of data sources their paths."""
    if isinstance(value, list) and value and all(isinstance(one, dict) and "path" in one for one in value):
        value = ", ".join(str(one["path"]) for one in value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 300 else f"{text[:299]}…"
