"""What benchmarks measure with: the memory of live tensors on any device, and times taken in turn."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Ledger(TorchDispatchMode):
    """While open, bytes of the storages that torch operations allocate: `live` now, `peak` at most.

    What existed before, such as the model's weights, is not counted. Scratch memory inside an operation is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        # a storage first met as an input was there before
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._meet(leaf, new=False)
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._meet(leaf, new=True)
        return output

    def _meet(self, tensor: Tensor, new: bool) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if new else 0
        if key in self._known:
            return

        def freed(_: Any) -> None:
            self._known.pop(key, None)
            self.live -= size

        self._known[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)


def peak_over(work: Callable[[], Any], device: torch.device) -> int:
    """Peak bytes that `work` holds on top of what is there: the allocator's count on CUDA, a ledger elsewhere."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with Ledger() as ledger:
        work()
    return ledger.peak


def interleaved(
    works: dict[str, Callable[[], Any]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each repeat by a clock, the contestants in turn, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            synchronise()
            started = clock()
            work()
            synchronise()
            if repeat:
                seconds[name].append(clock() - started)
    return seconds


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratios(reference: list[float], other: list[float]) -> dict[str, float]:
    """How many times as fast `other` is: median, lowest and highest over the repeats."""
    each = [a / b for a, b in zip(reference, other, strict=True)]
    return {"median": statistics.median(each), "min": min(each), "max": max(each)}
