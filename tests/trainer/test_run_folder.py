"""A run folder as the next command finds it: resumed, refused with the reason, or not touched."""

import json
import re
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from orpo_lite.common.errors import RequestError
from orpo_lite.recipe import Recipe
from orpo_lite.train.pipeline import run
from orpo_lite.trainer.checkpoint_folder import MANIFEST, checkpoints, seal
from orpo_lite.trainer.run_folder import RunFolder
from tests.commands import Command

SHORT = ["training.max_steps=6", "training.save_strategy=steps", "training.save_steps=2", "training.eval_steps=6",
         "training.logging_steps=4", "evaluation.samples=0", "data.max_rows=80", "data.max_eval_rows=8"]  # fmt: skip


def recipe(output, *words):
    return Recipe.load("quickstart", [*SHORT, f"training.output_dir={output}", *words])


@pytest.fixture
def unfinished(tmp_path):
    """A folder whose run has stopped after checkpoint 4."""
    folder = tmp_path / "run"
    for step in (2, 4):
        path = folder / "checkpoints" / f"checkpoint-{step}"
        path.mkdir(parents=True)
        (path / "optimizer.pt").write_bytes(b"x" * 100)
        seal(path, {"format": 1, "step": step, "processes": 1, "pairs_per_step": 8})
    recipe(folder).save(folder / "recipe.yaml")
    return folder


def test_the_same_command_goes_on_and_says_from_where(unfinished):
    folder = RunFolder.create(recipe(unfinished))
    assert folder.path == unfinished and folder.checkpoint.name == "checkpoint-4" and not folder.notes
    with pytest.raises(BlockingIOError):
        import fcntl

        fcntl.flock((unfinished / ".lock").open(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    folder.unlock()


@pytest.mark.parametrize("resume", [False, True])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(unfinished, resume):
    (unfinished / "checkpoints/checkpoint-4/optimizer.pt").write_bytes(b"x" * 99)
    folder = RunFolder.create(recipe(unfinished), resume)
    assert folder.checkpoint.name == "checkpoint-2"
    assert re.search(r"damaged, so not resumed from: .*checkpoint-4: optimizer.pt has 99 bytes, 100", folder.notes[0])
    folder.unlock()
    (unfinished / "checkpoints/checkpoint-2" / MANIFEST).unlink()
    if resume:
        with pytest.raises(RequestError, match=r"(?s)no good checkpoint.*checkpoint-4: .*checkpoint-2: manifest"):
            RunFolder.create(recipe(unfinished), True)
    else:
        folder = RunFolder.create(recipe(unfinished))
        assert folder.checkpoint is None and len(folder.notes) == 3 and "starts from the beginning" in folder.notes[2]
        folder.unlock()


@pytest.mark.parametrize(
    ("word", "forced"),
    [
        ("orpo.beta=0.2", True),
        ("training.learning_rate=1e-5", True),
        ("training.max_steps=9", True),
        ("evaluation.samples=3", True),
        ("adapter.r=4", False),
        ("data.max_rows=79", False),
        ("training.seed=1", False),
        ("training.per_device_train_batch_size=4", False),
        ("model.double_quant=false", False),
    ],
)
def test_changes_are_listed_and_forced_only_where_that_makes_sense(unfinished, word, forced):
    place = word.partition("=")[0]
    with pytest.raises(RequestError, match=re.escape(place)) as refused:
        RunFolder.create(recipe(unfinished, word), True)
    assert ("--resume=force" in str(refused.value)) == forced
    if forced:
        folder = RunFolder.create(recipe(unfinished, word), "force")
        assert folder.checkpoint.name == "checkpoint-4" and place in folder.notes[0]
        assert not folder.changes(recipe(unfinished, word)), "the folder's recipe is the changed one now"
        folder.unlock()
    else:
        with pytest.raises(RequestError, match="pairs per optimizer step" if "batch" in word else re.escape(place)):
            RunFolder.create(recipe(unfinished, word), "force")
        assert not RunFolder(unfinished).changes(recipe(unfinished))
        other = RunFolder.create(recipe(unfinished, word))
        assert other.path.name == "run-2", "without --resume another recipe is another run"
        assert "run is not empty, so this run has a folder of its own" in other.notes[-1]
        other.unlock()


def test_another_number_of_processes_is_refused_or_forced_with_the_same_pairs_a_step(unfinished):
    with pytest.raises(RequestError, match=r"(?s)processes: was 1, is 2.*pairs per optimizer step: was 8, is 16"):
        RunFolder.create(recipe(unfinished), True, processes=2)
    half = recipe(unfinished, "training.per_device_train_batch_size=4")
    with pytest.raises(RequestError, match=r"(?s)processes: was 1, is 2.*--resume=force"):
        RunFolder.create(half, True, processes=2)
    folder = RunFolder.create(half, "force", processes=2)
    assert any("processes: was 1, is 2" in note for note in folder.notes)
    folder.unlock()


@pytest.mark.parametrize("left", [[], ["recipe.yaml.part"], [".lock"]])
def test_what_a_kill_in_the_first_instant_leaves_is_no_other_run(tmp_path, left):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in left:
        (folder / name).write_text("half")
    made = RunFolder.create(recipe(folder))
    assert made.path == folder and (folder / "recipe.yaml").is_file()
    made.unlock()


def test_a_run_killed_between_its_results_and_its_report_is_not_finished(unfinished):
    folder = RunFolder(unfinished)
    folder.write({"steps": 6, "finished": False})
    assert not folder.finished
    folder.write({"steps": 6})
    assert folder.finished


def test_a_folder_that_cannot_be_written_is_named(unfinished, monkeypatch):
    def read_only(self, *args, **kwargs):
        raise OSError(30, "Read-only file system", str(self))

    asked = recipe(unfinished)
    monkeypatch.setattr("orpo_lite.common.files.FileLock.acquire", read_only)
    with pytest.raises(RequestError, match=r"training.output_dir: .*\(Read-only file system\).*another folder"):
        RunFolder.create(asked)


def test_results_that_cannot_be_written_are_rescued(tmp_path, monkeypatch):
    """The drive is gone at the end: the adapter goes to a temporary folder, which the message names."""
    output = tmp_path / "run"
    write = RunFolder.write

    def gone(self, facts):
        raise OSError(107, "Transport endpoint is not connected")

    monkeypatch.setattr(RunFolder, "write", gone)
    with pytest.raises(OSError, match="training is done, and the adapter is in") as error:
        run(recipe(output))
    rescue = re.search(r"adapter is in (\S+);", str(error.value))[1]
    monkeypatch.setattr(RunFolder, "write", write)
    done = run(recipe(output), resume=True)
    first, second = (load_file(f"{path}/adapter_model.safetensors") for path in (rescue, done.folder))
    assert all(torch.equal(first[key], second[key]) for key in second)


def orpo_lite(*words):
    return Command("train", "--recipe", "quickstart", *SHORT, *words, COLUMNS="200")


def test_the_real_command_stops_by_sigterm_and_goes_on(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    words = ["training.max_steps=40", "training.save_strategy=no", "training.eval_strategy=no"]
    run(recipe(whole, *words))
    command = orpo_lite(*words, f"training.output_dir={cut}")
    while not (cut / "metrics.jsonl").is_file() or '"loss"' not in (cut / "metrics.jsonl").read_text():
        assert command.poll() is None, command.communicate()
        time.sleep(0.02)
    command.send_signal(signal.SIGTERM)
    out, err = command.communicate(timeout=120)
    assert command.returncode == 128 + 15 and "Traceback" not in err, err
    assert "SIGTERM: stopping after this step" in err and re.search(r"checkpoint-\d+ is kept; resume with", err)
    step = int(checkpoints(cut / "checkpoints")[-1].name.partition("-")[2])
    assert 4 <= step < 40 and not (cut / "run.json").exists() and not (cut / ".lock").exists()

    command = orpo_lite(*words, f"training.output_dir={cut}")
    out, err = command.communicate(timeout=300)
    assert command.returncode == 0, err
    assert f"resuming from checkpoint-{step}" in out
    first, second = (load_file(path / "adapter_model.safetensors") for path in (whole, cut))
    assert all(torch.equal(first[key], second[key]) for key in first)
    logged = [
        [(x["step"], x.get("loss")) for x in map(json.loads, (path / "metrics.jsonl").open())] for path in (whole, cut)
    ]
    assert logged[0] == logged[1]


def test_force_is_taken_with_resume_on_the_command_line(unfinished):
    command = orpo_lite("--resume", "adapter.r=4", f"training.output_dir={unfinished}")
    _, err = command.communicate(timeout=120)
    assert command.returncode == 2 and "adapter.r: was 8, is 4" in err or "adapter.r: was 16, is 4" in err, err
    command = orpo_lite("--resume=force", "adapter.r=4", f"training.output_dir={unfinished}")
    _, err = command.communicate(timeout=120)
    assert command.returncode == 2 and "adapter.r" in err and "--resume=force" not in err, err
