"""The frozen base: loaded quantized or not, with the attention and precision that the device has."""

import logging
import os
import re
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from orpo_lite.common.console import progress
from orpo_lite.common.errors import RequestError
from orpo_lite.model.inspection import base_revision, check_quantized_share, keep_4bit_differentiable
from orpo_lite.model.locating import hub_errors_in_words, locate, read_config
from orpo_lite.model.precision import (
    Precision,
    choose_precision,
    default_device,
    is_quantized_parameter,
    quantization_settings,
    quantization_skipped_reason,
)
from orpo_lite.model.tokenizer import new_tokens
from orpo_lite.recipe import ModelSection

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaseFacts:
    """Decisions of load_base; `sentences` puts them into words."""

    name: str
    revision: str | None
    precision: Precision
    attention: str
    quantization: str
    """nf4, fp4 or none; for a repository that came quantized, its own method."""
    quantized_share: float | None
    """Share of the weights of linear layers and experts in 4 bits; None where bitsandbytes is not involved."""
    sentences: list[str]


def load_base(
    spec: ModelSection, tokenizer: PreTrainedTokenizerBase | None = None, *, device: torch.device | str | None = None
) -> tuple[PreTrainedModel, BaseFacts]:
    """Load the base as the recipe says, in evaluation mode, and grow its vocabulary by the recipe's new tokens.

    Args:
        tokenizer: from load_tokenizer; needed where the recipe has new tokens.
        device: default: this process's GPU, else the CPU.

    Raises:
        RequestError: missing, gated, broken or unsupported model; quantization or attention that is not available.
    """
    device = torch.device(device) if device is not None else local_device()
    precision = choose_precision(spec.dtype, device)
    config = read_config(spec)
    shipped = shipped_quantization(config)
    if shipped:
        adapt_shipped(spec.name_or_path, shipped, precision.dtype)
    elif skipped := quantization_skipped_reason(spec, device):
        logger.warning("%s", skipped)
        spec = spec.model_copy(update={"quantization": "none"})
    quantizes = not shipped and spec.quantization != "none"
    model = read_model(
        spec,
        config,
        dtype=precision.dtype,
        device_map={"": device},
        quantization_config=quantization_settings(spec, precision.dtype) if quantizes else None,
        attn_implementation=attention_for(config, spec.attention),
    )
    if (shipped or {}).get("quant_method") == "bitsandbytes":
        for parameter in model.parameters():  # transformers leaves what is not quantized in the dtype of its file
            if parameter.dtype in (torch.float16, torch.bfloat16) and not is_quantized_parameter(parameter):
                parameter.data = parameter.data.to(precision.dtype)
    if tokenizer is not None:
        grow_vocabulary(model, tokenizer)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_trainable:
        raise RequestError(
            f"model.name_or_path: {spec.name_or_path} is quantized with {shipped and shipped.get('quant_method')}, which "
            "adapters cannot be trained on: use the repository with the 16-bit weights"
        )
    counted = quantizes or (shipped or {}).get("quant_method") == "bitsandbytes"
    share = check_quantized_share(model) if counted else None
    if tokenizer is not None:
        # load_tokenizer chose it; transformers' Trainer would do the same with a warning
        for holder in (model.config.get_text_config(), model.generation_config):
            if holder is not None:
                holder.pad_token_id = tokenizer.pad_token_id
    name = f"{spec.name_or_path}/{spec.gguf_file}" if spec.gguf_file else spec.name_or_path
    revision, attention = base_revision(model), model.config._attn_implementation or "eager"
    method = method_name(shipped) if shipped else spec.quantization
    why = f"{type(model).__name__} {'supports it' if attention == 'sdpa' else 'has no exact sdpa'}"
    sentences = [
        f"base: {name}{f' at {revision}' if revision else ''}, {describe_weights(spec, method, bool(shipped), share)}",
        f"precision: {precision.why}",
        f"attention: {attention} ({why if spec.attention == 'auto' else 'as model.attention asks'})",
    ]
    return model, BaseFacts(name, revision, precision, attention, method, share, sentences)


def describe_weights(spec: ModelSection, method: str, shipped: bool, share: float | None) -> str:
    """Say how the weights are held."""
    held = "not quantized" if method == "none" else method
    if shipped:
        held += ", as the repository ships it"
        if spec.quantization != method:
            held += f" (model.quantization={spec.quantization} does not apply)"
    elif spec.double_quant and method != "none":
        held += " with double quantization"
    return held if share is None else f"{held}; {share:.1%} of the weights of linear layers and experts"


def attention_for(config: PreTrainedConfig, asked: str = "auto") -> str | None:
    """Choose attn_implementation; None leaves it to transformers.

    Before 5.23, transformers computes models with capped attention logits (Gemma 2) by sdpa, which ignores the cap.

    Raises:
        RequestError: sdpa is asked for, and the model caps its attention logits.
    """
    capped = getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None)
    if capped and asked == "sdpa":
        raise RequestError(
            f"model.attention: sdpa is not available for {config.model_type}, which caps its attention logits: set "
            "model.attention=auto (eager)"
        )
    return asked if asked != "auto" else "eager" if capped else None


def local_device() -> torch.device:
    """Return this process's device: the one accelerate has chosen, else the GPU of the launcher's LOCAL_RANK."""
    from accelerate import PartialState

    # creating the state here would settle the backend and use_cpu before TrainingArguments can
    if PartialState._shared_state:
        return torch.device(PartialState().device)  # type: ignore[arg-type]  # set once the state is there
    device = default_device()
    return torch.device(device.type, int(os.environ.get("LOCAL_RANK", 0))) if device.type in ("cuda", "xpu") else device


def shipped_quantization(config: PreTrainedConfig) -> dict[str, Any] | None:
    """Return the quantization that a repository ships with, as a dict that may be edited in place, or None."""
    shipped = getattr(config, "quantization_config", None)
    if shipped is not None and not isinstance(shipped, dict):
        shipped = config.quantization_config = shipped.to_dict()
    return shipped


def method_name(shipped: dict[str, Any]) -> str:
    """Name a repository's quantization, in the recipe's words where it has one."""
    if shipped.get("load_in_8bit"):
        return "int8"
    return shipped.get("bnb_4bit_quant_type", "4 bits") if shipped.get("load_in_4bit") else shipped["quant_method"]


def adapt_shipped(name: str, shipped: dict[str, Any], dtype: torch.dtype) -> None:
    """Make weights that ship quantized by bitsandbytes compute in this machine's dtype.

    The repository's own (usually bfloat16) is wrong on a T4 and slow on a CPU.

    Raises:
        RequestError: they ship in 8 bits.
    """
    if shipped.get("load_in_8bit"):
        raise RequestError(
            f"model.name_or_path: {name} ships in 8 bits (int8), and bases are held in 4 bits or in full: use the "
            "repository with the 16-bit weights, with model.quantization=nf4, or none"
        )
    if shipped.get("quant_method") == "bitsandbytes":
        shipped["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")


@progress("loading the weights")
def read_model(spec: ModelSection, config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """Load from safetensors only, with every weight of the model in the files."""
    try:
        with hub_errors_in_words(spec.name_or_path):
            model, info = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
                locate(spec),
                config=config,
                revision=spec.revision,
                trust_remote_code=spec.trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except RequestError as error:
        asked = options.get("attn_implementation")
        if not asked or not re.search(r"attention|attn|flash", str(error), re.IGNORECASE):
            raise
        raise RequestError(
            f"model.attention: {asked} is not available for {spec.name_or_path}: set model.attention=auto ({error.__cause__})"
        ) from error
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise RequestError(
            f"model.name_or_path: {spec.name_or_path}: weights do not fit config.json ({error}): copy or download it again"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise RequestError(
            f"model.name_or_path: {spec.name_or_path} lacks {len(missing)} weight(s) of {type(model).__name__}, which "
            f"would start out random: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}: check that this is "
            "the whole model, and a language model"
        )
    keep_4bit_differentiable(model)
    return model


def grow_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Grow the embeddings by the recipe's new tokens. Idempotent."""
    embeddings: Any = model.get_input_embeddings()
    resize_embeddings(model, max(len(embeddings.weight), rows_for_new_tokens(tokenizer)))


def rows_for_new_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many rows embeddings need for a tokenizer's new tokens; 0 where it has none."""
    ids: list[int] = [tokenizer.convert_tokens_to_ids(token) for token in new_tokens(tokenizer)]  # type: ignore[misc]
    return 1 + max(ids, default=-1)


def resize_embeddings(model: PreTrainedModel, rows: int) -> None:
    """Give embeddings and output head this many rows, each new one the mean of the existing ones."""
    embeddings: Any = model.get_input_embeddings()
    before = len(embeddings.weight)
    if rows == before:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    # resize_token_embeddings draws them at random; the mean gives the same start wherever the adapter is loaded
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            weight: Any = None if module is None else module.weight
            if weight is not None and rows > before:
                weight[before:] = weight[:before].float().mean(0).to(weight.dtype)
