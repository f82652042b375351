"""What a pair costs in time: its tokens, and the places that attention computes for them, which grow with their square."""

from __future__ import annotations

from typing import Any

import numpy as np

from orpo_lite.data.lengths import common_prefixes, list_lengths

EFFICIENCY = 0.64
"""Speed of attention's operations, of that of the linear layers': measured by `python -m tests.benchmarks.balance --measure`,
on one CPU core; fused attention on GPUs is said to reach half to three quarters."""


def pair_costs(pairs: Any, layout: str) -> np.ndarray:
    """Tokens that each pair costs in a layout, (N,) int64: padded counts the longer side twice, shared the prefix once."""
    lengths = list_lengths(pairs, "chosen_ids"), list_lengths(pairs, "rejected_ids")
    if "prompt_ids" in pairs.column_names:  # encoder-decoder: the prompt is not part of the sequences
        return 2 * (list_lengths(pairs, "prompt_ids") + np.maximum(*lengths))
    if layout == "padded":
        return 2 * np.maximum(*lengths)
    if layout == "packed":
        return lengths[0] + lengths[1]
    return lengths[0] + lengths[1] - common_prefixes(pairs, "chosen_ids", "rejected_ids")


def places(prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    """(query, key) places of causal attention over pairs that share their prompt, (N,), from lengths in tokens."""
    return (prompt + chosen) ** 2 / 2 + rejected * (prompt + rejected / 2)


def place_weight(config: Any) -> float:
    """Tokens that a place of attention costs in forward and backward passes of LoRA, by FLOPs and `EFFICIENCY`.

    0 for models that have no attention heads. A frozen matrix of P numbers takes 2 P a token forward and 2 P back, the output head among them; a place takes 4 d
    forward and 8 d back a layer, d being the width of all heads.
    """
    text = config.get_text_config(decoder=True)

    def number(name: str, default: float = 0.0) -> float:
        """A field, or its mean over the layers where each has its own."""
        return float(np.mean(getattr(text, name, None) or default))

    heads, hidden, layers = number("num_attention_heads"), number("hidden_size"), number("num_hidden_layers")
    if not heads or not layers:
        return 0.0
    size = number("head_dim", hidden / heads)
    matrices = 3 * hidden * number("num_experts_per_tok", 1) * number("intermediate_size", 4 * hidden)
    layer = 2 * hidden * size * (heads + number("num_key_value_heads", heads)) + matrices
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
