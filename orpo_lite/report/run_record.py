"""What a run folder has to tell: finished, under way or stopped, of this version or an older one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from orpo_lite.common import safe_yaml
from orpo_lite.common.errors import RequestError
from orpo_lite.common.files import is_locked
from orpo_lite.report.run_shapes import (
    EVALUATION,
    FACTS,
    HELD_OUT,
    LINE,
    RECIPE,
    SAMPLE,
    STEP,
    Shape,
    checked,
    notes,
    parsed,
    shown,
)
from orpo_lite.trainer.run_folder import RunFolder

State = Literal["finished", "under way", "stopped"]


@dataclass
class Told:
    """One run as its report takes it, every part `checked`: any of its fields may be missing or None."""

    facts: dict[str, Any]
    """run.json; of an unfinished run what else is known, by the same names."""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    """metrics.jsonl's lines, each with its step."""
    recipe: dict[str, Any] = field(default_factory=dict)
    pairs: dict[str, Any] = field(default_factory=dict)
    """held_out.json: log-probs of every held-out pair before and after."""
    path: Path | None = None
    state: State = "finished"
    checkpoint: str | None = None
    """Of an unfinished run, the newest."""
    notes: list[str] = field(default_factory=list)
    """What the reader has to know of what is missing."""

    @property
    def name(self) -> str:
        return str(self.facts.get("name") or (self.path.name if self.path else "run"))

    @property
    def beta(self) -> float:
        """Weight of the odds-ratio term."""
        said = (self.recipe.get("orpo") or {}).get("beta"), self.pairs.get("beta")
        return next((float(beta) for beta in said if isinstance(beta, int | float)), 0.1)

    def evaluation(self, when: str) -> dict[str, Any]:
        """Metrics on the held-out pairs, "before" or "after"; empty where there are none."""
        return (self.facts.get("eval") or {}).get(when) or {}

    def samples(self, when: str) -> list[dict[str, Any]]:
        return (self.facts.get("samples") or {}).get(when) or []


def read_run(place: str | Path | RunFolder) -> Told:
    """All that a run folder holds for its report.

    Raises:
        RequestError: no run folder, a run.json that is no JSON object, or a run of which nothing is known yet.
    """
    folder = place if isinstance(place, RunFolder) else RunFolder.open(place)
    told = Told({}, path=folder.path)
    try:
        # as it is: fields need no check here, which would load transformers, and may be another version's
        recipe = safe_yaml.read(folder.path / "recipe.yaml")
        told.recipe = known(recipe, RECIPE, "recipe.yaml", told.notes)
        if told.recipe and told.recipe.get("adapter") is None and recipe.get("adapter") is not None:
            del told.recipe["adapter"]  # not known, while None is full fine-tuning
    except safe_yaml.YamlError as error:
        told.notes.append(f"recipe.yaml cannot be read: {error}")
    told.metrics = read_metrics(folder, told.notes)
    if (folder.path / "run.json").is_file():
        facts = folder.read()
        if not isinstance(facts, dict):
            raise RequestError(
                f"{folder.path / 'run.json'}: found {shown(facts)}, expected an object: copy the run again, or train it again"
            )
        told.facts = known(facts, FACTS, "run.json", told.notes)
    else:
        unfinished(folder, told)
    told.pairs = read_pairs(folder, told.notes)
    return told


def known(found: Any, shape: Shape, file: str, to: list[str]) -> dict[str, Any]:
    """What of a file's value can be used; the rest is named."""
    said: list[str] = []
    kept = checked(found, shape, "", said)
    to += notes(file, said)
    return kept or {}


def unfinished(folder: RunFolder, told: Told) -> None:
    before = {"eval": EVALUATION, "samples": [SAMPLE]}
    kept = known(folder.read_before(), before, "before.json", told.notes)
    if not told.metrics and not kept:
        raise RequestError(
            f"{folder.path}: found neither run.json nor a line in metrics.jsonl, so there is nothing to report yet: wait for "
            f"its first log line (training.logging_steps), or train it with --recipe {folder.path}"
        )
    told.state = "under way" if is_locked(folder.path) else "stopped"
    names = [path.name for path in folder.checkpoints.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    told.checkpoint = max(names, key=lambda name: int(name.rpartition("-")[2]), default=None)
    told.facts = {
        "name": told.recipe.get("name"),
        "steps": max((line["step"] for line in told.metrics), default=0),
        "base_model": {key: (told.recipe.get("model") or {}).get(key) for key in ("name_or_path", "quantization")},
        "eval": {"before": kept.get("eval"), "after": None},
        "samples": {"before": kept.get("samples") or [], "after": []},
    }


def read_metrics(folder: RunFolder, to: list[str]) -> list[dict[str, Any]]:
    """Lines with a step, in the order of steps; half a line of a run that was killed is left out and said."""
    if not folder.metrics.is_file():
        to.append("metrics.jsonl is missing, so there are no curves")
        return []
    lines, broken, said = [], [], []
    with folder.metrics.open(encoding="utf-8", errors="replace") as file:
        for place, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                line = parsed(text)
            except ValueError as error:
                broken.append(f"line {place}: {error}")
                continue
            if not isinstance(line, dict):
                broken.append(f"line {place}: found {shown(line)}, expected an object")
            elif not STEP.holds(line.get("step")):
                broken.append(f"line {place}: step: found {shown(line.get('step'))}, expected {STEP}")
            else:
                lines.append(checked(line, LINE, f"line {place}: ", said))
    if broken:
        to.append(f"{len(broken):,} lines of metrics.jsonl cannot be read and are left out; the first is {broken[0]}")
    to += notes("metrics.jsonl", said)
    return sorted(lines, key=lambda line: line["step"])


def read_pairs(folder: RunFolder, to: list[str]) -> dict[str, Any]:
    try:
        found = parsed((folder.path / "held_out.json").read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        to.append(f"held_out.json cannot be read: {error}")
        return {}
    return known(found, HELD_OUT, "held_out.json", to)
