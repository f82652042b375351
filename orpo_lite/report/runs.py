"""What a run folder has to tell: finished, under way or stopped, of this version or an older one."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from orpo_lite import safe_yaml
from orpo_lite.errors import RequestError
from orpo_lite.lock import taken
from orpo_lite.runfolder import RunFolder

State = Literal["finished", "under way", "stopped"]


@dataclass
class Told:
    """One run as its report takes it: every part but `facts` may be missing."""

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
        orpo = self.recipe.get("orpo")
        found = (orpo if isinstance(orpo, dict) else {}).get("beta", self.pairs.get("beta", 0.1))
        return float(found) if number(found) else 0.1

    def evaluation(self, when: str) -> dict[str, Any]:
        """Metrics on the held-out pairs, "before" or "after"; empty where there are none."""
        found = (self.facts.get("eval") or {}).get(when)
        return found if isinstance(found, dict) else {}

    def samples(self, when: str) -> list[dict[str, Any]]:
        found = (self.facts.get("samples") or {}).get(when)
        return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def number(value: Any) -> bool:
    """Whether it is a number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_run(place: str | Path | RunFolder) -> Told:
    """All that a run folder holds for its report.

    Raises:
        RequestError: no run folder, broken JSON, or a run of which nothing is known yet.
    """
    folder = place if isinstance(place, RunFolder) else RunFolder.open(place)
    told = Told({}, path=folder.path)
    try:
        # as it is: fields need no check here, which would load transformers, and may be another version's
        recipe = safe_yaml.read(folder.path / "recipe.yaml")
        told.recipe = recipe if isinstance(recipe, dict) else {}
    except safe_yaml.YamlError as error:
        told.notes.append(f"recipe.yaml cannot be read: {error}")
    told.metrics = read_metrics(folder, told.notes)
    if (folder.path / "run.json").is_file():
        told.facts = folder.read()
        if not isinstance(told.facts, dict):
            raise RequestError(
                f"{folder.path / 'run.json'}: found {type(told.facts).__name__}, expected an object: copy the run again, or "
                "train it again"
            )
        for key in (
            "eval",
            "samples",
            "data",
            "rule",
            "base_model",
            "parameters",
            "layout",
            "versions",
            "out_of_memory",
        ):
            if not isinstance(told.facts.get(key, {}), dict | None):
                told.notes.append(
                    f"run.json: {key} is {type(told.facts.pop(key)).__name__}, not an object, and left out"
                )
    else:
        unfinished(folder, told)
    told.pairs = read_pairs(folder, told.notes)
    return told


def unfinished(folder: RunFolder, told: Told) -> None:
    kept = folder.read_before()
    kept = kept if isinstance(kept, dict) else {}
    if not told.metrics and not kept:
        raise RequestError(
            f"{folder.path}: found neither run.json nor a line in metrics.jsonl, so there is nothing to report yet: wait for "
            f"its first log line (training.logging_steps), or train it with --recipe {folder.path}"
        )
    told.state = "under way" if taken(folder.path) else "stopped"
    names = [path.name for path in folder.checkpoints.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    told.checkpoint = max(names, key=lambda name: int(name.rpartition("-")[2]), default=None)
    told.facts = {
        "name": told.recipe.get("name", folder.path.name),
        "steps": max((line["step"] for line in told.metrics), default=0),
        "base_model": {key: (told.recipe.get("model") or {}).get(key) for key in ("name_or_path", "quantization")},
        "eval": {"before": kept.get("eval"), "after": None},
        "samples": {"before": kept.get("samples") or [], "after": []},
    }


def read_metrics(folder: RunFolder, notes: list[str]) -> list[dict[str, Any]]:
    """Lines with a step, in the order of steps; half a line of a run that was killed is left out and said."""
    if not folder.metrics.is_file():
        notes.append("metrics.jsonl is missing, so there are no curves")
        return []
    lines, broken = [], 0
    with folder.metrics.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                line = None
            if isinstance(line, dict) and number(line.get("step")):
                lines.append(line)
            else:
                broken += bool(text.strip())
    if broken:
        notes.append(f"{broken:,} lines of metrics.jsonl cannot be read and are left out")
    return sorted(lines, key=lambda line: line["step"])


def read_pairs(folder: RunFolder, notes: list[str]) -> dict[str, Any]:
    path = folder.path / "held_out.json"
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        notes.append(f"held_out.json cannot be read: {error}")
        return {}
    return found if isinstance(found, dict) else {}
