"""Runs killed by SIGKILL at random moments, gone on with, and compared with one that never stopped.

    python -m tests.faults.kills --kills 300 --real 20

Tiny runs of the quickstart model (NF4, LoRA, evaluations, checkpoints), forked from a process that has everything
imported, so that a kill costs a second or two; `--real` of the kills go through `python -m orpo_lite.train`. A run is
killed at a random moment of loading, training, evaluating, saving or finishing, or in the instant in which a checkpoint
or its results are being written; the same command is given again until it is done. After every kill each checkpoint with
a name must be whole and none may be lost; at the end adapter, metrics and results must equal the unbroken run's, bit for
bit. Merges of the finished run are killed likewise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

WORDS = ["training.max_steps=9", "training.save_strategy=steps", "training.save_steps=2", "training.save_total_limit=2",
         "training.eval_strategy=steps", "training.eval_steps=4", "training.logging_steps=3", "evaluation.samples=1",
         "evaluation.max_new_tokens=2", "data.max_rows=40", "data.max_eval_rows=8"]  # fmt: skip
TIMES = ("tokens_per_second", "pairs_per_second", "peak_memory_gb", "eval_runtime", "eval_samples_per_second",
         "eval_steps_per_second")  # fmt: skip
SAVING = (".checkpoint-*", "checkpoints/.checkpoint-*", "adapter_model.safetensors", "run.json*", "*.part")
"""What lies in a run folder while something is being written."""


def words_of(output: Path) -> list[str]:
    return [*WORDS, f"training.output_dir={output}"]


def train(output: Path) -> None:
    """In a forked child: what the command does."""
    from orpo_lite.recipe import Recipe
    from orpo_lite.train.pipeline import run

    run(Recipe.load("quickstart", words_of(output)))


def merge(run_folder: Path, output: Path) -> None:
    from orpo_lite.merge.run import merge

    merge(str(run_folder), output, verify=False)


def start(work, real: list[str] | None, log: Path) -> int:
    """Pid of a child that does `work`, forked, or of the real command."""
    if real is not None:
        with log.open("ab") as out:
            return subprocess.Popen([sys.executable, "-m", *real], stdout=out, stderr=out).pid
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        work()
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def killed(pid: int, folder: Path, after: float, while_writing: bool) -> tuple[bool, str]:
    """Whether the child was killed in time, and where; raises if it failed by itself."""
    begun = time.monotonic()
    seen = {path.name for pattern in SAVING for path in folder.glob(pattern)}
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            if status:
                raise AssertionError(f"the run failed by itself with status {os.waitstatus_to_exitcode(status)}")
            return False, "finished"
        late = time.monotonic() - begun >= after
        new = {p.name for pattern in SAVING for p in folder.glob(pattern)} - seen if while_writing and late else set()
        if late and (new or not while_writing):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return True, "writing " + min(new).partition("-")[0] if new else "at a random moment"
        time.sleep(0.0005 if while_writing else 0.005)


def check(folder: Path, before: int) -> int:
    """Every checkpoint with a name is whole, and none that was there is lost. The newest one's step."""
    from orpo_lite.trainer.checkpoint_folder import checkpoints, newest_good, step_of

    newest, damaged = newest_good(folder / "checkpoints")
    assert not damaged, damaged
    # one that is being replaced has another name for an instant
    aside = [path for path in (folder / "checkpoints").glob(".checkpoint-*.old")]
    step = step_of(newest) if newest else 0
    assert step >= before or aside, (
        f"checkpoint of step {before} is lost, {checkpoints(folder / 'checkpoints')} are left"
    )
    return max(step, before if aside else 0)


def outcome(folder: Path) -> dict[str, object]:
    """All of a finished run that must be the same."""
    facts = json.loads((folder / "run.json").read_text("utf-8"))
    assert facts.get("finished", True)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert (folder / "report.html").is_file() and (folder / "README.md").is_file()
    return {
        "adapter": hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest(),
        "metrics": [{key: value for key, value in line.items() if key not in TIMES} for line in lines],
        "eval": {side: {k: v for k, v in facts["eval"][side].items() if k not in TIMES and "runtime" not in k}
                 for side in ("before", "after")},
        "samples": facts["samples"],
        "left": sorted(path.name for path in folder.rglob("*") if path.name.startswith(".") or path.suffix == ".part"),
    }  # fmt: skip


def main(kills: int, real: int, seed: int, place: Path) -> Counter:
    """Kill `kills` times, `real` of them through the real command; counts of where."""
    chance, counts, log = random.Random(seed), Counter(), place / "log.txt"
    began = time.monotonic()
    whole = place / "whole"
    pid = start(lambda: train(whole), None, log)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, log.read_text()
    lasts = time.monotonic() - began
    expected = outcome(whole)
    print(f"the unbroken run took {lasts:.1f} s", flush=True)
    number = 0
    while counts["kills"] < kills:
        number += 1
        folder, step = place / f"run-{number}", 0
        if chance.random() < 0.3:
            shutil.rmtree(place / "hf", ignore_errors=True)
        for _ in range(chance.randint(1, 8)):
            command = (
                ["orpo_lite.train", "--recipe", "quickstart", *words_of(folder)] if counts["real"] < real else None
            )
            longest = lasts * (1.1 if command is None else 4)
            writing = chance.random() < 0.5
            pid = start(lambda folder=folder: train(folder), command, log)
            was_killed, where = killed(pid, folder, chance.uniform(0, longest * (0.6 if writing else 1)), writing)
            if not was_killed:
                break
            counts.update(("kills", where, "real" if command else "forked"))
            step = check(folder, step)
        if not (folder / "run.json").is_file() or not json.loads((folder / "run.json").read_text()).get(
            "finished", True
        ):
            pid = start(lambda folder=folder: train(folder), None, log)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, log.read_text()[-3000:]
        got = outcome(folder)
        for key, value in expected.items():
            assert got[key] == value, f"run {number}: {key} differs: {got[key]} != {value}"
        counts["runs"] += 1
        if number % 5 == 0:
            kill_a_merge(folder, place / f"merged-{number}", chance, counts, log)
        shutil.rmtree(folder)
        if number % 10 == 0:
            print(f"{time.monotonic() - began:5.0f} s: {dict(counts)}", flush=True)
    print(f"{dict(counts)} in {time.monotonic() - began:.0f} s: none lost, none corrupt, all equal to the unbroken run")
    return counts


def kill_a_merge(folder: Path, output: Path, chance: random.Random, counts: Counter, log: Path) -> None:
    """No half model under the output's name; the run folder as it was; the next merge succeeds."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    pid = start(lambda: merge(folder, output), None, log)
    was_killed, _ = killed(pid, output.parent, chance.uniform(0, 1.5), False)
    counts.update(["kills", "merging"] if was_killed else [])
    assert not was_killed or not output.exists() or (output / "config.json").is_file()
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    if not output.exists():
        pid = start(lambda: merge(folder, output), None, log)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, log.read_text()[-3000:]
    assert (output / "model.safetensors").is_file() or (output / "model.safetensors.index.json").is_file()
    shutil.rmtree(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--real", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        # caches are written, and killed, as well; the libraries ask for their place once
        os.environ["HF_HOME"] = os.path.join(made, "hf")
        import orpo_lite.merge.run
        import orpo_lite.train.pipeline  # noqa: F401

        main(given.kills, given.real, given.seed, Path(made))
