"""Commands and scripts in processes of their own that start in a moment, as a user's would run.

They are forked from a server process that has the libraries imported, which takes ten seconds a time; orpo_lite itself
is imported anew in each, with its own environment. What the libraries read from the environment at their import
(HF_ENDPOINT, HF_HOME) is the tests' own: processes that need another start by subprocess.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from typing import Any

ROOT = Path(__file__).parents[1]
OWN = dict(os.environ)
"""The environment before any test has changed it."""
LIBRARIES = ["torch", "transformers.trainer", "transformers.models.llama.modeling_llama", "bitsandbytes", "peft", "accelerate",
             "datasets", "safetensors.torch", "pydantic", "typer", "rich.console", "rich.progress"]  # fmt: skip
context: Any = multiprocessing.get_context("forkserver")
context.set_forkserver_preload([*LIBRARIES, "orpo_lite.train.pipeline"])


class Command:
    """A started `python -m orpo_lite.NAME`, or a script by its path; with the methods of subprocess.Popen that tests use."""

    def __init__(self, name: str, *words: Any, cwd: Any = None, tty: str | None = None, **environment: str):
        self.args = [name, *map(str, words)]
        self.folder = tempfile.TemporaryDirectory()
        self.files = [tty or str(Path(self.folder.name) / stream) for stream in ("stdout", "stderr")]
        real = dict(os.environ)
        own = real | {"PYTHONPATH": str(ROOT)} | environment
        # the server starts with the first command, in whatever environment that test has
        os.environ.clear()
        os.environ.update(OWN)
        try:
            self.process = context.Process(target=child, args=(self.args, str(cwd or Path.cwd()), own, self.files))
            self.process.start()
        finally:
            os.environ.clear()
            os.environ.update(real)
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    poll = returncode.fget

    def said(self) -> str:
        """Its stdout so far."""
        path = Path(self.files[0])
        return path.read_text("utf-8") if path.is_file() else ""

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait for its end; stdout and stderr.

        Raises:
            TimeoutExpired: and it is killed.
        """
        self.process.join(timeout)
        ended = self.returncode is not None
        if not ended:
            self.kill()
            self.process.join()
        out, err = (Path(path).read_text("utf-8") if Path(path).is_file() else "" for path in self.files)
        if not ended:
            raise TimeoutExpired(self.args, timeout, out, err)
        return out, err


def command(name: str, *words: Any, timeout: float = 300, **where: Any) -> CompletedProcess[str]:
    """Run `python -m orpo_lite.NAME words`, or a script by its path, to its end."""
    started = Command(name, *words, **where)
    out, err = started.communicate(timeout)
    return CompletedProcess(started.args, int(started.returncode or 0), out, err)


def processes(count: int, script: Path, *words: Any, cwd: Path, timeout: float = 300) -> None:
    """Run a script in `count` processes that find each other, as under torchrun; all must end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    if count > 1:
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}  # fmt: skip
    ranks = [{"RANK": str(n), "LOCAL_RANK": str(n)} if count > 1 else {} for n in range(count)]
    started = [Command(str(script), *words, cwd=cwd, **shared | rank) for rank in ranks]
    until = time.monotonic() + timeout
    while (
        time.monotonic() < until
        and any(one.poll() is None for one in started)
        and not any(one.poll() for one in started)
    ):
        time.sleep(0.05)
    if any(one.poll() for one in started):
        time.sleep(1)  # what the others say of it
    for one in started:
        if one.poll() is None:
            one.kill()
    told = [one.communicate()[1] for one in started]
    assert not any(one.returncode for one in started), "\n".join(
        f"rank {n}: {err[-3000:]}" for n, err in enumerate(told)
    )


def child(args: list[str], cwd: str, environment: Mapping[str, str], files: list[str]) -> None:
    """In the forked process."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, path in enumerate(files, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY), number)
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), "utf-8", line_buffering=True)
    sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", closefd=False), "utf-8", "backslashreplace", line_buffering=True)
    if "HF_DATASETS_CACHE" in environment:
        import datasets

        datasets.config.HF_DATASETS_CACHE = environment["HF_DATASETS_CACHE"]
    for name in [name for name in sys.modules if name.partition(".")[0] in ("orpo_lite", "tests")]:
        del sys.modules[name]
    name, *words = args
    sys.argv = [name, *words]
    if name.endswith(".py"):
        runpy.run_path(name, run_name="__main__")
    else:
        runpy.run_module(f"orpo_lite.{name}", run_name="__main__", alter_sys=True)
