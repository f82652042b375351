"""Recipe: the one YAML that describes a complete run. Schema, load, override, validate, save.

Nothing here imports torch at module level, so that listing or checking a recipe is quick.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import os
import re
import typing
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from orpo_lite import safe_yaml
from orpo_lite.errors import RequestError

PACKAGE = Path(__file__).parent
BUILTIN = "builtin:"  # a path inside the installed package, for example builtin:quickstart/model

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


def checked_pattern(pattern: Any) -> Any:
    """The value as it is, or ValueError if it is text but no regular expression."""
    try:
        if isinstance(pattern, str):
            re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"found {shown(pattern)}, which is no regular expression: {error}") from None
    return pattern


Pattern = Annotated[str, AfterValidator(checked_pattern)]
Modules = Annotated[str | list[str], AfterValidator(checked_pattern)]


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
    target_modules: Modules = "all-linear"
    """Module names, a regular expression, or all-linear (which leaves output head and routers out)."""
    exclude_modules: Modules | None = None
    """Module names or a regular expression never to adapt."""
    target_parameters: list[str] | None = None
    """Parameters (fused experts, for example mlp.experts.down_proj) to adapt."""
    modules_to_save: list[str] | None = None
    """Modules trained whole and saved with the adapter, for example [embed_tokens, lm_head]."""
    rank_pattern: dict[Pattern, Positive] = {}
    """Rank by module name or regular expression, where it differs from r."""
    alpha_pattern: dict[Pattern, Annotated[float, Field(gt=0)]] = {}
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
    seed: Annotated[int, Field(ge=0)] = 0
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
    offload_activations: bool = False
    """Keep what checkpointed layers save in the host's memory until their backward pass (CUDA only)."""

    @model_validator(mode="after")
    def _something_to_offload(self) -> MemorySection:
        if self.offload_activations and self.checkpointing in ("none", 0):
            raise ValueError(
                f"offload_activations is true, but checkpointing is {self.checkpointing}: only what checkpointed layers keep is "
                "offloaded; set checkpointing to auto, all or a number of layers"
            )
        return self


class RuleSection(Section):
    chosen: Pattern
    """Regular expression that an answer in the chosen style matches (searched, case-insensitive)."""
    rejected: Pattern
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
        return cls.parse(content, str(path), [apply_override(content, word) for word in overrides])

    @classmethod
    def parse(cls, content: dict[str, Any], source: str = "recipe", overridden: typing.Sequence[str] = ()) -> Recipe:
        """Validate a plain dict; `source` names it in the error, save for what stands in `overridden` fields."""
        problems = [f"{place}: {wrong}" for place, value in leaves(content) if (wrong := unfit(value))]
        recipe = None
        try:
            recipe = cls.model_validate(content)
        except ValidationError as error:
            known = tuple(line.partition(" ")[0] for line in problems)
            problems += [line for line in describe(error) if not line.startswith(known)] if known else describe(error)
        except UnicodeEncodeError:  # half a character in a key: pydantic's own failure, and a problem already
            assert problems
        if recipe and not problems:
            return recipe
        mentions = [re.compile(rf"(?<![\w.]){re.escape(key)}(?![\w])") for key in overridden]
        own = [any(mention.search(line) for mention in mentions) for line in problems]
        if all(own):
            raise RecipeError("command line", problems)
        lines = [f"command line, {line}" if mine else line for line, mine in zip(problems, own, strict=True)]
        raise RecipeError(source, sorted(lines, key=lambda line: line.startswith("command line, ")))

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
    if os.path.isdir(path):  # unlike Path.is_dir, false for what can be no path
        path = path / "recipe.yaml"
        if not path.is_file():
            raise RecipeError(str(source), ["this folder holds no recipe.yaml: is it a run folder?"])
        return path
    if path.suffix in (".yaml", ".yml"):
        if not os.path.isfile(path):
            raise RecipeError(shown(source), [f"there is no such file; shipped recipes: {', '.join(shipped)}"])
        return path
    raise RecipeError(
        shown(source), [f"no recipe of this name{nearest(str(source), shipped)}; shipped: {', '.join(shipped)}"]
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """A recipe's YAML mapping.

    Raises:
        RecipeError: not readable, see `safe_yaml`, or something else than a mapping.
    """
    try:
        content = safe_yaml.read(path)
    except safe_yaml.YamlError as error:
        raise RecipeError(f"{path}, line {error.line}" if error.line else str(path), [str(error)]) from None
    if not isinstance(content, dict):
        found = "the file is empty" if content is None else f"found {shown(content)} at the top"
        found = "found a list at the top" if isinstance(content, list) else found
        raise RecipeError(str(path), [f"{found}, expected sections such as model: and data:"])
    return content


def apply_override(content: dict[str, Any], word: str) -> str:
    """Set one dotted key=value in place; the value is read as YAML (`null`, lists and numbers work). Returns the key."""
    key, equals, value = word.partition("=")
    if not equals or not key:
        raise RecipeError(
            "command line", [f"found {shown(word)}, expected key=value, for example training.learning_rate=5e-6"]
        )
    *parents, leaf = key.split(".")
    place = content
    for parent in parents:
        if place.get(parent) is None:
            place[parent] = {}
        if not isinstance(place[parent], dict):
            raise RecipeError(
                "command line", [f"{shown(word)}: {parent} is not a section; {parent} is {shown(place[parent])}"]
            )
        place = place[parent]
    try:
        place[leaf] = safe_yaml.parse(value)
    except safe_yaml.YamlError as error:
        raise RecipeError("command line", [f"{word[:200]}: value {error}"]) from None
    return key


@functools.cache
def training_fields() -> dict[str, Any]:
    """Name -> type of every transformers.TrainingArguments field (imports transformers)."""
    from transformers import TrainingArguments

    return {key: hint for key, hint in typing.get_type_hints(TrainingArguments).items() if not key.startswith("_")}


UNSIGNED = {"weight_decay", "max_grad_norm", "warmup_steps", "adam_epsilon", "dataloader_num_workers"}
SEEDS = {"seed", "data_seed"}
BETAS = {"adam_beta1", "adam_beta2"}
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
            f"training.{key}: found {shown(value)}{nearest(value, choices)}, expected one of {', '.join(choices)}"
        )
    try:
        clean = TypeAdapter(fields[key], config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        raise ValueError(f"training.{key}: found {shown(value)}, expected: {wanted(error.errors()[0])}") from None
    if isinstance(clean, float) and not math.isfinite(clean):
        raise ValueError(f"training.{key}: found {shown(value)}, expected a finite number")
    if isinstance(clean, int | float):
        limits = {
            "a number above 0": key in POSITIVE and not clean > 0,
            "0 or more": key in UNSIGNED and clean < 0,
            "a number from 0 to below 1": key in BETAS and not 0 <= clean < 1,
            "a number from 0 to 4294967295": key in SEEDS and not 0 <= clean < 2**32,
        }
        for expected, broken in limits.items():
            if broken:
                raise ValueError(f"training.{key}: found {shown(value)}, expected {expected}")
    return clean.value if isinstance(clean, Enum) else clean


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """', did you mean X?' where a known name is close, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def shown(value: Any, width: int = 100) -> str:
    """A value as Python writes it, cut: what a file holds can be of any size."""
    text = repr(str(value) if isinstance(value, Path) else value)
    return text if len(text) <= width else f"{text[:width]}..."


def leaves(value: Any, place: str = "") -> typing.Iterator[tuple[str, Any]]:
    """Every value that is neither mapping nor list, and every key that is text, with its dotted place."""
    if isinstance(value, dict):
        for key, item in value.items():
            inside = f"{place}.{key}".removeprefix(".")
            if isinstance(key, str) and unfit(key):
                yield f"{place or 'recipe'}, key {shown(key)}", key
            else:
                yield from leaves(item, inside)
    elif isinstance(value, list | tuple | set):
        for number, item in enumerate(value):
            yield from leaves(item, f"{place}.{number}")
    else:
        yield place, value


def unfit(value: Any) -> str | None:
    """What is wrong with a value wherever it stands, or None."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"found {value}, expected a finite number"
    if isinstance(value, str) and "\0" in value:
        return f"found {shown(value)}, which holds a NUL character: leave it out"
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        return f"found {shown(value)}, which holds half a character: write the character itself, not its escapes"
    return None


UNION_MEMBER = re.compile(
    r"(literal|list|dict|function|constrained|nullable)[\w-]*(\[.*\])?|\[key\]|str|[A-Z]\w*Section|DataSource",
    re.DOTALL,
)
"""What pydantic puts into the place of an error beside the user's own keys."""


def describe(error: ValidationError) -> list[str]:
    """Pydantic's errors in words: field, what was found, what was expected."""
    lines: list[str] = []
    for item in error.errors():
        # a key that is no field is the user's own word, whatever it looks like
        last = [str(item["loc"][-1])] if item["type"] in ("extra_forbidden", "missing") else []
        rest = item["loc"][:-1] if last else item["loc"]
        place = [str(part) for part in rest if not UNION_MEMBER.fullmatch(str(part))] + last
        field = ".".join(place)
        if item["type"] == "extra_forbidden":
            homes = [] if place[:-1] else sections_with(place[-1].lower())
            hint = f" (did you mean {' or '.join(homes)}?)" if homes else nearest(place[-1], known_keys(place[:-1]))
            lines.append(f"{field}: unknown key{hint}")
        elif item["type"] == "invalid_key":
            lines.append(f"{field}: unknown key, expected one of {', '.join(known_keys(place[:-1]))}")
        elif item["type"] == "missing":
            inside = known_keys(place)
            about = f", expected a section with {', '.join(inside)}" if len(place) == 1 else ""
            lines.append(f"{field}: missing, and it has no default{about}")
        elif item["type"] == "value_error":
            told = str(item.get("ctx", {})["error"]).split("\n")
            lines += [line if line.startswith(field) else f"{field}: {line}" for line in told]
        elif item["type"] in ("model_type", "model_attributes_type"):
            keys = ", ".join(known_keys(place))
            lines.append(f"{field}: found {shown(item['input'])}, expected a section with some of the keys {keys}")
        else:
            line = f"{field}: found {shown(item['input'])}, expected: "
            if lines and lines[-1].startswith(line):  # the other members of a union
                lines[-1] += f" or {wanted(item)}"
            else:
                lines.append(line + wanted(item))
    return list(dict.fromkeys(lines))


def wanted(item: Any) -> str:
    """Pydantic's words for what it expected."""
    return item["msg"].removeprefix("Input should be ")


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
