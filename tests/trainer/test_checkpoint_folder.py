"""Checkpoints: what is sealed is whole, what is damaged is found and named, and one replaces another whole."""

import json
import os
import random
import shutil

import pytest

from orpo_lite.common.errors import RequestError
from orpo_lite.common.files import lock_folder, unlock_folder, write_atomically
from orpo_lite.trainer.checkpoint_folder import MANIFEST, checkpoints, clean, damage, newest_good, place, seal

FACTS = {"step": 1, "processes": 1, "pairs_per_step": 4}


def checkpoint(folder, step, sealed=True):
    path = folder / f"checkpoint-{step}"
    (path / "inner").mkdir(parents=True)
    for i, name in enumerate(("adapter_model.safetensors", "optimizer.pt", "inner/shard.bin", "trainer_state.json")):
        (path / name).write_bytes(random.Random(step * 10 + i).randbytes(3000))
    if sealed:
        seal(path, FACTS)
    return path


def test_a_sealed_checkpoint_is_good_and_says_what_it_was_sealed_with(tmp_path):
    path = checkpoint(tmp_path, 4)
    assert damage(path) is None and newest_good(tmp_path) == (path, [])
    content = json.loads((path / MANIFEST).read_text())
    assert content["pairs_per_step"] == 4 and content["files"]["inner/shard.bin"]["bytes"] == 3000


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda p: (p / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda p: os.truncate(p / "optimizer.pt", 2999), "optimizer.pt has 2,999 bytes, 3,000 were written"),
        (lambda p: (p / "inner/shard.bin").unlink(), "inner/shard.bin is missing"),
        (lambda p: (p / MANIFEST).unlink(), "manifest.json is missing, so the checkpoint is incomplete"),
        (lambda p: (p / MANIFEST).write_text("[" * 100_000), "manifest.json is damaged"),
        (lambda p: (p / MANIFEST).write_text("{}"), "manifest.json is damaged"),
        (lambda p: (p / MANIFEST).write_text("[1]"), "manifest.json is damaged"),
        (lambda p: (p / MANIFEST).write_text('{"files": [1]}'), "manifest.json is damaged"),
    ],
)
def test_damage_is_named_and_the_checkpoint_before_is_taken(tmp_path, harm, words):
    good, bad = checkpoint(tmp_path, 4), checkpoint(tmp_path, 8)
    harm(bad)
    found, lines = newest_good(tmp_path)
    assert found == good and len(lines) == 1 and f"checkpoint-8: {words}" in lines[0]


def test_no_cut_goes_unseen(tmp_path):
    path, chance = checkpoint(tmp_path, 4), random.Random(0)
    whole = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    for number in range(300):
        file = chance.choice(sorted(whole))
        file.write_bytes(whole[file][: chance.randrange(len(whole[file]))])
        assert damage(path) is not None, (file.name, number)
        file.write_bytes(whole[file])
    assert damage(path) is None


def test_numbers_count_not_names(tmp_path):
    for step in (9, 10, 100):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-x").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert checkpoints(tmp_path / "none") == []


def test_a_checkpoint_replaces_one_of_its_step_and_a_kill_between_loses_none(tmp_path):
    checkpoint(tmp_path, 4)
    aside = tmp_path / ".checkpoint-4.part"
    new = checkpoint(aside, 4)
    (new / "inner/shard.bin").write_bytes(b"new")
    seal(new, FACTS)
    place(new, tmp_path / "checkpoint-4")
    assert (tmp_path / "checkpoint-4/inner/shard.bin").read_bytes() == b"new"
    # killed after the old one had made room
    (tmp_path / "checkpoint-4").rename(tmp_path / ".checkpoint-4.old")
    clean(tmp_path)
    assert newest_good(tmp_path)[0] == tmp_path / "checkpoint-4"
    # killed before the old one was deleted
    shutil.copytree(tmp_path / "checkpoint-4", tmp_path / ".checkpoint-4.old")
    clean(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-4"]


def test_a_folder_that_cannot_be_read_is_an_error_that_says_so(tmp_path, monkeypatch):
    def gone(self):
        raise OSError(107, "Transport endpoint is not connected")

    monkeypatch.setattr("pathlib.Path.iterdir", gone)
    with pytest.raises(RequestError, match=r"cannot be read \(Transport endpoint is not connected\).*mounted"):
        newest_good(tmp_path)


def test_a_file_is_replaced_whole_or_stays(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    write_atomically(path, "old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["run.json"]


def test_one_process_at_a_time_in_a_run_folder(tmp_path):
    lock_folder(tmp_path)
    child = os.fork()
    if not child:
        try:
            lock_folder(tmp_path)
        except RequestError as error:
            os._exit(7 if f"{tmp_path}: another process is training" in str(error) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    unlock_folder(tmp_path)
    assert not os.listdir(tmp_path)
    lock_folder(tmp_path)
    unlock_folder(tmp_path)
