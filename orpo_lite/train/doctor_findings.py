"""Findings, and the process apart in which they are made: what is probed may raise, hang, or take its process down."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

OK, NOTE, PROBLEM = "ok", "note", "problem"
VERDICTS = (OK, NOTE, PROBLEM)
"""From good to bad. A note is worth knowing and stops nothing; with a problem, training cannot work as it should."""
BUG_REPORT = "if it stays, put the output of python -m orpo_lite.doctor --json into a bug report"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's: what was looked at, the verdict, what was found and what to do about it."""

    name: str
    verdict: str
    text: str
    remedy: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    """Plain values for --json; bytes and seconds."""


@dataclass(frozen=True)
class Probe:
    """Something to look at.

    Args:
        look: a function of a module, which makes findings; whatever it raises becomes a finding too.
        limit: seconds that it may take for its next finding.
        needs: the probes whose problems make this one pointless.
    """

    name: str
    look: Callable[[], Iterable[Finding]]
    limit: float = 120
    needs: tuple[str, ...] = ()


def examine(probes: Iterable[Probe]) -> Iterator[Finding]:
    """Run the probes one after the other in a child process, which is replaced where one of them spoils it.

    An exception may leave CUDA unusable, so that the probes after it get a new process as well.
    """
    left, broken = list(probes), set[str]()
    # forked where that is safe: the child then starts at once, and knows what this process knows
    torch: Any = sys.modules.get("torch")
    forkable = sys.platform == "linux" and (torch is None or not torch.cuda.is_initialized())
    context: Any = multiprocessing.get_context("fork" if forkable else "spawn")
    # what a child that is killed leaves behind goes with this process
    with tempfile.TemporaryDirectory(prefix="orpo_lite_", ignore_cleanup_errors=True) as scratch:
        yield from _in_children(left, broken, context, scratch)


def _in_children(left: list[Probe], broken: set[str], context: Any, scratch: str) -> Iterator[Finding]:
    while left:
        cause = next((name for name in left[0].needs if name in broken), None)
        if cause is not None:
            probe = left.pop(0)
            broken.add(probe.name)
            yield Finding(probe.name, NOTE, f"not looked at, since there is a problem with {cause}")
            continue
        sys.stdout.flush()
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_look, args=(left, sender, scratch))
        process.start()
        sender.close()
        try:
            yield from _listen(process, receiver, left, broken)
        finally:
            process.kill()
            process.join()
            receiver.close()


def _listen(process: Any, receiver: Connection, left: list[Probe], broken: set[str]) -> Iterator[Finding]:
    """The child's findings. What is done leaves `left`; the last to leave may have been the child's end."""
    while left and broken.isdisjoint(left[0].needs):
        probe, ended = left[0], True
        try:
            if receiver.poll(probe.limit):
                finding, ended = receiver.recv()
            else:
                finding = Finding(probe.name, PROBLEM, f"gave no answer within {probe.limit:.0f} s", BUG_REPORT)
        except EOFError:
            process.join()
            finding = Finding(probe.name, PROBLEM, f"ended its process ({_how(process.exitcode)})", BUG_REPORT)
        if finding is None or ended:
            left.pop(0)
        if finding is not None:
            if finding.verdict == PROBLEM:
                broken.add(probe.name)
            yield finding
            if ended:
                return


def _how(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit status {code}"
    return f"by {signal.Signals(-code).name}" if -code in set(signal.Signals) else f"by signal {-code}"


def _look(probes: list[Probe], sender: Connection, scratch: str) -> None:
    """In the child: what libraries print goes nowhere. Sends (finding, False) for each, (None, False) after a probe's
    last, and (finding, True) for an exception, after which this process ends."""
    sys.stdout = sys.stderr = nowhere = open(os.devnull, "w", encoding="utf-8")
    tempfile.tempdir = scratch
    for stream in (1, 2):  # what native code prints
        os.dup2(nowhere.fileno(), stream)
    for probe in probes:
        try:
            for finding in probe.look():
                sender.send((finding, False))
        except BaseException as error:  # a library may call sys.exit
            sender.send((unexpected(probe.name, error), True))
            return
        sender.send((None, False))


def unexpected(name: str, error: BaseException) -> Finding:
    """A probe that raised, as a finding."""
    frames = traceback.extract_tb(error.__traceback__)[-8:]
    where = [f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}" for frame in frames]
    return Finding(name, PROBLEM, in_words(error), BUG_REPORT, {"traceback": where})


def in_words(error: BaseException, limit: int = 300) -> str:
    """An exception on one line."""
    text = " ".join(str(error).split())
    return type(error).__name__ + (f": {text[:limit]}" if text else "") + ("..." if len(text) > limit else "")


def gigabytes(size: float) -> str:
    """Bytes in words; GB is 10^9."""
    return f"{size / 1e9:.1f} GB"
