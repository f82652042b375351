"""`python -m orpo_lite.doctor`: check whether training works on this machine, and say what to do where it does not."""

import contextlib
import faulthandler
import importlib
import importlib.metadata
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from orpo_lite import __version__
from orpo_lite.common.console import console
from orpo_lite.common.credentials import without_secrets
from orpo_lite.common.text import counted, format_gb

OK, NOTE, PROBLEM = "ok", "note", "problem"
"""A note is worth knowing and stops nothing; with a problem, training cannot work as it should."""
COLORS = {OK: "green", NOTE: "yellow", PROBLEM: "bold red"}
"""Of the verdicts, from good to bad."""
BUG_REPORT = "if this stays, add the output of python -m orpo_lite.doctor --json to a bug report"
INSTALL_TORCH = "install torch for your CUDA: https://pytorch.org/get-started/locally"
LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "peft", "orpo_lite.train.pipeline")
UNNEEDED = ("torchvision", "torchaudio", "flash_attn", "xformers")
"""Packages that libraries import where they are installed, and fail with where they do not fit torch."""
NEEDED = ("torch", "libraries", "bitsandbytes")
"""Findings without which the probes after them are pointless."""


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's: what was checked, the verdict, what was found and what to do about it."""

    name: str
    verdict: str
    text: str
    remedy: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    """Plain values for --json; bytes and seconds."""


def command(
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object, for bug reports")] = False,
    no_self_test: Annotated[
        bool, typer.Option("--no-self-test", help="only look; leave out the short training run")
    ] = False,
) -> None:
    """Check this machine for training: packages, memory, card, hub; then a self-test of some 20 seconds."""
    faulthandler.enable(sys.__stderr__ or 2)  # native code that crashes leaves a traceback, which names the probe
    started, found = time.monotonic(), list[Finding]()
    if not as_json:
        console.print(f"orpo-lite {__version__}; importing the libraries can take a minute")
    for finding in examine(PROBES if no_self_test else [*PROBES, training]):
        found.append(finding)
        if not as_json:
            text = f"{finding.text} -> {finding.remedy}" if finding.remedy else finding.text
            name, text = (escape(without_secrets(words)) for words in (finding.name, text))
            verdict = f"[{COLORS[finding.verdict]}]{finding.verdict:<7}[/]"
            console.print(f"{verdict}  [bold]{name}[/]: {text}", soft_wrap=True)
    seconds, verdicts = time.monotonic() - started, [finding.verdict for finding in found]
    worst = max(verdicts, key=list(COLORS).index)
    if as_json:
        report = {"orpo_lite": __version__, "verdict": worst, "seconds": round(seconds, 1)}
        print(without_secrets(json.dumps(report | {"checks": [vars(finding) for finding in found]}, indent=1)))
    else:
        summary = f"{counted(verdicts.count(NOTE), 'note')}: training {'should work' if no_self_test else 'works'} here"
        if problems := verdicts.count(PROBLEM):
            summary = f"{counted(problems, 'problem')}: fix what is one first"
        console.print(f"\n{summary} ({seconds:.0f} s)", soft_wrap=True)
    if worst == PROBLEM:
        raise typer.Exit(1)


def examine(probes: Iterable[Callable[[], Iterable[Finding]]]) -> Iterator[Finding]:
    """Run functions that make findings, up to a problem with something NEEDED; whatever they raise is a finding too."""
    missing: str | None = None
    for probe in probes:
        name, found = probe.__name__, list[Finding]()
        if missing:
            yield Finding(name, NOTE, f"skipped, since there is a problem with {missing}")
            continue
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                found.extend(probe())
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a library may call sys.exit
            lines = traceback.format_exc().splitlines()[-20:]
            found.append(Finding(name, PROBLEM, in_words(error), BUG_REPORT, {"traceback": lines}))
        yield from found
        missing = next((one.name for one in found if one.verdict == PROBLEM and one.name in NEEDED), None)


def in_words(error: BaseException, limit: int = 300) -> str:
    """Describe an exception on one line."""
    text = " ".join(str(error).split())
    return type(error).__name__ + (f": {text[:limit]}" if text else "") + ("..." if len(text) > limit else "")


def packages() -> Iterator[Finding]:
    """Report the interpreter and the packages that shape a run."""
    yield Finding("python", OK, f"{platform.python_version()} on {platform.platform()}, {os.cpu_count()} cores")
    names = ("torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes")
    found: dict[str, str] = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if missing := set(names) - found.keys():
        yield Finding("packages", PROBLEM, f"missing: {', '.join(sorted(missing))}", "pip install orpo-lite", found)
    else:
        yield Finding("packages", OK, ", ".join(f"{name} {version}" for name, version in found.items()), facts=found)


def libraries() -> Iterator[Finding]:
    """Import the libraries: one package of a wrong build (torchvision, flash-attn) can break all of transformers."""
    for name in LIBRARIES:
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:
            trail = str(error) + "".join(frame.filename for frame in traceback.extract_tb(error.__traceback__))
            culprit = next((each for each in UNNEEDED if each in trail), None)
            remedy = f"pip uninstall {culprit}, which is not needed here" if culprit else f"pip install -U {name}"
            if "bitsandbytes" in trail:
                remedy = "repair bitsandbytes, or uninstall it and set model.quantization=none"
            yield Finding("libraries", PROBLEM, f"{name} cannot be imported: {in_words(error)}", remedy)
            return
    yield Finding("libraries", OK, "all can be imported")


def memory() -> Iterator[Finding]:
    """Check the host's memory, which holds torch with CUDA, the data and a matrix in transit."""
    import psutil

    host = psutil.virtual_memory()
    verdict = PROBLEM if host.available < 2e9 else NOTE if host.available < 6e9 else OK
    remedy = "" if verdict == OK else "close other programs; python -m orpo_lite.plan says what a recipe takes of it"
    text = f"{format_gb(host.available)} free of {format_gb(host.total)}"
    yield Finding("memory", verdict, text, remedy, {"total": host.total, "free": host.available})


def hub() -> Iterator[Finding]:
    """Check that the hub answers huggingface_hub's own client, to which no token is sent, and whether there is a token."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import get_session

    text, remedy = f"{constants.ENDPOINT} answers", ""
    try:
        answer = get_session().get(f"{constants.ENDPOINT}/api/models?limit=1", timeout=5)
        failure = "" if answer.status_code in (200, 404) else f"answers with status {answer.status_code}"
    except Exception as error:
        failure = f"cannot be reached ({in_words(error, 120)})"
    if constants.HF_HUB_OFFLINE:
        text, remedy = "not asked, since HF_HUB_OFFLINE is set", "unset it to download"
    elif failure:
        text = f"{constants.ENDPOINT} {failure}"
        remedy = "check HF_ENDPOINT, network, proxy and firewall; models that are on this machine can be trained on"
    yield Finding("hub", NOTE if remedy else OK, text, remedy)
    if get_token():
        in_environment = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")
        yield Finding("token", OK, f"present, {'in HF_TOKEN' if in_environment else 'saved by hf auth login'}")
    else:
        remedy = "gated models (Llama, Gemma) and push need one: hf auth login, or set HF_TOKEN"
        yield Finding("token", NOTE, "none", remedy)


def driver() -> Iterator[Finding]:
    """Check torch's build, that there is a card, and that torch and the driver fit together."""
    try:
        import torch
    except (Exception, SystemExit) as error:
        yield Finding("torch", PROBLEM, f"cannot be imported: {in_words(error)}", INSTALL_TORCH)
        return
    gpu = f"CUDA {torch.version.cuda}" if torch.version.cuda else torch.version.hip and f"ROCm {torch.version.hip}"
    yield Finding("torch", OK, f"{torch.__version__}, built {f'for {gpu}' if gpu else 'without CUDA'}")
    said = nvidia_smi()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    why = "".join(f": {' '.join(str(one.message).split())}" for one in warned)
    if available:
        yield Finding("driver", OK, f"{said or 'version unknown'}, and torch can use it")
    elif os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") and (said or gpu):
        text = "CUDA_VISIBLE_DEVICES hides every card"
        yield Finding("driver", NOTE, text, "unset it to train on the card")
    elif not said:
        remedy = "the quickstart recipe works on the CPU; a 7B model needs a card"
        if "COLAB_RELEASE_TAG" in os.environ:
            remedy = "Runtime > Change runtime type > T4 GPU"
        yield Finding("driver", NOTE, "no NVIDIA card here: training would run on the CPU", remedy)
    elif not gpu:
        text = f"there is a card ({said}), but this torch is built for the CPU alone"
        yield Finding("driver", PROBLEM, text, f"pip uninstall torch, then {INSTALL_TORCH}")
    else:
        remedy = f"update the NVIDIA driver, or {INSTALL_TORCH}; after an update, restart the machine or container"
        yield Finding("driver", PROBLEM, f"there is a card ({said}), but CUDA does not start{why}", remedy)


def nvidia_smi() -> str:
    """Return what the driver's program says: name and driver version of each card, or why it fails; empty without a card."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    query = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi: {in_words(error)}"
    said = " ".join(done.stdout.split())[:200]
    # a program left over in an image, or a runtime without a card
    absent = any(words in said.lower() for words in ("couldn't communicate", "no devices were found"))
    return "" if absent and not os.path.exists("/dev/nvidia0") else said or f"nvidia-smi: {done.returncode}"


def card() -> Iterator[Finding]:
    """Check the card that training takes: what it is, how much of it is free, and whether this torch has code for it."""
    import torch

    if not torch.cuda.is_available():
        return
    major, minor = torch.cuda.get_device_capability()
    free, total = torch.cuda.mem_get_info()
    text = f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}, {format_gb(free)} free of {format_gb(total)}"
    verdict, remedy = OK, ""
    try:
        (torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")).sum().item()
    except Exception as error:
        verdict, text = PROBLEM, f"{text}; a matrix product fails: {in_words(error)}"
        remedy = f"this torch has code for {', '.join(torch.cuda.get_arch_list())}: {INSTALL_TORCH}"
    yield Finding("card", verdict, text, remedy, {"total": total, "free": free})


def precision() -> Iterator[Finding]:
    """Name the dtype that training takes, and check that there is something to quantize with."""
    from orpo_lite.model.precision import bitsandbytes_unavailable, choose_precision

    yield Finding("precision", OK, choose_precision().why)
    if why := bitsandbytes_unavailable():
        remedy = "pip install -U --force-reinstall --no-deps bitsandbytes, or model.quantization=none"
        yield Finding("bitsandbytes", NOTE if sys.platform == "darwin" else PROBLEM, why, remedy)
    else:
        yield Finding("bitsandbytes", OK, f"{importlib.metadata.version('bitsandbytes')} works with this torch")


def training() -> Iterator[Finding]:
    """Train the quickstart recipe for a few steps: the loss must be finite and fall."""
    from orpo_lite.recipe import Recipe
    from orpo_lite.train import pipeline
    from orpo_lite.trainer.run_record import read_metrics

    short = ["training.max_steps=10", "training.logging_steps=1", "data.max_rows=8", "data.max_eval_rows=24"]
    recipe = Recipe.load("quickstart", [*short, "evaluation.samples=2", "evaluation.max_new_tokens=4"])
    with tempfile.TemporaryDirectory(prefix="orpo_lite_", ignore_cleanup_errors=True) as scratch:
        recipe.training["output_dir"] = str(Path(scratch) / "run")
        run: Any = pipeline.run(recipe)
        losses = [line["loss"] for line in read_metrics(run.folder / "metrics.jsonl", []) if "loss" in line]
    record = run.record
    base, layout = record.base_model, record.layout
    first, last = sum(losses[:2]) / 2, sum(losses[-2:]) / 2
    text, wrong = f"loss {first:.2f} to {last:.2f} in {len(losses)} steps", ""
    if record.warnings:
        wrong = record.warnings[0].message
    elif not last <= 0.9 * first:  # ten steps on the same 8 pairs remove about 40% of it
        wrong = f"{text}, which should have fallen"
    text = f"{base.quantization}, {base.dtype} on {record.device}: {wrong or text}"
    yield Finding("training", PROBLEM if wrong else OK, text, BUG_REPORT if wrong else "", {"losses": losses})
    remedy = f"padded batches are right, and slower; {BUG_REPORT}" if layout["name"] == "padded" else ""
    yield Finding("layout", NOTE if remedy else OK, f"{layout['name']}: {layout['why']}", remedy)


PROBES = [packages, memory, hub, driver, card, libraries, precision]
