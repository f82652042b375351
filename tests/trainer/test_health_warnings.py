"""Warnings about numbers that are finite and yet suspicious: each is logged once, and healthy runs get none."""

import json
import logging
import random

import pytest
import torch

from orpo_lite import ORPOTrainer
from orpo_lite.recipe import Recipe
from orpo_lite.train import pipeline as train
from orpo_lite.trainer.health import ENOUGH, UNCHANGED_AFTER, HealthWarnings
from tests.trainer.poison import build, llama
from tests.training import config, rows


def feed(health, losses):
    for i, loss in enumerate(losses):
        health.step(i + 1, loss, False)
    return [one["kind"] for one in health.warnings]


def noise(count, seed, scale=0.3):
    """Losses of a run with one pair a step: skewed, with a heavy tail, falling slowly."""
    g = random.Random(seed)
    return [1.0 + 0.8 * 0.99**i + scale * g.lognormvariate(0, 0.7) for i in range(count)]


@pytest.mark.parametrize("seed", range(8))
def test_ordinary_noise_is_no_spike(seed):
    assert feed(HealthWarnings(), noise(500, seed)) == []


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("loss", [12.0, 1e6])
def test_a_jump_is_a_spike_and_is_said_once(loss, seed, caplog):
    health = HealthWarnings()
    with caplog.at_level(logging.WARNING):
        feed(health, [*noise(60, seed), loss, *noise(30, seed), loss, loss, loss])
    (said,) = health.warnings
    assert said["kind"] == "loss spike" and said["step"] == 61 and caplog.text.count("the loss jumped") == 1
    assert "training.learning_rate" in said["message"] and f"{loss:.4g}" in said["message"]


def test_too_few_steps_say_nothing():
    assert feed(HealthWarnings(), [1.0] * (ENOUGH - 1) + [50.0]) == []


def test_gradients_of_zero(tmp_path, tokenizer, caplog):
    trainer, _ = build(tmp_path, tokenizer, max_steps=3)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(torch.zeros_like)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    said = {one["kind"]: one for one in trainer.health.warnings}
    assert said["zero gradient"]["step"] == 1 and caplog.text.count("every gradient is exactly 0") == 1
    assert said["adapter unchanged"]["step"] == 3  # a short run is looked at when it ends


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_that_updates_never_reach(dtype, tmp_path, tokenizer):
    """In 16 bits a small update of a weight near 1 is rounded away: gradients are fine, and nothing is learned."""
    model = llama()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.ones_like(parameter).to(dtype) if "lora_B" in name else parameter.data.to(dtype)
    trainer, _ = build(tmp_path, tokenizer, model=model, train=rows(90), learning_rate=1.1e-5, gradient_accumulation_steps=1,
                       max_steps=UNCHANGED_AFTER + 5, lr_scheduler_type="constant", bf16=False)  # fmt: skip
    trainer.train()
    said = [(one["kind"], one["step"]) for one in trainer.health.warnings]
    assert said == ([] if dtype == torch.float32 else [("adapter unchanged", UNCHANGED_AFTER)])


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
