"""What a device makes of an operation: autocast, the attention kernel it would pick, and the kernels' own memory.

Tensors on the meta device have no autocast, and their attention is always the plain formula. Both are put right here,
at the level where the real ones work: above autograd, so that casts and kernels show in the backward pass too.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from orpo_lite.objective import packed_attention as attention

aten = torch.ops.aten

LOWER = {"linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv",
         "einsum", "conv1d", "conv2d", "conv3d", "scaled_dot_product_attention"}  # fmt: skip
"""Functions that autocast computes in 16 bits."""
RAISED = {"layer_norm", "softmax", "log_softmax", "pow", "__pow__", "rsqrt", "exp", "log", "norm", "cumsum", "cumprod",
          "sum", "prod", "softplus", "cross_entropy", "nll_loss", "reciprocal", "group_norm"}  # fmt: skip
"""Functions that CUDA's autocast computes in float32; the CPU's leaves them as they come."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Target:
    """The device that is planned for."""

    kind: str
    """cuda or cpu."""
    capability: tuple[int, int] = (8, 6)
    """CUDA compute capability; decides kernels and the 16-bit dtype."""

    @property
    def block(self) -> int:
        """Bytes that allocations are rounded up to."""
        return 512 if self.kind == "cuda" else 1


def lower_right(queries: int, keys: int) -> Tensor:
    """Stands for torch's causal_lower_right, a tensor subclass that cannot be made while a ledger looks on."""
    mask = torch.ones((), dtype=torch.bool, device="meta").expand(queries, keys)
    mask.lower_right = True  # type: ignore[attr-defined]
    return mask


class Kernels(TorchFunctionMode):
    """While open, functions on meta tensors run as they would on the target."""

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.target = target
        self._cast_weights: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("grouped_mm", "_grouped_mm") and args[0].is_meta:
            return GroupedProduct.apply(args[0], args[1])
        if name not in LOWER and name not in RAISED:
            return func(*args, **kwargs)
        if torch.is_autocast_enabled("cpu"):  # the flag stands for the target's autocast: meta tensors ignore it
            if name in LOWER:
                args, kwargs = _converted(self._lower, args, kwargs)
            elif self.target.kind == "cuda" and kwargs.get("dtype") is None:
                args, kwargs = _converted(_raise, args, kwargs)
        if name == "scaled_dot_product_attention" and args[0].is_meta:
            return attend(self.target, *args, **kwargs)
        return func(*args, **kwargs)

    def _lower(self, value: Any) -> Any:
        dtype = torch.get_autocast_dtype("cpu")
        if not isinstance(value, Tensor) or value.dtype not in FLOATS:
            return value
        if value.dtype == dtype:
            return value
        if not (value.is_leaf and value.requires_grad and value.dtype == torch.float32):
            return value.to(dtype)
        if id(value) not in self._cast_weights:  # autocast casts a trained weight once and keeps it
            self._cast_weights[id(value)] = value.to(dtype)
        return self._cast_weights[id(value)]

    @contextlib.contextmanager
    def standing_in(self) -> Iterator[None]:
        """Let autocast, and what asks for it or for the device, take meta tensors for the target's."""
        plain, enabled, clear = torch.autocast, torch.is_autocast_enabled, torch.clear_autocast_cache

        class Autocast(plain):
            def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
                super().__init__("cpu" if device_type == "meta" else device_type, *args, **kwargs)

        def is_enabled(*device: str) -> bool:
            # without a device the question is for CUDA's
            if device and device[0] != "meta":
                return enabled(*device)
            return enabled("cpu") if device or self.target.kind == "cuda" else enabled()

        def forget() -> None:
            self._cast_weights.clear()
            clear()

        branches = attention.LOWER_RIGHT | ({"meta"} if self.target.kind == "cuda" else set())
        with (
            mock.patch.object(torch, "autocast", Autocast),
            mock.patch.object(torch, "is_autocast_enabled", is_enabled),
            mock.patch.object(torch, "clear_autocast_cache", forget),
            mock.patch.object(attention, "LOWER_RIGHT", branches),
            mock.patch.object(attention, "causal_lower_right", lower_right),
            self,
        ):
            yield


def _converted(convert: Callable[[Any], Any], args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return tree_map(convert, args), {key: tree_map(convert, value) for key, value in kwargs.items()}


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
    """scaled_dot_product_attention by the kernel that the target picks, which is what holds memory."""
    if target.kind == "cpu":
        if isinstance(attn_mask, Tensor) and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -math.inf)
        if cpu_flash(query, attn_mask, dropout_p, enable_gqa):
            return aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
            )[0]
    else:
        from_right = hasattr(attn_mask, "lower_right")
        half, grouped = query.dtype in FLOATS[:2], query.shape[1] != key.shape[1]
        if half and target.capability >= (8, 0) and (attn_mask is None or from_right) and query.shape[-1] <= 256:
            return aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal or from_right, False, scale=scale
            )[0]
        if not grouped:
            bias = None
            if from_right:  # this kernel has it as a flag as well
                is_causal = True
            elif attn_mask is not None:
                bias = attn_mask
                if bias.dtype == torch.bool:
                    bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill_(~bias, -math.inf)
                bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
            return aten._scaled_dot_product_efficient_attention(
                query, key, value, bias, True, dropout_p, is_causal, scale=scale
            )[0]
        if from_right:
            attn_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    with torch._C.DisableTorchFunction():
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )


class GroupedProduct(torch.autograd.Function):
    """Fused experts' product, each token's row by its expert's matrix: its own meta kernel takes bfloat16 alone.

    However the rows are dealt to experts, input, output and gradients have these sizes, and take these products.
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
    """Whether this machine's CPU takes its flash kernel, asked of torch on a tensor of the same kind."""
    small = torch.zeros(1, query.shape[1], 2, query.shape[-1], dtype=query.dtype)
    with torch._C.DisableTorchFunction():
        bias = None if mask is None else torch.zeros(1, 1, 2, 2, dtype=query.dtype)
        choose: Any = torch._fused_sdp_choice  # type: ignore[attr-defined]
        return choose(small, small, small, bias, dropout, False, enable_gqa=gqa) == 1


# ---- memory that a kernel takes for itself -------------------------------------------------------------------------


def cuda_workspace(func: Any, args: tuple, output: Any) -> int:
    """Bytes of attention's backward kernels; by the layout of their C++ sources, so an assumption here."""
    if func is aten._scaled_dot_product_flash_attention_backward.default:
        query, key = args[1], args[2]
        batch, heads, length, width = query.shape
        rows = -(-length // 128) * 128
        size = 4 * batch * heads * rows * (1 + -(-width // 32) * 32)  # row sums and the query's gradient, float32
        if key.shape[1] != heads:  # keys' and values' gradients come for every query head first
            size += 2 * batch * heads * key.shape[2] * width * key.element_size()
        return size
    if func is aten._scaled_dot_product_efficient_attention_backward.default:
        query, key = args[1], args[2]
        return 4 * (query.numel() + 2 * key.numel() + query.numel() // query.shape[-1])
    return 0


def no_workspace(func: Any, args: tuple, output: Any) -> int:
    """On the CPU what operations take for themselves is small, and shows in the comparison with real steps."""
    return 0
