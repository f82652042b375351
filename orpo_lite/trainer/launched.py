"""What a launcher says of the processes it has started, and how they meet: torchrun, accelerate, or SLURM alone."""

from __future__ import annotations

import os
import re
from datetime import timedelta
from typing import Any

from orpo_lite.common.errors import RequestError

LOST = ("closed by peer", "connection reset", "connection refused", "broken pipe", "timed out", "socket closed")
"""In messages of gloo and NCCL, which have no error class of their own for a process that is gone."""


class Lost(ConnectionError):
    """Another process of the run has ended or does not answer."""


def rank() -> int:
    """This process's number among all, 0 where it is alone."""
    return int(os.environ.get("RANK") or 0)


def processes() -> int:
    """How many take part."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def from_slurm() -> None:
    """Where srun has started this process and no other launcher speaks, say in torchrun's words what SLURM's say.

    srun sets SLURM_PROCID, SLURM_LOCALID and the number of tasks; MASTER_ADDR is the first node of the list unless it is
    given, MASTER_PORT goes by the job's number.

    Raises:
        RequestError: variables that are no numbers, or no list of nodes.
    """
    found = os.environ
    if "RANK" in found or "SLURM_PROCID" not in found or "SLURM_LOCALID" not in found:
        return
    tasks = number("SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in found else "SLURM_NTASKS", 1)
    if tasks <= 1:
        return
    nodes = next(
        (found[n] for n in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST") if found.get(n)), ""
    )
    host = found.get("MASTER_ADDR") or first_node(nodes)
    per_node = re.match(r"\d+", found.get("SLURM_STEP_TASKS_PER_NODE") or found.get("SLURM_TASKS_PER_NODE") or "")
    here = int(per_node.group()) if per_node else number("SLURM_NTASKS_PER_NODE", tasks // number("SLURM_NNODES", 1))
    found |= {
        "RANK": str(number("SLURM_PROCID", 0)),
        "LOCAL_RANK": str(number("SLURM_LOCALID", 0)),
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": str(max(1, here)),
        "MASTER_ADDR": host,
        "MASTER_PORT": found.get("MASTER_PORT") or str(15000 + number("SLURM_JOB_ID", 0) % 10000),
    }


def number(name: str, default: int) -> int:
    value = os.environ.get(name)
    if not value:
        return default
    if not value.isdigit():
        raise RequestError(
            f"{name}: found {value!r}, expected a number, as srun sets it: unset it, or start with torchrun"
        )
    return int(value)


def first_node(nodes: str) -> str:
    """The first host of SLURM's list, such as gpu[03-05,07],cpu1 -> gpu03."""
    match = re.match(r"([^,\[\]]+)(?:\[(\d+))?", nodes)
    if match is None:
        raise RequestError(
            f"SLURM_JOB_NODELIST: found {nodes!r}, expected nodes such as gpu[01-04]: set MASTER_ADDR to the first node's name"
        )
    return match[1] + (match[2] or "")


def meet(seconds: float, use_cpu: bool = False) -> None:
    """Join the other processes, with that time for each of them to answer, now and in every step.

    Raises:
        RequestError: FSDP or DeepSpeed without a GPU, where accelerate would quietly train with DDP.
        Lost: they do not all come.
    """
    import torch
    from accelerate import PartialState

    from orpo_lite.model.precision import default_device

    cpu = use_cpu or default_device().type in ("cpu", "mps")
    for name, words in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if cpu and os.environ.get(name, "false").lower() == "true":
            raise RequestError(
                f"{words} is asked for ({name}), but there is no GPU here, where accelerate would quietly take DDP for it: start "
                "with torchrun or with recipes/accelerate/ddp.yaml instead"
            )
    if processes() == 1:
        return
    if cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # else accelerate takes each process for a run of its own
    try:
        PartialState(cpu=cpu, timeout=timedelta(seconds=seconds), **started_anew(seconds))
    except torch.distributed.DistError as error:
        at = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise Lost(
            f"process {rank()} of {processes()} did not meet the others at {at} within {seconds:g} seconds "
            f"({' '.join(str(error).split())[:200]}): are all of them started, with the same WORLD_SIZE (SLURM_NTASKS)?"
        ) from None


def started_anew(seconds: float) -> dict[str, Any]:
    """Where processes meet after a restart by torchrun on one machine; nothing at the first start.

    torchrun (2.13, c10d rendezvous) keeps its store over restarts, with the addresses of the processes that have died,
    and these would be called. Agents of several machines count restarts each for itself, so that their processes have no
    name in common for a new place: TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives them a new store (the guide says so).
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


def lost(error: BaseException) -> Lost | None:
    """The error in words, if it is one of another process that is gone."""
    import torch

    text = " ".join(str(error).split())
    gone = isinstance(error, RuntimeError) and any(words in text.lower() for words in LOST)
    if processes() == 1 or not (gone or isinstance(error, torch.distributed.DistError)):
        return None
    return Lost(
        f"another process of the run has ended, or does not answer: training cannot go on without it ({text[:200]}). Its own "
        "message says why; the same command goes on from the newest checkpoint"
    )
