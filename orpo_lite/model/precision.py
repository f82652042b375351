"""Numbers that a model is held and computed in: the dtype by what the device has, quantization as the recipe asks."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig

from orpo_lite.common.errors import RequestError
from orpo_lite.recipe import ModelSection


@dataclass(frozen=True)
class Precision:
    """dtype of frozen weights and of computing; fp16 and bf16 are the fields of TrainingArguments with those names."""

    dtype: torch.dtype
    fp16: bool
    bf16: bool
    why: str


@dataclass(frozen=True)
class Place:
    """The kind of device that computes, its CUDA compute capability, the dtype of its matrix products, and the device if here."""

    kind: str
    capability: tuple[int, int]
    dtype: torch.dtype
    device: torch.device | None = None

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype) -> Place:
        """Read it from a device of this machine."""
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
        return cls(device.type, capability, dtype, device)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"sm{self.capability[0]}{self.capability[1]} in {dtype}" if self.kind == "cuda" else dtype


FLASH_DTYPES, FLASH_WIDTH = (torch.float16, torch.bfloat16), 256
"""What flash attention takes: dtypes, and the largest head size."""


def has_flash(place: Place, width: int) -> bool:
    """Check whether a CUDA device has a flash attention kernel for a head size."""
    return place.capability >= (8, 0) and place.dtype in FLASH_DTYPES and width <= FLASH_WIDTH


def default_device() -> torch.device:
    """Return the device that a run uses: CUDA, XPU or MPS where there is one, else the CPU."""
    for kind in ("cuda", "xpu", "mps"):
        if getattr(torch, kind).is_available():
            return torch.device(kind)
    return torch.device("cpu")


def chosen_dtype(dtype: str, kind: str, capability: tuple[int, int] = (0, 0)) -> tuple[str, str]:
    """Return the dtype that `model.dtype` means on a kind of device, and the one that auto would mean there.

    CUDA goes by compute capability alone: torch.cuda.is_bf16_supported() is true on a T4, which only emulates bfloat16.

    Raises:
        RequestError: float16 on the CPU, where neither autocast nor loss scaling makes it trainable.
    """
    native = {"xpu": "bfloat16", "cuda": "bfloat16" if capability >= (8, 0) else "float16"}.get(kind, "float32")
    chosen = native if dtype == "auto" else dtype
    if chosen == "float16" and kind == "cpu":
        raise RequestError(
            "model.dtype: found float16, but the CPU cannot train in it: set model.dtype=auto (float32 on the CPU)"
        )
    return chosen, native


def choose_precision(dtype: str = "auto", device: torch.device | str | None = None) -> Precision:
    """Choose the precision for `model.dtype` on a device (default: the one a run uses).

    Raises:
        RequestError: see `chosen_dtype`.
    """
    device = torch.device(device) if device is not None else default_device()
    place = {"cpu": "the CPU", "mps": "an Apple GPU (MPS)", "xpu": "an Intel GPU"}.get(device.type, device.type)
    capability = (0, 0)
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        place = f"a GPU of compute capability {capability[0]}.{capability[1]}"
    chosen, native = chosen_dtype(dtype, device.type, capability)
    why = f"{chosen} computing on {place}"
    if dtype != "auto" and chosen != native:
        why += f", as model.dtype asks (auto would be {native})"
        if (device.type, chosen, native) == ("cuda", "bfloat16", "float16"):
            why += "; bfloat16 is emulated below compute capability 8.0: slow"
    if chosen == "float16":
        why += ", with float32 adapters and loss scaling"
    return Precision(getattr(torch, chosen), chosen == "float16", chosen == "bfloat16", why)


def autocast(model: torch.nn.Module) -> contextlib.AbstractContextManager[object]:
    """Autocast a forward pass or generation outside a Trainer; a no-op for float32 models.

    Norms, adapters and saved modules of a 16-bit model are float32, and its plain matrix products refuse mixed inputs.
    """
    weight = model.get_input_embeddings().weight  # type: ignore[operator]  # a transformers or PEFT model
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad and p.dtype in (torch.float16, torch.bfloat16)}
    if not frozen:
        return contextlib.nullcontext()
    return torch.autocast(weight.device.type, dtype=frozen.pop())


def bitsandbytes_unavailable() -> str | None:
    """Return why bitsandbytes cannot quantize here; None where it can."""
    try:
        import bitsandbytes  # noqa: F401  # is it installed, and does its library load?
        from transformers.integrations.bitsandbytes import validate_bnb_backend_availability

        validate_bnb_backend_availability(raise_exception=True)
    except (ImportError, RuntimeError, OSError) as error:
        if sys.platform == "darwin":
            return "bitsandbytes is not available for macOS"
        return f"bitsandbytes does not work here ({' '.join(str(error).split()) or type(error).__name__})"
    return None


def four_bits(spec: ModelSection, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return transformers' quantization_config for nf4 or fp4, computed in `dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=spec.quantization,
        bnb_4bit_use_double_quant=spec.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def is_quantized_parameter(parameter: Tensor) -> bool:
    """Return True for a weight that bitsandbytes holds in 4 bits."""
    # they keep their state, in whatever dtype they are stored
    return type(parameter).__name__ == "Params4bit" and getattr(parameter, "quant_state", None) is not None


def quantization_skipped_reason(spec: ModelSection, device: torch.device) -> str | None:
    """Return why the recipe's quantization is skipped and what that costs; None where it is done or not asked for.

    It is skipped only on a CPU or an Apple GPU: for other GPUs the backend can be installed, and memory was planned
    with it.
    """
    if spec.quantization == "none" or device.type not in ("cpu", "mps"):
        return None
    if not (why := bitsandbytes_unavailable()):
        return None
    size = choose_precision(spec.dtype, device).dtype.itemsize
    return (
        f"model.quantization: {spec.quantization} is skipped, since {why}: the weights stay in {size * 8} bits, "
        f"{size} GB per billion weights instead of 0.5 GB"
    )


def quantization_settings(spec: ModelSection, dtype: torch.dtype) -> Any:
    """Return transformers' quantization_config for the recipe, or raise RequestError where the backend does not work."""
    if why := bitsandbytes_unavailable():
        raise RequestError(
            f"model.quantization: {spec.quantization} needs bitsandbytes, and {why}: set model.quantization=none, or "
            "pip install -U bitsandbytes"
        )
    return four_bits(spec, dtype)
