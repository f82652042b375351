"""Whole or not at all: kills, full disks, other hands on the target."""

import hashlib
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch

from orpo_lite.common.errors import RequestError
from orpo_lite.merge.run import merge
from tests.commands import Command
from tests.merge.conftest import weights


def digest(folder: Path) -> str:
    """Names and bytes of everything in a folder."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            total.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return total.hexdigest()


def test_a_write_that_fails_leaves_nothing(adapted, tmp_path):
    """The system refuses to let the file grow beyond a limit, half way through the weights."""
    _, _, adapter = adapted("llama", target_modules=["q_proj"])
    there = sorted(os.listdir(tmp_path))
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        try:
            merge(adapter, tmp_path / "merged")
        except RuntimeError as error:
            os._exit(7 if "takes no more data" in str(error) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert sorted(os.listdir(tmp_path)) == there
    merge(adapter, tmp_path / "merged")


def test_a_file_or_link_in_the_way(adapted, tmp_path):
    _, _, adapter = adapted("llama", target_modules=["q_proj"])
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RequestError, match="--output"):
        merge(adapter, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_politely(adapted, tmp_path, number):
    """The command clears up after itself."""
    _, _, adapter = adapted("llama", target_modules="all-linear")
    script = tmp_path / "slow.py"
    script.write_text(
        "import orpo_lite.merge.write as s, time, signal\nfrom orpo_lite.__main__ import load\nfrom orpo_lite.common.console import run_command\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's tests ignore it\n"
        "right = s.Job.merged_blocks\n"
        "def slow(self):\n"
        "    print('writing', flush=True); time.sleep(60)\n"
        "    yield from right(self)\n"
        "s.Job.merged_blocks = slow\n"
        "run_command(load('merge'))\n"
    )
    there = sorted(os.listdir(tmp_path))
    merging = Command(str(script), adapter, "--output", tmp_path / "merged")
    while "writing" not in merging.said():
        assert merging.poll() is None, "ended before it wrote"
        time.sleep(0.01)
    merging.send_signal(number)
    merging.communicate(timeout=60)
    assert merging.returncode not in (0, None) and sorted(os.listdir(tmp_path)) == there


@pytest.mark.slow
def test_killed_at_random_moments(adapted, tmp_path):
    """No half output, the input as it was, and the next run succeeds. KILLS=200 in the environment is the long form.

    The kills come at any time within a span, which shrinks after a merge that was whole and grows after one that was
    killed: about half are killed on any machine.
    """
    kills = int(os.environ.get("KILLS", "30"))
    _, base, adapter = adapted("llama", shard_size="100KB", target_modules="all-linear")
    before = digest(base), digest(adapter)
    merged = merge(adapter, tmp_path / "first")
    whole = digest(merged)
    assert len(weights(merged)) > 15
    torch.set_num_threads(1)
    started = time.monotonic()
    merge_apart(adapter, tmp_path / "timed")
    span = time.monotonic() - started
    chance = random.Random(0)
    outcomes = {"killed": 0, "whole": 0}
    for number in range(kills):
        place = tmp_path / "kills" / f"{number}"
        place.mkdir(parents=True)
        child = start_merge(adapter, place / "merged")
        time.sleep(chance.random() * span)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if (place / "merged").exists():
            outcomes["whole"] += 1
            span /= 1.5
            assert digest(place / "merged") == whole.replace("first", "merged") or len(weights(place / "merged")) > 15
        else:
            outcomes["killed"] += 1
            span *= 1.5
            merge_apart(adapter, place / "merged")
        assert sorted(weights(place / "merged")) == sorted(weights(merged))
        assert all(torch.equal(value, weights(merged)[key]) for key, value in weights(place / "merged").items())
        assert os.listdir(place) == ["merged"], "something was left beside it"
    assert (digest(base), digest(adapter)) == before
    assert min(outcomes.values()) > kills // 10, outcomes


def start_merge(adapter: Path, output: Path) -> int:
    """Start a silent merge in a fork of this process, which has everything imported; return its process id."""
    child = os.fork()
    if child:
        return child
    try:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        merge(adapter, output)
        os._exit(0)
    finally:
        os._exit(1)


def merge_apart(adapter: Path, output: Path) -> None:
    """Merge in a process of its own."""
    assert os.waitstatus_to_exitcode(os.waitpid(start_merge(adapter, output), 0)[1]) == 0
