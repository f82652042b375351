"""What a run records: run.json and held_out.json as training writes them and everything later reads them."""

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

from orpo_lite import __version__
from orpo_lite.common.errors import RequestError
from orpo_lite.common.files import is_locked
from orpo_lite.common.text import counted, shown
from orpo_lite.recipe import AdapterSection, Recipe
from orpo_lite.trainer.checkpoint_folder import checkpoints
from orpo_lite.trainer.run_folder import RunFolder

State = Literal["finished", "under way", "stopped"]
When = Literal["before", "after"]
T = TypeVar("T", bound=BaseModel)
Amount: TypeAlias = Annotated[int | float, Field(ge=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A part of run.json; every field may be missing, as in those of other versions, and is then None or empty."""

    model_config = ConfigDict(extra="ignore")


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
    rows: int | None = None
    kept: int | None = None
    weight: Amount | None = None


class Drops(Section):
    rows: int | None = None
    kept: int | None = None
    dropped: dict[str, int] | None = None
    """Reason -> rows; None where that is not known."""
    truncated: dict[str, int] = {}
    """prompt and completion -> pairs that were cut there."""
    notes: list[str] = []


class DataFacts(Section):
    fingerprint: str | None = None
    sources: dict[str, Source] = {}
    train_pairs: int | None = None
    eval_pairs: int | None = None
    drops: Drops = Drops()


class Plan(Section):
    """The memory plan that training began with, in bytes; more fields of a plan are passed on."""

    model_config = ConfigDict(extra="allow")
    recipe: str | None = None
    model: str | None = None
    peak_bytes: Amount | None = None
    needed_bytes: Amount | None = None
    fullest_phase: str | None = None
    phases: dict[str, dict[str, Amount]] = {}
    """Phase -> total, and each part that it holds."""
    assumed: dict[str, Amount] = {}
    measured: dict[str, Amount] = {}
    """allocated_bytes and reserved_bytes by torch, on CUDA."""


class HealthWarning(Section):
    kind: str | None = None
    step: int | None = None
    message: str | None = None


class Sample(Section):
    prompt: str = ""
    answer: str = ""
    tokens: int | None = None
    logp: float | None = None
    """Mean log-prob of the answer's tokens under the model that gave it."""
    log_odds: float | None = None
    logp_trained: float | None = None
    """The same of an answer from before training, under the trained model."""
    log_odds_trained: float | None = None


Evaluation = TypedDict("Evaluation", {
    "rewards/accuracies": float | None, "rewards/accuracies_interval": list[float] | None,
    "rewards/margins": float | None, "log_odds_chosen": float | None, "nll_loss": float | None,
    "loss": float | None, "length_baseline": float | None, "pairs": int | None,
}, total=False)  # fmt: skip
"""Metrics of the held-out pairs by the trainer's names; those that are not listed are passed on."""
with_config(ConfigDict(extra="allow"))(Evaluation)


class RunRecord(Section):
    """run.json: the facts of a run, written once it has finished."""

    name: str | None = None
    versions: dict[str, str | None] = {}
    device: str | None = None
    processes: int | None = None
    seed: int | None = None
    base_model: BaseFacts = BaseFacts()
    data: DataFacts = DataFacts()
    probe: list[list[int]] = []
    """Token ids of a few training rows, for a merge to compare models on."""
    layout: dict[Literal["name", "why", "attention"], str] = {}
    kernels: str | None = None
    parameters: dict[Literal["trainable", "total"], int] = {}
    effective_batch: int | None = None
    """Pairs per optimizer step."""
    steps: int | None = None
    train_seconds: Amount | None = None
    total_seconds: Amount | None = None
    pairs_per_second: Amount | None = None
    peak_memory_bytes: Amount | None = None
    plan: Plan | None = None
    out_of_memory: dict[Literal["training", "evaluation"], list[Any]] = {}
    warnings: list[HealthWarning] = []
    overflow_steps: int | None = None
    adapter: str | None = None
    """Which weights were kept: the last ones, or the best by a metric."""
    eval: dict[When, Evaluation | None] = {}
    samples: dict[When, list[Sample]] = {}
    rule: dict[When, dict[Literal["chosen", "rejected"], float] | None] = {}
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

    before: dict[Literal["logps/chosen", "logps/rejected"], list[float]] = {}
    after: dict[Literal["logps/chosen", "logps/rejected"], list[float]] = {}


@dataclass
class LoadedRun:
    """One run as its report takes it: finished, under way or stopped, of this version or an older one."""

    path: Path
    recipe: Recipe
    record: RunRecord = field(default_factory=RunRecord)
    """run.json; for an unfinished run what else is known, in the same fields."""
    metrics: list[dict[str, float]] = field(default_factory=list)
    """The numbers in each line of metrics.jsonl, in the order of their steps."""
    pairs: HeldOutPairs = field(default_factory=HeldOutPairs)
    state: State = "finished"
    checkpoint: str | None = None
    """The newest one of an unfinished run."""
    notes: list[str] = field(default_factory=list)
    """Sentences for the page on lines of metrics.jsonl that cannot be read."""

    @property
    def name(self) -> str:
        return self.record.name or self.path.name

    @property
    def beta(self) -> float:
        """Weight of the odds-ratio term."""
        return self.recipe.orpo.beta

    @property
    def full_fine_tuning(self) -> bool:
        return self.recipe.adapter is None

    @property
    def adapter(self) -> str:
        return describe_adapter(self.recipe.adapter)

    @property
    def last_evaluation(self) -> dict[str, Any]:
        return self.record.evaluation("after") or self.record.evaluation("before")


def read_record(folder: RunFolder) -> RunRecord:
    """Read run.json.

    Raises:
        RequestError: there is none, or it is broken.
    """
    return validated(RunRecord, folder.read(), folder.path / "run.json")


def read_run(place: str | Path | RunFolder) -> LoadedRun:
    """Read all that a run folder holds for its report.

    Raises:
        RequestError: no run folder, a broken file in it, or a run of which nothing is known yet.
    """
    folder = place if isinstance(place, RunFolder) else RunFolder.open(place)
    run = LoadedRun(folder.path, folder.recipe())
    run.metrics = read_metrics(folder.metrics, run.notes)
    if (folder.path / "run.json").is_file():
        run.record = read_record(folder)
    else:
        read_unfinished(folder, run)
    held_out = folder.path / "held_out.json"
    if held_out.is_file():
        try:
            content = json.loads(held_out.read_bytes())
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{held_out} is broken JSON ({error}): copy the run again") from None
        run.pairs = validated(HeldOutPairs, content, held_out)
    return run


def read_unfinished(folder: RunFolder, run: LoadedRun) -> None:
    """Fill in what is known of a run without run.json."""
    before = folder.read_before() or {}
    facts = {"eval": {"before": before.get("eval")}, "samples": {"before": before.get("samples", [])}}
    run.record = validated(RunRecord, facts, folder.before)
    if not run.metrics and not run.record.evaluation("before") and not run.record.samples.get("before"):
        raise RequestError(
            f"{folder.path}: found neither run.json nor a line in metrics.jsonl, so there is nothing to report yet: wait for "
            f"its first log line (training.logging_steps), or train it with --recipe {folder.path}"
        )
    run.state = "under way" if is_locked(folder.path) else "stopped"
    run.checkpoint = next((path.name for path in reversed(checkpoints(folder.checkpoints))), None)
    run.record.steps = int(run.metrics[-1]["step"]) if run.metrics else 0
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
            f"left out of metrics.jsonl, as not readable: {counted(len(broken), 'line')}; the first is line {broken[0]}"
        )
    return sorted(lines, key=lambda line: line["step"])


def validated(kind: type[T], content: Any, path: Path) -> T:
    """Return a file's content as its model.

    Raises:
        RequestError: it is not as orpo-lite writes it; the first field that is not is named.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = "".join(f"{key}." for key in first["loc"]).rstrip(".")
        raise RequestError(
            f"{path}: {field}{': ' * bool(field)}{first['msg']}, found {shown(first['input']):.100}: copy the run again, or "
            "train it again"
        ) from None


PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes", "liger-kernel")


def versions() -> dict[str, str | None]:
    """Return our version, those of the packages that shape a run, None for one that is not installed, and Python's."""
    found: dict[str, str | None] = {"orpo-lite": __version__} | dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found | {"python": platform.python_version()}


def describe_adapter(adapter: AdapterSection | None) -> str:
    """Name a recipe's kind of adapter, its rank and alpha, or what it continues."""
    if adapter is None:
        return "none: full fine-tuning"
    if adapter.init_from:
        return f"continues {adapter.init_from}"
    kind = "DoRA" if adapter.use_dora else "rsLoRA" if adapter.use_rslora else "LoRA"
    return f"{kind} r={adapter.r}, alpha={adapter.alpha:g}"
