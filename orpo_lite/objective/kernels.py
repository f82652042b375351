"""liger-kernel's fused norms, rotary embeddings and gated activations in a model; its losses stay out."""

import copy
import inspect
import logging
import os
import sys
from types import FunctionType, MethodType
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_liger_kernel_available

from orpo_lite.common.errors import RequestError
from orpo_lite.model.inspection import routers, unwrap
from orpo_lite.objective.layout import TOLERANCE, difference, outcome, small_model


def fuse(model: Any, args: Any) -> str:
    """Put the kernels into a model, as an ORPOConfig asks and where a check finds them exact; return which run, and why.

    Raises:
        RequestError: liger is asked for, and cannot be used.
    """
    wish, device, base = args.kernels, args.device, unwrap(model)
    interpreted = wish == "liger" and os.environ.get("TRITON_INTERPRET") == "1"
    if wish == "none":
        return "PyTorch's own, as asked"
    if device.type != "cuda" and not interpreted:
        reason = f"liger's need a CUDA device, and this is {device.type}"
    elif not is_liger_kernel_available():
        reason = "liger-kernel is not installed (pip install liger-kernel)"
    else:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.mixed_precision, torch.float32)
        reason = inexactness(base, device, dtype)
    if reason is None:
        return f"liger-kernel's in {patch(base)} modules, checked exact for {type(base).__name__}"
    if wish == "auto":
        return f"PyTorch's own: {reason}"
    raise RequestError(f"memory.kernels: found liger, which cannot be used here: {reason}; or set it to auto or none")


def inexactness(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> str | None:
    """Compare the kernels with PyTorch's operations on a small model of the same kind on the device; None if they agree.

    In float32 they must agree to rounding; in 16 bits they may be twice as far from float32 as PyTorch's operations.
    """
    kind, attention = type(model), "sdpa" if model.config._attn_implementation == "sdpa" else "eager"
    for computed in dict.fromkeys((torch.float32, dtype)):
        try:
            plain: Any = small_model(kind, model.config, attention, computed)
            fused, exact = copy.deepcopy(plain.to(device)), copy.deepcopy(plain).float()
            if not patch(fused):
                return f"liger-kernel has none for {kind.__name__}"
            expected = outcome(exact, "padded")
            with torch.autocast(device.type, computed, enabled=computed != torch.float32):
                allowed = max(TOLERANCE[torch.float32], 2 * difference(outcome(plain, "padded"), expected))
                worst = difference(outcome(fused, "padded"), expected)
        except Exception as error:  # whatever liger, a model or the compiler of a kernel raises
            words = " ".join(str(error).split())[:120]
            return f"liger's could not be checked for {kind.__name__} ({type(error).__name__}: {words})"
        if not worst <= allowed:
            return f"a small {kind.__name__} differs by {worst:.1g} with liger's in {str(computed)[6:]}"
    return None


def as_its_weight(norm: Any, inputs: tuple[torch.Tensor]) -> torch.Tensor:
    """Let a float32 norm return float32, as transformers' does: liger's returns what it is given.

    Under a quantized base the sums between layers are float32 by that, which float16 needs in order not to overflow.
    """
    return inputs[0].to(torch.promote_types(inputs[0].dtype, norm.weight.dtype))


def patch(model: PreTrainedModel) -> int:
    """Bind the kernels to the modules of one model, and return to how many.

    liger also replaces classes and functions of transformers for the whole process, where models on the CPU would fail by
    them: those are put back, and the functions are called by this model's modules alone.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance  # pyright: ignore[reportMissingImports]  # an extra

    # at the first rotation it lists the compilers that it would have liked to have
    logging.getLogger("liger_kernel").setLevel(logging.ERROR)
    library = [module for name, module in sys.modules.items() if name.startswith("transformers.models.")]
    before, functions = [dict(vars(module)) for module in library], {}
    # fused experts are no elementwise kernel: quantized ones, and adapters on them, would be passed by
    options = {"swiglu": False} if routers(model) else {}
    try:
        _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False, **options)
    finally:
        for module, names in zip(library, before, strict=True):
            new = {key: value for key, value in vars(module).items() if value is not names.get(key, value)}
            functions[module.__name__] = {key: value for key, value in new.items() if isinstance(value, FunctionType)}
            vars(module).update({key: names[key] for key in new})
    for module in model.modules():
        if getattr(module, "casting_mode", None) == "llama":
            module.register_forward_pre_hook(as_its_weight)
        forward: Any = inspect.unwrap(type(module).forward)
        used = functions.get(forward.__module__, {})
        if used.keys() & set(forward.__code__.co_names):
            names = forward.__globals__ | used
            own = FunctionType(forward.__code__, names, "forward", forward.__defaults__, forward.__closure__)
            own.__kwdefaults__ = forward.__kwdefaults__
            module.forward = MethodType(own, module)
    return sum("forward" in vars(module) for module in model.modules())
