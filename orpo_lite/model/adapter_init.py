"""EVA: an adapter that starts from the directions in which the data moves each layer's inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, PeftModel, initialize_lora_eva_weights

from orpo_lite.common.errors import RequestError
from orpo_lite.model.adapter import prepare_frozen
from orpo_lite.model.precision import autocast


def initialise_eva(model: PeftModel, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
    """EVA's data pass (arXiv 2410.07170): A from the principal directions of each layer's inputs, ranks shared out anew.

    Args:
        batches: input_ids, attention_mask and, optionally, labels (B, T); positions labelled -100 or masked out are
            not looked at. They are gone through again and again until every layer's directions settle.

    Raises:
        RequestError: encoder-decoder base, no batches, or batches with too few tokens for the rank.
    """
    config: LoraConfig = model.peft_config["default"]  # type: ignore[assignment]
    batches = [dict(batch) for batch in batches]
    if model.config.is_encoder_decoder:
        raise RequestError("adapter.init_lora_weights: eva is not supported for encoder-decoder models")
    needed = round(max([config.r, *(config.rank_pattern or {}).values()]) * (config.eva_config or EvaConfig()).rho)
    fewest = min((batch_tokens(batch) for batch in batches), default=0)
    if fewest < needed:
        raise RequestError(
            f"adapter.init_lora_weights: eva at rank {config.r} needs at least {needed} tokens a batch, found {fewest}: "
            "raise training.per_device_train_batch_size or lower adapter.r"
        )
    passes = iter(range(100 * len(batches)))

    def forward(peft_model: PeftModel, batch: dict[str, Any]) -> None:
        if next(passes, None) is None:
            raise RequestError("adapter.init_lora_weights: eva did not settle in 100 passes: raise adapter.eva_batches")
        with autocast(peft_model):
            peft_model(batch["input_ids"], attention_mask=batch.get("attention_mask"), use_cache=False)

    initialize_lora_eva_weights(model, batches, forward_fn=forward, show_progress_bar=False)
    prepare_frozen(model)


def batch_tokens(batch: Mapping[str, torch.Tensor]) -> int:
    """Positions of a batch that EVA looks at."""
    mask = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(batch["input_ids"]).bool()
    return int((mask & (batch["labels"] != -100)).sum() if "labels" in batch else mask.sum())
