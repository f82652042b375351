"""Every allocation of a step, when it was made and freed: a peak that can be taken apart, in time and by what it is."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from orpo_lite.plan.quantised import AS_KERNEL, DEQUANTISE, PRODUCTS

aten = torch.ops.aten

Segment = tuple[str, int | str]
"""A stretch of the step: its phase, and a layer's number, `start` (before the layers) or `end` (after them)."""

BASE, CONSTANTS, ENDS, ADAPTER = "base weights", "quantisation constants", "embeddings and head", "adapter"
GRADIENTS, OPTIMIZER, KEPT = "gradients", "optimizer", "kept activations"
LAYER, HEAD, WORKSPACE = "layer recompute", "head chunk", "kernel workspace"
LOADING = "matrix being loaded"
GATHERED, BUFFERS = "gathered weights", "communication buffers"
PARTS = (BASE, CONSTANTS, ENDS, ADAPTER, GRADIENTS, OPTIMIZER, KEPT, LAYER, HEAD, WORKSPACE, LOADING, GATHERED, BUFFERS)
"""What memory is held for, in the order in which it is shown."""

FLOPS, UNPACKED, MOVED = "FLOPs", "weights unpacked", "activations on the host"
"""What a step takes beside memory: floating point operations of products and attention, quantised weights turned into 16
bits for a product, bytes that wait in the host's memory."""

COMPOSED = (aten.linear.default, aten.matmul.default)

INPLACE = {
    aten.add.Tensor: aten.add_.Tensor,
    aten.scatter_add.default: aten.scatter_add_.default,
    aten.index_add.default: aten.index_add_.default,
}
"""What autograd does in place unless a dispatch mode looks on; see `Timeline._owned_by_engine`."""


class Timeline(TorchDispatchMode):
    """While open, logs each storage that torch operations make and when it goes, on meta tensors as on real ones.

    Args:
        block: bytes that an allocation is rounded up to; 512 as CUDA's allocator does, 1 as on the CPU.
        workspace: bytes that an operation takes for its own use while it runs, from its name, arguments and output.
    """

    def __init__(self, block: int, workspace: Callable[[Any, tuple, Any], int]) -> None:
        super().__init__()
        self.block, self.workspace = block, workspace
        self.segment: Segment = ("static", "")
        self.events: list[tuple[int, int, Segment]] = []
        """(allocation, bytes gained or lost, when)."""
        self.labels: dict[int, str] = {}
        self.work: Counter[str] = Counter()
        """What the training step computes: FLOPs of its products, and how many quantised weights it unpacks."""
        self._known: dict[int, int] = {}

    # ---- what is there ---------------------------------------------------------------------------------------------

    def hold(self, tensor: Tensor, label: str | None = None) -> None:
        """Log a tensor's storage, once; with a label, say what it is for."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            size = -(-storage.nbytes() // self.block) * self.block
            if size == 0:
                return
            number = self._add(size)
            self._known[key] = number

            def freed() -> None:
                self._known.pop(key, None)
                self.events.append((number, -size, self.segment))

            weakref.finalize(storage, freed).atexit = False
        if label is not None:
            self.labels[self._known[key]] = label

    def take(self, size: int, label: str) -> None:
        """Log bytes that no tensor here stands for and that stay."""
        if size:
            self.labels[self._add(size)] = label

    def _add(self, size: int) -> int:
        number = len(self.events)
        self.events.append((number, size, self.segment))
        return number

    # ---- what operations make --------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            if args[0].dtype != torch.bool:
                raise NotImplementedError("the model reads a number out of its tensors, which a plan does not have")
            return True  # transformers asks whether a mask has no padding: the plan's has none
        name = func._schema.name
        kernel = AS_KERNEL.get(name)
        if kernel is not None and args[0].is_meta:
            if name in PRODUCTS:
                self._worked(FLOPS, PRODUCTS[name](*args))
            with self:
                return kernel(*args, **kwargs)
        if func in COMPOSED:  # where autograd is off they come whole
            with self:
                return func.decompose(*args, **kwargs)
        if func in INPLACE and self.segment[0] == "backward" and self._owned_by_engine(func, args):
            func = INPLACE[func]
        output = func(*args, **kwargs)
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self.hold(leaf)
        if func._overloadpacket in flop_registry:
            self._worked(FLOPS, flop_registry[func._overloadpacket](*args, **kwargs, out_val=output))
        elif name == DEQUANTISE:
            self._worked(UNPACKED, output.numel())
        extra = self.workspace(func, args, output)
        if extra:
            number = self._add(extra)
            self.labels[number] = WORKSPACE
            self.events.append((number, -extra, self.segment))
        return output

    def _worked(self, what: str, amount: int) -> None:
        if self.segment[0] in ("forward", "backward"):
            self.work[what] += amount

    @staticmethod
    def _owned_by_engine(func: Any, args: tuple) -> bool:
        """Whether autograd would have worked in place had nobody looked on.

        Gradients that meet are summed in place where the engine alone owns the first, and under any dispatch mode its
        Python wrapper is a second owner; derivative formulas avoid in-place operations under a mode altogether. Either
        shows one gradient too many.
        """
        if torch.is_grad_enabled():
            return False
        first, second = args[0], args[1]
        if func is aten.add.Tensor and not (
            isinstance(second, Tensor) and first.shape == second.shape and first.dtype == second.dtype
        ):
            return False
        return torch._C._storage_Use_Count(first.untyped_storage()._cdata) <= 2

    # ---- what it comes to ------------------------------------------------------------------------------------------

    def peaks(self) -> dict[Segment, Counter[str]]:
        """The fullest moment of each segment: bytes by part."""
        freed = {number: segment for number, size, segment in self.events if size < 0}
        now: Counter[str] = Counter()
        total, highest = 0, dict[Segment, int]()
        found: dict[Segment, Counter[str]] = {}
        for number, size, segment in self._each():
            now[self._part(number, freed)] += size
            total += size
            if total > highest.get(segment, -1):
                highest[segment] = total
                found[segment] = Counter(now)
        return found

    def _each(self) -> Iterator[tuple[int, int, Segment]]:
        """The events, and at the start of every segment what it found there."""
        last: Segment | None = None
        for number, size, segment in self.events:
            if segment != last:
                yield number, 0, segment
                last = segment
            yield number, size, segment

    def _part(self, number: int, freed: dict[int, Segment]) -> str:
        """What an allocation is for; activations that outlive the layer that made them are kept ones."""
        if number in self.labels:
            return self.labels[number]
        born: Segment = self.events[number][2]
        if born[1] == "end":
            return HEAD
        return KEPT if born[0] == "forward" and freed.get(number) != born else LAYER
