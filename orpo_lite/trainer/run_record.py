"""What a run records: run.json and held_out.json as training writes them and everything later reads them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, with_config
from typing_extensions import TypedDict

from orpo_lite.common.errors import RequestError
from orpo_lite.common.files import is_locked
from orpo_lite.common.text import shown
from orpo_lite.recipe import AdapterSection, Recipe
from orpo_lite.trainer.checkpoint_folder import checkpoints
from orpo_lite.trainer.run_folder import RunFolder

State = Literal["finished", "under way", "stopped"]
When = Literal["before", "after"]
T = TypeVar("T", bound=BaseModel)

Count: TypeAlias = Annotated[int, Field(ge=0)]
Amount: TypeAlias = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Bytes: TypeAlias = Count | Amount
"""A plan's: whole where it was written so."""
Result: TypeAlias = float
"""A measurement, NaN or infinite in a run that went wrong."""


# ---- run.json --------------------------------------------------------------------------------------------------------


class Section(BaseModel):
    """A part of run.json; every field may be missing, and is then None or empty."""

    model_config = ConfigDict(extra="forbid")


class BaseFacts(Section):
    name_or_path: str | None = None
    revision: str | None = None
    commit: str | None = None
    hub_id: str | None = None
    """The base's repository on the hub; None for a local folder."""
    license: dict[str, str] | None = Field(default=None, validation_alias=AliasChoices("license", "licence"))
    """As `find_license` returns it."""
    quantization: str | None = None
    dtype: str | None = None
    facts: list[str] = []
    """Sentences on how the base was loaded."""


class Source(Section):
    section: Literal["train", "eval"] | None = None
    path: str | None = None
    files: list[str] = []
    """Local files; empty for a data set on the hub."""
    shape: str | None = None
    rows: Count | None = None
    kept: Count | None = None
    weight: Amount | None = None
    cached: bool | None = None


class Drops(Section):
    rows: Count | None = None
    kept: Count | None = None
    dropped: dict[str, Count] | None = None
    """Reason -> rows; None where that is not known."""
    truncated: dict[str, Count] = {}
    """prompt and completion -> pairs that were cut there."""
    notes: list[str] = []
    cached: bool | None = None


class Histogram(Section):
    width: Annotated[int, Field(ge=1)] | None = None
    counts: list[Count] = []
    median: Amount | None = None
    p95: Amount | None = None
    max: Count | None = None


class DataFacts(Section):
    fingerprint: str | None = None
    sources: dict[str, Source] = {}
    train_pairs: Count | None = None
    eval_pairs: Count | None = None
    drops: Drops = Drops()
    lengths: dict[Literal["train", "eval"], dict[Literal["prompt", "chosen", "rejected"], Histogram]] = {}


class Plan(Section):
    """The memory plan that training began with, in bytes; more fields of a plan are passed on."""

    model_config = ConfigDict(extra="allow")
    recipe: str | None = None
    model: str | None = None
    peak_bytes: Bytes | None = None
    needed_bytes: Bytes | None = None
    fullest_phase: str | None = None
    phases: dict[str, dict[str, Bytes]] = {}
    """Phase -> total, and each part that it holds."""
    assumed: dict[str, Bytes] = {}
    measured: dict[str, Bytes] = {}
    """allocated_bytes and reserved_bytes by torch, on CUDA."""


class HealthWarning(Section):
    kind: str | None = None
    step: Count | None = None
    message: str | None = None


class Sample(Section):
    prompt: str = ""
    answer: str = ""
    tokens: Count | None = None
    logp: Result | None = None
    """Mean log-prob of the answer's tokens under the model that gave it."""
    log_odds: Result | None = None
    logp_trained: Result | None = None
    """The same of an answer from before training, under the trained model."""
    log_odds_trained: Result | None = None


Evaluation = TypedDict("Evaluation", {
    "rewards/accuracies": Result | None, "rewards/accuracies_interval": list[Result] | None,
    "rewards/margins": Result | None, "log_odds_chosen": Result | None, "nll_loss": Result | None,
    "loss": Result | None, "length_baseline": Result | None, "pairs": Count | None,
}, total=False)  # fmt: skip
"""Metrics of the held-out pairs by the trainer's names; those that are not listed are passed on."""
with_config(ConfigDict(extra="allow"))(Evaluation)


OLD_FIELDS = ("skipped_steps", "nonfinite_rows", "reproducer")
"""Fields of run.json that older versions wrote, and nothing reads anymore."""


class RunRecord(Section):
    """run.json: the facts of a run, written once it has finished."""

    name: str | None = None
    versions: dict[str, str | None] = {}
    device: str | None = None
    processes: Count | None = None
    world: dict[str, Any] = {}
    """Processes, machines and what joins them."""
    seed: Count | None = None
    base_model: BaseFacts = BaseFacts()
    data: DataFacts = DataFacts()
    probe: list[list[Count]] = []
    """Token ids of a few training rows, for a merge to compare models on."""
    layout: dict[Literal["name", "why"], str] = {}
    parameters: dict[Literal["trainable", "total"], Count] = {}
    effective_batch: Count | None = None
    """Pairs per optimizer step."""
    steps: Count | None = None
    train_seconds: Amount | None = None
    total_seconds: Amount | None = None
    pairs_per_second: Amount | None = None
    peak_memory_bytes: Bytes | None = None
    plan: Plan | None = None
    out_of_memory: dict[Literal["training", "evaluation"], list[Any]] = {}
    warnings: list[HealthWarning] = []
    overflow_steps: Count | None = None
    adapter: str | None = None
    """Which weights were kept: the last ones, or the best by a metric."""
    eval: dict[When, Evaluation | None] = {}
    samples: dict[When, list[Sample]] = {}
    rule: dict[When, dict[Literal["chosen", "rejected"], Result] | None] = {}
    """Shares of the greedy answers in either style, by the recipe's rule."""
    finished: bool = True

    @property
    def held_by(self) -> str:
        """Say what `peak_memory_bytes` counts: on the CPU, much more than tensors."""
        on_cpu = (self.device or "").startswith("cpu")
        return "in the whole process, libraries included" if on_cpu else "in tensors on the GPU"

    def evaluation(self, when: When) -> dict[str, Any]:
        """Return the metrics of the held-out pairs; empty where there are none."""
        return dict(self.eval.get(when) or {})


class HeldOutPairs(Section):
    """held_out.json: mean log-probs of the answers to every held-out pair."""

    model_config = ConfigDict(extra="ignore")
    beta: float | None = None
    before: dict[Literal["logps/chosen", "logps/rejected"], list[Result]] = {}
    after: dict[Literal["logps/chosen", "logps/rejected"], list[Result]] = {}


# ---- reading -----------------------------------------------------------------------------------------------------------


@dataclass
class LoadedRun:
    """One run as its report takes it: finished, under way or stopped, of this version or an older one."""

    path: Path
    record: RunRecord = field(default_factory=RunRecord)
    """run.json; for an unfinished run what else is known, in the same fields."""
    metrics: list[dict[str, float]] = field(default_factory=list)
    """The numbers in each line of metrics.jsonl, in the order of their steps."""
    recipe: Recipe | None = None
    """None where it cannot be read, which `notes` says."""
    pairs: HeldOutPairs = field(default_factory=HeldOutPairs)
    state: State = "finished"
    checkpoint: str | None = None
    """The newest one of an unfinished run."""
    notes: list[str] = field(default_factory=list)
    """Missing or damaged fields, in sentences for the page."""

    @property
    def name(self) -> str:
        return self.record.name or self.path.name

    @property
    def beta(self) -> float:
        """Weight of the odds-ratio term."""
        known = self.recipe.orpo.beta if self.recipe else self.pairs.beta
        return 0.1 if known is None else known

    @property
    def full_fine_tuning(self) -> bool:
        return self.recipe is not None and self.recipe.adapter is None

    @property
    def adapter(self) -> str:
        """Name the kind of adapter, its rank and alpha; empty where the recipe cannot be read."""
        return describe_adapter(self.recipe.adapter, brief=True) if self.recipe else ""

    @property
    def last_evaluation(self) -> dict[str, Any]:
        return self.record.evaluation("after") or self.record.evaluation("before")


def read_record(folder: RunFolder, notes: list[str]) -> RunRecord:
    """Read run.json; fields that do not fit are left out, and named in `notes`.

    Raises:
        RequestError: there is none, or it holds no JSON object.
    """
    content = folder.read()
    if isinstance(content, dict):
        content = {name: value for name, value in content.items() if name not in OLD_FIELDS}
    return fitting(RunRecord, content, "run.json", notes)


def read_run(place: str | Path | RunFolder) -> LoadedRun:
    """Read all that a run folder holds for its report.

    Raises:
        RequestError: no run folder, a run.json that is no JSON object, or a run of which nothing is known yet.
    """
    folder = place if isinstance(place, RunFolder) else RunFolder.open(place)
    run = LoadedRun(folder.path)
    try:
        run.recipe = folder.recipe()
    except RequestError as error:
        run.notes.append(f"recipe.yaml cannot be read: {error}")
    run.metrics = read_metrics(folder.metrics, run.notes)
    if (folder.path / "run.json").is_file():
        run.record = read_record(folder, run.notes)
    else:
        read_unfinished(folder, run)
    held_out = folder.path / "held_out.json"
    if held_out.is_file():
        try:
            run.pairs = fitting(HeldOutPairs, json.loads(held_out.read_text("utf-8")), "held_out.json", run.notes)
        except (OSError, ValueError, RecursionError) as error:
            run.notes.append(f"held_out.json cannot be read: {error}")
    return run


def read_unfinished(folder: RunFolder, run: LoadedRun) -> None:
    """Fill in what is known of a run without run.json."""
    before = folder.read_before() or {}
    facts = {"eval": {"before": before.get("eval")}, "samples": {"before": before.get("samples", [])}}
    run.record = fitting(RunRecord, facts, "before.json", run.notes)
    if not run.metrics and not run.record.evaluation("before") and not run.record.samples.get("before"):
        raise RequestError(
            f"{folder.path}: found neither run.json nor a line in metrics.jsonl, so there is nothing to report yet: wait for "
            f"its first log line (training.logging_steps), or train it with --recipe {folder.path}"
        )
    run.state = "under way" if is_locked(folder.path) else "stopped"
    run.checkpoint = next((path.name for path in reversed(checkpoints(folder.checkpoints))), None)
    run.record.steps = int(run.metrics[-1]["step"]) if run.metrics else 0
    if run.recipe:
        model = run.recipe.model
        run.record.name = run.recipe.name
        run.record.base_model = BaseFacts(name_or_path=model.name_or_path, quantization=model.quantization)


def read_metrics(path: Path, notes: list[str]) -> list[dict[str, float]]:
    """Read metrics.jsonl in the order of its steps; half a line of a run that was killed is left out and named."""
    if not path.is_file():
        notes.append("metrics.jsonl is missing, so there are no curves")
        return []
    lines, broken = [], []
    with path.open(encoding="utf-8", errors="replace") as file:
        for place, text in enumerate(file, 1):
            try:
                content = json.loads(text, parse_int=float)
                line = {key: value for key, value in content.items() if isinstance(value, float)}
                if not math.isfinite(line["step"]):
                    raise ValueError(line["step"])
                lines.append(line)
            except (ValueError, KeyError, AttributeError, RecursionError):
                broken.append(place)
    if broken:
        notes.append(
            f"{len(broken):,} lines of metrics.jsonl cannot be read and are left out; the first is line {broken[0]}"
        )
    return sorted(lines, key=lambda line: line["step"])


def fitting(kind: type[T], content: Any, file: str, notes: list[str]) -> T:
    """Validate a file's content; fields that do not fit are left out, and named in `notes`.

    Raises:
        RequestError: the content is no object.
    """
    if not isinstance(content, dict):
        raise RequestError(f"{file}: found {shown(content)}, expected an object: copy the run again, or train it again")
    findings: list[str] = []
    while True:
        try:
            value = kind.model_validate(content)
            break
        except ValidationError as error:
            misfits = {field_at(content, misfit["loc"]): misfit["msg"] for misfit in error.errors(include_url=False)}
        for (*parents, last), why in misfits.items():
            inside = content
            for key in parents:
                inside = inside[key]
            found = f"{json.dumps(inside.pop(last)):.100}"
            findings.append(f"{file}: {'.'.join([*parents, last])}: {why}, found {found}; left out")
    if findings:
        notes += [*findings, f"{file} is not as orpo-lite writes it: copy the run again, or fix these fields"]
    return value


def field_at(content: Any, place: tuple[int | str, ...]) -> tuple[str, ...]:
    """Return the innermost field on the way to a misfit: a list is left out whole, as its items go by their places."""
    fields: list[str] = []
    for key in place:
        if not isinstance(content, dict) or key not in content:
            break
        fields.append(str(key))
        content = content[key]
    return tuple(fields)


# ---- what several of its readers and writers say -----------------------------------------------------------------------

PACKAGES = ("orpo-lite", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes")


def versions() -> dict[str, str | None]:
    """Return the versions of the packages that shape a run, None for one that is not installed, and Python's."""
    found: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found | {"python": platform.python_version()}


def describe_adapter(adapter: AdapterSection | None, brief: bool = False) -> str:
    """Describe a recipe's adapter in a line; in brief by its kind, rank and alpha alone."""
    if adapter is None:
        return "none: full fine-tuning"
    kind = "DoRA" if adapter.use_dora else "rsLoRA" if adapter.use_rslora else "LoRA"
    size = f"r={adapter.r}, alpha={adapter.alpha:g}"
    if brief:
        return f"{kind} {size}"
    if adapter.init_from:
        return f"continues {adapter.init_from}"
    init = "" if adapter.init_lora_weights is True else f", init {adapter.init_lora_weights}"
    plus = f", LoRA+ ratio {adapter.loraplus_lr_ratio:g}" if adapter.loraplus_lr_ratio else ""
    return f"{kind}, {size}, on {adapter.target_modules}{init}{plus}"
