"""Training on several processes: DDP, FSDP2 or DeepSpeed, all by accelerate, started by torchrun or accelerate.

Every engine divides the sum of the processes' gradients by their number: DDP in its all-reduce, FSDP2 in its
reduce-scatter, DeepSpeed in its own reduction (accelerate switches off its division by accumulation steps). The shares
of a step's loss must be summed, so `compute_loss` multiplies by that number once, whatever the engine.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import Trainer

from orpo_lite.common.console import processes, rank
from orpo_lite.common.errors import RequestError
from orpo_lite.model import autocast
from orpo_lite.model.precision import default_device

LOST_PEER = ("closed by peer", "connection reset", "connection refused", "broken pipe", "timed out", "socket closed")
"""Parts of messages by which gloo and NCCL report that a process is gone; they have no error class for it."""
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""DeepSpeed's names of mixed precisions."""
ENGINES = {"DeepSpeed": ("global_step*",), "FSDP2": ("optimizer_0", "optimizer.bin"),
           "one process or DDP": ("optimizer.pt", "optimizer.bin")}  # fmt: skip
"""Files by which the optimizer states of each engine are known."""

logger = logging.getLogger(__name__)


def sharded(model: nn.Module) -> bool:
    """Return True where parameters are sharded over the processes: FSDP2's are DTensors, ZeRO-3's carry its marks."""
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())


def recomputable(head: nn.Module) -> bool:
    """Return True where a head's weights are there in the backward pass, for its chunks to be recomputed.

    They are not where the head is gathered for its forward pass alone and no gradient of its output gathers it again,
    unless it is a plain linear layer without training, also of the class that FSDP2 makes: its weights are kept.
    """
    plain = type(head) is nn.Linear or type(head).__bases__ == (FSDPModule, nn.Linear)
    if plain and not any(p.requires_grad for p in head.parameters()):
        return True
    return not isinstance(head, FSDPModule) and not any(hasattr(p, "ds_id") for p in head.parameters())


# ---- what is asked for -------------------------------------------------------------------------------------------------


def asked_of_launcher(engine: str) -> bool:
    """Return True where the launcher asks for FSDP or DeepSpeed, by its environment variable."""
    return os.environ.get(f"ACCELERATE_USE_{engine.upper()}", "false").lower() == "true"


def zero_stage(accelerator: Any) -> int | None:
    """Return DeepSpeed's stage; None without DeepSpeed."""
    found = accelerator.distributed_type == DistributedType.DEEPSPEED
    return accelerator.state.deepspeed_plugin.zero_stage if found else None


def zero_stage_asked(settings: Any = None) -> int | None:
    """Return the stage that `training.deepspeed` (settings, or a file of them) or the launcher asks for; None without DeepSpeed.

    Raises:
        RequestError: there is no such file, or it does not hold DeepSpeed's settings.
    """
    if not settings and not asked_of_launcher("DeepSpeed"):
        return None
    name, asked = "training.deepspeed", settings
    if not asked:
        name, asked = "deepspeed_config_file", os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if asked == "none":
        return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2))
    from accelerate.utils.deepspeed import HfDeepSpeedConfig

    try:
        return int(HfDeepSpeedConfig(asked).get_value("zero_optimization.stage", 0) or 0)
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise RequestError(
            f"{name}: found {asked!r}, expected DeepSpeed's settings or a JSON file of them "
            f"({' '.join(str(error).split())[:200]})"
        ) from None


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


# ---- passes and weights -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def accumulating(accelerator: Any, model: nn.Module) -> Iterator[None]:
    """Keep the gradients of backward passes inside on their process: more passes of the step follow."""
    with contextlib.ExitStack() as stack:
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            state = accelerator.gradient_state  # by which accelerate tells DeepSpeed whether to take a step
            stack.callback(state._set_sync_gradients, state.sync_gradients)
            state._set_sync_gradients(False)
        elif isinstance(model, FSDPModule):
            stack.callback(model.set_requires_gradient_sync, True)
            model.set_requires_gradient_sync(False)
        else:
            stack.enter_context(accelerator.no_sync(model))
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
    """Gather the trained weights on the CPU, one tensor at a time, on all processes together; never the frozen base.

    Only a process that says `keep` gets them; the others get none.
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


# ---- joining and losing other processes -------------------------------------------------------------------------------


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
    for name in ("FSDP", "DeepSpeed"):
        if cpu and asked_of_launcher(name):
            raise RequestError(
                f"{name} is asked for (ACCELERATE_USE_{name.upper()}), but there is no GPU, and accelerate would silently use "
                "DDP instead: start with torchrun or with recipes/accelerate/ddp.yaml"
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


def world(accelerator: Any) -> dict[str, Any]:
    """Describe the processes for run.json: how many, on how many machines, with which strategy and backend."""
    here, processes = int(os.environ.get("LOCAL_WORLD_SIZE") or 1), accelerator.num_processes
    engines = {DistributedType.DEEPSPEED: f"zero{zero_stage(accelerator)}", DistributedType.FSDP: "fsdp2"}
    strategy = engines.get(accelerator.distributed_type, "ddp" if processes > 1 else "none")
    launcher = "python"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = "accelerate launch" if "ACCELERATE_MIXED_PRECISION" in os.environ else "torchrun"
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    return {
        "processes": processes,
        "nodes": max(1, processes // here),
        "processes_per_node": min(here, processes),
        "strategy": strategy,
        "backend": torch.distributed.get_backend() if joined else None,
        "launcher": launcher,
    }


# ---- what FSDP2 and DeepSpeed want set up before training and evaluation ----------------------------------------------


def prepare_to_train(trainer: Any) -> None:
    """Get a model ready for the engine that trains it, also after an evaluation."""
    reshard(trainer.model)
    if trainer.args.world_size > 1:
        # an evaluation before training leaves this mark, on which transformers 5.23 takes the model for one that DDP
        # wraps already: the processes would train apart
        trainer.model._is_accelerate_prepared = False
    if trainer.deepspeed_settings is not None:
        leave_evaluation(trainer)
    if trainer.is_deepspeed_enabled:
        set_sizes(trainer)


def ready_to_evaluate(trainer: Any) -> contextlib.AbstractContextManager[object]:
    """Get a model ready to evaluate where `train` has not set the engine up yet."""
    if trainer.accelerator.is_fsdp2 and not isinstance(trainer.model, FSDPModule):
        # accelerate shards a model together with its optimizer only, which transformers does not give it here
        trainer.create_optimizer()
        trainer.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.model_wrapped = trainer.model
        register_fsdp_forward_method(trainer.model, "generate")
    if not trainer.is_deepspeed_enabled or trainer.deepspeed is not None:
        return contextlib.nullcontext()
    if zero_stage(trainer.accelerator) == 3:
        set_sizes(trainer)
        trainer.deepspeed_settings = copy.deepcopy(trainer.accelerator.state.deepspeed_plugin.deepspeed_config)
        return contextlib.nullcontext()
    return without_engine(trainer)


@contextlib.contextmanager
def without_engine(trainer: Any) -> Iterator[None]:
    """Evaluate below ZeRO-3 without an engine: every process holds the model whole, and DeepSpeed has none that only evaluates."""
    trainer.is_deepspeed_enabled = False
    try:
        with autocast(trainer.unwrapped()):
            yield
    finally:
        trainer.is_deepspeed_enabled = True
        trainer.accelerator._models.clear()  # it would not set the engine up for a model that it knows


def leave_evaluation(trainer: Any) -> None:
    """Make room for the engine that trains, with the settings that transformers has taken away to evaluate under ZeRO-3."""
    accelerator = trainer.accelerator
    if trainer.deepspeed is not None:
        trainer.deepspeed.destroy()
        for module in trainer.model.modules():
            # DeepSpeed (0.19) leaves these, and the next engine would take weights for gathered that this one has released
            for left in ("pre_bwd_fn", "post_bwd_fn"):
                module.__dict__.pop(left, None)
    trainer.deepspeed, trainer.model_wrapped = None, trainer.model
    accelerator.deepspeed_engine_wrapped = None
    accelerator._models.clear()
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    config.clear()
    config.update(trainer.deepspeed_settings)
    trainer.deepspeed_settings = None


def set_sizes(trainer: Any) -> None:
    """Set the sizes in DeepSpeed's settings, and under ZeRO-3 cut the weights into shares."""
    # an item of the loader is a step of several passes, for whose gradients DeepSpeed keeps room only if it knows; it
    # divides by none of these numbers
    config = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
    size = trainer.args.per_device_train_batch_size
    config |= {"train_micro_batch_size_per_gpu": size, "gradient_accumulation_steps": 2}
    config["train_batch_size"] = 2 * size * trainer.args.world_size
    trainer.accelerator.gradient_accumulation_steps = 2  # it would set it by the config, and warn
    if zero_stage(trainer.accelerator) == 3:
        partition(trainer.model, config, trainer.args.device)


def partition(model: nn.Module, config: dict[str, Any], device: torch.device) -> None:
    """Cut all weights into ZeRO-3's shares, one after the other, from wherever they are.

    DeepSpeed's engine would first move the whole model to the card. What else it does to a whole model is done here:
    numbers get the dtype of its mixed precision, buffers go to the card. 4-bit weights stay as they are packed.
    """
    from deepspeed.runtime.zero import Init  # pyright: ignore[reportMissingImports]

    halves = {name: config[name] for name in HALF if config.get(name, {}).get("enabled")}
    for parameter in model.parameters():
        packed = getattr(parameter, "quant_state", None) is not None
        if halves and parameter.is_floating_point() and not packed and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(HALF[next(iter(halves))])
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    zero = {name: value for name, value in config["zero_optimization"].items() if value != "auto"}
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero} | halves
    Init(module=model, config_dict_or_path=settings)


# ---- resuming --------------------------------------------------------------------------------------------------------------


def check_origin(trainer: Trainer, found: Path, facts: dict[str, Any], here: dict[str, Any]) -> None:
    """Compare engine, pairs per step, processes and versions with those that a checkpoint was written with.

    Args:
        trainer: the one that resumes.
        found: the checkpoint's folder.
        facts, here: pairs per step, processes and versions, of the checkpoint and of this run.

    Raises:
        RequestError: training cannot resume from it.
    """
    there = [kind for kind, names in ENGINES.items() if any(any(found.glob(name)) for name in names)]
    engine = (
        "DeepSpeed" if trainer.is_deepspeed_enabled else "FSDP2" if trainer.is_fsdp_enabled else "one process or DDP"
    )
    if not there:
        raise RequestError(
            f"{found}: holds no optimizer state (training.save_only_model), so training cannot resume from it"
        )
    if engine not in there:
        raise RequestError(
            f"{found}: its optimizer states are those of {there[0]}, and here is {engine}: resume with the launcher file that "
            "it was started with, or start anew"
        )
    if facts["pairs_per_step"] != here["pairs_per_step"]:
        raise RequestError(
            f"{found}: was written with {facts['pairs_per_step']} pairs an optimizer step, here it is "
            f"{here['pairs_per_step']}: set batch size, accumulation and processes to the same product"
        )
    if facts["processes"] != here["processes"]:
        if trainer.is_deepspeed_enabled:
            raise RequestError(
                f"{found}: was written by {facts['processes']} processes of DeepSpeed, here are {here['processes']}: its "
                "optimizer states are cut for that number; resume with as many, or train with FSDP2 or DDP from the start"
            )
        logger.warning(
            "%s was written by %d processes, here %s: the same pairs in each step, but random states start anew",
            found.name, facts["processes"], here["processes"],
        )  # fmt: skip
    for name, version in here["versions"].items():
        if facts["versions"].get(name) != version:
            logger.warning(
                "%s was written with %s %s, here is %s: the result may differ in the last bits",
                found.name, name, facts["versions"].get(name), version,
            )  # fmt: skip
