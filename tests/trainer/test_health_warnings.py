"""Warnings about numbers that are finite and yet suspicious: each is logged once, and healthy runs get none."""

import json
import logging

import pytest
import torch

from orpo_lite import ORPOTrainer
from orpo_lite.recipe import Recipe
from orpo_lite.train import pipeline as train
from tests.trainer.poison import build, llama
from tests.training import config, rows


def test_gradients_of_zero(tmp_path, tokenizer, caplog):
    trainer, _ = build(tmp_path, tokenizer, max_steps=3)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(torch.zeros_like)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    said = {one["kind"]: one for one in trainer.health.warnings}
    assert said["zero gradient"]["step"] == 1 and caplog.text.count("every gradient is exactly 0") == 1


def test_a_learning_rate_of_zero_is_no_reason_to_wait(tmp_path, tokenizer):
    """Warm-up begins at 0: such steps change nothing and are not counted."""
    trainer, _ = build(tmp_path, tokenizer, max_steps=3, lr_scheduler_type="constant_with_warmup", warmup_steps=50)
    trainer.train()
    assert trainer.health.warnings == []


@pytest.mark.parametrize(("rate", "said"), [(1e-6, ["low learning rate"]), (1e-4, [])])
def test_low_learning_rate_is_kept_too(rate, said, tmp_path, tokenizer):
    trainer = ORPOTrainer(llama(), config(tmp_path, learning_rate=rate), None, rows(2), processing_class=tokenizer)
    assert [one["kind"] for one in trainer.health.warnings] == said


@pytest.mark.slow
def test_quickstart_is_healthy_and_run_json_says_so(tmp_path, capsys):
    done = train.run(Recipe.load("quickstart", ["evaluation.samples=0", f"training.output_dir={tmp_path / 'run'}"]))
    record = json.loads((done.folder / "run.json").read_text())
    assert record["warnings"] == [] and record["overflow_steps"] == 0
    assert "warnings during training" not in capsys.readouterr().out


def test_warnings_are_in_run_json_and_at_the_end(tmp_path, capsys):
    words = [
        "evaluation.samples=0",
        f"training.output_dir={tmp_path / 'run'}",
        "training.max_steps=2",
        "training.learning_rate=1e-7",
    ]
    train.run(Recipe.load("quickstart", words))
    (said,) = json.loads((tmp_path / "run" / "run.json").read_text())["warnings"]
    assert said["kind"] == "low learning rate" and "training.learning_rate=1e-4" in said["message"]
    assert "warnings during training: low learning rate (step 0)" in " ".join(capsys.readouterr().out.split())
