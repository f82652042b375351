"""What trains on several processes: DDP, FSDP2 or DeepSpeed, all of them accelerate's; what the trainer must know of each.

Every engine divides the sum of the processes' gradients by their number: DDP in its all-reduce, FSDP2 in its
reduce-scatter, DeepSpeed in its own reduction (accelerate switches off its division by accumulation steps). The shares
of a step's loss are to be summed, so that `compute_loss` multiplies by that number once, whatever the engine.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from orpo_lite.common.errors import RequestError


def sharded(model: nn.Module) -> bool:
    """Whether parameters are spread over the processes: FSDP2's are DTensors, ZeRO-3's carry its marks."""
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())


def complete(model: nn.Module) -> bool:
    """Whether this process holds every weight, so that it can run the model alone."""
    return not sharded(model) and not any(p.is_meta for p in model.parameters())


def frozen_linear(head: nn.Module) -> bool:
    """Whether an output head is a plain linear layer that does not train, also one that FSDP2 has made a class of its own of."""
    plain = type(head) is nn.Linear or type(head).__bases__ == (FSDPModule, nn.Linear)
    return plain and not any(p.requires_grad for p in head.parameters())


def recomputable(head: nn.Module) -> bool:
    """Whether a head's weights are at hand in the backward pass, for its chunks to be computed again.

    Not where the head is gathered for its forward pass alone and no gradient of its output will gather it again.
    """
    apart = isinstance(head, FSDPModule) or any(hasattr(p, "ds_id") for p in head.parameters())
    return not apart


def zero_stage(accelerator: Any) -> int | None:
    """DeepSpeed's stage; None without DeepSpeed."""
    found = accelerator.distributed_type == DistributedType.DEEPSPEED
    return accelerator.state.deepspeed_plugin.zero_stage if found else None


def shards_by_launcher() -> bool:
    """Whether the launcher asks for FSDP; known before any library has looked."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def check_data_parallel(accelerator: Any) -> None:
    """Raise RequestError where processes would share pairs: tensor, context and sequence parallelism, and FSDP1."""
    parallelism = getattr(accelerator, "parallelism_config", None)  # accelerate 1.10 has none
    names = {"tp": "tensor", "cp": "context", "sp": "sequence"}
    found = [words for name, words in names.items() if getattr(parallelism, f"{name}_enabled", False)]
    if found:
        raise RequestError(
            f"{' and '.join(found)} parallelism is asked for, but only data parallelism is supported, where each process has "
            "pairs of its own: leave parallelism_config out, and use fsdp2 or zero3 for models that one GPU cannot hold"
        )
    if accelerator.distributed_type == DistributedType.FSDP and accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise RequestError(
            "FSDP version 1 is asked for, but its flat parameters mix adapters with frozen 4-bit weights: set fsdp_version: 2 "
            "in accelerate's file (training.fsdp_config version)"
        )


@contextlib.contextmanager
def accumulating(accelerator: Any, model: nn.Module) -> Iterator[None]:
    """While open, backward passes keep their gradients to their process: more of the step's are to follow."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        state = accelerator.gradient_state  # accelerate tells DeepSpeed by it whether to take a step
        synced = state.sync_gradients
        state._set_sync_gradients(False)
        try:
            yield
        finally:
            state._set_sync_gradients(synced)
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
    else:
        with accelerator.no_sync(model):
            yield


def reshard(model: nn.Module) -> None:
    """Give FSDP2's whole weights back that a forward pass without a backward pass leaves standing.

    Modules show those in the place of the sharded ones: an optimizer or a checkpoint made now would take them for parameters.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def gathered(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """What is trained, whole and on the CPU, one tensor at a time; the frozen base is never gathered.

    All processes call it together.

    Args:
        keep: whether this process wants the result; the others get an empty one.
    """
    reshard(model)
    found = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        whole: Tensor = parameter
        with contextlib.ExitStack() as stack:
            if hasattr(parameter, "ds_id"):
                from deepspeed.runtime.zero import GatheredParameters  # pyright: ignore[reportMissingImports]

                stack.enter_context(GatheredParameters([parameter]))
            elif isinstance(parameter, DTensor):
                # with CPU offload the shards are on the CPU, where NCCL cannot gather them
                here: Any = parameter.to(parameter.device_mesh.device_type)
                whole = here.full_tensor()
            if keep:
                found[name] = whole.detach().to("cpu", copy=True)
    return found


def world(accelerator: Any) -> dict[str, Any]:
    """What run.json says of the processes: how many, on how many machines, joined by what."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    processes = accelerator.num_processes
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        strategy = f"zero{zero_stage(accelerator)}"
    elif accelerator.distributed_type == DistributedType.FSDP:
        strategy = "fsdp2"
    else:
        strategy = "ddp" if processes > 1 else "none"
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    return {
        "processes": processes,
        "nodes": max(1, processes // here),
        "processes_per_node": min(here, processes),
        "strategy": strategy,
        "backend": torch.distributed.get_backend() if joined else None,
        "launcher": launcher(),
    }


def launcher() -> str:
    """What has started this process."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "accelerate launch" if "ACCELERATE_MIXED_PRECISION" in os.environ else "torchrun"
    return "slurm" if "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1 else "python"
