"""Probe the machine: Python, packages, memory, disk, hub and token; torch, driver and cards."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
import tomllib
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from orpo_lite.common.credentials import token_files
from orpo_lite.common.text import format_gb

OK, NOTE, PROBLEM = "ok", "note", "problem"
"""A note is worth knowing and stops nothing; with a problem, training cannot work as it should."""
BUG_REPORT = "if this stays, add the output of python -m orpo_lite.doctor --json to a bug report"
INDIRECT = ("huggingface-hub", "tokenizers", "numpy")
"""Not declared, and yet much depends on them."""
LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "peft", "orpo_lite.train.pipeline")
UNNEEDED = ("torchvision", "torchaudio", "flash_attn", "xformers")
"""Packages that libraries import where they are installed, and fail with where they do not fit torch."""
ROOM = {"working folder": (1e9, 5e9, "checkpoints and the adapter"), "model cache": (1e9, 20e9, "a 7B base is 15 GB")}
"""Free bytes below which a folder is a problem, or a note; and what needs the room."""
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


def python() -> Iterator[Finding]:
    """Report the interpreter and the operating system."""
    release = platform.release()
    system = f"{platform.system()} {release}" + (" (WSL)" if "microsoft" in release.lower() else "")
    if "COLAB_RELEASE_TAG" in os.environ:
        system += ", Colab"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {"python": platform.python_version(), "system": system, "machine": platform.machine(), "cores": cores}
    yield Finding("python", OK, f"{facts['python']} on {system}, {platform.machine()}, {cores} cores", facts=facts)


# ---- packages --------------------------------------------------------------------------------------------------------


def packages() -> Iterator[Finding]:
    """Compare the installed versions with those that orpo-lite declares and was tested with."""
    from packaging.requirements import Requirement

    declared = [Requirement(line) for line in requirements()]
    declared = [one for one in declared if one.marker is None or one.marker.evaluate({"extra": ""})]
    tested = tested_versions()
    found = {name: installed_version(name) for name in (*(one.name for one in declared), *INDIRECT)}
    facts: dict[str, Any] = {
        name: {"installed": version, "tested": tested.get(name)} for name, version in found.items() if version
    }
    wrong = [
        one
        for one in declared
        if (version := found[one.name]) is None or not one.specifier.contains(version, prereleases=True)
    ]
    other = [
        f"{name} {version} (tested: {tested[name]})"
        for name, version in found.items()
        if version and name in tested and version.partition("+")[0] != tested[name]
    ]
    if wrong:
        text = "; ".join(f"{one.name} is {found[one.name] or 'missing'}, {one.specifier} is needed" for one in wrong)
        remedy = "pip install -U " + " ".join(f"'{one.name}{one.specifier}'" for one in wrong)
        yield Finding("packages", PROBLEM, text, remedy, facts)
    elif other:
        remedy = "that is allowed; if something fails: pip install -c constraints.txt orpo-lite"
        yield Finding("packages", NOTE, f"not the versions of our tests: {', '.join(other)}", remedy, facts)
    else:
        how = "as tested" if tested else "within the declared versions"
        yield Finding("packages", OK, f"{len(declared)} packages {how}", facts=facts)


def requirements() -> list[str]:
    """List what orpo-lite depends on, by its installed metadata or the pyproject.toml of a checkout."""
    try:
        return importlib.metadata.requires("orpo-lite") or []
    except importlib.metadata.PackageNotFoundError:
        path = Path(__file__).parents[2] / "pyproject.toml"
        return tomllib.loads(path.read_text("utf-8"))["project"]["dependencies"]


def tested_versions() -> dict[str, str]:
    """Map packages to the versions that the tests ran with; empty where the list was not shipped."""
    package = Path(__file__).parents[1]
    path = next((p for folder in (package, package.parent) if (p := folder / "constraints.txt").is_file()), None)
    lines = path.read_text("utf-8").splitlines() if path else []
    return dict(line.strip().split("==") for line in lines if re.fullmatch(r"[\w.-]+==\S+", line.strip()))


def installed_version(name: str) -> str | None:
    """Look up the installed version of a package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def libraries() -> Iterator[Finding]:
    """Import the libraries: one package of a wrong build (torchvision, flash-attn) can break all of transformers."""
    started = time.monotonic()
    for name in LIBRARIES:
        try:
            importlib.import_module(name)
        except BaseException as error:
            text = in_words(error)
            trail = text + "".join(frame.filename for frame in traceback.extract_tb(error.__traceback__))
            culprit = next((each for each in UNNEEDED if each in trail), None)
            remedy = f"pip uninstall {culprit}, which is not needed here" if culprit else f"pip install -U {name}"
            if "bitsandbytes" in trail:
                remedy = "repair bitsandbytes, or uninstall it and set model.quantization=none"
            yield Finding("libraries", PROBLEM, f"{name} cannot be imported: {text}", remedy)
            return
    seconds = time.monotonic() - started
    yield Finding("libraries", OK, f"all import, in {seconds:.0f} s", facts={"seconds": round(seconds, 1)})


# ---- memory and disk -------------------------------------------------------------------------------------------------


def memory() -> Iterator[Finding]:
    """Check the host's memory, by the container's limit where that is lower than the machine's."""
    import psutil

    host = psutil.virtual_memory()
    total, free, text = host.total, host.available, ""
    limit = container_limit()
    if limit is not None and limit[0] < host.total:
        total, free = limit[0], min(host.available, limit[0] - limit[1])
        text = f" (this container's limit; the machine has {format_gb(host.total)})"
    facts = {"total": total, "free": free, "machine": host.total}
    verdict = by_size(free, *RAM)
    remedy = "" if verdict == OK else "close other programs; python -m orpo_lite.plan says what a recipe takes of it"
    yield Finding("memory", verdict, f"{format_gb(free)} free of {format_gb(total)}{text}", remedy, facts)


def by_size(free: float, least: float, little: float) -> str:
    """Judge free bytes: a problem below `least`, a note below `little`."""
    return PROBLEM if free < least else NOTE if free < little else OK


def container_limit(root: Path = Path("/")) -> tuple[int, int] | None:
    """Return (limit, used) in bytes of the tightest control group that this process is in; None without a limit."""
    top, limits = root / "sys/fs/cgroup", []
    try:
        path = (root / "proc/self/cgroup").read_text("ascii", errors="replace").strip().rpartition(":")[2]
    except OSError:
        return None
    # inside a container the path may be the host's, which does not exist here; the top of the mount does
    for group in (folder := top / path.strip("/"), *folder.parents):
        try:
            limit = int((group / "memory.max").read_text())  # "max" is not a number
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            cached = int(stat.get("inactive_file", 0))  # cached files make room
            limits.append((limit, max(0, int((group / "memory.current").read_text()) - cached)))
        except (OSError, ValueError):
            pass
        if group == top:
            break
    return min(limits, key=lambda one: one[0] - one[1], default=None)


def disk() -> Iterator[Finding]:
    """Check free space and write access where runs and downloaded models go."""
    from huggingface_hub import constants

    for name, folder in (("working folder", Path.cwd()), ("model cache", Path(constants.HF_HUB_CACHE))):
        place = next(one for one in (folder, *folder.parents) if one.is_dir())
        free = shutil.disk_usage(place).free
        least, little, purpose = ROOM[name]
        text, facts = f"{folder}: {format_gb(free)} free", {"folder": str(folder), "free": free, "writable": True}
        elsewhere = "set training.output_dir" if name == "working folder" else "set HF_HOME"
        verdict = by_size(free, least, little)
        remedy = "" if verdict == OK else f"make room ({purpose}), or {elsewhere} elsewhere"
        try:
            with tempfile.TemporaryFile(dir=place):
                pass
        except OSError as error:
            facts["writable"] = False
            text += f", but it cannot be written to ({error.strerror})"
            verdict, remedy = NOTE, f"{elsewhere} to a folder that can"
        yield Finding(name, verdict, text, remedy, facts)


# ---- the hub ---------------------------------------------------------------------------------------------------------


def hub() -> Iterator[Finding]:
    """Check that the hub answers huggingface_hub's own client; no token is sent."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    address = urlsplit(constants.ENDPOINT)
    place = f"{address.scheme}://{address.hostname}" + (f":{address.port}" if address.port else "")
    facts: dict[str, Any] = {"own_endpoint": "HF_ENDPOINT" in os.environ, "offline": constants.HF_HUB_OFFLINE}
    local = "models that are on this machine can be trained on"
    if constants.HF_HUB_OFFLINE:
        remedy = f"unset HF_HUB_OFFLINE to download; {local}"
        yield Finding("hub", NOTE, "not asked, since HF_HUB_OFFLINE is set", remedy, facts)
        return
    started = time.monotonic()
    try:
        answer = get_session().get(f"{constants.ENDPOINT}/api/models?limit=1", timeout=HUB_SECONDS)
    except Exception as error:
        own = "HF_ENDPOINT, " if facts["own_endpoint"] else ""
        text, remedy = f"{place} cannot be reached ({in_words(error, 120)})", f"check {own}network, proxy and firewall"
        yield Finding("hub", NOTE, text, f"{remedy}; {local}", facts | {"reachable": False})
        return
    facts |= {"reachable": True, "status": answer.status_code, "seconds": round(time.monotonic() - started, 2)}
    if answer.status_code >= 500 or answer.status_code in (401, 403, 407, 429):
        text = f"{place} answers with status {answer.status_code}"
        yield Finding("hub", NOTE, text, f"downloads may fail: try again later, check the proxy; {local}", facts)
    elif "html" in answer.headers.get("content-type", ""):
        text, remedy = f"{place} answers with a web page instead of data", "check for a login page or a proxy"
        yield Finding("hub", NOTE, text, f"{remedy}; {local}", facts)
    else:
        yield Finding("hub", OK, f"{place} answers in {facts['seconds']:.1f} s", facts=facts)


def token() -> Iterator[Finding]:
    """Check that there is a token; it is not read further than that, and never shown."""
    names = [name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name, "").strip()]
    used = token_files()[0]
    if names:
        yield Finding("token", OK, f"present, in {names[0]}", facts={"present": True, "from": names[0]})
    elif used.is_file() and used.stat().st_size:
        yield Finding("token", OK, "present, saved by hf auth login", facts={"present": True, "from": "file"})
    else:
        remedy = "gated models (Llama, Gemma) and push need one: hf auth login, or set HF_TOKEN"
        yield Finding("token", NOTE, "none", remedy, {"present": False, "from": None})


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
    facts = {"torch": torch.__version__, "cuda_build": torch.version.cuda, "hip_build": hip}
    yield Finding("torch", OK, f"{torch.__version__}, built {built}", facts=facts)
    yield driver()
    yield from cards()


def driver() -> Finding:
    """Check that there is a card, and that torch and the driver fit together."""
    import torch

    found, failure = nvidia_smi()
    facts: dict[str, Any] = {"driver": found[0][1] if found else None, "cards_by_driver": [name for name, _ in found]}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        return Finding("driver", OK, f"{facts['driver'] or 'version unknown'}, and torch can use it", facts=facts)
    why = failure or "; ".join(" ".join(str(w.message).split()) for w in warned) or _why_no_cuda()
    facts["reason"] = why
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") and (found or torch.version.cuda):
        text, remedy = "CUDA_VISIBLE_DEVICES hides every card", "unset it to train on the card"
        return Finding("driver", NOTE, text, remedy, facts)
    if "too old" in why:
        remedy = f"update the NVIDIA driver, or {INSTALL_TORCH.replace('your CUDA', 'the CUDA of this driver')}"
        return Finding("driver", PROBLEM, f"too old for this torch: {why}", remedy, facts)
    if found and not (torch.version.cuda or getattr(torch.version, "hip", None)):
        text = f"there is a card ({found[0][0]}), but this torch is built for the CPU alone"
        return Finding("driver", PROBLEM, text, f"pip uninstall torch, then {INSTALL_TORCH}", facts)
    if found or failure:
        text = f"there is a card{f' ({found[0][0]})' if found else ''}, but CUDA does not start: {why}"
        remedy = "restart the machine or container; if that does not help, reinstall the driver"
        return Finding("driver", PROBLEM, text, remedy, facts)
    for kind, name in (("xpu", "an Intel GPU (XPU)"), ("mps", "an Apple GPU (MPS)")):
        if getattr(torch, kind).is_available():
            text = f"no NVIDIA card; training takes {name}, on which this kit is not tested"
            return Finding("driver", NOTE, text, facts=facts)
    colab = "Runtime > Change runtime type > T4 GPU" if "COLAB_RELEASE_TAG" in os.environ else ""
    remedy = colab or "the quickstart recipe works on the CPU; a 7B model needs a card"
    return Finding("driver", NOTE, "no NVIDIA card here: training would run on the CPU", remedy, facts)


def _why_no_cuda() -> str:
    import torch

    try:
        torch.cuda.init()
    except Exception as error:  # its message is the reason
        return in_words(error)
    return "torch.cuda.is_available() is false"


def nvidia_smi() -> tuple[list[tuple[str, str]], str]:
    """Return (name, driver version) of each card by the driver's own account, and why it fails; both empty without one."""
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
        output = " ".join((done.stdout + done.stderr).split())[:200]
        # a program left over in an image, or a runtime without a card
        absent = re.search(r"couldn't communicate|no devices were found", output, re.IGNORECASE)
        return [], "" if absent and not os.path.exists("/dev/nvidia0") else f"nvidia-smi: {output or done.returncode}"
    return [(name.strip(), version.strip()) for name, version in lines], ""


def cards() -> Iterator[Finding]:
    """Check each card: what it is, how much of it is free, and whether this torch has code for it."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        name = "card" if count == 1 else f"card {index}"
        try:
            capability = torch.cuda.get_device_capability(index)
            free, total = torch.cuda.mem_get_info(index)
            model = torch.cuda.get_device_name(index)
        except Exception as error:
            remedy = "check that nvidia-smi shows it; restart the machine"
            yield Finding(name, PROBLEM, f"cannot be queried: {in_words(error)}", remedy)
            continue
        facts = {"name": model, "capability": list(capability), "total": total, "free": free}
        text = (
            f"{model}, compute capability {capability[0]}.{capability[1]}, {format_gb(free)} free of {format_gb(total)}"
        )
        error = matrix_product_error(torch.device("cuda", index))
        if error is not None:
            facts["built_for"] = torch.cuda.get_arch_list()
            remedy = f"this torch has code for {', '.join(facts['built_for'])}: {INSTALL_TORCH}"
            yield Finding(name, PROBLEM, f"{text}; a matrix product fails: {error}", remedy, facts)
        elif total - free > IN_USE + torch.cuda.memory_reserved(index):
            text += f"; {format_gb(total - free)} are in use"
            remedy = "nvidia-smi shows by which programs: stop them before training"
            yield Finding(name, NOTE, text, remedy, facts)
        else:
            yield Finding(name, OK, text, facts=facts)
    if count > 1:
        text = f"{count} cards; training takes the first, accelerate launch -m orpo_lite.train all of them"
        yield Finding("cards", OK, text)


def matrix_product_error(device: Any) -> str | None:
    """Multiply two matrices on a device; return what went wrong, or None."""
    import torch

    try:
        a = torch.arange(64.0).reshape(8, 8)
        difference = (a.to(device) @ a.to(device)).cpu() - a @ a
        return None if difference.abs().max() <= 1e-3 * (a @ a).max() else "its result is wrong"
    except Exception as error:
        return in_words(error)
