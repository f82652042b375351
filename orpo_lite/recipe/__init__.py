"""Recipe: the one YAML that describes a complete run. Schema, loading, saving.

Nothing here imports torch at module level, so that listing or checking a recipe is quick.
"""

from __future__ import annotations

import json
import re
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from orpo_lite.recipe.checks import check_training_field, checked_pattern, leaves, training_fields, unfit
from orpo_lite.recipe.explain import describe
from orpo_lite.recipe.source import RecipeError, apply_override, find_recipe, read_yaml
from orpo_lite.writing import write_whole

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


Pattern = Annotated[str, AfterValidator(checked_pattern)]
Modules = Annotated[str | list[str], AfterValidator(checked_pattern)]


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
    streaming: bool = False
    """Read, check and tokenise the training rows while training, in their order, instead of all of them before.

    Nothing is written to disk and a hub data set is not downloaded. A stream does not know its length and is not
    shuffled: training.max_steps is needed, held-out pairs are data.eval (or data.eval_fraction: 0, none), and rows that
    are sorted must be shuffled before. Sources are read one after the other; weights stay 1."""

    @model_validator(mode="after")
    def _what_a_stream_can(self) -> DataSection:
        problems = []
        if self.streaming and self.eval is None and self.eval_fraction:
            problems.append(
                f"streaming is true and eval_fraction is {self.eval_fraction:g}: a stream cannot hold a share of itself out; "
                "name held-out pairs in data.eval, or set data.eval_fraction=0"
            )
        for place, source in enumerate(self.train if self.streaming else []):
            if source.weight != 1:
                problems.append(
                    f"streaming is true and train.{place}.weight is {source.weight:g}: a stream is read once through; leave "
                    "weight out"
                )
        if problems:
            raise ValueError("\n".join(problems))
        return self


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
    """The base, and how it is held."""
    adapter: AdapterSection | None = AdapterSection()
    """null: full fine-tuning (needs quantization: none)."""
    data: DataSection
    """The pairs, and how they become tokens."""
    orpo: OrpoSection = OrpoSection()
    """The loss and its batches."""
    training: dict[str, Any] = {}
    """Any field of transformers.TrainingArguments, by its own name, and on_nonfinite.

    on_nonfinite: what becomes of a step whose loss or gradients are not finite: stop (the default), or skip, which leaves it
    out and gives up after 5 one after another or 20 in all."""
    memory: MemorySection = MemorySection()
    """What is given up for memory."""
    evaluation: EvaluationSection = EvaluationSection()
    """Sample answers before and after training."""

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
        if data.streaming and self.training.get("max_steps", -1) <= 0:
            problems.append(
                "data.streaming is true, but training.max_steps is not set: a stream does not say how many rows it has; set "
                "training.max_steps to the optimizer steps to train"
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
        """The run folder: training.output_dir, or `outputs/<name>`."""
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
        write_whole(path, yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def json_schema() -> str:
    """The schema as JSON Schema, with the training fields listed, so that editors complete and check recipes."""
    schema = Recipe.model_json_schema()
    schema["properties"]["training"] |= {
        "properties": {key: {} for key in training_fields()},
        "additionalProperties": False,
    }
    return json.dumps(schema, indent=1)
