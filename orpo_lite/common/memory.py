"""Peak memory of this process and its accelerator."""

from __future__ import annotations

import sys
from typing import Any


def peak_memory_bytes(device: Any) -> int:
    """Return the peak memory so far of a torch device: what torch allocated on CUDA, else the process's resident set."""
    if str(device).startswith("cuda"):
        return sys.modules["torch"].cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    if sys.platform == "linux":
        # getrusage would count what the parent held when it started this process
        with open("/proc/self/status", encoding="ascii", errors="replace") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def held_by(facts: dict) -> str:
    """Say what a run's `peak_memory_bytes` (run.json) counts: on the CPU, much more than tensors."""
    return "in the whole process, libraries included" if facts["device"].startswith("cpu") else "in tensors on the GPU"
