"""Probes of the machine: Python, packages, memory, disk, hub and token; torch, driver and cards."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orpo_lite.common.text import format_gb

OK, NOTE, PROBLEM = "ok", "note", "problem"
"""A note is worth knowing and stops nothing; with a problem, training cannot work as it should."""
LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "peft", "orpo_lite.train.pipeline")
UNNEEDED = ("torchvision", "torchaudio", "flash_attn", "xformers")
"""Packages that libraries import where they are installed, and fail with where they do not fit torch."""
RAM = (2e9, 6e9)
"""Free bytes of the host below which memory is a problem, or a note: torch with CUDA, the data, a matrix in transit."""
HUB_SECONDS = 5
IN_USE = 1.5e9
"""Bytes in use on a card that the CUDA context of one process does not explain."""
INSTALL_TORCH = "install torch for your CUDA: https://pytorch.org/get-started/locally"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's: what was checked, the verdict, what was found and what to do about it."""

    name: str
    verdict: str
    text: str
    remedy: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    """Plain values for --json; bytes and seconds."""


def in_words(error: BaseException, limit: int = 300) -> str:
    """Describe an exception on one line."""
    text = " ".join(str(error).split())
    return type(error).__name__ + (f": {text[:limit]}" if text else "") + ("..." if len(text) > limit else "")


def by_size(free: float, least: float, little: float) -> str:
    """Judge free bytes: a problem below `least`, a note below `little`."""
    return PROBLEM if free < least else NOTE if free < little else OK


def python() -> Iterator[Finding]:
    """Report the interpreter and the operating system."""
    release, colab = platform.release(), ", Colab" if "COLAB_RELEASE_TAG" in os.environ else ""
    system = f"{platform.system()} {release}" + (" (WSL)" if "microsoft" in release.lower() else "") + colab
    text = f"{platform.python_version()} on {system}, {platform.machine()}, {os.cpu_count()} cores"
    yield Finding("python", OK, text)


# ---- packages --------------------------------------------------------------------------------------------------------


def packages() -> Iterator[Finding]:
    """Compare the installed versions with those that orpo-lite declares."""
    from packaging.requirements import Requirement

    try:
        declared = [Requirement(line) for line in importlib.metadata.requires("orpo-lite") or ()]
    except importlib.metadata.PackageNotFoundError:
        remedy = "pip install -c constraints.txt ."
        yield Finding("packages", NOTE, "orpo-lite is not installed, so nothing says what it needs", remedy)
        return
    declared = [one for one in declared if one.marker is None or one.marker.evaluate({"extra": ""})]
    found: dict[str, str] = {}
    for one in declared:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[one.name] = importlib.metadata.version(one.name)
    wrong = [one for one in declared if not one.specifier.contains(found.get(one.name, "0"), prereleases=True)]
    if wrong:
        text = "; ".join(f"{one.name} is {found.get(one.name, 'missing')}, {one.specifier} is needed" for one in wrong)
        remedy = "pip install -U " + " ".join(f"'{one.name}{one.specifier}'" for one in wrong)
        yield Finding("packages", PROBLEM, text, remedy, found)
    else:
        yield Finding("packages", OK, f"{len(found)} packages in the declared versions", facts=found)


def libraries() -> Iterator[Finding]:
    """Import the libraries: one package of a wrong build (torchvision, flash-attn) can break all of transformers."""
    started = time.monotonic()
    for name in LIBRARIES:
        try:
            importlib.import_module(name)
        except BaseException as error:
            trail = str(error) + "".join(frame.filename for frame in traceback.extract_tb(error.__traceback__))
            culprit = next((each for each in UNNEEDED if each in trail), None)
            remedy = f"pip uninstall {culprit}, which is not needed here" if culprit else f"pip install -U {name}"
            if "bitsandbytes" in trail:
                remedy = "repair bitsandbytes, or uninstall it and set model.quantization=none"
            yield Finding("libraries", PROBLEM, f"{name} cannot be imported: {in_words(error)}", remedy)
            return
    yield Finding("libraries", OK, f"all import, in {time.monotonic() - started:.0f} s")


# ---- memory and disk -------------------------------------------------------------------------------------------------


def memory() -> Iterator[Finding]:
    """Check the host's memory."""
    import psutil

    host = psutil.virtual_memory()
    verdict = by_size(host.available, *RAM)
    remedy = "" if verdict == OK else "close other programs; python -m orpo_lite.plan says what a recipe takes of it"
    text = f"{format_gb(host.available)} free of {format_gb(host.total)}"
    yield Finding("memory", verdict, text, remedy, {"total": host.total, "free": host.available})


def disk() -> Iterator[Finding]:
    """Check free space and write access where runs and downloaded models go."""
    from huggingface_hub import constants

    yield room("working folder", Path.cwd(), 5e9, "checkpoints and the adapter", "training.output_dir")
    yield room("model cache", Path(constants.HF_HUB_CACHE), 20e9, "a 7B base is 15 GB", "HF_HOME")


def room(name: str, folder: Path, little: float, purpose: str, setting: str) -> Finding:
    """Check a folder's free bytes, which are a note below `little`, and that it can be written to."""
    place = next(one for one in (folder, *folder.parents) if one.is_dir())
    free = shutil.disk_usage(place).free
    text, verdict = f"{folder}: {format_gb(free)} free", by_size(free, 1e9, little)
    remedy = "" if verdict == OK else f"make room ({purpose}), or set {setting} elsewhere"
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        text += f", but it cannot be written to ({error.strerror})"
        verdict, remedy = NOTE, f"set {setting} to a folder that can"
    return Finding(name, verdict, text, remedy, {"folder": str(folder), "free": free})


# ---- the hub ---------------------------------------------------------------------------------------------------------


def hub() -> Iterator[Finding]:
    """Check that the hub answers huggingface_hub's own client; no token is sent."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    remedy = "check HF_ENDPOINT, network, proxy and firewall, or try again later"
    text = f"{constants.ENDPOINT} answers"
    try:
        answer = get_session().get(f"{constants.ENDPOINT}/api/models?limit=1", timeout=HUB_SECONDS)
        if answer.status_code >= 500 or answer.status_code in (401, 403, 407, 429):
            text += f" with status {answer.status_code}"
        elif "html" in answer.headers.get("content-type", ""):
            text += " with a web page instead of data"
        else:
            remedy = ""
    except Exception as error:
        text = f"{constants.ENDPOINT} cannot be reached ({in_words(error, 120)})"
    if constants.HF_HUB_OFFLINE:
        text, remedy = "not asked, since HF_HUB_OFFLINE is set", "unset it to download"
    remedy = remedy and f"{remedy}; models that are on this machine can be trained on"
    yield Finding("hub", NOTE if remedy else OK, text, remedy)


def token() -> Iterator[Finding]:
    """Check that there is a token, which is not shown."""
    from huggingface_hub import get_token

    names = [name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name, "").strip()]
    if get_token():
        yield Finding("token", OK, f"present, {f'in {names[0]}' if names else 'saved by hf auth login'}")
    else:
        remedy = "gated models (Llama, Gemma) and push need one: hf auth login, or set HF_TOKEN"
        yield Finding("token", NOTE, "none", remedy)


# ---- torch, driver and cards -----------------------------------------------------------------------------------------


def devices() -> Iterator[Finding]:
    """Check torch's build, the driver, and each card."""
    try:
        import torch
    except BaseException as error:
        yield Finding("torch", PROBLEM, f"cannot be imported: {in_words(error)}", INSTALL_TORCH)
        return
    hip = getattr(torch.version, "hip", None)
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else f"for ROCm {hip}" if hip else "without CUDA"
    yield Finding("torch", OK, f"{torch.__version__}, built {built}")
    yield driver()
    yield from cards()


def driver() -> Finding:
    """Check that there is a card, and that torch and the driver fit together."""
    import torch

    found, failure = nvidia_smi()
    card, version = found or ("", "")
    built_for_gpu = bool(torch.version.cuda or getattr(torch.version, "hip", None))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        return Finding("driver", OK, f"{version or 'version unknown'}, and torch can use it")
    why = failure or "; ".join(" ".join(str(one.message).split()) for one in warned) or "torch does not say why"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") and (found or built_for_gpu):
        return Finding("driver", NOTE, "CUDA_VISIBLE_DEVICES hides every card", "unset it to train on the card")
    if "too old" in why:
        remedy = f"update the NVIDIA driver, or {INSTALL_TORCH.replace('your CUDA', 'the CUDA of this driver')}"
        return Finding("driver", PROBLEM, f"{version} is too old for this torch: {why}", remedy)
    if found and not built_for_gpu:
        text = f"there is a card ({card}), but this torch is built for the CPU alone"
        return Finding("driver", PROBLEM, text, f"pip uninstall torch, then {INSTALL_TORCH}")
    if found or failure:
        remedy = "restart the machine or container; if that does not help, reinstall the driver"
        return Finding("driver", PROBLEM, f"there is a card {card}, but CUDA does not start: {why}", remedy)
    colab = "Runtime > Change runtime type > T4 GPU" if "COLAB_RELEASE_TAG" in os.environ else ""
    remedy = colab or "the quickstart recipe works on the CPU; a 7B model needs a card"
    return Finding("driver", NOTE, "no NVIDIA card here: training would run on the CPU", remedy)


def nvidia_smi() -> tuple[tuple[str, str] | None, str]:
    """Ask the driver for (name, driver version) of the first card, and for the reason if it fails."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None, ""
    query = [command, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"nvidia-smi: {in_words(error)}"
    name, _, version = done.stdout.partition("\n")[0].partition(",")
    if done.returncode == 0 and version:
        return (name.strip(), version.strip()), ""
    output = " ".join((done.stdout + done.stderr).split())[:200]
    # a program left over in an image, or a runtime without a card
    absent = re.search(r"couldn't communicate|no devices were found", output, re.IGNORECASE)
    return None, "" if absent and not os.path.exists("/dev/nvidia0") else f"nvidia-smi: {output or done.returncode}"


def cards() -> Iterator[Finding]:
    """Check each card: what it is, how much of it is free, and whether this torch has code for it."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        name = "card" if count == 1 else f"card {index}"
        major, minor = torch.cuda.get_device_capability(index)
        free, total = torch.cuda.mem_get_info(index)
        size = f"{format_gb(free)} free of {format_gb(total)}"
        text = f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}, {size}"
        verdict, remedy = OK, ""
        if error := product_error(torch.device("cuda", index)):
            verdict, text = PROBLEM, f"{text}; a matrix product fails: {error}"
            remedy = f"this torch has code for {', '.join(torch.cuda.get_arch_list())}: {INSTALL_TORCH}"
        elif total - free > IN_USE + torch.cuda.memory_reserved(index):
            verdict, text = NOTE, f"{text}; {format_gb(total - free)} are in use"
            remedy = "nvidia-smi shows by which programs: stop them before training"
        yield Finding(name, verdict, text, remedy, {"total": total, "free": free})
    if count > 1:
        text = f"{count} cards; training takes the first, accelerate launch -m orpo_lite.train all of them"
        yield Finding("cards", OK, text)


def product_error(device: Any) -> str | None:
    """Multiply two matrices on a device; return what went wrong, or None."""
    import torch

    try:
        ones = torch.ones(8, 8, device=device)
        return None if (ones @ ones).sum().item() == 512 else "its result is wrong"
    except Exception as error:
        return in_words(error)
