"""torch, driver and cards, and what they compute in."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from typing import Any

from orpo_lite.train.doctor_findings import NOTE, OK, PROBLEM, Finding, gigabytes, in_words

TAKEN = 1.5e9
"""Bytes in use on a card that one process's CUDA context does not explain."""
INSTALL = "install torch for your CUDA: https://pytorch.org/get-started/locally"


def torch_build() -> Iterator[Finding]:
    """Does torch import, and what was it built for?"""
    try:
        import torch
    except BaseException as error:
        yield Finding("torch", PROBLEM, f"cannot be imported: {in_words(error)}", INSTALL)
        return
    hip = getattr(torch.version, "hip", None)
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else f"for ROCm {hip}" if hip else "without CUDA"
    facts = {"torch": torch.__version__, "cuda_build": torch.version.cuda, "hip_build": hip}
    yield Finding("torch", OK, f"{torch.__version__}, built {built}", facts=facts)


def driver() -> Iterator[Finding]:
    """Is there a card, and do torch and the driver get on?"""
    import torch

    built = bool(torch.version.cuda or getattr(torch.version, "hip", None))
    cards, failure = nvidia_smi()
    facts: dict[str, Any] = {
        "driver": cards[0]["driver"] if cards else None,
        "cards_by_driver": [card["name"] for card in cards],
    }
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        text = f"{facts['driver'] or 'version unknown'}, and torch can use it"
        yield Finding("driver", OK, text, facts=facts)
        return
    why = failure or "; ".join(" ".join(str(w.message).split()) for w in told) or _why_not(torch)
    facts["reason"] = why
    other = next((kind for kind in ("xpu", "mps") if getattr(torch, kind).is_available()), None)
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") and (cards or torch.version.cuda):
        yield Finding("driver", NOTE, "CUDA_VISIBLE_DEVICES hides every card", "unset it to train on the card", facts)
    elif "too old" in why:
        newer = f"update the NVIDIA driver, or {INSTALL.replace('your CUDA', 'the CUDA of this driver')}"
        yield Finding("driver", PROBLEM, f"too old for this torch: {why}", newer, facts)
    elif cards and not built:
        text = f"there is a card ({cards[0]['name']}), but this torch is built for the CPU alone"
        yield Finding("driver", PROBLEM, text, f"pip uninstall torch, then {INSTALL}", facts)
    elif cards or failure:
        which = f" ({cards[0]['name']})" if cards else ""
        text = f"there is a card{which}, but CUDA does not start: {why}"
        yield Finding("driver", PROBLEM, text, "restart the machine or container; if that does not help, reinstall the driver", facts)  # fmt: skip
    elif other:
        name = {"xpu": "an Intel GPU (XPU)", "mps": "an Apple GPU (MPS)"}[other]
        yield Finding(
            "driver", NOTE, f"no NVIDIA card; training takes {name}, on which this kit is not tested", "", facts
        )
    else:
        colab = "COLAB_RELEASE_TAG" in os.environ
        remedy = (
            "Runtime > Change runtime type > T4 GPU" if colab else "the quickstart recipe runs so; a 7B wants a card"
        )
        yield Finding("driver", NOTE, "no NVIDIA card here: training would run on the CPU", remedy, facts)


def _why_not(torch: Any) -> str:
    try:
        torch.cuda.init()
    except Exception as error:  # its message is the reason
        return in_words(error)
    return "torch.cuda.is_available() is false"


def nvidia_smi() -> tuple[list[dict[str, str]], str]:
    """The driver's own account of the cards, and why it has none; both empty where there is no driver."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return [], ""
    query = [command, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"nvidia-smi: {in_words(error)}"
    lines = [line.split(",") for line in done.stdout.splitlines() if line.count(",") == 1]
    if done.returncode or not lines:
        said = " ".join((done.stdout + done.stderr).split())[:200]
        # left over in an image, or a runtime without a card
        absent = re.search(r"couldn't communicate|no devices were found", said, re.IGNORECASE)
        return [], "" if absent and not os.path.exists("/dev/nvidia0") else f"nvidia-smi: {said or done.returncode}"
    return [{"name": name.strip(), "driver": driver.strip()} for name, driver in lines], ""


def cards() -> Iterator[Finding]:
    """Each card: what it is, how much of it is free, and whether this torch has code for it."""
    import torch

    if not torch.cuda.is_available():
        return
    count = torch.cuda.device_count()
    for index in range(count):
        name = "card" if count == 1 else f"card {index}"
        try:
            capability = torch.cuda.get_device_capability(index)
            free, total = torch.cuda.mem_get_info(index)
            model = torch.cuda.get_device_name(index)
        except Exception as error:
            yield Finding(
                name, PROBLEM, f"cannot be asked: {in_words(error)}", "does nvidia-smi show it? restart the machine"
            )
            continue
        facts = {"name": model, "capability": list(capability), "total": total, "free": free}
        text = (
            f"{model}, compute capability {capability[0]}.{capability[1]}, {gigabytes(free)} free of {gigabytes(total)}"
        )
        error = computes(torch.device("cuda", index))
        if error is not None:
            facts["built_for"] = torch.cuda.get_arch_list()
            remedy = f"this torch has code for {', '.join(facts['built_for'])}: {INSTALL}"
            yield Finding(name, PROBLEM, f"{text}; a matrix product fails: {error}", remedy, facts)
        elif total - free > TAKEN + torch.cuda.memory_reserved(index):
            text += f"; {gigabytes(total - free)} are taken"
            yield Finding(name, NOTE, text, "nvidia-smi shows by which programs: stop them before training", facts)
        else:
            yield Finding(name, OK, text, facts=facts)
    if count > 1:
        yield Finding("cards", OK, f"{count} cards; training takes the first, accelerate launch -m orpo_lite.train all")


def computes(device: Any) -> str | None:
    """Why a card cannot multiply two matrices; None where it can."""
    import torch

    try:
        a = torch.arange(64.0).reshape(8, 8)
        wrong = (a.to(device) @ a.to(device)).cpu() - a @ a
        return None if wrong.abs().max() <= 1e-3 * (a @ a).max() else "its result is wrong"
    except Exception as error:
        return in_words(error)


def sixteen_bits() -> Iterator[Finding]:
    """Is bfloat16 in the hardware, and what will training compute in?"""
    import torch

    from orpo_lite.model.precision import choose_precision, default_device

    device = default_device()
    takes = str(choose_precision(device=device).dtype).removeprefix("torch.")
    if device.type == "cuda":
        real = torch.cuda.is_bf16_supported(including_emulation=False)
        emulated = not real and torch.cuda.is_bf16_supported()
        how = "in hardware" if real else "by emulation, which is slow" if emulated else "not there"
    elif device.type == "cpu":
        real = cpu_bfloat16()
        emulated = not real
        how = "in hardware" if real else "by emulation, which is slow"
    else:
        real, emulated, how = device.type == "xpu", False, "left to the device"
    facts = {"bf16": real, "emulated": emulated, "training_dtype": takes}
    text = f"bfloat16 {how}; training takes {takes}"
    if takes == "float16":
        text += " with loss scaling and float32 adapters"
    agree = real == (takes == "bfloat16") or device.type != "cuda"
    remedy = "" if agree else f"set model.dtype if {takes} is slow or fails"
    yield Finding("bf16", OK if agree else NOTE, text, remedy, facts)


def cpu_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself."""
    import torch

    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as lines:
            flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags.split()))
