"""Emulation of a target device on meta tensors: autocast, the attention kernel it would pick, and kernel workspaces.

Tensors on the meta device have no autocast, and their attention is always the plain formula. Both are corrected here, at
the level where the real ones work: above autograd, so that casts and kernels appear in the backward pass too.
"""

import contextlib
import math
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from orpo_lite.model.precision import Place, has_flash
from orpo_lite.plan.gpus import Target

aten = torch.ops.aten

LOWER = {"linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv",
         "einsum", "conv1d", "conv2d", "conv3d", "scaled_dot_product_attention"}  # fmt: skip
"""Functions that autocast runs in 16 bits."""
RAISED = {"layer_norm", "softmax", "log_softmax", "pow", "__pow__", "rsqrt", "exp", "log", "norm", "cumsum", "cumprod",
          "sum", "prod", "softplus", "cross_entropy", "nll_loss", "reciprocal", "group_norm"}  # fmt: skip
"""Functions that CUDA's autocast runs in float32; the CPU's leaves them in the dtype of their inputs."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class Kernels(TorchFunctionMode):
    """A mode under which functions on meta tensors run as they would on the target."""

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.target = target
        self._cast_weights: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("grouped_mm", "_grouped_mm") and args[0].is_meta:
            return GroupedProduct.apply(args[0], args[1])
        if name not in LOWER and name not in RAISED:
            return func(*args, **kwargs)
        if torch.is_autocast_enabled("cpu"):  # stands for the target's autocast, since meta tensors ignore it
            if name in LOWER:
                args, kwargs = tree_map(self._lower, (args, kwargs))
            elif self.target.kind == "cuda" and kwargs.get("dtype") is None:
                args, kwargs = tree_map(_raise, (args, kwargs))
        if name == "scaled_dot_product_attention" and args[0].is_meta:
            return attend(self.target, *args, **kwargs)
        return func(*args, **kwargs)

    def _lower(self, value: Any) -> Any:
        dtype = torch.get_autocast_dtype("cpu")
        if not isinstance(value, Tensor) or value.dtype not in FLOATS or value.dtype == dtype:
            return value
        if not (value.is_leaf and value.requires_grad and value.dtype == torch.float32):
            return value.to(dtype)
        if id(value) not in self._cast_weights:  # autocast casts a trained weight once and keeps it
            self._cast_weights[id(value)] = value.to(dtype)
        return self._cast_weights[id(value)]

    @contextlib.contextmanager
    def emulate(self) -> Iterator[None]:
        """Make autocast, and code that asks for it or for the device, treat meta tensors as the target's."""
        plain, enabled, clear = torch.autocast, torch.is_autocast_enabled, torch.clear_autocast_cache
        dtype = torch.get_autocast_dtype

        class Autocast(plain):
            def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
                super().__init__("cpu" if device_type == "meta" else device_type, *args, **kwargs)

        def is_enabled(*device: str) -> bool:
            # asked without a device, torch answers for CUDA
            if device and device[0] != "meta":
                return enabled(*device)
            return enabled("cpu") if device or self.target.kind == "cuda" else enabled()

        def clear_cache() -> None:
            self._cast_weights.clear()
            clear()

        launches = contextlib.ExitStack()
        if "triton" in sys.modules:  # liger's functions allocate what they do, and their kernels run on nothing
            from triton.runtime.jit import KernelInterface  # pyright: ignore[reportMissingImports]

            launches.enter_context(mock.patch.object(KernelInterface, "__getitem__", lambda *_: lambda *a, **k: None))
        with (
            launches,
            mock.patch.object(torch, "autocast", Autocast),
            mock.patch.object(torch, "is_autocast_enabled", is_enabled),
            mock.patch.object(torch, "get_autocast_dtype", lambda kind: dtype("cpu" if kind == "meta" else kind)),
            mock.patch.object(torch, "clear_autocast_cache", clear_cache),
            self,
        ):
            yield


def _raise(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in FLOATS[:2] else value


def attend(
    target: Target,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Run scaled_dot_product_attention with the kernel that the target would pick, since kernels differ in what they keep.

    Args:
        query: (batch, heads, queries, width); key and value: (batch, key heads, keys, width).
    """
    flash = has_flash(Place(target.kind, target.capability, query.dtype), query.shape[-1])
    if target.kind == "cpu":
        attn_mask = as_bias(attn_mask, query)
        if cpu_flash(query, attn_mask, dropout_p, enable_gqa):
            return aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
            )[0]
    elif flash and attn_mask is None:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    elif query.shape[1] == key.shape[1]:  # heads are not grouped
        bias = as_bias(attn_mask, query)
        if bias is not None:
            bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, dropout_p, is_causal, scale=scale
        )[0]
    with torch._C.DisableTorchFunction():
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )


def as_bias(mask: Any, query: Tensor) -> Any:
    """Turn a mask of what may be seen into numbers that are added to the scores, as kernels take it."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -math.inf)


class GroupedProduct(torch.autograd.Function):
    """Product of fused experts, each token's row with its expert's matrix; torch's own meta kernel accepts only bfloat16.

    However rows are routed, inputs, outputs, gradients and the count of operations have these sizes.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, experts: Tensor) -> Tensor:
        ctx.save_for_backward(rows if experts.requires_grad else None, experts)
        return rows.mm(experts[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, experts = ctx.saved_tensors
        of_rows, of_experts = ctx.needs_input_grad
        of_each = None
        if of_experts:
            of_each = torch.empty_like(experts)
            torch.mm(rows.t(), gradients[0], out=of_each[0])
        return gradients[0].mm(experts[0].t()) if of_rows else None, of_each


def cpu_flash(query: Tensor, mask: Tensor | None, dropout: float, gqa: bool) -> bool:
    """Ask torch whether this machine's CPU would use its flash kernel, with a small tensor of the same kind."""
    small = torch.zeros(1, query.shape[1], 2, query.shape[-1], dtype=query.dtype)
    with torch._C.DisableTorchFunction():
        bias = None if mask is None else torch.zeros(1, 1, 2, 2, dtype=query.dtype)
        choose: Any = torch._fused_sdp_choice  # type: ignore[attr-defined]
        return choose(small, small, small, bias, dropout, False, enable_gqa=gqa) == 1


def workspace(func: Any, args: tuple) -> int:
    """Count the bytes that CUDA's attention kernels allocate in the backward pass, by their C++ sources: an assumption.

    On the CPU workspaces are small; the comparison with real steps shows how small.
    """
    if func is aten._scaled_dot_product_flash_attention_backward.default:
        query, key = args[1], args[2]
        batch, heads, length, width = query.shape
        rows, grouped = batch * -(-length // 128) * 128, key.shape[1] != heads
    elif func._schema.name == "torch_attn::_varlen_attn_backward":
        query, key = args[1], args[2]
        length, heads, width = query.shape
        rows, grouped = length + 128 * len(args[6]), key.shape[1] != heads
    elif func is aten._scaled_dot_product_efficient_attention_backward.default:
        return efficient_workspace(args[1], args[2])
    else:
        return 0
    size = 4 * heads * rows * (1 + -(-width // 32) * 32)  # row sums and the query's gradient, float32
    if grouped:  # gradients of keys and values are first made for every query head
        size += 2 * key.nbytes * heads // key.shape[1]
    return size


def widened(func: Any, args: tuple) -> int:
    """Count the float32 copies that a CPU makes of 16-bit numbers to sum them, or (of input and output) to divide them."""
    if func is aten.div_.Tensor:
        mixed = isinstance(args[1], Tensor) and args[1].ndim > 0 and args[0].element_size() < args[1].element_size()
        return 8 * args[0].numel() if mixed else 0
    if func in (aten.sum.IntList_out, aten.mean.out) and args[0].element_size() == 2:
        return 4 * args[0].numel()
    return 0


def efficient_workspace(query: Tensor, key: Tensor) -> int:
    """Count what the memory-efficient kernel's backward pass allocates: gradients in float32, and row sums."""
    return 4 * (query.numel() + 2 * key.numel() + query.numel() // query.shape[-1])


def efficient_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
    """Stand in for that kernel's backward pass over all pairs, whose meta kernel expects other arguments (torch 2.14)."""
    query.new_empty(efficient_workspace(query, key), dtype=torch.uint8)
    return *map(torch.empty_like, (query, key, value)), query.new_empty(())


def gemm_4bit(*args: Any, **kwargs: Any) -> Tensor:
    """Dequantize the whole matrix, then multiply, as every device does for more than a few hundred rows."""
    from bitsandbytes.backends.default.ops import _gemm_4bit_default_impl

    return _gemm_4bit_default_impl(*args, **kwargs)


DEQUANTIZE, EFFICIENT_BACKWARD = "bitsandbytes::dequantize_4bit", "aten::_efficient_attention_backward"
REPLACEMENTS = {EFFICIENT_BACKWARD: efficient_backward, "bitsandbytes::gemm_4bit": gemm_4bit}
"""Operations by name, and the functions that run in their place on meta tensors."""
