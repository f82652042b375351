"""What a pair costs in time: its tokens, and the places that attention computes for them, which grow with their square."""

from __future__ import annotations

from typing import Any

import numpy as np

from orpo_lite.data.columns import common_prefixes, list_lengths
from orpo_lite.data.steps import pair_costs

EFFICIENCY = 0.64
"""Speed of attention's operations, of that of the linear layers': measured by `python -m orpo_lite.bench_balance --measure`,
on one CPU core; fused attention on GPUs is said to reach half to three quarters."""


def places(prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    """(query, key) places of causal attention over pairs that share their prompt, (N,), from lengths in tokens."""
    return (prompt + chosen) ** 2 / 2 + rejected * (prompt + rejected / 2)


def place_weight(config: Any) -> float:
    """Tokens that a place of attention costs in forward and backward passes of LoRA, by FLOPs and `EFFICIENCY`.

    A frozen matrix of P numbers takes 2 P a token forward and 2 P back, the output head among them; a place takes 4 d
    forward and 8 d back a layer, d being the width of all heads.
    """
    text = config.get_text_config(decoder=True)
    layers, hidden, heads = text.num_hidden_layers, text.hidden_size, text.num_attention_heads
    size = getattr(text, "head_dim", None) or hidden // heads
    shared = getattr(text, "num_key_value_heads", None) or heads
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    experts = getattr(text, "num_experts_per_tok", None) or 1
    layer = hidden * size * (2 * heads + 2 * shared) + 3 * experts * hidden * inner
    token = 4 * (layers * layer + hidden * text.vocab_size)
    return 12 * layers * heads * size / token / EFFICIENCY


def pair_work(pairs: Any, layout: str, weight: float) -> np.ndarray:
    """Time that each pair takes in a layout, in tokens, (N,) int64: its tokens and `weight` times its attention's places."""
    tokens = pair_costs(pairs, layout)
    if "prompt_ids" in pairs.column_names:  # encoder-decoder: attention is of three kinds there, none of them this
        return tokens
    chosen, rejected = (list_lengths(pairs, f"{side}_ids").astype(np.float64) for side in ("chosen", "rejected"))
    if layout == "shared":
        prompt = common_prefixes(pairs, "chosen_ids", "rejected_ids")
        return tokens + np.round(weight * places(prompt, chosen - prompt, rejected - prompt)).astype(np.int64)
    if layout == "padded":
        chosen = rejected = np.maximum(chosen, rejected)
    return tokens + np.round(weight * (chosen**2 + rejected**2) / 2).astype(np.int64)
