"""Activation checkpointing: which layers recompute, and their saved inputs in host memory until the backward pass.

A checkpointed layer keeps only its input, rows x hidden size. For two sequences of 4,096 tokens in a model of 32 layers
and width 4,096 that is 4.3 GB in float32, which a 12 GB card has better uses for. The copy to the host overlaps with the
layer's own work; the copy back takes a few percent of the layer's recomputation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel, TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from orpo_lite.common.errors import RequestError
from orpo_lite.model.inspection import outside_text, unwrap

logger = logging.getLogger(__name__)

SMALLEST = 1 << 20
"""Bytes below which a tensor stays where it is: a copy would cost more than the memory it frees."""


class Away(NamedTuple):
    """A tensor that waits in host memory."""

    host: Tensor
    device: torch.device
    copied: Any
    """CUDA event after which the host has it; None where the copy was made at once."""


class HostMemory:
    """Copies tensors to page-locked memory of the host and back, bit for bit."""

    def __init__(self) -> None:
        self._stream: Any = None

    def pack(self, tensor: Tensor) -> Tensor | Away:
        """Copy a tensor to the host; small ones stay."""
        if tensor.nbytes < SMALLEST or isinstance(tensor, nn.Parameter):
            return tensor
        if tensor.device.type != "cuda":
            return Away(tensor.to("cpu", copy=True), tensor.device, None)
        if self._stream is None:
            self._stream = torch.cuda.Stream(tensor.device)
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self._stream):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)  # its memory is not reused before the copy is done
        return Away(host, tensor.device, self._stream.record_event())

    def unpack(self, kept: Tensor | Away) -> Tensor:
        """Copy a tensor back to its device."""
        if isinstance(kept, Tensor):
            return kept
        if kept.copied is not None:
            torch.cuda.current_stream(kept.device).wait_event(kept.copied)
        return kept.host.to(kept.device, non_blocking=True, copy=True)


def offload(layers: Sequence[nn.Module], place: Any) -> None:
    """Make checkpointed layers keep their saved tensors in `place`: a HostMemory, or an object with its pack and unpack.

    Must be called again whenever checkpointing is switched on, which replaces the layers' checkpointing function.
    """
    for layer in layers:
        plain: Callable[..., Any] = layer._gradient_checkpointing_func  # type: ignore[assignment]
        plain = getattr(plain, "orpo_plain", plain)

        def away(*args: Any, plain: Callable[..., Any] = plain, **kwargs: Any) -> Any:
            # tensors saved inside the layer go to checkpoint's own hooks, which are entered later
            with saved_tensors_hooks(place.pack, place.unpack):
                return plain(*args, **kwargs)

        away.orpo_plain = plain  # type: ignore[attr-defined]
        layer._gradient_checkpointing_func = away  # type: ignore[assignment]


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
            offload(layers[:count], HostMemory())
        elif self.offload:
            logger.warning(
                "memory.offload_activations: activations are in the CPU's memory already: nothing to offload"
            )
