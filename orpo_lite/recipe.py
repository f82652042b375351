"""Recipe: the one YAML that describes a complete run. Schema, load, override, validate, save.

Nothing here imports torch at module level, so that listing or checking a recipe is quick.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import typing
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from orpo_lite.errors import RequestError

PACKAGE = Path(__file__).parent
BUILTIN = "builtin:"  # a path inside the installed package, for example builtin:quickstart/model

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class RecipeError(RequestError):
    """A recipe that cannot be run. The message lists every problem found, one a line."""

    def __init__(self, source: str, problems: list[str]):
        self.problems = problems
        super().__init__(f"{source}: {len(problems)} problem(s)\n" + "\n".join(f"  - {p}" for p in problems))


class Section(BaseModel):
    """Base of all recipe sections: unknown keys, NaN and infinity are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, validate_default=True)


class ModelSection(Section):
    name_or_path: str
    """Hub id, local folder, or builtin:quickstart/model."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    gguf_file: str | None = None
    """File name of a GGUF checkpoint inside name_or_path (a local folder or hub id); dequantised once into a cached
    safetensors folder, which is then quantised and trained on as the recipe says."""
    quantization: Literal["nf4", "fp4", "int8", "none"] = "nf4"
    """How the frozen base is held. A repository that is quantised already is used as it is."""
    double_quant: bool = True
    """Quantise the 4-bit quantisation constants too (about 0.4 bits a parameter less)."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute dtype. auto: bfloat16 from compute capability 8.0, float16 below, float32 on the CPU."""
    attention: Literal["auto", "sdpa", "flex_attention", "flash_attention_2", "eager"] = "auto"
    """Attention kernel; auto takes sdpa where the model supports it."""
    trust_remote_code: bool = False
    """Run Python code that the model's repository ships."""
    chat_template: str | None = None
    """Template for a model without one: chatml, zephyr, llama-3, ..., or the path of a Jinja file."""
    new_tokens: list[str] = []
    """Tokens to add to the vocabulary; their embeddings are trained and saved with the adapter."""


class AdapterSection(Section):
    init_from: str | None = None
    """Go on from this existing LoRA adapter (folder or hub id) instead of a new one; its own shape is kept."""
    r: Positive = 16
    """LoRA rank."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """LoRA alpha; the update is scaled by alpha / r (alpha / sqrt(r) with use_rslora)."""
    dropout: Fraction = 0.0
    """Dropout on the adapter's input (active only with orpo.disable_dropout: false)."""
    target_modules: str | list[str] = "all-linear"
    """Module names, a regular expression, or all-linear (which leaves output head and routers out)."""
    exclude_modules: str | list[str] | None = None
    """Module names or a regular expression never to adapt."""
    target_parameters: list[str] | None = None
    """Parameters (fused experts, for example mlp.experts.down_proj) to adapt."""
    modules_to_save: list[str] | None = None
    """Modules trained whole and saved with the adapter, for example [embed_tokens, lm_head]."""
    rank_pattern: dict[str, int] = {}
    """Rank by module name or regular expression, where it differs from r."""
    alpha_pattern: dict[str, float] = {}
    """Alpha by module name or regular expression, where it differs from alpha."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained."""
    use_rslora: bool = False
    """Rank-stabilised scaling, alpha / sqrt(r)."""
    use_dora: bool = False
    """Weight-decomposed LoRA: also trains the magnitude of each output."""
    init_lora_weights: bool | str = True
    """true, gaussian, orthogonal, eva, pissa, pissa_niter_N or olora; the last three need quantization: none."""
    eva_batches: Positive = 16
    """Micro-batches of training data that an EVA initialisation looks at."""
    loraplus_lr_ratio: Annotated[float, Field(gt=0)] | None = None
    """LoRA+: learning rate of B over that of A; 16 is the paper's."""


Columns = dict[Literal["prompt", "chosen", "rejected", "tools", "system"], str]


class DataSource(Section):
    path: str
    """Local file (jsonl, json, csv, parquet, compressed too), glob, folder, builtin:... or hub id."""
    name: str | None = None
    """Configuration of a hub data set."""
    split: str | None = None
    """Split; the section's `split` if null."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Times the source is seen an epoch: 0.5 takes a seeded half of its rows, 2 each row twice."""
    columns: Columns | None = None
    """Column map of this source; the section's `columns` if null."""


def as_sources(given: Any) -> Any:
    """One path, one mapping or a list of either -> a list of mappings."""
    if isinstance(given, str | dict | DataSource):
        given = [given]
    return [{"path": item} if isinstance(item, str) else item for item in given] if isinstance(given, list) else given


Sources = Annotated[
    list[DataSource],
    BeforeValidator(as_sources, json_schema_input_type=str | DataSource | list[str | DataSource]),
    Field(min_length=1),
]


class DataSection(Section):
    train: Sources
    """Training pairs: one source or several."""
    eval: Sources | None = None
    """Held-out pairs; null takes eval_fraction of the training pairs."""
    eval_fraction: Fraction = 0.05
    """Share of the training rows held out where `eval` is null, by prompt; 0 evaluates nothing."""
    split: str = "train"
    """Split of hub data sets."""
    columns: Columns | None = None
    """Names of the columns where they are not prompt, chosen, rejected, tools, system."""
    apply_template: bool = False
    """Wrap plain-string rows into the chat template as one user and one assistant turn."""
    template_kwargs: dict[str, Any] = {}
    """Variables given to the chat template, for example enable_thinking: false."""
    completion_end: Literal["trl", "turn"] = "turn"
    """trl: all that the template writes, then EOS if it is not last; turn: cut after the first end-of-turn token."""
    max_length: Positive | None = 1024
    """Tokens of prompt and completion together."""
    max_prompt_length: Positive | None = None
    """Tokens of the prompt; null leaves it to max_length."""
    max_completion_length: Positive | None = None
    """Tokens of the completion (encoder-decoder models: 128 if null)."""
    overlong: Literal["drop", "truncate"] = "drop"
    """What to do with a pair longer than that. Both are counted."""
    max_rows: Positive | None = None
    """Use only the first rows of the training data (before anything is dropped)."""
    max_eval_rows: Positive | None = None
    """Use only the first rows of the held-out data."""
    seed: int = 0
    """Seed of the held-out choice and of source sampling."""
    num_proc: Positive | None = None
    """Processes for tokenising."""


class OrpoSection(Section):
    beta: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the odds-ratio term: lambda in the paper, alpha in its code, beta in TRL."""
    nll_scope: Literal["prompt+chosen", "chosen"] = "prompt+chosen"
    """Tokens in the NLL term: prompt and chosen answer as in the paper's code and TRL, or the answer only."""
    nll_mean: Literal["window", "micro"] = "window"
    """window: normalised over the whole optimizer step; micro: TRL's mean of micro-batch means."""
    layout: Literal["auto", "shared", "packed", "padded"] = "auto"
    """How pairs become a batch; auto takes the fastest layout that is exact for the model.

    shared: one row without padding, each prompt computed once for both completions; packed: one row without padding;
    padded: two right-padded rows a pair, as in TRL."""
    tokens_per_batch: Positive | None = None
    """Tokens of a micro-batch as the layout counts them; null takes training.per_device_train_batch_size pairs each.

    An optimizer step keeps its pairs (per_device_train_batch_size x gradient_accumulation_steps x processes), dealt to
    processes and micro-batches by cost."""
    disable_dropout: bool = True
    """Set every dropout in the model to 0."""


class MemorySection(Section):
    gpu_gb: Annotated[float, Field(gt=0)] | None = None
    """Memory of the card in GB (10^9 bytes) that the run must fit; null takes the card that is there."""
    checkpointing: Literal["auto", "all", "none"] | Annotated[int, Field(ge=0)] = "auto"
    """Layers whose activations are recomputed in the backward pass; auto is all on a GPU and none on the CPU."""
    head_chunk: Literal["auto"] | Positive = "auto"
    """Rows of logits held at a time; auto keeps them near 64 MB."""


class RuleSection(Section):
    chosen: str
    """Regular expression that an answer in the chosen style matches (searched, case-insensitive)."""
    rejected: str
    """Regular expression that an answer in the rejected style matches."""


class EvaluationSection(Section):
    samples: Annotated[int, Field(ge=0)] = 4
    """Held-out prompts answered greedily before and after training."""
    max_new_tokens: Positive = 128
    """Tokens of a sample answer at most."""
    rule: RuleSection | None = None
    """Judge of sample answers: the share in either style is reported before and after."""


class Recipe(Section):
    """One complete run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; its folder is outputs/<name>."""
    description: str = ""
    """What the run is for, in a sentence."""
    needs: str = ""
    """What it needs: card, memory, disk."""
    model: ModelSection
    adapter: AdapterSection | None = AdapterSection()
    """null: full fine-tuning (needs quantization: none)."""
    data: DataSection
    orpo: OrpoSection = OrpoSection()
    training: dict[str, Any] = {}
    """Any field of transformers.TrainingArguments, by its own name."""
    memory: MemorySection = MemorySection()
    evaluation: EvaluationSection = EvaluationSection()

    @field_validator("training")
    @classmethod
    def _training_fields(cls, given: dict[str, Any]) -> dict[str, Any]:
        problems, clean = [], {}
        for key, value in given.items():
            try:
                clean[key] = check_training_field(key, value)
            except ValueError as error:
                problems.append(str(error))
        if problems:
            raise ValueError("\n".join(problems))
        return clean

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        problems = []
        model, adapter, data = self.model, self.adapter, self.data
        if adapter is None and model.quantization != "none":
            problems.append(
                f"adapter is null (full fine-tuning) but model.quantization is {model.quantization}: quantised weights "
                "cannot be trained; set model.quantization=none or give an adapter"
            )
        init = adapter.init_lora_weights if adapter else True
        if isinstance(init, str) and init.startswith(("pissa", "olora")) and model.quantization != "none":
            problems.append(
                f"adapter.init_lora_weights is {init}, which changes the base weights, but model.quantization is "
                f"{model.quantization}: set model.quantization=none or adapter.init_lora_weights=true"
            )
        if isinstance(init, str) and not init.startswith(("gaussian", "orthogonal", "eva", "pissa", "olora")):
            problems.append(
                f"adapter.init_lora_weights: found {init!r}, expected true, false, gaussian, orthogonal, eva, pissa, "
                "pissa_niter_N or olora"
            )
        if data.max_prompt_length and data.max_length and data.max_prompt_length >= data.max_length:
            problems.append(
                f"data.max_prompt_length ({data.max_prompt_length}) leaves no room for an answer in data.max_length "
                f"({data.max_length}): make it smaller"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def folder(self) -> Path:
        """The run folder: training.output_dir, or outputs/<name>."""
        return Path(self.training.get("output_dir") or Path("outputs") / self.name)

    @classmethod
    def load(cls, source: str | Path, overrides: typing.Sequence[str] = ()) -> Recipe:
        """Read a recipe and apply `key=value` overrides in dotted form.

        Args:
            source: name of a shipped recipe, path of a YAML file, or a run folder.
            overrides: for example ["training.learning_rate=5e-6", "data.train=my.jsonl"]; values are YAML.

        Raises:
            RecipeError: no such recipe, YAML that does not parse, or fields that do not fit; all at once.
        """
        path = find_recipe(source)
        content = read_yaml(path)
        content.setdefault("name", path.stem)
        for word in overrides:
            apply_override(content, word)
        return cls.parse(content, str(path))

    @classmethod
    def parse(cls, content: dict[str, Any], source: str = "recipe") -> Recipe:
        """Validate a plain dict; `source` names it in the error."""
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise RecipeError(source, describe(error)) from None

    def save(self, path: Path) -> None:
        """Write every field, defaults included, so that the file loads back to the same run."""
        path.write_text(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True), "utf-8")


def resolve_path(value: str) -> str:
    """Turn builtin:quickstart/model into its place in the installed package; anything else is returned as it is."""
    return str(PACKAGE / value.removeprefix(BUILTIN)) if value.startswith(BUILTIN) else value


def recipes_folder() -> Path:
    """The shipped recipes: inside the installed package, or beside it in a checkout."""
    inside = PACKAGE / "recipes"
    return inside if inside.is_dir() else PACKAGE.parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Name -> path of every shipped recipe, sorted."""
    return {path.stem: path for path in sorted(recipes_folder().glob("*.yaml"))}


def find_recipe(source: str | Path) -> Path:
    """The YAML file behind a shipped name, a path or a run folder."""
    path, shipped = Path(source), shipped_recipes()
    if str(source) in shipped:  # before the folders, so that a run folder called quickstart does not hide the recipe
        return shipped[str(source)]
    if path.is_dir():
        path = path / "recipe.yaml"
        if not path.is_file():
            raise RecipeError(str(source), ["this folder holds no recipe.yaml: is it a run folder?"])
        return path
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise RecipeError(str(source), [f"there is no such file; shipped recipes: {', '.join(shipped)}"])
        return path
    raise RecipeError(
        str(source), [f"no recipe of this name{nearest(str(source), shipped)}; shipped: {', '.join(shipped)}"]
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping, read with the safe loader."""
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise RecipeError(str(path), [f"not readable as YAML: {' '.join(str(error).split())}"]) from None
    if not isinstance(content, dict):
        raise RecipeError(
            str(path), [f"found {type(content).__name__} at the top, expected sections such as model: and data:"]
        )
    return content


def apply_override(content: dict[str, Any], word: str) -> None:
    """Set one dotted key=value in place; the value is read as YAML (`null`, lists and numbers work)."""
    key, equals, value = word.partition("=")
    if not equals or not key:
        raise RecipeError("override", [f"found {word!r}, expected key=value, for example training.learning_rate=5e-6"])
    *parents, leaf = key.split(".")
    place = content
    for parent in parents:
        if place.get(parent) is None:
            place[parent] = {}
        if not isinstance(place[parent], dict):
            raise RecipeError("override", [f"{word}: {parent} is not a section, it is {place[parent]!r}"])
        place = place[parent]
    try:
        place[leaf] = yaml.safe_load(value) if value else None
    except yaml.YAMLError as error:
        raise RecipeError("override", [f"{word}: value not readable as YAML: {' '.join(str(error).split())}"]) from None


@functools.cache
def training_fields() -> dict[str, Any]:
    """Name -> type of every transformers.TrainingArguments field (imports transformers)."""
    from transformers import TrainingArguments

    return {key: hint for key, hint in typing.get_type_hints(TrainingArguments).items() if not key.startswith("_")}


POSITIVE = {"learning_rate", "num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size",
            "gradient_accumulation_steps"}  # fmt: skip


def check_training_field(key: str, value: Any) -> Any:
    """The value in its field's type, or ValueError in words: 5e-6, which YAML reads as text, becomes a number."""
    fields = training_fields()
    if key not in fields:
        raise ValueError(f"training.{key}: not a field of transformers.TrainingArguments{nearest(key, fields)}")
    # their types are `Enum | str`: without this, a misspelt choice would pass here and fail once the model is loaded
    choices = [
        choice.value
        for option in typing.get_args(fields[key])
        if isinstance(option, type) and issubclass(option, Enum)
        for choice in option
    ]
    value = "no" if value is False and "no" in choices else value  # YAML reads an unquoted no as false
    if choices and isinstance(value, str) and value not in choices:
        raise ValueError(
            f"training.{key}: found {value!r}{nearest(value, choices)}, expected one of {', '.join(choices)}"
        )
    try:
        clean = TypeAdapter(fields[key], config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        raise ValueError(f"training.{key}: found {value!r}, {error.errors()[0]['msg'].lower()}") from None
    if isinstance(clean, float) and not math.isfinite(clean):
        raise ValueError(f"training.{key}: found {value!r}, expected a finite number")
    if key in POSITIVE and not clean > 0:
        raise ValueError(f"training.{key}: found {value!r}, expected a number above 0")
    return clean.value if isinstance(clean, Enum) else clean


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """', did you mean X?' where a known name is close, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def describe(error: ValidationError) -> list[str]:
    """Pydantic's errors in words: field, what was found, what was expected."""
    lines = []
    for item in error.errors():
        # union members' names and our own class names are pydantic's path, not the user's
        place = [str(part) for part in item["loc"] if not str(part)[:1].isupper() and "[" not in str(part)]
        field = ".".join(part for part in place if not part.startswith(("literal", "constrained", "function")))
        if item["type"] == "extra_forbidden":
            homes = [] if place[:-1] else sections_with(place[-1])
            hint = f" (did you mean {' or '.join(homes)}?)" if homes else nearest(place[-1], known_keys(place[:-1]))
            lines.append(f"{field}: unknown key{hint}")
        elif item["type"] == "missing":
            lines.append(f"{field}: missing, and it has no default")
        elif item["type"] == "value_error":
            lines += str(item.get("ctx", {})["error"]).split("\n")
        else:
            lines.append(f"{field}: found {item['input']!r}, expected: {item['msg'].removeprefix('Input should be ')}")
    return list(dict.fromkeys(lines))


def known_keys(place: list[str]) -> list[str]:
    """Keys of the section at this path, for the nearest-key hint."""
    section: Any = Recipe
    for part in place:
        field = section.model_fields.get(part)
        options = (field.annotation, *typing.get_args(field.annotation)) if field else ()
        # a list index, or the list itself, leads to the one section that stands in lists
        section = next((t for t in options if isinstance(t, type) and issubclass(t, Section)), DataSource)
    return list(section.model_fields)


def sections_with(key: str) -> list[str]:
    """`section.key` for every section that has this key: what a field given without its section was meant to be."""
    kinds = {name: (f.annotation, *typing.get_args(f.annotation)) for name, f in Recipe.model_fields.items()}
    found = [
        name
        for name, options in kinds.items()
        if any(isinstance(t, type) and issubclass(t, Section) and key in t.model_fields for t in options)
    ]
    return [f"{name}.{key}" for name in found + ["training"] * (key in training_fields())]


def json_schema() -> str:
    """The schema as JSON Schema, with the training fields listed, so that editors complete and check recipes."""
    schema = Recipe.model_json_schema()
    schema["properties"]["training"] |= {
        "properties": {key: {} for key in training_fields()},
        "additionalProperties": False,
    }
    return json.dumps(schema, indent=1)
