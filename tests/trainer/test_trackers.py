"""Trackers get our metrics, offline; one that is not installed is said before anything is spent."""

import importlib.util
import os
import shutil
import socket

import pytest

from orpo_lite import ORPOTrainer
from orpo_lite.common.errors import RequestError
from orpo_lite.recipe import Recipe
from orpo_lite.train.pipeline import run
from orpo_lite.trainer.callbacks import check_trackers
from tests.trainer.test_trainer import adapted
from tests.training import config, rows

needs_trackio = pytest.mark.skipif(
    importlib.util.find_spec("trackio") is None, reason="no trackio here: .ci/run installs it (pip install trackio)"
)
OURS = {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected", "nll_loss",
        "log_odds_ratio", "log_odds_chosen", "loss"}  # fmt: skip


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Whatever calls out fails."""
    connect = socket.socket.connect

    def only_here(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            pytest.fail(f"a connection to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", only_here)


@pytest.fixture(scope="module")
def trackio_folder():
    yield os.environ["TRACKIO_DIR"]
    shutil.rmtree(os.environ["TRACKIO_DIR"], ignore_errors=True)


def trackio_lines(project):
    """Every line that a project holds, in order, and the runs that they belong to."""
    from trackio.sqlite_storage import SQLiteStorage

    runs = SQLiteStorage.get_runs(project)
    return [line for name in runs for line in SQLiteStorage.get_logs(project, name)], runs


def tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return found


@needs_trackio
def test_a_run_in_tensorboard_and_trackio(tmp_path, trackio_folder):
    words = ["training.max_steps=2", "training.logging_steps=1", "training.report_to=[tensorboard, trackio]", "model.quantization=none",
             "evaluation.samples=2", "evaluation.max_new_tokens=6", "data.max_eval_rows=12", "training.project=whole",
             f"training.output_dir={tmp_path / 'run'}"]  # fmt: skip
    done = run(Recipe.load("quickstart", words))
    assert done is not None
    logged = tensorboard(tmp_path / "run" / "tensorboard")
    for name in OURS:
        assert [each.step for each in logged.Scalars(f"train/{name}")] == [1, 2], name
        assert {0, 2} <= {each.step for each in logged.Scalars(f"eval/{name}")}
    last = logged.Scalars("eval/rewards/margins")[-1].value
    assert last == pytest.approx(done.record.evaluation("after")["rewards/margins"], rel=1e-5)

    import trackio

    trackio.finish()  # as it does itself when the process ends
    lines, runs = trackio_lines("whole")
    assert len(runs) == 1, "what comes after training is in a run of its own"
    for name in OURS:
        assert len([line for line in lines if f"train/{name}" in line]) == 2
        assert len([line for line in lines if f"eval/{name}" in line]) >= 2


def test_one_that_is_not_installed_is_said_before_anything_is_spent(tmp_path, tokenizer, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in ("wandb", "mlflow") else there(name, *a)
    )
    with pytest.raises(
        RequestError,
        match="report_to: found .*wandb.*: WandbCallback requires wandb to be installed. Run `pip install wandb`",
    ):
        run(
            Recipe.load(
                "quickstart",
                ["training.report_to=wandb", "model.name_or_path=/nowhere", f"training.output_dir={tmp_path / 'a'}"],
            )
        )
    with pytest.raises(RequestError, match="pip install mlflow"):
        ORPOTrainer(
            adapted("llama"), config(tmp_path, report_to=["tensorboard", "mlflow"]), None, rows(2), None, tokenizer
        )
    with pytest.raises(
        RequestError, match=r"found tensorbord: tensorbord is not supported, only .*tensorboard.* are supported"
    ):
        check_trackers("tensorbord")
    for fine in (None, [], "none", "all", ["all"], "tensorboard"):
        check_trackers(fine)
