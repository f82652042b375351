"""bitsandbytes' operations as their kernels run them: their own meta kernels show an output and no memory on the way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def gemm_4bit(*args: Any, **kwargs: Any) -> Tensor:
    """The whole matrix dequantised, then multiplied: what every device does for more than some hundred rows."""
    from bitsandbytes.backends.default.ops import _gemm_4bit_default_impl

    return _gemm_4bit_default_impl(*args, **kwargs)


def int8_vectorwise_quant(rows: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales, and no outlier columns: how many there are only data can tell."""
    return (
        torch.empty(rows.shape, dtype=torch.int8, device=rows.device),
        torch.empty(rows.numel() // rows.shape[-1], dtype=torch.float32, device=rows.device),
        torch.empty(0, dtype=torch.int64, device=rows.device),
    )


def int8_mixed_scaled_mm(rows: Tensor, codes: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
    """An int32 product, then the scaled one."""
    shape = (*codes.shape[:-1], weight.shape[0])
    product = torch.empty(shape, dtype=torch.int32, device=rows.device)
    return product.to(rows.dtype), None


AS_KERNEL = {
    "bitsandbytes::gemm_4bit": gemm_4bit,
    "bitsandbytes::int8_vectorwise_quant": int8_vectorwise_quant,
    "bitsandbytes::int8_mixed_scaled_mm": int8_mixed_scaled_mm,
}
"""Operations by name, and what runs in their place on meta tensors."""

DEQUANTISE = "bitsandbytes::dequantize_4bit"
PRODUCTS = {
    "bitsandbytes::int8_mixed_scaled_mm": lambda rows, codes, weight, *_: 2 * codes.numel() * weight.shape[0],
}
"""FLOPs of the operations among these that are not made of torch's own products."""
