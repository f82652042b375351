"""A process that is killed: the others end within a minute, and say why."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORDS = ["--recipe", "quickstart", "training.max_steps=8", "training.save_strategy=steps", "training.save_steps=2",
         "training.logging_steps=1", "training.eval_strategy=no", "evaluation.samples=2", "data.max_eval_rows=8",
         "training.warmup_steps=0", "training.save_total_limit=9", "training.per_device_train_batch_size=2"]  # fmt: skip


def torchrun(out, *options, words=(), **environment):
    """A real torchrun of two processes that train the quickstart; its exit status and what it said."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--rdzv_backend=c10d",
               "--rdzv_endpoint=localhost:0", *options, "-m", "tests.scale.harmed", *WORDS, f"training.output_dir={out}", *words]  # fmt: skip
    given = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=given, cwd=ROOT, timeout=500)
    return done.returncode, done.stdout + done.stderr, time.monotonic() - started


@pytest.mark.slow
def test_the_others_end_within_a_minute_and_say_why(tmp_path):
    status, said, seconds = torchrun(tmp_path / "run", HARM="kill:1:3", HARMED=str(tmp_path / "harmed"))
    assert status != 0
    assert time.time() - (tmp_path / "harmed").stat().st_mtime < 60, (seconds, said[-3000:])
    assert "rank 0: Lost: another process of the run has ended, or does not answer" in said
