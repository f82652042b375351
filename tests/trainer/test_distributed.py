"""Several processes are one: losses, gradient norms and adapters of 1 and of 2 gloo processes agree."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT, processes

SCRIPT = Path(__file__).with_name("ddp_script.py")


def outcomes(folder, count, mode):
    folder.mkdir()
    processes(count, SCRIPT, folder, mode, cwd=folder)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(count)]


@pytest.mark.parametrize("mode", ["pairs", "budget"])
def test_two_processes_train_as_one(mode, tmp_path):
    (one,) = outcomes(tmp_path / "one", 1, mode)
    for rank in outcomes(tmp_path / "two", 2, mode):
        assert rank["before"] == pytest.approx(one["before"], abs=1e-5)
        for got, expected in zip(rank["logged"], one["logged"], strict=True):
            assert got == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert rank["weights"] == pytest.approx(one["weights"], rel=1e-5)
        assert rank["after"] == pytest.approx(one["after"], abs=1e-5)


@pytest.mark.slow
def test_so_they_do_under_torchrun(tmp_path):
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SCRIPT, tmp_path, "pairs"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, env=environment, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (one,) = outcomes(tmp_path / "one", 1, "pairs")
    for rank in range(2):
        assert json.loads((tmp_path / f"rank{rank}.json").read_text())["weights"] == pytest.approx(
            one["weights"], rel=1e-5
        )
