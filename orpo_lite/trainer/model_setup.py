"""Arguments that TRL's constructor takes besides a loaded PeftModel: a model by name, a peft_config, no tokenizer."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
)

from orpo_lite.data.lengths import list_lengths, numbers
from orpo_lite.model.adapter import prepare_frozen
from orpo_lite.model.base import attention_for

if TYPE_CHECKING:
    from orpo_lite.trainer.config import ORPOConfig


def load_by_name(name: str, args: ORPOConfig, with_adapter: bool) -> Any:
    """Load a model with the config's model_init_kwargs; the dtype follows the device unless they name one.

    float32 on the CPU; on a GPU the checkpoint's own, but on one without bfloat16 float16 under an adapter and float32
    for full fine-tuning, whose float16 gradients could not be unscaled.
    """
    kwargs: dict[str, Any] = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
    if dtype is None:
        cpu = args.device.type == "cpu"
        dtype = torch.float32 if cpu or (args.fp16 and not with_adapter) else torch.float16 if args.fp16 else "auto"
    elif isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype)
    found = {key: kwargs[key] for key in ("revision", "trust_remote_code") if key in kwargs}
    config = AutoConfig.from_pretrained(name, **found)
    if attention := attention_for(config):
        kwargs.setdefault("attn_implementation", attention)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto.from_pretrained(name, dtype=dtype, **kwargs)


def tokenizer_of(model: Any, args: ORPOConfig) -> Any:
    """Load the tokenizer beside the model's weights.

    Raises:
        ValueError: the model was not loaded from a folder or the hub.
    """
    if not model.config._name_or_path:
        raise ValueError(
            "ORPOTrainer: this model was not loaded from a folder or the hub: pass its tokenizer as processing_class"
        )
    revision = (args.model_init_kwargs or {}).get("revision")  # type: ignore[union-attr]
    return AutoTokenizer.from_pretrained(
        model.config._name_or_path, revision=revision, trust_remote_code=args.trust_remote_code
    )


def adapt(model: Any, peft_config: PeftConfig, checkpointing: bool) -> PeftModel:
    """Attach a new adapter, and prepare a quantized base for it.

    Raises:
        TypeError: not a PeftConfig.
        ValueError: the model carries an adapter already.
    """
    if not isinstance(peft_config, PeftConfig):
        raise TypeError(
            f"ORPOTrainer: peft_config is a {type(peft_config).__name__}, expected a peft.PeftConfig such as LoraConfig"
        )
    if isinstance(model, PeftModel):
        raise ValueError(
            "ORPOTrainer: the model is a PeftModel already: remove peft_config, or merge its adapter first"
        )
    with warnings.catch_warnings():
        # PEFT asks transformers for a property that 5.23 renamed
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        adapted = get_peft_model(model, peft_config)
    prepare_frozen(adapted)  # type: ignore[arg-type]
    if checkpointing:
        model.enable_input_require_grads()
    return adapted  # type: ignore[return-value]


def check_tokenized(pairs: Dataset, name: str) -> None:
    """Refuse pairs tokenized elsewhere that have no label on one side.

    Raises:
        ValueError: a side without a label; the message names the row.
    """
    for side in ("chosen", "rejected"):
        length = list_lengths(pairs, f"{side}_ids")
        # a token is predicted from the one before it, so the first of a decoder-only sequence is nobody's label
        alone = "prompt_ids" in pairs.column_names
        first = np.zeros_like(length) if alone else np.maximum(numbers(pairs, f"{side}_start"), 1)
        empty = np.flatnonzero(length <= first)
        if len(empty):
            raise ValueError(
                f"ORPOTrainer: {name}: row {empty[0]} has no label in {side}_ids ({length[empty[0]]} tokens), and so have "
                f"{len(empty) - 1} other rows: remove them"
            )


def pad_token(args: ORPOConfig, tokenizer: Any) -> int:
    """Choose an id: any will do, since labels and masks come from lengths (padding_value, the tokenizer's, EOS, or 0)."""
    choices = (args.padding_value, tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(choice for choice in choices if choice is not None)


def decoder_start(config: Any) -> int:
    """Return the token that an encoder-decoder's answers start with."""
    if config.decoder_start_token_id is None:
        raise ValueError(
            "ORPOTrainer: model.config.decoder_start_token_id is not set; it is usually the pad token's id"
        )
    return config.decoder_start_token_id
