"""The real thing, small: the embedded model learns, the layouts agree, and a plan is held against what was taken."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import math
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

from orpo_lite.train.doctor_findings import BUG_REPORT, NOTE, OK, PROBLEM, Finding
from orpo_lite.train.doctor_kernels import relative

STEPS, ROWS, COMPARED = 10, 80, 6
"""Optimizer steps of 8 pairs, pairs that they are drawn from, and pairs that the layouts are compared on."""
FALL = 0.1
"""Least share of the loss that these steps must take off; they take off about a third."""
AGREEMENT = {"float32": (1e-4, 1e-3), "float16": (5e-3, 3e-2), "bfloat16": (1e-2, 5e-2)}
"""Largest relative difference between layouts by the dtype that computes: of the loss, and of the gradient."""
SCALE = 256.0
"""What the loss is multiplied by before its gradients are compared, as float16's loss scaling would."""
CARD_MODEL: dict[str, Any] = {"vocab_size": 16000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4,
              "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64}  # fmt: skip
"""A model whose step takes some 0.5 GB of a card, most of it where a large model's goes."""


def learning() -> Iterator[Finding]:
    """A QLoRA run of the quickstart recipe, cut short, and its layouts on the adapter that came out."""
    import torch

    from orpo_lite.model import attach_adapter, load_base, load_tokenizer
    from orpo_lite.recipe import Recipe
    from orpo_lite.recipe.loading import resolve_path
    from orpo_lite.trainer.config_from_recipe import DEFAULTS, arguments, checkpointed

    started = time.monotonic()
    recipe = Recipe.load("quickstart", [f"model.quantization={quantisation()}"])
    recipe.training = DEFAULTS | recipe.training | {"max_steps": STEPS, "logging_steps": 1, "disable_tqdm": True}
    tokenizer = load_tokenizer(recipe.model)
    with (
        tempfile.TemporaryDirectory() as scratch,
        mock.patch("datasets.config.HF_DATASETS_CACHE", scratch),  # tokens of the self-test are no one's cache
        _quiet(),
    ):
        base, facts = load_base(recipe.model, tokenizer)
        count = checkpointed(recipe, base.device)
        torch.manual_seed(0)
        model: Any = attach_adapter(base, recipe.adapter, tokenizer=tokenizer, checkpointing=count != 0)
        args = arguments(recipe, Path(scratch), facts, has_eval=False, checkpointing=count)
        with open(resolve_path("builtin:quickstart/train.jsonl"), encoding="utf-8") as lines:
            rows = [json.loads(line) for line in islice(lines, ROWS)]
        yield train(model, args, rows, tokenizer, f"{facts.quantization}, {facts.precision.why}", started)
        yield layouts(model, args, rows[:COMPARED], tokenizer, str(facts.precision.dtype).removeprefix("torch."))


def quantisation() -> str:
    """nf4 wherever bitsandbytes is."""
    return "nf4" if importlib.util.find_spec("bitsandbytes") else "none"


def train(model: Any, args: Any, rows: list[dict], tokenizer: Any, how: str, started: float) -> Finding:
    """Train: the loss must be finite and fall, the adapter change, and nothing else."""
    import torch
    from datasets import Dataset

    from orpo_lite.trainer.nonfinite_report import NonFinite
    from orpo_lite.trainer.trainer import ORPOTrainer

    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    trained = {name for name, tensor in tensors.items() if tensor.requires_grad}
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    trainer = ORPOTrainer(model, args, None, Dataset.from_list(rows), None, tokenizer)
    trainer.reproducer_folder = None
    try:
        trainer.train()
    except NonFinite as error:
        found = str(error).partition("\n")[0]
        return Finding("training", PROBLEM, f"{how}: not finite, {found}", f"see the lines above; {BUG_REPORT}")
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    changed = {name for name, tensor in tensors.items() if not torch.equal(before[name], tensor.detach())}
    seconds = time.monotonic() - started
    name, facts = "training", {"losses": losses, "seconds": round(seconds, 1)}
    remedy = f"see the lines above; {BUG_REPORT}"
    if len(losses) != STEPS or not all(map(math.isfinite, losses)):
        return Finding(name, PROBLEM, f"{how}: the loss is not finite ({losses})", remedy, facts)
    first, last = sum(losses[:2]) / 2, sum(losses[-2:]) / 2
    if changed - trained:
        text = f"{how}: {len(changed - trained)} frozen tensor(s) changed, {min(changed - trained)} for one"
        return Finding(name, PROBLEM, text, remedy, facts)
    if not changed:
        return Finding(name, PROBLEM, f"{how}: the adapter did not change in {STEPS} steps", remedy, facts)
    text = f"{how}: loss {first:.2f} to {last:.2f} in {STEPS} steps"
    if last > (1 - FALL) * first:
        return Finding(name, PROBLEM, f"{text}, which should have fallen", remedy, facts)
    return Finding(name, OK, f"{text}, only the adapter changed; {seconds:.0f} s", facts=facts)


def layouts(model: Any, args: Any, rows: list[dict], tokenizer: Any, dtype: str) -> Finding:
    """Loss and gradient of the same pairs in all three layouts."""
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
    most_loss, most_gradient = AGREEMENT[dtype]
    if of_loss <= most_loss and of_gradient <= most_gradient:  # false for NaN
        return Finding("layouts", OK, f"{text}: they agree", facts=facts)
    return Finding("layouts", PROBLEM, f"{text}: they do not agree", f"set orpo.layout=padded; {BUG_REPORT}", facts)


def planning() -> Iterator[Finding]:
    """A plan of a small model's step, held against the step."""
    from orpo_lite.model.precision import default_device

    device = default_device()
    if device.type == "cuda":
        yield from on_card()
    elif device.type == "cpu":
        yield on_cpu()
    else:
        yield Finding("plan", NOTE, f"plans are not made for {device.type}; nothing to compare")


def on_cpu() -> Finding:
    """As torch's profiler sees it."""
    from tests.benchmarks.plan_accuracy import TOLERANCE, UNDER, Case, compare

    held = compare(Case("llama", quantisation(), length=96))
    return judged(held.planned, held.measured, UNDER, TOLERANCE)


def judged(planned: int, measured: int, under: float, over: float, **more: int) -> Finding:
    """A plan beside what was measured, in bytes; how far below and above it may be."""
    error = planned / measured - 1
    facts = {"planned": planned, "measured": measured, "error": error} | more
    text = f"{planned / 1e6:.1f} MB planned, {measured / 1e6:.1f} MB taken: {error:+.1%}"
    if -under <= error <= over:
        return Finding("plan", OK, text, facts=facts)
    remedy = "leave the plan as much room, and send the output of python -m orpo_lite.doctor --json"
    return Finding("plan", NOTE, text, remedy, facts)


def on_card() -> Iterator[Finding]:
    """As CUDA's allocator and the driver see it; and what the plan's assumptions would have to be on this card."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, LlamaConfig

    from orpo_lite.model import attach_adapter, load_base, load_tokenizer
    from orpo_lite.model.precision import choose_precision
    from orpo_lite.plan.allocations import BASE, CONSTANTS, ENDS, OPTIMIZER
    from orpo_lite.plan.kernels import Target
    from orpo_lite.plan.predict import CONTEXT, LIBRARIES, MARGIN, plan
    from orpo_lite.plan.step import longest_pair
    from orpo_lite.recipe import Recipe
    from orpo_lite.trainer.config_from_recipe import arguments, checkpointed
    from orpo_lite.trainer.trainer import ORPOTrainer
    from tests.benchmarks.plan_accuracy import TOLERANCE, UNDER, Case

    tokenizer = load_tokenizer(Recipe.load("quickstart", []).model)
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        folder, device = Path(scratch) / "base", torch.device("cuda", torch.cuda.current_device())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            small = AutoModelForCausalLM.from_config(LlamaConfig(**CARD_MODEL), dtype=choose_precision().dtype)
            small.save_pretrained(folder)
            del small
        recipe = Case("llama", quantisation(), dtype="auto", pairs=4, length=512).recipe(folder)
        del recipe.training["use_cpu"]
        made = plan(recipe, Target("cuda", torch.cuda.get_device_capability(device)))
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        held, kept = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        base, facts = load_base(recipe.model)
        count = checkpointed(recipe, base.device)
        model: Any = attach_adapter(base, recipe.adapter, checkpointing=count != 0)
        args = arguments(recipe, Path(scratch), facts, has_eval=False, checkpointing=count)
        prompt, answer = longest_pair(recipe.data)
        row: dict[str, Any] = {"chosen_ids": [1] * prompt + [2] * answer, "rejected_ids": [1] * prompt + [3] * answer}
        row |= {"chosen_start": prompt, "rejected_start": prompt}
        rows = Dataset.from_list([row] * (2 * args.per_device_train_batch_size * args.gradient_accumulation_steps))
        ORPOTrainer(model, args, None, rows, None, tokenizer).train()
        torch.cuda.synchronize(device)
        allocated = torch.cuda.max_memory_allocated(device) - held
        reserved = torch.cuda.max_memory_reserved(device) - kept
        free, total = torch.cuda.mem_get_info(device)
        outside = total - free - torch.cuda.memory_reserved(device)

    yield judged(made.peak, allocated, UNDER, TOLERANCE)
    parts = made.phases[made.fullest]
    moving = max(1, made.peak - sum(parts[part] for part in (BASE, CONSTANTS, ENDS, OPTIMIZER)))
    wasted = max(0, reserved - allocated)
    assumed = made.assumed
    measures = {"reserved": reserved, "fragmentation": wasted / moving, "outside_allocator": outside}
    fixed = assumed[CONTEXT] + assumed[LIBRARIES]
    text = (
        f"the allocator reserves {wasted / 1e6:.0f} MB more than it fills, {wasted / moving:.0%} of what comes and goes "
        f"(assumed: {assumed[MARGIN] / moving:.0%}); {outside / 1e6:.0f} MB are taken outside of it, by CUDA and other "
        f"programs (assumed: {fixed / 1e6:.0f} MB)"
    )
    if wasted <= assumed[MARGIN] and outside <= fixed:
        yield Finding("plan's margins", OK, text, facts=measures)
    else:
        remedy = (
            "a plan that fits by less than the difference may not: send the output of python -m orpo_lite.doctor --json"
        )
        yield Finding("plan's margins", NOTE, text, remedy, measures)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    from tests.benchmarks.plan_accuracy import quiet

    with quiet():
        yield
