"""Compute dtype and mixed precision, chosen by what the device really has."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch

from orpo_lite.common.errors import RequestError


@dataclass(frozen=True)
class Precision:
    """dtype of the frozen weights and of computing; fp16 and bf16 are the TrainingArguments fields of those names."""

    dtype: torch.dtype
    fp16: bool
    bf16: bool
    why: str


def default_device() -> torch.device:
    """The device a run uses: CUDA, XPU or MPS where there is one, else the CPU."""
    for kind in ("cuda", "xpu", "mps"):
        if getattr(torch, kind).is_available():
            return torch.device(kind)
    return torch.device("cpu")


def choose_precision(dtype: str = "auto", device: torch.device | str | None = None) -> Precision:
    """Precision for `model.dtype` on a device (default: the one a run uses).

    CUDA goes by compute capability alone: torch.cuda.is_bf16_supported() is true on a T4, which only emulates bfloat16.

    Raises:
        RequestError: float16 on the CPU, where neither autocast nor loss scaling makes it trainable.
    """
    device = torch.device(device) if device is not None else default_device()
    place = {"cpu": "the CPU", "mps": "an Apple GPU (MPS)", "xpu": "an Intel GPU"}.get(device.type, device.type)
    native = {"xpu": "bfloat16"}.get(device.type, "float32")
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        native = "bfloat16" if capability >= (8, 0) else "float16"
        place = f"a GPU of compute capability {capability[0]}.{capability[1]}"
    chosen = native if dtype == "auto" else dtype
    if chosen == "float16" and device.type == "cpu":
        raise RequestError(
            "model.dtype: found float16, but the CPU cannot train in it: set model.dtype=auto (float32 on the CPU)"
        )
    why = f"{chosen} computing on {place}"
    if dtype != "auto" and chosen != native:
        why += f", as model.dtype asks (auto would be {native})"
        if (device.type, chosen, native) == ("cuda", "bfloat16", "float16"):
            why += "; bfloat16 is emulated below compute capability 8.0: slow"
    if chosen == "float16":
        why += ", with float32 adapters and loss scaling"
    return Precision(getattr(torch, chosen), chosen == "float16", chosen == "bfloat16", why)


def autocast(model: torch.nn.Module) -> contextlib.AbstractContextManager[object]:
    """Autocast for forward or generate outside a Trainer: norms, adapters and saved modules are float32 in a 16-bit
    model, and its plain matrix products refuse mixed inputs. A no-op for float32 models."""
    weight = model.get_input_embeddings().weight  # type: ignore[operator]  # a transformers or PEFT model
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad and p.dtype in (torch.float16, torch.bfloat16)}
    if not frozen:
        return contextlib.nullcontext()
    return torch.autocast(weight.device.type, dtype=frozen.pop())
