"""A run folder that version 0.1.0 wrote on commit 15425f3 is read, and its checkpoint resumed to the same adapter."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from orpo_lite.recipe import Recipe
from orpo_lite.train import pipeline as train
from orpo_lite.trainer.checkpoint_folder import damage
from orpo_lite.trainer.run_folder import RunFolder
from orpo_lite.trainer.run_record import read_run

FIXTURE = Path(__file__).parents[1] / "fixtures" / "run_15425f3"


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A copy where the run's recipe says that it lies."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(FIXTURE, Path("outputs/run_15425f3")))


def test_its_recipe_and_record_are_read(old):
    recipe = Recipe.load(str(old))
    assert recipe.training["max_steps"] == 3 and recipe.adapter is not None and recipe.adapter.r == 2
    assert RunFolder.open(old).read()["steps"] == 3
    assert damage(old / "checkpoints" / "checkpoint-2") is None


def test_steps_that_it_left_out_are_no_reason_not_to_read_it(old):
    """Versions before could leave out steps that were not finite."""
    facts = json.loads((old / "run.json").read_text("utf-8"))
    (old / "run.json").write_text(
        json.dumps(facts | {"skipped_steps": [2], "nonfinite_rows": "nonfinite-step-2.jsonl"})
    )
    run = read_run(old)
    assert run.record.steps == 3 and not run.notes


def test_its_checkpoint_is_resumed_to_the_same_adapter(old):
    wanted, lines = load_file(old / "adapter_model.safetensors"), (old / "metrics.jsonl").read_text().splitlines()
    for name in ("run.json", "adapter_model.safetensors", "adapter_config.json", "held_out.json"):
        (old / name).unlink()
    done = train.run(Recipe.load(str(old)), resume=True)
    assert done is not None and done.folder.samefile(old) and done.record.steps == 3
    found = load_file(old / "adapter_model.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.allclose(found[name], tensor, rtol=0, atol=1e-6), name
    again = (old / "metrics.jsonl").read_text().splitlines()
    for one, other in zip(lines, again, strict=True):
        before, after = json.loads(one), json.loads(other)
        assert before["step"] == after["step"]
        for name in {"loss", "eval_loss", "train_loss"} & before.keys():
            assert after[name] == pytest.approx(before[name], rel=1e-5), name
