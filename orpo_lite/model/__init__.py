"""The model side of a run: tokenizer, precision, base (quantized or not) and adapter."""

from orpo_lite.model.adapter import attach_adapter, load_adapter, save_adapter
from orpo_lite.model.base import BaseFacts, load_base, read_config
from orpo_lite.model.inspection import (
    base_name,
    base_revision,
    check_quantized_share,
    keep_4bit_differentiable,
    routers,
    trainable_share,
)
from orpo_lite.model.precision import Precision, autocast, choose_precision
from orpo_lite.model.tokenizer import load_tokenizer, stop_token_ids

__all__ = ["BaseFacts", "Precision", "attach_adapter", "autocast", "base_name", "base_revision",
           "check_quantized_share", "choose_precision", "keep_4bit_differentiable", "load_adapter",
           "load_base", "load_tokenizer", "read_config", "routers", "save_adapter", "stop_token_ids",
           "trainable_share"]  # fmt: skip
