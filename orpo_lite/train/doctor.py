"""`python -m orpo_lite.doctor`: does training work here? What is wrong, in one line each, and what to do about it."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer
from rich.markup import escape

from orpo_lite import __version__
from orpo_lite.common.console import console
from orpo_lite.common.credentials import Scrubber
from orpo_lite.train import doctor_device as device
from orpo_lite.train import doctor_kernels as kernels
from orpo_lite.train import doctor_machine as machine
from orpo_lite.train import doctor_selftest as selftest
from orpo_lite.train.doctor_findings import NOTE, OK, PROBLEM, VERDICTS, Finding, Probe, examine

PROBES = [
    Probe("python", machine.python),
    Probe("packages", machine.packages),
    Probe("memory", machine.memory),
    Probe("disk", machine.disk),
    Probe("hub", machine.hub, limit=30),
    Probe("token", machine.token),
    Probe("torch", device.torch_build),
    Probe("driver", device.driver, needs=("torch",)),
    Probe("card", device.cards, needs=("torch",)),
    Probe("bitsandbytes", kernels.bitsandbytes, needs=("torch",)),
    Probe("libraries", machine.libraries, limit=300, needs=("torch",)),  # minutes from a cold network disk
    Probe("bf16", device.sixteen_bits, needs=("libraries",)),
    Probe("quantising", kernels.quantising, needs=("libraries", "bitsandbytes")),
    Probe("attention", kernels.attention, needs=("libraries",)),
]
SELF_TEST = [
    Probe("training", selftest.learning, limit=300, needs=("libraries", "bitsandbytes", "quantising")),
    Probe("plan", selftest.planning, limit=300, needs=("libraries", "bitsandbytes", "quantising")),
]
COLOURS = {OK: "green", NOTE: "yellow", PROBLEM: "bold red"}


def command(
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object, for bug reports")] = False,
    no_self_test: Annotated[
        bool, typer.Option("--no-self-test", help="look only; leave out the short training run")
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
    """One line: verdict, what, found, remedy."""
    text = f"{finding.text} -> {finding.remedy}" if finding.remedy else finding.text
    verdict = f"[{COLOURS[finding.verdict]}]{finding.verdict:<7}[/]"
    name = f"[bold]{escape(scrub(finding.name))}[/]"
    console.print(f"{verdict}  {name}: {escape(scrub(text))}", soft_wrap=True)


def summary(found: list[Finding]) -> str:
    """What it comes to."""
    count = {verdict: sum(finding.verdict == verdict for finding in found) for verdict in VERDICTS}
    notes = f"{count[NOTE]} note(s)"
    if count[PROBLEM]:
        return f"{count[PROBLEM]} problem(s) and {notes}: mend the problems first"
    tried = any(finding.name == "training" and finding.verdict == OK for finding in found)
    return f"No problem, {notes}: " + ("training works here" if tried else "nothing speaks against training here")
