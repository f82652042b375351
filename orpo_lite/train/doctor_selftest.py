"""Try what training uses: a 4-bit layer and attention against their definitions, then a short run on the embedded model."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import math
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

from orpo_lite.train.doctor_machine import BUG_REPORT, NOTE, OK, PROBLEM, Finding, in_words

ROUNDING = {"float32": 1e-3, "float16": 3e-2, "bfloat16": 5e-2}
"""Largest error by dtype, relative to the norm, that is rounding."""
NF4_ERROR = 0.0926
"""Relative error of the matrix below when each value is replaced by the nearest of NF4's codes times its block's scale."""
KINDS = {"plain": "causal", "packed": "packed pairs", "grouped": "grouped heads"}
FAST = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION")
"""torch's attention kernels whose memory grows linearly with length, by their SDPBackend names."""
STEPS, ROWS, COMPARED = 10, 80, 6
"""Optimizer steps of 8 pairs, pairs that they are drawn from, and pairs that the layouts are compared on."""
MIN_DROP = 0.1
"""Share of the loss that these steps must remove; they remove about a third."""
SCALE = 256.0
"""Factor on the loss before its gradients are compared, as float16's loss scaling would apply."""


def relative(got: Any, expected: Any) -> float:
    """Compute the norm of the difference over the norm; infinite where the result is not finite."""
    expected = expected.detach().cpu().double()
    difference = float((got.detach().cpu().double() - expected).norm() / expected.norm())
    return difference if math.isfinite(difference) else math.inf


def quantizing() -> Iterator[Finding]:
    """Quantize a matrix to NF4, then run a layer of it forward and backward."""
    name, installed = "bitsandbytes", importlib.util.find_spec("bitsandbytes") is not None
    if sys.platform == "darwin" and not installed:
        yield Finding(
            name, NOTE, "not available for macOS", "model.quantization=none, with a base that fits in 16 bits"
        )
        return
    try:
        bnb: Any = importlib.import_module(name)
    except BaseException as error:
        remedy = (
            "pip install -U --force-reinstall --no-deps bitsandbytes, or uninstall it and set model.quantization=none"
        )
        yield Finding(name, PROBLEM, f"cannot be imported: {in_words(error)}", remedy)
        return
    import torch

    from orpo_lite.model.precision import choose_precision, default_device

    device = default_device()
    dtype = choose_precision(device=device).dtype
    version = importlib.metadata.version(name)
    facts: dict[str, Any] = {"version": version, "device": device.type, "dtype": str(dtype).removeprefix("torch.")}
    remedy = "pip install -U bitsandbytes, with a torch of the same CUDA; until then model.quantization=none"
    try:
        generator = torch.Generator().manual_seed(0)
        weight = (torch.randn(96, 256, generator=generator) * 0.02).to(dtype)
        rows = torch.randn(40, 256, generator=generator).to(dtype)
        layer = bnb.nn.Linear4bit(256, 96, bias=False, compute_dtype=dtype, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        layer.to(device)  # quantizes the weights, and the scales too, as recipes do
        packed: Any = layer.weight
        got = bnb.functional.dequantize_4bit(packed.data, packed.quant_state).float().cpu()
        facts["error"] = relative(got, weight.float())
        x = rows.to(device).requires_grad_()
        out = layer(x)
        out.sum().backward()
        single = layer(x[:1].detach())  # generation uses another kernel than training
        expected = rows.float() @ got.T
        facts["forward_error"] = max(relative(out, expected), relative(single, expected[:1]))
        facts["backward_error"] = relative(x.grad, got.sum(0).expand(40, 256))
    except Exception as error:
        yield Finding(name, PROBLEM, f"{version} fails on {device.type}: {in_words(error)}", remedy, facts)
        return
    if abs(facts["error"] / NF4_ERROR - 1) > 0.03 or math.isinf(facts["error"]):
        text = (
            f"{version} quantizes wrongly on {device.type}: error {facts['error']:.1%}, where NF4 gives {NF4_ERROR:.1%}"
        )
        yield Finding(name, PROBLEM, text, remedy, facts)
    elif not max(facts["forward_error"], facts["backward_error"]) < ROUNDING[facts["dtype"]]:
        text = (
            f"{version}: a 4-bit layer is wrong on {device.type}: forward by {facts['forward_error']:.1%}, backward by "
            f"{facts['backward_error']:.1%}"
        )
        yield Finding(name, PROBLEM, text, remedy, facts)
    else:
        text = (
            f"{version} quantizes on {device.type} (NF4's error: {facts['error']:.1%}), forward and backward are right"
        )
        yield Finding(name, OK, f"{text} in {facts['dtype']}", facts=facts)


# ---- dtype and attention ---------------------------------------------------------------------------------------------


def computing() -> Iterator[Finding]:
    """Check the dtype that training takes, and attention in it."""
    import torch

    from orpo_lite.model.precision import choose_precision, default_device

    device = default_device()
    dtype = choose_precision(device=device).dtype
    name = str(dtype).removeprefix("torch.")
    text, remedy, facts = f"training takes {name}", "", {"training_dtype": name}
    if device.type == "cuda":
        real = torch.cuda.is_bf16_supported(including_emulation=False)
        emulated = not real and torch.cuda.is_bf16_supported()
        how = "in hardware" if real else "by emulation, which is slow" if emulated else "not supported"
        text, facts = f"bfloat16 {how}; {text}", facts | {"bf16": real, "emulated": emulated}
        remedy = "" if real == (name == "bfloat16") else f"set model.dtype if {name} is slow or fails"
    if name == "float16":
        text += " with loss scaling and float32 adapters"
    yield Finding("bf16", NOTE if remedy else OK, text, remedy, facts)
    yield attention(device, dtype)


def attention(device: Any, dtype: Any) -> Finding:
    """Try attention forward and backward, by the kernel that torch chooses: causal; for packed pairs, where a branch's
    queries are at the end of their keys; with grouped heads. Then list the fast kernels that work for packed pairs."""
    name, tried = (
        str(dtype).removeprefix("torch."),
        {kind: attention_error(None, kind, device, dtype) for kind in KINDS},
    )
    fast = {one: attention_error(one, "packed", device, dtype) for one in FAST}
    good = [one.removesuffix("_ATTENTION").lower() for one, error in fast.items() if error is None]
    facts: dict[str, Any] = {kind: error or "works" for kind, error in tried.items()}
    facts["fast_kernels"] = {one: error or "works" for one, error in fast.items()}
    if failing := [f"{KINDS[kind]}: {error}" for kind, error in tried.items() if error]:
        text = f"the kernel that torch chooses in {name} does not work: {'; '.join(failing)}"
        return Finding("attention", PROBLEM, text, "update torch and driver; until then model.attention=eager", facts)
    text = f"{name}: {', '.join(KINDS.values())} work; fast kernels for packed pairs: {', '.join(good) or 'none'}"
    if device.type == "cuda" and not good:
        remedy = "memory grows with the square of a pair's length: keep data.max_length short, or update torch"
        return Finding("attention", NOTE, text, remedy, facts)
    return Finding("attention", OK, text, facts=facts)


def attention_error(backend: str | None, kind: str, device: Any, dtype: Any) -> str | None:
    """Run attention by one backend, or by the one that torch chooses (None), and compare it with the formula.

    Returns:
        None where values and gradients are right; else what is wrong.
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
    options: dict[str, Any] = {"is_causal": True, "enable_gqa": kind == "grouped"}
    if kind == "packed":
        mask = causal_lower_right(queries, keys) if device.type in LOWER_RIGHT else allowed[None, None].to(device)
        options = {"attn_mask": mask}

    real = [x.float().requires_grad_() for x in inputs]
    q, k, v = real[0], *(x.repeat_interleave(heads // groups, 1) for x in real[1:])
    expected = (q @ k.mT / width**0.5).masked_fill(~allowed, -torch.inf).softmax(-1) @ v
    wanted = [expected.detach(), *torch.autograd.grad((expected * weight).sum(), real)]
    try:
        tried = [x.to(device).requires_grad_() for x in inputs]
        attend: Any = torch.nn.functional.scaled_dot_product_attention
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # reasons why a kernel is not available
            with sdpa_kernel(getattr(SDPBackend, backend)) if backend else contextlib.nullcontext():
                out = attend(*tried, **options)
                got = [out, *torch.autograd.grad((out.float() * weight.to(device)).sum(), tried)]
    except Exception as error:
        text = in_words(error, 120)
        if "CUDA error" in text:
            raise  # no later result on this device can be trusted
        absent = re.search("no available kernel|no viable backend|invalid backend", text, re.IGNORECASE)
        return "not available" if absent else text
    worst = max(relative(g, w) for g, w in zip(got, wanted, strict=True))
    return None if worst < ROUNDING[str(dtype).removeprefix("torch.")] else f"wrong by {worst:.1%}"


# ---- a short run -----------------------------------------------------------------------------------------------------


def training() -> Iterator[Finding]:
    """Train the quickstart recipe for a few steps, and compare its layouts on the adapter that results."""
    import torch

    from orpo_lite.model import attach_adapter, load_base, load_tokenizer
    from orpo_lite.recipe import Recipe
    from orpo_lite.recipe.loading import resolve_path
    from orpo_lite.trainer.config_from_recipe import DEFAULTS, arguments, checkpointed

    started = time.monotonic()
    quantization = "nf4" if importlib.util.find_spec("bitsandbytes") else "none"
    recipe = Recipe.load("quickstart", [f"model.quantization={quantization}"])
    recipe.training = DEFAULTS | recipe.training | {"max_steps": STEPS, "logging_steps": 1, "disable_tqdm": True}
    tokenizer = load_tokenizer(recipe.model)
    with (
        tempfile.TemporaryDirectory() as scratch,
        mock.patch("datasets.config.HF_DATASETS_CACHE", scratch),  # the tokens of the self-test are not worth caching
    ):
        base, facts = load_base(recipe.model, tokenizer)
        count = checkpointed(recipe, base.device)
        torch.manual_seed(0)
        model: Any = attach_adapter(base, recipe.adapter, tokenizer=tokenizer, checkpointing=count != 0)
        args = arguments(recipe, Path(scratch), facts, has_eval=False, checkpointing=count)
        with open(resolve_path("builtin:quickstart/train.jsonl"), encoding="utf-8") as lines:
            rows = [json.loads(line) for line in islice(lines, ROWS)]
        yield train(model, args, rows, tokenizer, f"{facts.quantization}, {facts.precision.why}", started)
        yield compare_layouts(
            model, args, rows[:COMPARED], tokenizer, str(facts.precision.dtype).removeprefix("torch.")
        )


def train(model: Any, args: Any, rows: list[dict], tokenizer: Any, how: str, started: float) -> Finding:
    """Train: the loss must be finite and fall, and only the adapter may change."""
    import torch
    from datasets import Dataset

    from orpo_lite.trainer.nonfinite_report import NonFinite
    from orpo_lite.trainer.trainer import ORPOTrainer

    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    trainer = ORPOTrainer(model, args, None, Dataset.from_list(rows), None, tokenizer)
    trainer.guard.folder = None
    losses: list[float] = []
    try:
        trainer.train()
        losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
        wrong = "" if all(map(math.isfinite, losses)) else f"the loss is not finite ({losses})"
    except NonFinite as error:
        wrong = f"not finite, {str(error).splitlines()[0]}"
    changed = [name for name, tensor in tensors.items() if not torch.equal(before[name], tensor.detach())]
    frozen = [name for name in changed if not tensors[name].requires_grad]
    text = f"loss {sum(losses[:2]) / 2:.2f} to {sum(losses[-2:]) / 2:.2f} in {len(losses)} steps"
    if frozen:
        wrong = wrong or f"{len(frozen)} frozen tensor(s) changed, such as {min(frozen)}"
    elif not changed:
        wrong = wrong or f"the adapter did not change in {STEPS} steps"
    elif sum(losses[-2:]) > (1 - MIN_DROP) * sum(losses[:2]):
        wrong = wrong or f"{text}, which should have fallen"
    seconds = time.monotonic() - started
    facts = {"losses": losses, "seconds": round(seconds, 1)}
    if wrong:
        return Finding("training", PROBLEM, f"{how}: {wrong}", f"see the lines above; {BUG_REPORT}", facts)
    return Finding("training", OK, f"{how}: {text}, only the adapter changed; {seconds:.0f} s", facts=facts)


def compare_layouts(model: Any, args: Any, rows: list[dict], tokenizer: Any, dtype: str) -> Finding:
    """Compare loss and gradient of the same pairs in all three layouts."""
    import torch
    from datasets import Dataset

    from orpo_lite.data.token_cache import TokenizeOptions, tokenize_rows
    from orpo_lite.model import autocast
    from orpo_lite.trainer.trainer import ORPOTrainer

    pairs, _ = tokenize_rows(Dataset.from_list(rows), tokenizer, TokenizeOptions(), "train")
    args.per_device_train_batch_size = len(rows)
    outcomes: dict[str, tuple[float, Any]] = {}
    model.train()
    for layout in ("padded", "packed", "shared"):
        args.layout = layout
        trainer = ORPOTrainer(model, args, None, pairs, None, tokenizer)
        batch = trainer.data_collator([pairs[i] for i in range(len(pairs))])
        model.zero_grad()
        with autocast(model):
            loss = trainer.compute_loss(model, batch)
        (loss * SCALE).backward()
        gradient = torch.cat([p.grad.flatten().double().cpu() for p in model.parameters() if p.grad is not None])
        outcomes[layout] = loss.item(), gradient / SCALE
    loss, gradient = outcomes.pop("padded")
    of_loss = max(relative(torch.tensor(other), torch.tensor(loss)) for other, _ in outcomes.values())
    of_gradient = max(relative(other, gradient) for _, other in outcomes.values())
    facts = {"loss": loss, "of_loss": of_loss, "of_gradient": of_gradient, "dtype": dtype}
    text = f"shared, packed and padded: loss within {of_loss:.0e}, gradients within {of_gradient:.0e} in {dtype}"
    if max(of_loss, of_gradient) <= ROUNDING[dtype]:
        return Finding("layouts", OK, f"{text}: they agree", facts=facts)
    return Finding("layouts", PROBLEM, f"{text}: they do not agree", f"set orpo.layout=padded; {BUG_REPORT}", facts)
