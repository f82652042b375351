"""bitsandbytes and attention: each tried by running it and held against its definition."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import math
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from orpo_lite.train.doctor_findings import NOTE, OK, PROBLEM, Finding, in_words

FASTEST = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
"""torch's attention kernels by their SDPBackend names."""
KINDS = {"plain": "causal", "packed": "packed pairs", "grouped": "grouped heads"}
ROUNDING = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest error that is rounding, relative to the norm."""
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)  # fmt: skip
"""The sixteen values of the QLoRA paper (arXiv 2305.14314, appendix E), to hold bitsandbytes' codes against."""


# ---- bitsandbytes --------------------------------------------------------------------------------------------------


def bitsandbytes() -> Iterator[Finding]:
    """Does it import? Nothing is said where it does: `quantising` goes on from there."""
    name = "bitsandbytes"
    if sys.platform == "darwin" and importlib.util.find_spec(name) is None:
        yield Finding(name, NOTE, "not there for macOS", "model.quantization=none, with a base that fits so")
        return
    try:
        import bitsandbytes  # noqa: F401
    except BaseException as error:
        remedy = (
            "pip install -U --force-reinstall --no-deps bitsandbytes, or uninstall it and set model.quantization=none"
        )
        yield Finding(name, PROBLEM, f"cannot be imported: {in_words(error)}", remedy)


def quantising() -> Iterator[Finding]:
    """Quantise a real matrix to NF4 and hold it against the definition; then a layer, forward and backward."""
    import torch

    from orpo_lite.model.precision import choose_precision, default_device

    name, device = "bitsandbytes", default_device()
    if importlib.util.find_spec(name) is None:
        return
    bnb: Any = importlib.import_module(name)
    dtype = choose_precision(device=device).dtype
    version = importlib.metadata.version(name)
    facts: dict[str, Any] = {"version": version, "device": device.type, "dtype": str(dtype).removeprefix("torch.")}
    remedy = "pip install -U bitsandbytes, with a torch of the same CUDA; until then model.quantization=none"
    try:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(96, 256, generator=generator) * 0.02
        layer = bnb.nn.Linear4bit(256, 96, bias=False, compute_dtype=dtype, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(weight.to(dtype), requires_grad=False, quant_type="nf4")
        layer.to(device)  # which quantises, and the scales too, as recipes do
        packed = layer.weight
        got = bnb.functional.dequantize_4bit(packed.data, packed.quant_state).float().cpu()
        rounded = weight.to(dtype).float()
        facts["bytes_per_weight"] = packed.numel() * packed.element_size() / weight.numel()
        facts["error"], facts["error_of_nf4"] = relative(got, rounded), relative(nearest_nf4(rounded), rounded)
        rows = torch.randn(40, 256, generator=generator)
        x = rows.to(device, dtype).requires_grad_()
        out = layer(x)
        out.sum().backward()
        with torch.no_grad():
            single = layer(x[:1].detach())  # generation's kernel, another than training's
        expected = rows.to(dtype).float() @ got.T
        facts["forward_error"] = max(relative(out, expected), relative(single, expected[:1]))
        facts["backward_error"] = relative(x.grad, got.sum(0).expand(40, 256))
    except Exception as error:
        yield Finding(name, PROBLEM, f"{version} fails on {device.type}: {in_words(error)}", remedy, facts)
        return
    # nothing is nearer than the nearest codes; what is further off has wrong codes or scales
    faithful = abs(facts["error"] / facts["error_of_nf4"] - 1) < 0.02 and facts["bytes_per_weight"] == 0.5
    exact_layer = max(facts["forward_error"], facts["backward_error"]) < ROUNDING[facts["dtype"]]
    if faithful and exact_layer:
        text = f"{version} quantises on {device.type}: NF4's error {facts['error']:.1%}, a layer right both ways in {facts['dtype']}"
        yield Finding(name, OK, text, facts=facts)
    elif not faithful:
        text = f"{version} quantises wrongly on {device.type}: error {facts['error']:.1%}, where NF4 gives {facts['error_of_nf4']:.1%}"
        yield Finding(name, PROBLEM, text, remedy, facts)
    else:
        text = f"{version}: a 4-bit layer is wrong on {device.type}: forward by {facts['forward_error']:.1%}, backward by {facts['backward_error']:.1%}"
        yield Finding(name, PROBLEM, text, remedy, facts)


def nearest_nf4(weight: Any, block: int = 64) -> Any:
    """NF4 by its definition: (rows, columns) float32 in blocks of 64, each value the nearest code times its block's
    largest magnitude."""
    import torch

    blocks = weight.reshape(-1, block)
    scale = blocks.abs().amax(1, keepdim=True)
    codes = torch.tensor(NF4)
    return (codes[(blocks / scale).unsqueeze(-1).sub(codes).abs().argmin(-1)] * scale).reshape(weight.shape)


def relative(got: Any, expected: Any) -> float:
    """Norm of the difference over the norm; infinite where the result is not finite."""
    expected = expected.detach().cpu().double()
    difference = float((got.detach().cpu().double() - expected).norm() / expected.norm())
    return difference if math.isfinite(difference) else math.inf


# ---- attention -----------------------------------------------------------------------------------------------------


def attention() -> Iterator[Finding]:
    """torch's attention kernels, forward and backward, in the dtype of training, against the formula.

    Causal on its own; for packed pairs, where a branch's queries sit at the end of their keys; with grouped heads.
    """
    from orpo_lite.model.precision import choose_precision, default_device

    device = default_device()
    dtype = choose_precision(device=device).dtype
    name = str(dtype).removeprefix("torch.")
    found = {kind: {each: try_attention(each, kind, device, dtype) for each in (None, *FASTEST)} for kind in KINDS}
    facts = {kind: {str(each or "chosen by torch"): text or "works" for each, text in tried.items()} for kind, tried in found.items()}  # fmt: skip
    good = {kind: [each for each in FASTEST if tried[each] is None] for kind, tried in found.items()}
    words = "; ".join(
        f"{label}: {', '.join(_short(each) for each in good[kind]) or 'none'}" for kind, label in KINDS.items()
    )
    text = f"{name}: {words}"
    failing = [f"{KINDS[kind]}: {tried[None]}" for kind, tried in found.items() if tried[None] is not None]
    wrong = [f"{_short(each)} ({KINDS[kind]}): {tried[each]}" for kind, tried in found.items() for each in FASTEST if "wrong" in (tried[each] or "")]  # fmt: skip
    if failing:
        text = f"what torch chooses in {name} does not work: {'; '.join(failing)}"
        yield Finding("attention", PROBLEM, text, "update torch and driver; until then model.attention=eager", facts)
    elif wrong:
        text += f"; not chosen here, but wrong: {', '.join(wrong)}"
        yield Finding("attention", NOTE, text, "update torch", facts)
    elif device.type == "cuda" and good["packed"] in (["MATH"], []):
        remedy = "memory grows with the square of a pair's length: keep data.max_length short, or update torch"
        yield Finding("attention", NOTE, text, remedy, facts)
    else:
        yield Finding("attention", OK, text, facts=facts)
    if importlib.util.find_spec("flash_attn") is not None:
        try:
            import flash_attn  # type: ignore[import-not-found]

            yield Finding("flash-attn", OK, f"{flash_attn.__version__} imports (model.attention=flash_attention_2)")
        except BaseException as error:
            remedy = "pip uninstall flash-attn; it is not needed"
            yield Finding("flash-attn", NOTE, f"is installed, but cannot be imported: {in_words(error)}", remedy)


def _short(backend: str | None) -> str:
    return str(backend).removesuffix("_ATTENTION").lower()


def try_attention(backend: str | None, kind: str, device: Any, dtype: Any) -> str | None:
    """Run attention by one backend, or by the one that torch chooses (None).

    Returns:
        None where values and gradients are right; else why not, in words.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right

    from orpo_lite.objective.packed_attention import LOWER_RIGHT

    keys, queries, heads, width = 160, 64 if kind == "packed" else 160, 8, 64
    groups = 2 if kind == "grouped" else heads
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, queries, width), (1, groups, keys, width), (1, groups, keys, width)]
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    weight = torch.randn(shapes[0], generator=generator)
    allowed = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    options: dict[str, Any] = {"is_causal": True}
    if kind == "packed":
        mask = causal_lower_right(queries, keys) if device.type in LOWER_RIGHT else allowed[None, None].to(device)
        options = {"attn_mask": mask}
    if kind == "grouped":
        options["enable_gqa"] = True

    real = [x.float().requires_grad_() for x in inputs]
    q, k, v = real[0], *(x.repeat_interleave(heads // groups, 1) for x in real[1:])
    expected = (q @ k.mT / width**0.5).masked_fill(~allowed, -torch.inf).softmax(-1) @ v
    wanted = [expected.detach(), *torch.autograd.grad((expected * weight).sum(), real)]
    try:
        tried = [x.to(device).requires_grad_() for x in inputs]
        attend: Any = torch.nn.functional.scaled_dot_product_attention
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # reasons why a kernel cannot be had
            with sdpa_kernel(getattr(SDPBackend, backend)) if backend else contextlib.nullcontext():
                out = attend(*tried, **options)
                got = [out, *torch.autograd.grad((out.float() * weight.to(device)).sum(), tried)]
    except Exception as error:
        text = in_words(error, 120)
        if "CUDA error" in text:
            raise  # nothing on this device can be believed any more
        return (
            "not to be had"
            if re.search("no available kernel|no viable backend|invalid backend", text, re.IGNORECASE)
            else text
        )
    worst = max(relative(g, w) for g, w in zip(got, wanted, strict=True))
    return None if worst < ROUNDING[str(dtype).removeprefix("torch.")] else f"wrong by {worst:.1%}"
