"""Facts about this process that its launcher sets in environment variables; needs no torch."""

from __future__ import annotations

import os
import re

from orpo_lite.common.errors import RequestError


def rank() -> int:
    """Return this process's number among all, 0 where it is alone."""
    return int(os.environ.get("RANK") or 0)


def processes() -> int:
    """Return the number of processes."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def from_slurm() -> None:
    """Set torchrun's environment variables from SLURM's, where srun alone has started this process.

    srun sets SLURM_PROCID, SLURM_LOCALID and the number of tasks; MASTER_ADDR is the first node of the list unless it is
    given, MASTER_PORT is derived from the job's number.

    Raises:
        RequestError: a variable that is not a number, or not a list of nodes.
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
    """Read an environment variable that srun sets to a number."""
    value = os.environ.get(name)
    if not value:
        return default
    if not value.isdigit():
        raise RequestError(
            f"{name}: found {value!r}, expected a number, as srun sets it: unset it, or start with torchrun"
        )
    return int(value)


def first_node(nodes: str) -> str:
    """Return the first host of SLURM's list, such as gpu[03-05,07],cpu1 -> gpu03."""
    match = re.match(r"([^,\[\]]+)(?:\[(\d+))?", nodes)
    if match is None:
        raise RequestError(
            f"SLURM_JOB_NODELIST: found {nodes!r}, expected nodes such as gpu[01-04]: set MASTER_ADDR to the first node's name"
        )
    return match[1] + (match[2] or "")
