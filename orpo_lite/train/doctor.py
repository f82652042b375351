"""`python -m orpo_lite.doctor`: check whether training works on this machine, and say what to do where it does not.

Each probe runs in a process of its own, since what it probes may raise, hang, or take its process down.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from orpo_lite import __version__
from orpo_lite.common.console import console
from orpo_lite.common.credentials import Scrubber
from orpo_lite.train import doctor_machine as machine
from orpo_lite.train import doctor_selftest as selftest
from orpo_lite.train.doctor_machine import BUG_REPORT, NOTE, OK, PROBLEM, Finding, in_words

VERDICTS = (OK, NOTE, PROBLEM)
"""From good to bad."""
COLORS = {OK: "green", NOTE: "yellow", PROBLEM: "bold red"}


@dataclass(frozen=True)
class Probe:
    """Something to check.

    Args:
        look: a function of a module, which makes findings; whatever it raises becomes a finding too.
        limit: seconds that it may take for its next finding.
        needs: findings whose problems make this probe pointless.
    """

    name: str
    look: Callable[[], Iterable[Finding]]
    limit: float = 120
    needs: tuple[str, ...] = ()


PROBES = [
    Probe("python", machine.python),
    Probe("packages", machine.packages),
    Probe("memory", machine.memory),
    Probe("disk", machine.disk),
    Probe("hub", machine.hub, limit=30),
    Probe("token", machine.token),
    Probe("torch", machine.devices),
    Probe("libraries", machine.libraries, limit=300, needs=("torch",)),  # minutes from a cold network disk
    Probe("bitsandbytes", selftest.quantizing, needs=("torch", "libraries")),
    Probe("attention", selftest.computing, needs=("torch", "libraries")),
]
SELF_TEST = [Probe("training", selftest.training, limit=300, needs=("torch", "libraries", "bitsandbytes"))]


def command(
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object, for bug reports")] = False,
    no_self_test: Annotated[
        bool, typer.Option("--no-self-test", help="only look; leave out the short training run")
    ] = False,
) -> None:
    """Check this machine for training: packages, memory, card, kernels, hub; then a self-test of some 20 seconds."""
    started, found, scrub = time.monotonic(), list[Finding](), Scrubber(report=as_json)
    if not as_json:
        console.print(f"orpo-lite {__version__}; importing the libraries can take a minute")
    for finding in examine(PROBES if no_self_test else PROBES + SELF_TEST):
        found.append(finding)
        if not as_json:
            show(finding, scrub)
    worst = max((finding.verdict for finding in found), key=VERDICTS.index)
    seconds = time.monotonic() - started
    if as_json:
        checks = [vars(finding) for finding in found]
        report = {"orpo_lite": __version__, "verdict": worst, "seconds": round(seconds, 1), "checks": checks}
        print(json.dumps(scrub(report), indent=1))
    else:
        console.print(f"\n{summary(found)} ({seconds:.0f} s)", soft_wrap=True)
    if worst == PROBLEM:
        raise typer.Exit(1)


def show(finding: Finding, scrub: Scrubber) -> None:
    """Print one line: verdict, name, what was found, and the remedy."""
    text = f"{finding.text} -> {finding.remedy}" if finding.remedy else finding.text
    verdict = f"[{COLORS[finding.verdict]}]{finding.verdict:<7}[/]"
    name = f"[bold]{escape(scrub(finding.name))}[/]"
    console.print(f"{verdict}  {name}: {escape(scrub(text))}", soft_wrap=True)


def summary(found: list[Finding]) -> str:
    """Sum up the findings in a sentence."""
    count = {verdict: sum(finding.verdict == verdict for finding in found) for verdict in VERDICTS}
    notes = f"{count[NOTE]} note(s)"
    if count[PROBLEM]:
        return f"{count[PROBLEM]} problem(s) and {notes}: fix the problems first"
    trained = any(finding.name == "training" and finding.verdict == OK for finding in found)
    return f"No problem, {notes}: " + ("training works here" if trained else "nothing speaks against training here")


# ---- probes in processes of their own --------------------------------------------------------------------------------


def examine(probes: Iterable[Probe]) -> Iterator[Finding]:
    """Run the probes one after the other; a probe that needs something broken is skipped, with a note."""
    # forking is faster, and safe as long as this process has not used CUDA
    torch: Any = sys.modules.get("torch")
    forkable = sys.platform == "linux" and (torch is None or not torch.cuda.is_initialized())
    context: Any = multiprocessing.get_context("fork" if forkable else "spawn")
    broken = set[str]()
    # files that a killed probe leaves behind are removed with this folder
    with tempfile.TemporaryDirectory(prefix="orpo_lite_", ignore_cleanup_errors=True) as scratch:
        for probe in probes:
            cause = next((name for name in probe.needs if name in broken), None)
            if cause is not None:
                broken.add(probe.name)
                yield Finding(probe.name, NOTE, f"skipped, since there is a problem with {cause}")
                continue
            for finding in run_probe(probe, context, scratch):
                if finding.verdict == PROBLEM:
                    broken.add(finding.name)
                yield finding


def run_probe(probe: Probe, context: Any, scratch: str) -> Iterator[Finding]:
    """Run one probe in a child process."""
    sys.stdout.flush()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_findings, args=(probe, sender, scratch))
    process.start()
    sender.close()
    try:
        while receiver.poll(probe.limit):
            finding = receiver.recv()
            if finding is None:
                return
            yield finding
        yield Finding(probe.name, PROBLEM, f"gave no answer within {probe.limit:.0f} s", BUG_REPORT)
    except EOFError:
        process.join()
        yield Finding(probe.name, PROBLEM, f"ended its process ({exit_reason(process.exitcode)})", BUG_REPORT)
    finally:
        process.kill()
        process.join()
        receiver.close()


def exit_reason(code: int | None) -> str:
    """Describe an exit code in words."""
    if code is None or code >= 0:
        return f"exit status {code}"
    return f"by {signal.Signals(-code).name}" if -code in set(signal.Signals) else f"by signal {-code}"


def send_findings(probe: Probe, sender: Any, scratch: str) -> None:
    """Run the probe in this child process, whose output is discarded; send its findings, then None."""
    sys.stdout = sys.stderr = nowhere = open(os.devnull, "w", encoding="utf-8")
    tempfile.tempdir = scratch
    for stream in (1, 2):  # the output of native code
        os.dup2(nowhere.fileno(), stream)
    try:
        for finding in probe.look():
            sender.send(finding)
    except BaseException as error:  # a library may call sys.exit
        frames = traceback.extract_tb(error.__traceback__)[-8:]
        where = [f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}" for frame in frames]
        sender.send(Finding(probe.name, PROBLEM, in_words(error), BUG_REPORT, {"traceback": where}))
    sender.send(None)
