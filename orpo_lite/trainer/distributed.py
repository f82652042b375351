"""Training on several processes: DDP or FSDP2, both by accelerate, started by torchrun or accelerate.

Both divide the sum of the processes' gradients by their number: DDP in its all-reduce, FSDP2 in its reduce-scatter. The
shares of a step's loss must be summed, so `compute_loss` multiplies by that number once.
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
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from orpo_lite.common.console import asked_of_launcher, processes, rank
from orpo_lite.common.errors import RequestError
from orpo_lite.model.precision import default_device

LOST_PEER = ("closed by peer", "connection reset", "connection refused", "broken pipe", "timed out", "socket closed")
"""Parts of messages by which gloo and NCCL report that a process is gone; they have no error class for it."""


def sharded(model: nn.Module) -> bool:
    """Return True where FSDP2 has sharded parameters over the processes."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def check_data_parallel(accelerator: Any) -> None:
    """Refuse what would share pairs between processes: tensor, context and sequence parallelism; and FSDP1."""
    parallelism = getattr(accelerator, "parallelism_config", None)  # accelerate 1.10 has none
    names = {"tp": "tensor", "cp": "context", "sp": "sequence"}
    found = [words for name, words in names.items() if getattr(parallelism, f"{name}_enabled", False)]
    if found:
        raise RequestError(
            f"{' and '.join(found)} parallelism is asked for, but only data parallelism is supported, where each process has "
            "its own pairs: remove parallelism_config, and use fsdp2 for models that one GPU cannot hold"
        )
    if accelerator.distributed_type == DistributedType.FSDP and accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise RequestError(
            "FSDP version 1 is asked for, but its flat parameters mix adapters with frozen 4-bit weights: set fsdp_version: 2 "
            "in accelerate's file (training.fsdp_config version)"
        )


# ---- passes and weights -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def accumulating(accelerator: Any, model: nn.Module) -> Iterator[None]:
    """Keep the gradients of backward passes inside on their process: more passes of the step follow."""
    if not isinstance(model, FSDPModule):
        with accelerator.no_sync(model):
            yield
        return
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def reshard(model: nn.Module) -> None:
    """Free the unsharded weights that FSDP2 keeps after a forward pass without a backward pass.

    Modules show them in place of the sharded ones: an optimizer or a checkpoint made now would take them for parameters.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def gathered(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """Gather the trained weights on the CPU, one tensor at a time, on all processes together; never the frozen base.

    Only a process that says `keep` gets them; the others get none.
    """
    reshard(model)
    found = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        whole: Tensor = parameter
        if isinstance(parameter, DTensor):
            # with CPU offload the shards are on the CPU, where NCCL cannot gather them
            here: Any = parameter.to(parameter.device_mesh.device_type)
            whole = here.full_tensor()
        if keep:
            found[name] = whole.detach().to("cpu", copy=True)
    return found


def shard_to_evaluate(trainer: Any) -> None:
    """Shard a model that is evaluated before `train` does it.

    accelerate shards a model together with its optimizer only, which transformers does not give it here.
    """
    if trainer.accelerator.is_fsdp2 and not isinstance(trainer.model, FSDPModule):
        trainer.create_optimizer()
        trainer.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.model_wrapped = trainer.model
        register_fsdp_forward_method(trainer.model, "generate")


# ---- joining and losing other processes -------------------------------------------------------------------------------


class LostPeer(ConnectionError):
    """Another process of the run has ended or does not answer."""


def init_process_group(seconds: float, use_cpu: bool = False) -> None:
    """Join the other processes.

    Args:
        seconds: time for each of them to answer, now and in every step.

    Raises:
        RequestError: FSDP without a GPU, where accelerate would silently train with DDP.
        LostPeer: not all of them join in time.
    """
    cpu = use_cpu or default_device().type in ("cpu", "mps")
    if cpu and asked_of_launcher("FSDP"):
        raise RequestError(
            "FSDP is asked for (ACCELERATE_USE_FSDP), but there is no GPU, and accelerate would silently use DDP instead: "
            "start with torchrun or with recipes/accelerate/ddp.yaml"
        )
    if processes() == 1:
        return
    if cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # otherwise accelerate takes each process for a run of its own
    try:
        PartialState(cpu=cpu, timeout=timedelta(seconds=seconds))
    except torch.distributed.DistError as error:
        at = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise LostPeer(
            f"process {rank()} of {processes()} did not meet the others at {at} within {seconds:g} seconds "
            f"({' '.join(str(error).split())[:200]}): check that all of them are started, with the same WORLD_SIZE"
        ) from None


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
