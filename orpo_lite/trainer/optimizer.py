"""The optimizer of TrainingArguments, with LoRA+ learning rates where the recipe asks for them."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers import Trainer, TrainingArguments

from orpo_lite.common.errors import RequestError


def optimizer_for(
    model: nn.Module, args: TrainingArguments, loraplus_lr_ratio: float | None = None
) -> torch.optim.Optimizer:
    """Make the optimizer of the trainable parameters: args.optim, its learning rate and weight decay (none on norms, biases).

    With a ratio, every B matrix learns at ratio times the learning rate (LoRA+, arXiv 2402.12354).

    Raises:
        RequestError: a ratio without a LoRA adapter, or an optimizer that builds its own parameter groups.
    """
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)  # type: ignore[arg-type]
    if {"params", "model", "optimizer_dict"} & set(options):
        raise RequestError(
            f"training.optim: {args.optim} sorts parameters itself and cannot be combined with LoRA+ groups"
        )
    options: dict[str, Any] = dict(options)
    if loraplus_lr_ratio is not None:
        if not isinstance(model, PeftModel):
            raise RequestError("adapter.loraplus_lr_ratio: LoRA+ needs a LoRA adapter, and the model has none")
        optimizer = create_loraplus_optimizer(
            model,
            kind,
            loraplus_lr_ratio=loraplus_lr_ratio,
            loraplus_weight_decay=args.weight_decay,
            lr=options.pop("lr"),
            **options,
        )
        # PEFT makes a group for every kind of parameter, and some optimizers fail on empty groups
        optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
        return full_precision_embeddings(optimizer, model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]  # it does not use self
    groups = [
        {"params": [p for name, p in trained.items() if name in decayed], "weight_decay": args.weight_decay},
        {"params": [p for name, p in trained.items() if name not in decayed], "weight_decay": 0.0},
    ]
    return full_precision_embeddings(kind([group for group in groups if group["params"]], **options), model)


def full_precision_embeddings(optimizer: torch.optim.Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """Keep 32-bit states for embeddings under an 8-bit optimizer, as transformers' Trainer does: 8 bits are unstable there."""
    if type(optimizer).__module__.startswith("bitsandbytes"):
        from bitsandbytes.optim.optimizer import GlobalOptimManager

        manager = GlobalOptimManager.get_instance()
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                manager.register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer
