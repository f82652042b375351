"""Training on several processes: DDP, FSDP2 or DeepSpeed, all by accelerate, started by torchrun or accelerate.

Every engine divides the sum of the processes' gradients by their number: DDP in its all-reduce, FSDP2 in its
reduce-scatter, DeepSpeed in its own reduction (accelerate switches off its division by accumulation steps). The shares
of a step's loss must be summed, so `compute_loss` multiplies by that number once, whatever the engine.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from orpo_lite.common.console import processes, rank
from orpo_lite.common.errors import RequestError
from orpo_lite.model.precision import default_device

LOST_PEER = ("closed by peer", "connection reset", "connection refused", "broken pipe", "timed out", "socket closed")
"""Parts of messages by which gloo and NCCL report that a process is gone; they have no error class for it."""


def sharded(model: nn.Module) -> bool:
    """Return True where parameters are sharded over the processes: FSDP2's are DTensors, ZeRO-3's carry its marks."""
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())


def complete(model: nn.Module) -> bool:
    """Return True where this process holds every weight, so that it can run the model alone."""
    return not sharded(model) and not any(p.is_meta for p in model.parameters())


def frozen_linear(head: nn.Module) -> bool:
    """Return True for an output head that is a plain linear layer without training, also of the class that FSDP2 makes."""
    plain = type(head) is nn.Linear or type(head).__bases__ == (FSDPModule, nn.Linear)
    return plain and not any(p.requires_grad for p in head.parameters())


def recomputable(head: nn.Module) -> bool:
    """Return True where a head's weights are there in the backward pass, for its chunks to be recomputed.

    They are not where the head is gathered for its forward pass alone and no gradient of its output gathers it again.
    """
    apart = isinstance(head, FSDPModule) or any(hasattr(p, "ds_id") for p in head.parameters())
    return not apart


def zero_stage(accelerator: Any) -> int | None:
    """Return DeepSpeed's stage; None without DeepSpeed."""
    found = accelerator.distributed_type == DistributedType.DEEPSPEED
    return accelerator.state.deepspeed_plugin.zero_stage if found else None


def shards_by_launcher() -> bool:
    """Return True where the launcher asks for FSDP, as its environment variable says before any library reads it."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def check_data_parallel(accelerator: Any) -> None:
    """Refuse what would share pairs between processes: tensor, context and sequence parallelism; and FSDP1."""
    parallelism = getattr(accelerator, "parallelism_config", None)  # accelerate 1.10 has none
    names = {"tp": "tensor", "cp": "context", "sp": "sequence"}
    found = [words for name, words in names.items() if getattr(parallelism, f"{name}_enabled", False)]
    if found:
        raise RequestError(
            f"{' and '.join(found)} parallelism is asked for, but only data parallelism is supported, where each process has "
            "its own pairs: remove parallelism_config, and use fsdp2 or zero3 for models that one GPU cannot hold"
        )
    if accelerator.distributed_type == DistributedType.FSDP and accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise RequestError(
            "FSDP version 1 is asked for, but its flat parameters mix adapters with frozen 4-bit weights: set fsdp_version: 2 "
            "in accelerate's file (training.fsdp_config version)"
        )


@contextlib.contextmanager
def accumulating(accelerator: Any, model: nn.Module) -> Iterator[None]:
    """Keep the gradients of backward passes inside on their process: more passes of the step follow."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        state = accelerator.gradient_state  # by which accelerate tells DeepSpeed whether to take a step
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
    """Free the unsharded weights that FSDP2 keeps after a forward pass without a backward pass.

    Modules show them in place of the sharded ones: an optimizer or a checkpoint made now would take them for parameters.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def gathered(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """Gather the trained weights on the CPU, one tensor at a time; the frozen base is never gathered.

    All processes call it together.

    Args:
        keep: this process wants the result; the others get an empty one.
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
    """Describe the processes for run.json: how many, on how many machines, with which strategy and backend."""
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
    """Name the launcher of this process."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "accelerate launch" if "ACCELERATE_MIXED_PRECISION" in os.environ else "torchrun"
    return "python"


class LostPeer(ConnectionError):
    """Another process of the run has ended or does not answer."""


def init_process_group(seconds: float, use_cpu: bool = False) -> None:
    """Join the other processes.

    Args:
        seconds: time for each of them to answer, now and in every step.

    Raises:
        RequestError: FSDP or DeepSpeed without a GPU, where accelerate would silently train with DDP.
        LostPeer: not all of them join in time.
    """
    cpu = use_cpu or default_device().type in ("cpu", "mps")
    for name, words in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if cpu and os.environ.get(name, "false").lower() == "true":
            raise RequestError(
                f"{words} is asked for ({name}), but there is no GPU, and accelerate would silently use DDP instead: start "
                "with torchrun or with recipes/accelerate/ddp.yaml"
            )
    if processes() == 1:
        return
    if cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # otherwise accelerate takes each process for a run of its own
    try:
        PartialState(cpu=cpu, timeout=timedelta(seconds=seconds), **restart_store(seconds))
    except torch.distributed.DistError as error:
        at = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise LostPeer(
            f"process {rank()} of {processes()} did not meet the others at {at} within {seconds:g} seconds "
            f"({' '.join(str(error).split())[:200]}): check that all of them are started, with the same WORLD_SIZE"
        ) from None


def restart_store(seconds: float) -> dict[str, Any]:
    """Return the store where processes meet after a restart by torchrun on one machine; nothing at the first start.

    torchrun (2.13, c10d rendezvous) keeps its store over restarts, with the addresses of dead processes. Agents of
    several machines count restarts separately, so their processes share no name for a new store:
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives them one (the guide says so).
    """
    from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]  # its documented place

    given, attempt = os.environ, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    shared = given.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and given.get("GROUP_WORLD_SIZE") == "1"
    if attempt == "0" or not shared or given.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        return {}
    wait = timedelta(seconds=seconds)
    store = TCPStore(given["MASTER_ADDR"], int(given["MASTER_PORT"]), processes(), False, wait)
    place = PrefixStore(f"attempt-{attempt}", store)
    return {"store": place, "rank": rank(), "world_size": processes()}


def as_lost_peer(error: BaseException) -> LostPeer | None:
    """Put an error into words if it comes from another process that is gone."""
    text = " ".join(str(error).split())
    gone = isinstance(error, RuntimeError) and any(words in text.lower() for words in LOST_PEER)
    if processes() == 1 or not (gone or isinstance(error, torch.distributed.DistError)):
        return None
    return LostPeer(
        f"another process of the run has ended or does not answer, and training cannot continue without it ({text[:200]}). "
        "Its own message says why; the same command resumes from the newest checkpoint"
    )
