"""`python -m orpo_lite.doctor`: check whether training works on this machine, and say what to do where it does not."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import typer
from rich.markup import escape

from orpo_lite import __version__
from orpo_lite.common.console import console
from orpo_lite.common.credentials import without_secrets
from orpo_lite.train import doctor_machine as machine
from orpo_lite.train.doctor_machine import NOTE, OK, PROBLEM, Finding, in_words

BUG_REPORT = "if this stays, add the output of python -m orpo_lite.doctor --json to a bug report"
COLORS = {OK: "green", NOTE: "yellow", PROBLEM: "bold red"}
"""Of the verdicts, from good to bad."""
ROUNDING = {"torch.float32": 1e-3, "torch.float16": 3e-2, "torch.bfloat16": 5e-2}
"""Largest error by dtype, relative to the norm, that is rounding."""
NF4_ERROR = 0.0926
"""Relative error of the probe's matrix when each value is replaced by the nearest of NF4's codes times its block's scale."""
LIMIT = 300
"""Seconds that a probe may take for its next finding: imports take minutes from a cold network disk."""
FAST = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION")
"""torch's attention kernels whose memory grows linearly with length, by their SDPBackend names."""
STEPS, ROWS, COMPARED = 10, 80, 6
"""Optimizer steps of 8 pairs, pairs that they are drawn from, and pairs that the layouts are compared on."""
MIN_DROP = 0.1
"""Share of the loss that these steps must remove; they remove about a third."""
SCALE = 256.0
"""Factor on the loss before its gradients are compared, as float16's loss scaling would apply."""


@dataclass(frozen=True)
class Probe:
    """Something to check.

    Args:
        look: a function of a module, which makes findings; whatever it raises becomes a finding too.
        needs: findings whose problems make this probe pointless.
    """

    name: str
    look: Callable[[], Iterable[Finding]]
    needs: tuple[str, ...] = ()


def command(
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object, for bug reports")] = False,
    no_self_test: Annotated[
        bool, typer.Option("--no-self-test", help="only look; leave out the short training run")
    ] = False,
) -> None:
    """Check this machine for training: packages, memory, card, kernels, hub; then a self-test of some 20 seconds."""
    started, found = time.monotonic(), list[Finding]()
    if not as_json:
        console.print(f"orpo-lite {__version__}; importing the libraries can take a minute")
    for finding in examine(PROBES if no_self_test else [*PROBES, SELF_TEST]):
        found.append(finding)
        if not as_json:
            show(finding)
    worst = max((finding.verdict for finding in found), key=list(COLORS).index)
    seconds = time.monotonic() - started
    if as_json:
        checks = [vars(finding) for finding in found]
        report = {"orpo_lite": __version__, "verdict": worst, "seconds": round(seconds, 1), "checks": checks}
        print(without_secrets(json.dumps(report, indent=1)))
    else:
        console.print(f"\n{summary(found)} ({seconds:.0f} s)", soft_wrap=True)
    if worst == PROBLEM:
        raise typer.Exit(1)


def show(finding: Finding) -> None:
    """Print one line: verdict, name, what was found, and the remedy."""
    text = f"{finding.text} -> {finding.remedy}" if finding.remedy else finding.text
    verdict = f"[{COLORS[finding.verdict]}]{finding.verdict:<7}[/]"
    name, text = (escape(without_secrets(words)) for words in (finding.name, text))
    console.print(f"{verdict}  [bold]{name}[/]: {text}", soft_wrap=True)


def summary(found: list[Finding]) -> str:
    """Sum up the findings in a sentence."""
    verdicts = [finding.verdict for finding in found]
    problems, notes = verdicts.count(PROBLEM), f"{verdicts.count(NOTE)} note(s)"
    if problems:
        return f"{problems} problem(s) and {notes}: fix the problems first"
    trained = any(finding.name == "training" and finding.verdict == OK for finding in found)
    return f"No problem, {notes}: " + ("training works here" if trained else "nothing speaks against training here")


# ---- probes in another process ---------------------------------------------------------------------------------------


def examine(probes: list[Probe]) -> Iterator[Finding]:
    """Run the probes in a child process, since what they look at may raise, hang, or take its process down.

    The last two end the examination, with a finding that has the name of the probe.
    """
    # forking is faster, and safe as long as this process has not used CUDA
    context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    receiver, sender = context.Pipe(duplex=False)
    sys.stdout.flush()
    name, reason = probes[0].name, f"gave no answer within {LIMIT} s"
    # files that a killed probe leaves behind are removed with this folder
    with tempfile.TemporaryDirectory(prefix="orpo_lite_", ignore_cleanup_errors=True) as scratch:
        process = context.Process(target=look, args=(probes, sender, scratch), daemon=True)
        process.start()
        sender.close()
        try:
            while receiver.poll(LIMIT):
                message = receiver.recv()
                if message is None:
                    return
                if isinstance(message, Finding):
                    yield message
                else:
                    name = message
        except EOFError:
            process.join()
            code = process.exitcode
            reason = f"ended its process ({signal.strsignal(-code) if code < 0 else f'exit status {code}'})"
        finally:
            process.kill()
            process.join()
    yield Finding(name, PROBLEM, f"{reason}; the checks after it were left out", BUG_REPORT)


def look(probes: list[Probe], sender: Any, scratch: str) -> None:
    """Run the probes in this child process, whose output is discarded; send the name of each, then its findings; last None."""
    sys.stdout = sys.stderr = nowhere = open(os.devnull, "w", encoding="utf-8")
    tempfile.tempdir = scratch
    for stream in (1, 2):  # the output of native code
        os.dup2(nowhere.fileno(), stream)
    broken: set[str] = set()
    for probe in probes:
        sender.send(probe.name)
        if cause := next((name for name in probe.needs if name in broken), None):
            broken.add(probe.name)
            sender.send(Finding(probe.name, NOTE, f"skipped, since there is a problem with {cause}"))
            continue
        for finding in findings(probe):
            broken |= {finding.name} if finding.verdict == PROBLEM else set()
            sender.send(finding)
    sender.send(None)


def findings(probe: Probe) -> Iterator[Finding]:
    """Run a probe; whatever it raises is a finding too."""
    try:
        yield from probe.look()
    except BaseException as error:  # a library may call sys.exit
        frames = traceback.extract_tb(error.__traceback__)[-8:]
        where = [f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}" for frame in frames]
        yield Finding(probe.name, PROBLEM, in_words(error), BUG_REPORT, {"traceback": where})


# ---- the self-test: what training computes, against its definition ---------------------------------------------------


def relative(got: Any, expected: Any) -> float:
    """Compute the norm of the difference over the norm; infinite where the result is not finite."""
    expected = expected.detach().cpu().double()
    difference = float((got.detach().cpu().double() - expected).norm() / expected.norm())
    return difference if math.isfinite(difference) else math.inf


def quantizing() -> Iterator[Finding]:
    """Quantize a matrix to NF4, then run a layer of it forward and backward."""
    from orpo_lite.model.precision import bitsandbytes_unavailable, choose_precision, default_device

    if why := bitsandbytes_unavailable():
        remedy = "pip install -U --force-reinstall --no-deps bitsandbytes, or model.quantization=none"
        yield Finding("bitsandbytes", NOTE if sys.platform == "darwin" else PROBLEM, why, remedy)
        return
    device = default_device()
    dtype = choose_precision(device=device).dtype
    errors = four_bit_errors(device, dtype)
    layer = max(errors["forward"], errors["backward"])
    right = abs(errors["quantizing"] / NF4_ERROR - 1) <= 0.03 and layer < ROUNDING[str(dtype)]
    off = ", ".join(f"{what} {error:.1%}" for what, error in errors.items())
    text = f"{'right' if right else 'wrong'} on {device.type}: errors of {off}, where NF4's is {NF4_ERROR:.1%}"
    remedy = (
        ""
        if right
        else "pip install -U bitsandbytes, with a torch of the same CUDA; until then model.quantization=none"
    )
    yield Finding("bitsandbytes", OK if right else PROBLEM, text, remedy, errors)


def four_bit_errors(device: Any, dtype: Any) -> dict[str, float]:
    """Compute the relative errors of a matrix in NF4, of a layer's outputs with it, and of the gradient of its inputs."""
    import torch

    bnb: Any = importlib.import_module("bitsandbytes")

    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(96, 256, generator=generator) * 0.02).to(dtype)
    rows = torch.randn(40, 256, generator=generator).to(dtype)
    layer: Any = bnb.nn.Linear4bit(256, 96, bias=False, compute_dtype=dtype, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    layer.to(device)  # quantizes the weights, and the scales too, as recipes do
    got = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float().cpu()
    x = rows.to(device).requires_grad_()
    out = layer(x)
    out.sum().backward()
    single = layer(x[:1].detach())  # generation uses another kernel than training
    expected = rows.float() @ got.T
    return {
        "quantizing": relative(got, weight.float()),
        "forward": max(relative(out, expected), relative(single, expected[:1])),
        "backward": relative(x.grad, got.sum(0).expand(40, 256)),
    }


def computing() -> Iterator[Finding]:
    """Name the dtype that training takes, and the fast attention kernels that work for packed pairs in it."""
    from orpo_lite.model.precision import choose_precision, default_device

    device = default_device()
    precision = choose_precision(device=device)
    yield Finding("precision", OK, precision.why)
    tried = {kernel: kernel_error(kernel, device, precision.dtype) for kernel in FAST}
    fast = [kernel.removesuffix("_ATTENTION").lower() for kernel, error in tried.items() if error is None]
    text, remedy = f"fast kernels for packed pairs: {', '.join(fast) or 'none'}", ""
    if device.type == "cuda" and not fast:
        remedy = "memory grows with the square of a pair's length: keep data.max_length short, or update torch"
    yield Finding("attention", NOTE if remedy else OK, text, remedy, tried)


def kernel_error(kernel: str, device: Any, dtype: Any) -> str | None:
    """Run an attention kernel forward and backward as for a packed branch, whose queries are at the end of their keys;
    return why it does not work, or None. The self-test finds out whether results are right."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right

    q, k, v = (torch.ones(1, 8, rows, 64, device=device, dtype=dtype, requires_grad=True) for rows in (64, 160, 160))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # reasons why a kernel is not available
            with sdpa_kernel(getattr(SDPBackend, kernel)):
                mask: Any = causal_lower_right(64, 160)
                torch.nn.functional.scaled_dot_product_attention(q, k, v, mask).sum().backward()
    except Exception as error:
        return in_words(error, 120)
    return None


def training() -> Iterator[Finding]:
    """Train the quickstart recipe for a few steps, and compare its layouts on the adapter that results."""
    import torch
    from datasets import Dataset

    from orpo_lite.model import attach_adapter, load_base, load_tokenizer
    from orpo_lite.recipe import Recipe
    from orpo_lite.recipe.loading import resolve_path
    from orpo_lite.trainer.config_from_recipe import DEFAULTS, arguments, checkpointed

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
            rows = Dataset.from_list([json.loads(line) for line in islice(lines, ROWS)])
        how = f"{facts.quantization}, {facts.precision.why}"
        started = time.monotonic()
        text, wrong = train(model, args, rows, tokenizer)
        text = f"{how}: {wrong or text}; {time.monotonic() - started:.0f} s"
        yield Finding("training", PROBLEM if wrong else OK, text, BUG_REPORT if wrong else "")
        text, wrong = compare_layouts(model, args, rows.select(range(COMPARED)), tokenizer, facts.precision.dtype)
        remedy = f"set orpo.layout=padded; {BUG_REPORT}" if wrong else ""
        yield Finding("layouts", PROBLEM if wrong else OK, text, remedy)


def train(model: Any, args: Any, rows: Any, tokenizer: Any) -> tuple[str, str]:
    """Train: the loss must be finite and fall, and only the adapter may change; return what happened, and what is wrong."""
    import torch

    from orpo_lite.trainer.nonfinite_guard import NonFinite
    from orpo_lite.trainer.trainer import ORPOTrainer

    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    trainer = ORPOTrainer(model, args, None, rows, None, tokenizer)
    trainer.guard.folder = None
    try:
        trainer.train()
    except NonFinite as error:
        return "", f"not finite, {str(error).splitlines()[0]}"
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    changed = [name for name, tensor in tensors.items() if not torch.equal(before[name], tensor.detach())]
    frozen = [name for name in changed if not tensors[name].requires_grad]
    first, last = sum(losses[:2]) / 2, sum(losses[-2:]) / 2
    text, wrong = f"loss {first:.2f} to {last:.2f} in {len(losses)} steps, only the adapter changed", ""
    if frozen:
        wrong = f"{len(frozen)} frozen tensor(s) changed, such as {min(frozen)}"
    elif not changed:
        wrong = f"the adapter did not change in {STEPS} steps"
    elif not last <= (1 - MIN_DROP) * first:
        wrong = f"{text}, which should have fallen"
    return text, wrong


def compare_layouts(model: Any, args: Any, rows: Any, tokenizer: Any, dtype: Any) -> tuple[str, bool]:
    """Compare loss and gradient of the same pairs in all three layouts; return what was found, and whether it is wrong."""
    import torch

    from orpo_lite.model import autocast
    from orpo_lite.trainer.trainer import ORPOTrainer

    args.per_device_train_batch_size = len(rows)
    outcomes: dict[str, tuple[Any, Any]] = {}
    model.train()
    for layout in ("padded", "packed", "shared"):
        args.layout = layout
        trainer = ORPOTrainer(model, args, None, rows, None, tokenizer)
        batch = trainer.data_collator(list(trainer.train_dataset))
        model.zero_grad()
        with autocast(model):
            loss = trainer.compute_loss(model, batch)
        (loss * SCALE).backward()
        gradient = torch.cat([p.grad.flatten().double().cpu() for p in model.parameters() if p.grad is not None])
        outcomes[layout] = loss, gradient / SCALE
    padded = outcomes.pop("padded")
    of_loss, of_gradient = (max(relative(other[n], padded[n]) for other in outcomes.values()) for n in (0, 1))
    wrong = not max(of_loss, of_gradient) <= ROUNDING[str(dtype)]
    text = f"shared, packed and padded {'do not agree' if wrong else 'agree'}: loss within {of_loss:.0e}, gradients within {of_gradient:.0e}"
    return text, wrong


PROBES = [
    Probe("python", machine.python),
    Probe("packages", machine.packages),
    Probe("memory", machine.memory),
    Probe("disk", machine.disk),
    Probe("hub", machine.hub),
    Probe("token", machine.token),
    Probe("torch", machine.devices),
    Probe("libraries", machine.libraries, needs=("torch",)),
    Probe("bitsandbytes", quantizing, needs=("torch", "libraries")),
    Probe("attention", computing, needs=("torch", "libraries")),
]
SELF_TEST = Probe("training", training, needs=("torch", "libraries", "bitsandbytes"))
