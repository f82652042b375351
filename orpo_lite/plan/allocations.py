"""A log of every allocation of a step, from which a peak can be broken down by time and by purpose."""

import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from orpo_lite.plan.gpus import Target
from orpo_lite.plan.kernels import DEQUANTIZE, REPLACEMENTS, widened, workspace

aten = torch.ops.aten

Segment = tuple[str, int | str]
"""A part of the step: its phase, and a layer's index, `start` (before the layers) or `end` (after them)."""

BASE, CONSTANTS, ENDS, ADAPTER = "base weights", "quantization constants", "embeddings and head", "adapter"
GRADIENTS, OPTIMIZER, KEPT = "gradients", "optimizer", "kept activations"
LAYER, HEAD, WORKSPACE = "layer recompute", "head chunk", "kernel workspace"
LOADING = "matrix being loaded"
PARTS = (BASE, CONSTANTS, ENDS, ADAPTER, GRADIENTS, OPTIMIZER, KEPT, LAYER, HEAD, WORKSPACE, LOADING)
"""Purposes of memory, in the order in which they are shown."""

FLOPS, LAUNCHED, UNPACKED, MOVED = "FLOPs", "kernels launched", "weights unpacked", "activations on the host"
"""Costs of a step other than memory: floating point operations of products and attention, kernels, quantized weights dequantized to
16 bits for a product, bytes of activations offloaded to the host."""

COMPOSED = (aten.linear.default, aten.matmul.default)

INPLACE = {
    aten.add.Tensor: aten.add_.Tensor,
    aten.scatter_add.default: aten.scatter_add_.default,
    aten.index_add.default: aten.index_add_.default,
}
"""Operations that autograd runs in place except under a dispatch mode; see `Timeline._owned_by_engine`."""


class Timeline(TorchDispatchMode):
    """A mode that logs every storage that torch operations make, and when it is freed, on meta tensors as on real ones.

    Args:
        target: the device; CUDA's allocator rounds up to blocks, and its kernels have workspaces.
    """

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.target = target
        self.segment: Segment = ("static", "")
        self.events: list[tuple[int, int, Segment]] = []
        """(index of the allocation, bytes gained or lost, segment)."""
        self.labels: dict[int, str] = {}
        self.work: Counter[str] = Counter()
        """Work of the training step: its FLOPs, and how many quantized weights it unpacks."""
        self._known: dict[int, int] = {}

    def hold(self, tensor: Tensor, label: str | None = None) -> None:
        """Log a tensor's storage once; a label names its purpose."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            block = self.target.block
            size = -(-storage.nbytes() // block) * block
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
        """Log bytes that stay allocated and that no tensor of the meta run stands for."""
        if size:
            self.labels[self._add(size)] = label

    def _add(self, size: int) -> int:
        number = len(self.events)
        self.events.append((number, size, self.segment))
        return number

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            if args[0].dtype != torch.bool:
                raise NotImplementedError("the model reads a value from its tensors, and a plan has none")
            return True  # transformers asks whether a mask is free of padding, as the plan's is
        name = func._schema.name
        kernel = REPLACEMENTS.get(name)
        if kernel is not None and args[0].is_meta:
            with self:
                return kernel(*args, **kwargs)
        if func in COMPOSED:  # without autograd they arrive undecomposed
            with self:
                return func.decompose(*args, **kwargs)
        if func in INPLACE and self.segment[0] == "backward" and self._owned_by_engine(func, args):
            func = INPLACE[func]
        output = func(*args, **kwargs)
        if not func.is_view:
            self._count(LAUNCHED, 1)
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self.hold(leaf)
        if func._overloadpacket in flop_registry:
            self._count(FLOPS, flop_registry[func._overloadpacket](*args, **kwargs, out_val=output))
        elif name == DEQUANTIZE:
            self._count(UNPACKED, output.numel())
        extra = workspace(func, args) if self.target.kind == "cuda" else widened(func, args)
        if extra:
            number = self._add(extra)
            self.labels[number] = WORKSPACE
            self.events.append((number, -extra, self.segment))
        return output

    def _count(self, what: str, amount: int) -> None:
        if self.segment[0] in ("forward", "backward"):
            self.work[what] += amount

    @staticmethod
    def _owned_by_engine(func: Any, args: tuple) -> bool:
        """Check whether autograd would have run the operation in place without a dispatch mode.

        The engine sums gradients in place where it alone owns the first; under a dispatch mode the Python wrapper is a
        second owner. Derivative formulas avoid in-place operations under a mode altogether. Either would show one
        gradient too many.
        """
        if torch.is_grad_enabled():
            return False
        first, second = args[0], args[1]
        if func is aten.add.Tensor and not (
            isinstance(second, Tensor) and first.shape == second.shape and first.dtype == second.dtype
        ):
            return False
        return torch._C._storage_Use_Count(first.untyped_storage()._cdata) <= 2

    def peaks(self) -> dict[Segment, Counter[str]]:
        """Return the fullest moment of each segment, as bytes by purpose."""
        freed = {number: segment for number, size, segment in self.events if size < 0}
        now: Counter[str] = Counter()
        total, highest = 0, dict[Segment, int]()
        found: dict[Segment, Counter[str]] = {}
        last: Segment | None = None
        for number, size, segment in self.events:
            # a segment may be fullest at its start
            for change in (size,) if segment == last else (0, size):
                now[self._part(number, freed)] += change
                total += change
                if total > highest.get(segment, -1):
                    highest[segment] = total
                    found[segment] = Counter(now)
            last = segment
        return found

    def _part(self, number: int, freed: dict[int, Segment]) -> str:
        """Name an allocation's purpose; activations that outlive the segment that made them are kept ones."""
        if number in self.labels:
            return self.labels[number]
        born: Segment = self.events[number][2]
        if born[1] == "end":
            return HEAD
        return KEPT if born[0] == "forward" and freed.get(number) != born else LAYER
