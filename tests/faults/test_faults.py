"""The short form of the figures: kills and cuts; `python -m tests.faults.kills` and `.cuts` are the long."""

import subprocess
import sys

import pytest

from tests.faults import cuts


def test_cuts_in_real_checkpoints(tmp_path):
    said = cuts.main(harms=40, resumed=1, seed=1, place=tmp_path)
    assert "40 cuts seen and named; 1 runs gone on with, all equal" in said


@pytest.mark.slow
def test_killed_runs_end_as_the_unbroken_one():
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.kills", "--kills", "16", "--real", "1", "--seed", "1"],
        capture_output=True, text=True, timeout=2400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "none lost, none corrupt, all equal to the unbroken run" in done.stdout
