"""The files of a run as its report and model card read them; run.json is written through the same model."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    Strict,
    TypeAdapter,
    ValidationError,
    model_validator,
    with_config,
)
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from orpo_lite.common import safe_yaml
from orpo_lite.common.errors import RequestError
from orpo_lite.common.files import is_locked
from orpo_lite.report.charts import PANELS
from orpo_lite.report.drawing import LARGEST, is_number
from orpo_lite.trainer.run_folder import RunFolder

State = Literal["finished", "under way", "stopped"]
When = Literal["before", "after"]
T = TypeVar("T")

SLACK = 1e-6
"""Tolerance at either end of a range, for shares that were rounded."""
DEEPEST, DIGITS = 40, 300
"""Nesting and digits allowed in values that are only passed on."""
NAMED, LONGEST = 8, 120
"""Findings named for each file, and characters shown of a field's name or value."""


# ---- kinds of values -------------------------------------------------------------------------------------------------


def number(
    low: float = -LARGEST, high: float = LARGEST, whole: bool = False, undefined: bool = False
) -> PlainValidator:
    """Return a validator of numbers in a range.

    Args:
        whole: refuse fractions.
        undefined: accept NaN and the infinities too, which a run that went wrong has recorded.
    """

    def check(value: Any) -> Any:
        if isinstance(value, int | float) and not isinstance(value, bool):
            # whole numbers may be too large for math.isfinite
            if isinstance(value, float) and not math.isfinite(value):
                fits = undefined
            else:
                fits = low - SLACK <= value <= high + SLACK and not (whole and value != int(value))
            if fits:
                return value
        expected = f"a {'whole ' if whole else ''}number from {low:g} to {high:g}"
        raise PydanticCustomError("number", "{expected}", {"expected": expected})

    return PlainValidator(check)


def check_plain(value: Any) -> Any:
    """Refuse what JSON cannot hold, deep nesting and numbers too long to print."""

    def fits(value: Any, levels: int) -> bool:
        if isinstance(value, dict):
            return levels > 0 and all(isinstance(key, str) and fits(inner, levels - 1) for key, inner in value.items())
        if isinstance(value, list):
            return levels > 0 and all(fits(inner, levels - 1) for inner in value)
        if isinstance(value, int):
            return abs(value) < 10**DIGITS
        return value is None or isinstance(value, str | float)

    if fits(value, DEEPEST):
        return value
    expected = f"plain values at most {DEEPEST} deep, numbers of at most {DIGITS} digits"
    raise PydanticCustomError("plain", "{expected}", {"expected": expected})


Number: TypeAlias = Annotated[float, number()]
Count: TypeAlias = Annotated[int, number(0, whole=True)]
Amount: TypeAlias = Annotated[float, number(0)]
Share: TypeAlias = Annotated[float, number(0, 1, undefined=True)]
Result: TypeAlias = Annotated[float, number(undefined=True)]
Step: TypeAlias = Annotated[float, number(0, 1e15)]
Text: TypeAlias = Annotated[str, Strict()]
Plain: TypeAlias = Annotated[Any, AfterValidator(check_plain)]


# ---- run.json --------------------------------------------------------------------------------------------------------


class Section(BaseModel):
    """A part of run.json; every field may be missing, and is then None or empty."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, content: Any) -> Any:
        """Take null for a field that was not recorded."""
        return {key: one for key, one in content.items() if one is not None} if isinstance(content, dict) else content


class BaseFacts(Section):
    name_or_path: Text | None = None
    revision: Text | None = None
    commit: Text | None = None
    hub_id: Text | None = None
    """The base's repository on the hub; None for a local folder."""
    license: dict[str, Text] | None = Field(default=None, validation_alias=AliasChoices("license", "licence"))
    """As `find_license` returns it."""
    quantization: Text | None = None
    dtype: Text | None = None
    facts: list[Text] = []
    """Sentences on how the base was loaded."""


class Source(Section):
    section: Literal["train", "eval"] | None = None
    path: Text | None = None
    files: list[Text] = []
    """Local files; empty for a data set on the hub."""
    shape: Text | None = None
    rows: Count | None = None
    kept: Count | None = None
    weight: Number | None = None
    cached: bool | None = None


class Drops(Section):
    rows: Count | None = None
    kept: Count | None = None
    dropped: dict[str, Count] | None = None
    """Reason -> rows; None where that is not known."""
    truncated: dict[str, Count] = {}
    """prompt and completion -> pairs that were cut there."""
    notes: list[Text] = []
    cached: bool | None = None


class Histogram(Section):
    width: Annotated[float, number(1)] | None = None
    counts: list[Count | None] = []
    median: Amount | None = None
    p95: Amount | None = None
    max: Count | None = None


class DataFacts(Section):
    fingerprint: Text | None = None
    sources: dict[str, Source] = {}
    train_pairs: Count | None = None
    eval_pairs: Count | None = None
    drops: Drops = Drops()
    lengths: dict[Literal["train", "eval"], dict[Literal["prompt", "chosen", "rejected"], Histogram]] = {}


class Plan(Section):
    """The memory plan that training began with, in bytes; more fields of a plan are passed on."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Plain]
    recipe: Text | None = None
    model: Text | None = None
    peak_bytes: Amount | None = None
    needed_bytes: Amount | None = None
    fullest_phase: Text | None = None
    phases: dict[str, dict[str, Amount]] = {}
    """Phase -> total, and each part that it holds."""
    assumed: dict[str, Amount] = {}
    measured: dict[str, Amount] = {}
    """allocated_bytes and reserved_bytes by torch, on CUDA."""


class HealthWarning(Section):
    kind: Text | None = None
    step: Number | None = None
    message: Text | None = None
    text: Text | None = None


class Sample(Section):
    prompt: Text = ""
    answer: Text = ""
    tokens: Count | None = None
    logp: Result | None = None
    """Mean log-prob of the answer's tokens under the model that gave it."""
    log_odds: Result | None = None
    logp_trained: Result | None = None
    """The same of an answer from before training, under the trained model."""
    log_odds_trained: Result | None = None


EvaluationFields = TypedDict("EvaluationFields", {
    "rewards/accuracies": Share | None, "rewards/accuracies_interval": list[Share | None] | None,
    "rewards/margins": Result | None, "log_odds_chosen": Result | None, "nll_loss": Result | None,
    "loss": Result | None, "length_baseline": Share | None, "pairs": Count | None,
}, total=False)  # fmt: skip
with_config(ConfigDict(extra="allow"))(EvaluationFields)
Evaluation: TypeAlias = Annotated[EvaluationFields, AfterValidator(check_plain)]
"""Metrics of the held-out pairs by the trainer's names; those that are not listed are passed on."""


class RunRecord(Section):
    """run.json: the facts of a run, written once it has finished."""

    name: Text | None = None
    versions: dict[str, Text | None] = {}
    device: Text | None = None
    processes: Count | None = None
    world: dict[str, Plain] = {}
    """Processes, machines and what joins them."""
    seed: Number | None = None
    base_model: BaseFacts = BaseFacts()
    data: DataFacts = DataFacts()
    probe: list[list[Count | None]] = []
    """Token ids of a few training rows, for a merge to compare models on."""
    layout: dict[Literal["name", "why"], Text] = {}
    parameters: dict[Literal["trainable", "total"], Count] = {}
    effective_batch: Count | None = None
    """Pairs per optimizer step."""
    steps: Count | None = None
    train_seconds: Amount | None = None
    total_seconds: Amount | None = None
    pairs_per_second: Amount | None = None
    peak_memory_bytes: Amount | None = None
    plan: Plan | None = None
    out_of_memory: dict[Literal["training", "evaluation"], list[Plain]] = {}
    warnings: list[HealthWarning] = []
    skipped_steps: list[Plain] = []
    """Optimizer steps that were not finite and were left out."""
    overflow_steps: Count | None = None
    nonfinite_rows: Text | None = None
    """File of the rows of the first step that was not finite."""
    reproducer: Text | None = None
    """The same in run folders of version 0.1.0."""
    adapter: Text | None = None
    """Which weights were kept: the last ones, or the best by a metric."""
    eval: dict[When, Evaluation | None] = {}
    samples: dict[When, list[Sample]] = {}
    rule: dict[When, dict[Literal["chosen", "rejected"], Share] | None] = {}
    """Shares of the greedy answers in either style, by the recipe's rule."""
    finished: bool = True

    @classmethod
    def of(cls, facts: dict[str, Any], notes: list[str]) -> RunRecord:
        """Return the record that a run writes; a value that the model has no place for is left out and named in `notes`."""
        return read_as(cls, json.loads(json.dumps(facts)), "run.json", notes)


class RecipeFields(BaseModel):
    """recipe.yaml as any version wrote it: `Recipe` loads transformers, and knows its own version alone."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Plain]
    name: Text | None = None
    description: Text | None = None
    model: dict[str, Plain] | None = None
    orpo: dict[str, Plain] | None = None
    adapter: dict[str, Plain] | None = None
    """None for full fine-tuning; where that is not known, the field is not set."""


class HeldOutPairs(Section):
    """held_out.json: mean log-probs of the answers to every held-out pair."""

    model_config = ConfigDict(extra="ignore")
    beta: Number | None = None
    before: dict[Literal["logps/chosen", "logps/rejected"], list[Result | None]] = {}
    after: dict[Literal["logps/chosen", "logps/rejected"], list[Result | None]] = {}


class BeforeTraining(Section):
    """before.json, which an unfinished run keeps."""

    model_config = ConfigDict(extra="ignore")
    eval: Evaluation | None = None
    samples: list[Sample] = []


# ---- reading -----------------------------------------------------------------------------------------------------------


@dataclass
class LoadedRun:
    """One run as its report takes it: finished, under way or stopped, of this version or an older one."""

    record: RunRecord = field(default_factory=RunRecord)
    """run.json; for an unfinished run what else is known, in the same fields."""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    """Lines of metrics.jsonl in the order of their steps."""
    recipe: RecipeFields = field(default_factory=RecipeFields)  # type: ignore[call-overload]  # its extra fields are none of __init__
    pairs: HeldOutPairs = field(default_factory=HeldOutPairs)
    path: Path | None = None
    state: State = "finished"
    checkpoint: str | None = None
    """The newest one of an unfinished run."""
    notes: list[str] = field(default_factory=list)
    """What is missing or damaged, in sentences for the page."""

    @property
    def name(self) -> str:
        return self.record.name or (self.path.name if self.path else "run")

    @property
    def beta(self) -> float:
        """Weight of the odds-ratio term."""
        known = (self.recipe.orpo or {}).get("beta"), self.pairs.beta
        return next((float(beta) for beta in known if is_number(beta)), 0.1)

    @property
    def full_fine_tuning(self) -> bool:
        return self.recipe.adapter is None and "adapter" in self.recipe.model_fields_set

    def evaluation(self, when: When) -> dict[str, Any]:
        """Return the metrics of the held-out pairs; empty where there are none."""
        return dict(self.record.eval.get(when) or {})

    @property
    def last_evaluation(self) -> dict[str, Any]:
        return self.evaluation("after") or self.evaluation("before")


def read_run(place: str | Path | RunFolder) -> LoadedRun:
    """Read all that a run folder holds for its report.

    Raises:
        RequestError: no run folder, a run.json that is no JSON object, or a run of which nothing is known yet.
    """
    folder = place if isinstance(place, RunFolder) else RunFolder.open(place)
    run = LoadedRun(path=folder.path)
    try:
        run.recipe = read_as(RecipeFields, safe_yaml.read(folder.path / "recipe.yaml"), "recipe.yaml", run.notes)
    except safe_yaml.YamlError as error:
        run.notes.append(f"recipe.yaml cannot be read: {error}")
    run.metrics = read_metrics(folder, run.notes)
    if (folder.path / "run.json").is_file():
        facts = folder.read()
        if not isinstance(facts, dict):
            raise RequestError(
                f"{folder.path / 'run.json'}: found {shown(facts)}, expected an object: copy the run again, or train it again"
            )
        run.record = read_as(RunRecord, facts, "run.json", run.notes)
    else:
        read_unfinished(folder, run)
    try:
        found = parsed((folder.path / "held_out.json").read_text("utf-8"))
        run.pairs = read_as(HeldOutPairs, found, "held_out.json", run.notes)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        run.notes.append(f"held_out.json cannot be read: {error}")
    return run


def read_unfinished(folder: RunFolder, run: LoadedRun) -> None:
    """Fill in what is known of a run without run.json."""
    before = read_as(BeforeTraining, folder.read_before() or {}, "before.json", run.notes)
    if not run.metrics and not before.eval and not before.samples:
        raise RequestError(
            f"{folder.path}: found neither run.json nor a line in metrics.jsonl, so there is nothing to report yet: wait for "
            f"its first log line (training.logging_steps), or train it with --recipe {folder.path}"
        )
    run.state = "under way" if is_locked(folder.path) else "stopped"
    names = [path.name for path in folder.checkpoints.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    run.checkpoint = max(names, key=lambda name: int(name.rpartition("-")[2]), default=None)
    base = {key: (run.recipe.model or {}).get(key) for key in ("name_or_path", "quantization")}
    facts = {
        "name": run.recipe.name,
        "steps": max((int(line["step"]) for line in run.metrics), default=0),
        "base_model": base,
    }
    run.record = read_as(RunRecord, facts, "recipe.yaml", run.notes)
    run.record.eval, run.record.samples = {"before": before.eval}, {"before": before.samples}


def read_metrics(folder: RunFolder, notes: list[str]) -> list[dict[str, Any]]:
    """Read metrics.jsonl in the order of its steps; half a line of a run that was killed is left out and named."""
    if not folder.metrics.is_file():
        notes.append("metrics.jsonl is missing, so there are no curves")
        return []
    lines, broken, findings = [], [], []
    with folder.metrics.open(encoding="utf-8", errors="replace") as file:
        for place, text in enumerate(file, 1):
            if text.strip():
                try:
                    line, found = read_line(text)
                except ValueError as error:
                    broken.append(f"line {place}: {error}")
                else:
                    lines.append(line)
                    findings += [f"line {place}: {finding}" for finding in found]
    if broken:
        notes.append(
            f"{len(broken):,} lines of metrics.jsonl cannot be read and are left out; the first is {broken[0]}"
        )
    notes += in_sentences("metrics.jsonl", findings)
    return sorted(lines, key=lambda line: line["step"])


def read_line(text: str) -> tuple[dict[str, Any], list[str]]:
    """Return the values of a line of metrics.jsonl, and what was left out of it.

    Raises:
        ValueError: no JSON object, or none with a step.
    """
    line = parsed(text)
    if not isinstance(line, dict):
        raise ValueError(f"found {shown(line)}, expected an object")
    _, misfits = fitting(LINE, {"step": line.get("step")})
    if misfits:
        raise ValueError(misfits[0])
    return fitting(LINE, line)


def read_as(kind: type[T], content: Any, file: str, notes: list[str]) -> T:
    """Validate a file's content; whatever does not fit is left out, and named in `notes`."""
    if not isinstance(content, dict):
        notes += in_sentences(file, [f"found {shown(content)}, expected an object"])
        content = {}
    value, findings = fitting(TypeAdapter(kind), content)
    notes += in_sentences(file, findings)
    return value


def fitting(kind: TypeAdapter[T], content: dict[str, Any]) -> tuple[T, list[str]]:
    """Validate an object, taking out of it what does not fit; return the value and a finding for each such place."""
    findings: list[str] = []
    while True:
        try:
            return kind.validate_python(content), findings
        except ValidationError as error:
            misfits = error.errors(include_url=False)
        findings += [finding(one) for one in misfits]
        for one in reversed(misfits):  # the last item of a list first, so that the places of the others stay
            take_out(content, one["loc"], keep_place=one["type"] == "number")


def take_out(content: Any, place: tuple[int | str, ...], keep_place: bool) -> None:
    """Delete a field or an item; a number in a list becomes None, since the others are known by their places."""
    *parents, last = place[:-1] if place[-1] == "[key]" else place
    for key in parents:
        if isinstance(content, dict) and key not in content:
            return  # gone already, for its name
        content = content[key]
    if not isinstance(content, list):
        content.pop(last, None)
    elif keep_place:
        content[int(last)] = None
    else:
        del content[int(last)]


EXPECTED = {
    "model_type": "an object", "dict_type": "an object", "list_type": "a list", "string_type": "text",
    "bool_type": "true or false", "bool_parsing": "true or false", "extra_forbidden": "no field of this name",
    "literal_error": "train or eval",
}  # fmt: skip
"""Type of pydantic's error -> what was expected."""


def finding(misfit: Any) -> str:
    """Put one of pydantic's errors into words: place, what was found, what was expected."""
    *place, last = misfit["loc"]
    if last == "[key]" or misfit["type"] == "invalid_key":
        return f"found {shown(place[-1] if place else last)} as a field's name, expected another"
    dotted = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in misfit["loc"]).lstrip(".")
    if len(dotted) > LONGEST:
        dotted = f"{dotted[:LONGEST]}…"
    expected = misfit.get("ctx", {}).get("expected") if misfit["type"] in ("number", "plain") else None
    return (
        f"{dotted}: found {shown(misfit['input'])}, expected {expected or EXPECTED.get(misfit['type'], misfit['msg'])}"
    )


def in_sentences(file: str, findings: list[str]) -> list[str]:
    """Turn the findings in a file into notes for the page, with what to do about them."""
    if not findings:
        return []
    more = f", {len(findings) - NAMED:,} more fields among them" if len(findings) > NAMED else ""
    return [f"{file}: {one}; left out" for one in findings[:NAMED]] + [
        f"{file} is not as orpo-lite writes it{more}: copy the run again, or fix these fields"
    ]


def parsed(text: str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: broken, or nested too deep.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def shown(value: Any) -> str:
    """Show a value in a message."""
    if value is None:
        return "nothing"
    if isinstance(value, dict | list | tuple | set):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and abs(value) >= 10**LONGEST:
        return "a number of more than 120 digits"
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, str | int | float) else repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


LINE: TypeAdapter[Any] = TypeAdapter(
    with_config(ConfigDict(extra="allow"))(
        TypedDict(  # type: ignore[misc]  # its keys are those of the panels
            "Line",
            {"step": Step}
            | {
                f"{place}{metric.key}": (Share if panel.form == "%" else Result) | None  # type: ignore[operator]  # of aliases
                for panel in PANELS
                for metric in panel.metrics
                for place in ("", "eval_")
            },
            total=False,
        )
    )
)
"""Of metrics.jsonl."""
