"""Activation checkpointing: which layers recompute, and their saved inputs in host memory until the backward pass.

A checkpointed layer keeps only its input, rows x hidden size. For two sequences of 4,096 tokens in a model of 32 layers
and width 4,096 that is 4.3 GB in float32, which a 12 GB card has better uses for. The copies to the host and back take a
few percent of the layer's work each.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from torch.autograd.graph import save_on_cpu
from transformers import PreTrainedModel, TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from orpo_lite.common.errors import RequestError
from orpo_lite.model.inspection import outside_text, unwrap

logger = logging.getLogger(__name__)


def offload(layers: Sequence[nn.Module], hooks: AbstractContextManager[Any]) -> None:
    """Make checkpointed layers keep their saved inputs where `hooks` puts them, such as torch's save_on_cpu.

    Must be called again whenever checkpointing is switched on, which replaces the layers' checkpointing function.
    """

    def away(checkpoint: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # tensors saved inside the layer go to checkpoint's own hooks, which are entered later
        with hooks:
            return checkpoint(*args, **kwargs)

    for layer in layers:
        plain: Any = layer._gradient_checkpointing_func
        layer._gradient_checkpointing_func = functools.partial(away, plain)  # type: ignore[assignment]


def check_count(count: int | None, layers: int) -> None:
    """Refuse a number of checkpointed layers that is higher than the number of layers."""
    if count is not None and count > layers:
        raise RequestError(
            f"memory.checkpointing: found {count}, but the model has {layers} layers: set all, or a number up to {layers}"
        )


def checkpointing_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """List the layers that process text and can recompute their activations, in the order of the forward pass.

    Raises:
        RequestError: there are none, as in models whose own code, not transformers', checkpoints all layers or none.
    """
    base = unwrap(model)
    other = outside_text(base) if isinstance(base, PreTrainedModel) else set()
    named = [(name, module) for name, module in base.named_modules() if isinstance(module, GradientCheckpointingLayer)]
    layers = [module for name, module in named if name not in other]
    if not layers:
        raise RequestError(
            f"memory: {type(model).__name__} cannot checkpoint its layers one by one: set memory.checkpointing to all or none, "
            "and remove memory.offload_activations"
        )
    return layers


class CheckpointedLayers(TrainerCallback):
    """Recompute only the first layers in the backward pass, or keep their saved inputs in host memory, or both.

    Args:
        count: number of layers, from the first, that recompute their activations; None for all. The others keep them.
        offload: keep the saved inputs of those layers in host memory until their backward pass.
    """

    def __init__(self, count: int | None, offload: bool = False):
        self.count, self.offload = count, offload

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        layers = checkpointing_layers(model)
        check_count(self.count, len(layers))
        count = len(layers) if self.count is None else self.count
        for i, layer in enumerate(layers):
            layer.gradient_checkpointing = i < count
        if self.offload and args.device.type == "cuda":
            offload(layers[:count], save_on_cpu(pin_memory=True))
        elif self.offload:
            logger.warning(
                "memory.offload_activations: activations are in the CPU's memory already: nothing to offload"
            )
