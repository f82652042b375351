"""Python, packages, memory, disk, hub and token: what needs no device."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import tempfile
import time
import tomllib
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from orpo_lite.common.credentials import token_files
from orpo_lite.train.doctor_findings import NOTE, OK, PROBLEM, Finding, gigabytes, in_words

CORE = ("huggingface-hub", "tokenizers", "numpy")
"""Not asked for by name, and yet what much depends on."""
LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "peft", "trl", "orpo_lite.train")
UNNEEDED = ("torchvision", "torchaudio", "flash_attn", "xformers")
"""What libraries import where it is there, and fail with where it does not fit torch."""
ROOM = {"working folder": (1e9, 5e9, "checkpoints and the adapter"), "model cache": (1e9, 20e9, "a 7B base is 15 GB")}
"""Free bytes below which a folder is a problem, or a note; and what wants the room."""
RAM = (2e9, 6e9)
"""Free bytes of the host below which memory is a problem, or a note: torch with CUDA, the data, a matrix on its way."""
HUB_SECONDS = 5


def python() -> Iterator[Finding]:
    """Interpreter and operating system."""
    release = platform.release()
    system = f"{platform.system()} {release}" + (" (WSL)" if "microsoft" in release.lower() else "")
    if "COLAB_RELEASE_TAG" in os.environ:
        system += ", Colab"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {"python": platform.python_version(), "system": system, "machine": platform.machine(), "cores": cores}
    yield Finding("python", OK, f"{facts['python']} on {system}, {platform.machine()}, {cores} cores", facts=facts)


# ---- packages ------------------------------------------------------------------------------------------------------


def packages() -> Iterator[Finding]:
    """Installed versions against what orpo-lite declares, and what it was tested with."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    from packaging.version import Version

    declared = [Requirement(line) for line in requirements()]
    declared = [one for one in declared if one.marker is None or one.marker.evaluate({"extra": ""})]
    known = {canonicalize_name(name): version for name, version in tested().items()}
    names = dict.fromkeys(canonicalize_name(name) for name in (*(one.name for one in declared), *CORE))
    found = {name: installed(name) for name in {**names, **known}}
    facts: dict[str, Any] = {
        name: {"installed": version, "tested": known.get(name)}
        for name, version in found.items()
        if version is not None
    }
    wrong = []
    for one in declared:
        version = found[canonicalize_name(one.name)]
        if version is None or not one.specifier.contains(version, prereleases=True):
            wrong.append(f"{one.name} is {version or 'missing'}, {one.specifier} is needed")
    if wrong:
        asked = " ".join(f"'{one.name}{one.specifier}'" for one in declared if any(one.name in w for w in wrong))
        yield Finding("packages", PROBLEM, "; ".join(wrong), f"pip install -U {asked}", facts)
        return
    other = []
    for name in names:
        version, wanted = found[name], known.get(name)
        if version and wanted and Version(version).public != Version(wanted).public:
            other.append(f"{name} {version} (tested: {wanted})")
    if other:
        remedy = "that is allowed; if something fails: pip install -c constraints.txt orpo-lite"
        yield Finding("packages", NOTE, f"not the versions of our tests: {', '.join(other)}", remedy, facts)
    elif not known:
        yield Finding("packages", OK, f"{len(declared)} packages within the declared versions", facts=facts)
    else:
        yield Finding("packages", OK, f"{len(declared)} packages as tested", facts=facts)


def requirements() -> list[str]:
    """What orpo-lite depends on: by its installed metadata, or by the pyproject.toml of a checkout."""
    try:
        return importlib.metadata.requires("orpo-lite") or []
    except importlib.metadata.PackageNotFoundError:
        return tomllib.loads(beside("pyproject.toml").read_text("utf-8"))["project"]["dependencies"]


def tested() -> dict[str, str]:
    """Name -> version of the packages that the tests ran with; empty where the list was not shipped."""
    path = beside("constraints.txt")
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    return dict(line.strip().split("==") for line in lines if re.fullmatch(r"[\w.-]+==\S+", line.strip()))


def beside(name: str) -> Path:
    """A file that lies in the package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    return package / name if (package / name).is_file() else package.parent / name


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def libraries() -> Iterator[Finding]:
    """Do they import? One package of a wrong build (torchvision, flash-attn) can take all of transformers along."""
    started = time.monotonic()
    for name in LIBRARIES:
        try:
            importlib.import_module(name)
        except BaseException as error:
            text = in_words(error)
            trail = text + "".join(frame.filename for frame in traceback.extract_tb(error.__traceback__))
            guilty = next((each for each in UNNEEDED if each in trail), None)
            remedy = f"pip uninstall {guilty}, which is not needed here" if guilty else f"pip install -U {name}"
            if "bitsandbytes" in trail:
                remedy = "mend bitsandbytes, or uninstall it and set model.quantization=none"
            yield Finding("libraries", PROBLEM, f"{name} cannot be imported: {text}", remedy)
            return
    seconds = time.monotonic() - started
    yield Finding("libraries", OK, f"all import, in {seconds:.0f} s", facts={"seconds": round(seconds, 1)})


# ---- memory and disk -----------------------------------------------------------------------------------------------


def memory() -> Iterator[Finding]:
    """The host's memory, by the container's limit where that is lower than the machine's."""
    import psutil

    host = psutil.virtual_memory()
    total, free, text = host.total, host.available, ""
    limit = container_limit()
    if limit is not None and limit[0] < host.total:
        total, free = limit[0], min(host.available, limit[0] - limit[1])
        text = f" (this container's limit; the machine has {gigabytes(host.total)})"
    least, little = RAM
    facts = {"total": total, "free": free, "machine": host.total}
    verdict = PROBLEM if free < least else NOTE if free < little else OK
    remedy = "" if verdict == OK else "close other programs; python -m orpo_lite.plan says what a recipe takes of it"
    yield Finding("memory", verdict, f"{gigabytes(free)} free of {gigabytes(total)}{text}", remedy, facts)


def container_limit(root: Path = Path("/")) -> tuple[int, int] | None:
    """(limit, used) in bytes of the tightest control group that this process is in, versions 1 and 2."""
    try:
        lines = (root / "proc/self/cgroup").read_text("ascii", errors="replace").splitlines()
    except OSError:
        return None
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = top / path.strip("/")
        # inside a container the path may be the host's, which is not there: its parents end at the mount's top
        for group in (folder, *folder.parents):
            found.append(_limit(group, *names))
            if group == top:
                break
    limits = [one for one in found if one is not None and one[0] < 2**60]  # version 1 says "none" by a huge number
    return min(limits, key=lambda one: one[0] - one[1], default=None)


def _limit(group: Path, limit: str, usage: str, idle: str) -> tuple[int, int] | None:
    try:
        most = int((group / limit).read_text())  # "max" is no number
        used = int((group / usage).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return most, max(0, used - int(stat.get(idle, 0)))  # cached files give way
    except (OSError, ValueError):
        return None


def disk() -> Iterator[Finding]:
    """Free space, and whether files can be written, where runs and downloaded models go."""
    from huggingface_hub import constants

    for name, folder in (("working folder", Path.cwd()), ("model cache", Path(constants.HF_HUB_CACHE))):
        place = next(one for one in (folder, *folder.parents) if one.is_dir())
        free = shutil.disk_usage(place).free
        least, little, what = ROOM[name]
        text, facts = f"{folder}: {gigabytes(free)} free", {"folder": str(folder), "free": free, "writable": True}
        elsewhere = "set training.output_dir" if name == "working folder" else "set HF_HOME"
        try:
            with tempfile.TemporaryFile(dir=place):
                pass
        except OSError as error:
            facts["writable"] = False
            text += f", but it cannot be written to ({error.strerror})"
            yield Finding(name, NOTE, text, f"{elsewhere} to a folder that can", facts)
            continue
        verdict = PROBLEM if free < least else NOTE if free < little else OK
        yield Finding(
            name, verdict, text, "" if verdict == OK else f"make room ({what}), or {elsewhere} elsewhere", facts
        )


# ---- the hub -------------------------------------------------------------------------------------------------------


def hub() -> Iterator[Finding]:
    """Does the hub answer huggingface_hub's own client? No token is sent."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    address = urlsplit(constants.ENDPOINT)
    place = f"{address.scheme}://{address.hostname}" + (f":{address.port}" if address.port else "")
    facts = {"own_endpoint": "HF_ENDPOINT" in os.environ, "offline": constants.HF_HUB_OFFLINE}
    local = "models that lie here already can be trained on"
    if constants.HF_HUB_OFFLINE:
        remedy = f"unset HF_HUB_OFFLINE to download; {local}"
        yield Finding("hub", NOTE, "not asked, since HF_HUB_OFFLINE is set", remedy, facts)
        return
    started = time.monotonic()
    try:
        answer = get_session().get(f"{constants.ENDPOINT}/api/models?limit=1", timeout=HUB_SECONDS)
    except Exception as error:
        own = "HF_ENDPOINT, " if facts["own_endpoint"] else ""
        yield Finding(
            "hub", NOTE, f"{place} cannot be reached ({in_words(error, 120)})",
            f"check {own}network, proxy and firewall; {local}", facts | {"reachable": False},
        )  # fmt: skip
        return
    facts |= {"reachable": True, "status": answer.status_code, "seconds": round(time.monotonic() - started, 2)}
    text = f"{place} answers in {facts['seconds']:.1f} s"
    if answer.status_code >= 500 or answer.status_code in (401, 403, 407, 429):
        text = f"{place} answers with status {answer.status_code}"
        yield Finding("hub", NOTE, text, f"downloads may fail: try again later, check the proxy; {local}", facts)
    elif "html" in answer.headers.get("content-type", ""):
        remedy = f"is there a login page or a proxy before the network? {local}"
        yield Finding("hub", NOTE, f"{place} answers with a web page where the hub's data should be", remedy, facts)
    else:
        yield Finding("hub", OK, text, facts=facts)


def token() -> Iterator[Finding]:
    """Is there a token? It is not read further than that, and never shown."""
    names = [name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name, "").strip()]
    used = token_files()[0]
    if names:
        yield Finding("token", OK, f"present, in {names[0]}", facts={"present": True, "from": names[0]})
    elif used.is_file() and used.stat().st_size:
        yield Finding("token", OK, "present, saved by hf auth login", facts={"present": True, "from": "file"})
    else:
        text, remedy = "none", "gated models (Llama, Gemma) and push want one: hf auth login, or set HF_TOKEN"
        yield Finding("token", NOTE, text, remedy, {"present": False, "from": None})
