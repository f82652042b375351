"""Windows and macOS as far as they can be had here: what they lack is taken away, and things go on or say why not."""

import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from orpo_lite.common.console import run_command
from orpo_lite.common.errors import RequestError
from orpo_lite.data.__main__ import command
from orpo_lite.model.base import load_base
from orpo_lite.model.precision import (
    bitsandbytes_unavailable,
    choose_precision,
    quantization_settings,
    quantization_skipped_reason,
)
from orpo_lite.recipe import ModelSection, Recipe
from orpo_lite.train.pipeline import run

SHORT = [
    "training.max_steps=1",
    "evaluation.samples=0",
    "data.max_rows=16",
    "data.max_eval_rows=4",
    "training.save_strategy=no",
]
AS_ON_WINDOWS = """
import importlib, multiprocessing, os, signal, sys
import accelerate, bitsandbytes, datasets, matplotlib, peft, psutil, torch, transformers.trainer  # these know their systems
for name in ("fcntl", "resource", "termios", "tty", "pwd", "grp"):
    sys.modules[name] = None
for module, names in ((os, "fork forkpty sched_getaffinity sysconf statvfs getuid geteuid killpg setsid"),
                      (signal, "SIGKILL SIGPROF SIGUSR1 SIGHUP SIGALRM SIGQUIT pthread_sigmask setitimer ITIMER_PROF")):
    for name in names.split():
        delattr(module, name)
from orpo_lite.__main__ import load
from orpo_lite.common.console import run_command
sys.argv = ["train", *sys.argv[1:]]
run_command(load("train"))
"""


def test_a_run_without_bitsandbytes_goes_on_in_plain_weights_and_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with caplog.at_level(logging.WARNING):
        done = run(
            Recipe.load(
                "quickstart", [*SHORT, "training.optim=paged_adamw_32bit", f"training.output_dir={tmp_path / 'run'}"]
            )
        )
    [word] = [line for line in caplog.messages if "model.quantization" in line]
    assert "nf4 is skipped, since bitsandbytes does not work here" in word and "4 GB per billion" in word
    assert done.record.base_model.quantization == "none"
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["model"]["quantization"] == "none"


def test_on_macos_the_reason_is_macos(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert bitsandbytes_unavailable() == "bitsandbytes is not available for macOS"
    spec = ModelSection(name_or_path="builtin:quickstart/model")
    assert "since bitsandbytes is not available for macOS: the weights stay in 32 bits" in (
        quantization_skipped_reason(spec, torch.device("mps")) or ""
    )
    assert quantization_skipped_reason(spec.model_copy(update={"quantization": "none"}), torch.device("mps")) is None
    # beside a CUDA device bitsandbytes can be had, and the memory was planned with it
    assert quantization_skipped_reason(spec, torch.device("cuda")) is None
    with pytest.raises(RequestError, match="model.quantization: nf4 needs bitsandbytes"):
        quantization_settings(spec, torch.float32)
    model, facts = load_base(spec, device="cpu")
    assert facts.quantization == "none" and facts.quantized_share is None


def test_an_apple_gpu_computes_in_float32(monkeypatch):
    found = choose_precision("auto", "mps")
    assert (found.dtype, found.fp16, found.bf16) == (torch.float32, False, False) and "Apple GPU" in found.why


@pytest.mark.parametrize("name", ["paged_adamw_32bit", "adamw_bnb_8bit", "lion_32bit", "rmsprop_bnb"])
def test_optimizers_of_bitsandbytes_are_replaced_without_a_gpu(name, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("for machines without a GPU")
    run(Recipe.load("quickstart", [*SHORT, f"training.optim={name}", f"training.output_dir={tmp_path}"]), dry_run=True)
    assert f"training.optim: {name} needs a CUDA device: adamw_torch is used here" in " ".join(
        capsys.readouterr().out.split()
    )


def test_a_console_that_cannot_write_a_character_writes_it_out(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "argv", ["data", "--recipe", "quickstart", "data.max_rows=4", "--examples", "1"])
    with pytest.raises(SystemExit) as stop:
        run_command(command)
    out.flush()
    text = out.buffer.getvalue().decode("cp1252")
    assert not stop.value.code and "4 pairs to train on" in text and "\\u23ce" in text


@pytest.mark.slow
def test_a_run_with_nothing_of_posix(tmp_path):
    words = [*SHORT, f"training.output_dir={tmp_path / 'run'}"]
    place = {"PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run([sys.executable, "-c", AS_ON_WINDOWS, "--recipe", "quickstart", *words],
                          capture_output=True, env=os.environ | place, cwd=tmp_path, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr.decode("cp1252", "replace")[-3000:]
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file() and (tmp_path / "run" / "report.html").is_file()
