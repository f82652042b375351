"""Sections of a recipe: every field, its values, and what it does (its docstring is the text of the reference)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from orpo_lite.recipe.validation import checked_pattern

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Pattern = Annotated[str, AfterValidator(checked_pattern)]
Modules = Annotated[str | list[str], AfterValidator(checked_pattern)]


class Section(BaseModel):
    """Base of all recipe sections: unknown keys, NaN and infinity are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, validate_default=True)

    removed: ClassVar[dict[str, Any]] = {}
    """Former fields, and the default that recipes of older run folders hold."""

    @model_validator(mode="before")
    @classmethod
    def _without_removed(cls, given: Any) -> Any:
        """Accept recipes of older run folders, which name removed fields."""
        if not isinstance(given, dict):
            return given
        return {key: value for key, value in given.items() if key not in cls.removed or value != cls.removed[key]}


class ModelSection(Section):
    name_or_path: str
    """Hub id, local folder, or builtin:quickstart/model."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    gguf_file: str | None = None
    """File name of a GGUF checkpoint inside name_or_path (a local folder or hub id); dequantized once into a cached
    safetensors folder, which is then quantized and trained on as the recipe says."""
    quantization: Literal["nf4", "fp4", "none"] = "nf4"
    """Quantization of the frozen base. A repository that is already quantized is used as it is."""
    double_quant: bool = True
    """Quantize the 4-bit quantization constants too (saves about 0.4 bits per parameter)."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute dtype. auto: bfloat16 from compute capability 8.0, float16 below, float32 on the CPU."""
    attention: Literal["auto", "sdpa", "flex_attention", "flash_attention_2", "eager"] = "auto"
    """Attention kernel; auto takes sdpa where the model supports it."""
    trust_remote_code: bool = False
    """Run Python code that the model's repository ships."""
    chat_template: str | None = None
    """Template for a model without one: chatml, zephyr, mistral, llama-3, one that TRL ships, or the path of a Jinja file."""
    new_tokens: list[Annotated[str, Field(min_length=1)]] = []
    """Tokens to add to the vocabulary; their embeddings are trained and saved with the adapter."""


class AdapterSection(Section):
    removed = {"eva_batches": 16, "exclude_modules": None, "rank_pattern": {}, "alpha_pattern": {}, "bias": "none"}

    init_from: str | None = None
    """Continue training this LoRA adapter (folder or hub id) instead of a new one; its own shape is kept."""
    r: Positive = 16
    """LoRA rank."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """LoRA alpha; the update is scaled by alpha / r (alpha / sqrt(r) with use_rslora)."""
    dropout: Fraction = 0.0
    """Dropout on the adapter's input (active only with orpo.disable_dropout: false)."""
    target_modules: Modules = "all-linear"
    """Module names, a regular expression, or all-linear (which leaves out the output head and routers)."""
    target_parameters: list[str] | None = None
    """Parameters (fused experts, for example mlp.experts.down_proj) to adapt."""
    modules_to_save: list[str] | None = None
    """Modules trained whole and saved with the adapter, for example [embed_tokens, lm_head]."""
    use_rslora: bool = False
    """Rank-stabilized scaling, alpha / sqrt(r)."""
    use_dora: bool = False
    """Weight-decomposed LoRA: also trains the magnitude of each output."""
    init_lora_weights: bool | Literal["gaussian", "orthogonal"] = True
    """true, gaussian or orthogonal; PiSSA and OLoRA would change the base, which a quantized one does not allow."""
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
    """Passes over the source per epoch: 0.5 takes a seeded half of its rows, 2 each row twice."""
    columns: Columns | None = None
    """Column map of this source; the section's `columns` if null."""


def as_sources(given: Any) -> Any:
    """Turn one path, one mapping or a list of either into a list of mappings."""
    if isinstance(given, str | dict | DataSource):
        given = [given]
    return [{"path": item} if isinstance(item, str) else item for item in given] if isinstance(given, list) else given


Sources = Annotated[
    list[DataSource],
    BeforeValidator(as_sources, json_schema_input_type=str | DataSource | list[str | DataSource]),
    Field(min_length=1),
]


class DataSection(Section):
    removed = {"streaming": False, "num_proc": None}

    train: Sources
    """Training pairs: one source or several."""
    eval: Sources | None = None
    """Held-out pairs; null takes eval_fraction of the training pairs."""
    eval_fraction: Fraction = 0.05
    """Share of the training rows held out where `eval` is null, by prompt; 0 evaluates nothing."""
    split: str = "train"
    """Split of hub data sets."""
    columns: Columns | None = None
    """Names of the columns, where they differ from prompt, chosen, rejected, tools, system."""
    apply_template: bool = False
    """Wrap plain-string rows into the chat template as one user and one assistant turn."""
    system: Literal["template", "merge"] = "template"
    """template: system turns go to the chat template; merge: they go in front of the first user turn, for templates that
    take none (Gemma's)."""
    pairing: Literal["best-worst", "all"] = "best-worst"
    """Pairs of a row with several scored answers: the best against the worst, or each against every lower one."""
    template_kwargs: dict[str, Any] = {}
    """Variables given to the chat template, for example enable_thinking: false."""
    completion_end: Literal["trl", "turn"] = "turn"
    """trl: everything the template writes, then EOS if it is not last; turn: cut after the first end-of-turn token."""
    max_length: Positive | None = 1024
    """Tokens of prompt and completion together."""
    max_prompt_length: Positive | None = None
    """Tokens of the prompt; null leaves it to max_length."""
    max_completion_length: Positive | None = None
    """Tokens of the completion; null leaves it to max_length."""
    overlong: Literal["drop", "truncate"] = "drop"
    """Drop or truncate a longer pair; either way it is counted."""
    max_rows: Positive | None = None
    """Use only the first rows of the training data (before anything is dropped)."""
    max_eval_rows: Positive | None = None
    """Use only the first rows of the held-out data."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the held-out choice and of source sampling."""
    deduplicate: bool = False
    """Leave out exact duplicates beyond the first, and pairs that contradict each other (a>b and b>a)."""


class OrpoSection(Section):
    beta: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the odds-ratio term: lambda in the paper, alpha in its code, beta in TRL."""
    nll_scope: Literal["prompt+chosen", "chosen"] = "prompt+chosen"
    """Tokens in the NLL term: prompt and chosen answer as in the paper's code and TRL, or the answer only."""
    nll_mean: Literal["window", "micro"] = "window"
    """window: normalized over the whole optimizer step; micro: TRL's mean of micro-batch means."""
    layout: Literal["auto", "shared", "packed", "padded"] = "auto"
    """Form of a batch; auto takes the fastest layout that is exact for the model.

    shared: one row without padding, each prompt computed once for both completions; packed: one row without padding;
    padded: two right-padded rows per pair, as in TRL."""
    tokens_per_batch: Positive | None = None
    """Tokens of a micro-batch as the layout counts them; null takes training.per_device_train_batch_size pairs,
    or, where that is `auto`, as many as the plan finds room for.

    An optimizer step keeps its pairs (per_device_train_batch_size x gradient_accumulation_steps x processes), dealt out
    to processes and micro-batches by cost."""
    disable_dropout: bool = True
    """Set every dropout in the model to 0."""


class MemorySection(Section):
    gpu_gb: Annotated[float, Field(gt=0)] | None = None
    """Memory of the card in GB (10^9 bytes) that the run must fit; null takes the card in this machine."""
    checkpointing: Literal["auto", "all", "none"] | Annotated[int, Field(ge=0)] = "auto"
    """Layers whose activations are recomputed in the backward pass; auto is none on the CPU; on a GPU all, or
    where training.per_device_train_batch_size is `auto`, as few as fit."""
    head_chunk: Literal["auto"] | Positive = "auto"
    """Rows of logits in memory at a time; auto keeps them near 64 MB."""
    kernels: Literal["auto", "liger", "none"] = "auto"
    """Fused norms, rotary embeddings and gated activations of liger-kernel, without its losses; auto takes them on CUDA
    where the package is installed and a check at the start finds them exact for the model."""
    offload_activations: bool = False
    """Keep what checkpointed layers save in host memory until their backward pass (CUDA only)."""


class RuleSection(Section):
    chosen: Pattern
    """Regular expression that an answer in the chosen style matches (searched, case-insensitive)."""
    rejected: Pattern
    """Regular expression that an answer in the rejected style matches."""


class EvaluationSection(Section):
    samples: Annotated[int, Field(ge=0)] = 4
    """Held-out prompts answered greedily before and after training."""
    max_new_tokens: Positive = 128
    """Maximum tokens of a sample answer."""
    rule: RuleSection | None = None
    """Styles of sample answers: the share in either style is reported before and after."""
