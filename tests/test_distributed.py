"""Several processes are one: losses, gradient norms and adapters of 1 and of 2 gloo processes agree."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def outcomes(folder, processes, mode):
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = command if processes > 1 else [sys.executable]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(ROOT / "tests" / "ddp_script.py"), str(folder), mode], capture_output=True, text=True, env=environment, cwd=folder)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.parametrize("mode", ["pairs", "budget"])
def test_two_processes_train_as_one(mode, tmp_path):
    (one,) = outcomes(tmp_path / "one", 1, mode)
    for rank in outcomes(tmp_path / "two", 2, mode):
        assert rank["before"] == pytest.approx(one["before"], abs=1e-5)
        for got, expected in zip(rank["logged"], one["logged"], strict=True):
            assert got == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert rank["weights"] == pytest.approx(one["weights"], rel=1e-5)
        assert rank["after"] == pytest.approx(one["after"], abs=1e-5)
