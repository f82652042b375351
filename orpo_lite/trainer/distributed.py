"""Training on several processes by DDP, started by torchrun or accelerate.

DDP divides the sum of the processes' gradients by their number. The shares of a step's loss must be summed, so
`compute_loss` multiplies by that number once.
"""

import os
from datetime import timedelta

import torch
from accelerate import PartialState

from orpo_lite.common.console import processes
from orpo_lite.model.precision import default_device

LOST_PEER = ("closed by peer", "connection reset", "connection refused", "broken pipe", "timed out", "socket closed")
"""Parts of messages by which gloo and NCCL report that a process is gone; they have no error class for it."""


class LostPeer(ConnectionError):
    """Another process of the run has ended or does not answer."""


def init_process_group(seconds: float, use_cpu: bool = False) -> None:
    """Join the other processes, each of which has `seconds` to answer, now and in every step."""
    if processes() == 1:
        return
    cpu = use_cpu or default_device().type in ("cpu", "mps")
    if cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # otherwise accelerate takes each process for a run of its own
    PartialState(cpu=cpu, timeout=timedelta(seconds=seconds))


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
