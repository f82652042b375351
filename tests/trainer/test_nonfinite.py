"""A loss or gradient that is not finite never reaches adapter or optimizer, whatever it came from."""

import pytest
import torch
from transformers import TrainerCallback

from orpo_lite.common.errors import RequestError
from orpo_lite.recipe import Recipe
from orpo_lite.trainer.health import NonFinite
from tests.trainer.poison import (
    ODD,
    PoisonedLoss,
    PoisonedStep,
    build,
    poison_gradient,
    poison_token,
    state_of,
)

NAN, INF = float("nan"), float("inf")
STEPS = [{}, {"tokens_per_batch": 64}, {"max_grad_norm": 0.0}, {"logging_nan_inf_filter": True}, {"nll_mean": "micro"}]


def stopped(trainer, keep, step):
    """The error of a run that stops in a step with the state after the one before."""
    with pytest.raises(NonFinite) as caught:
        trainer.train()
    assert trainer.state.global_step == step - 1 and f"step {step}: " in str(caught.value)
    assert state_of(trainer) == keep.states[step - 1]
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters() if p.requires_grad)
    return str(caught.value)


@pytest.mark.parametrize(("options", "value"), [*((one, NAN) for one in STEPS), ({}, INF), ({}, -INF)], ids=str)
def test_a_poisoned_row_stops_the_run_before_the_optimizer(options, value, tmp_path, tokenizer):
    trainer, keep = build(tmp_path, tokenizer, **options)
    poison_token(trainer, value)
    trainer.guard.sources = ["pairs.jsonl"]
    said = stopped(trainer, keep, 2)  # row 5 is the last of the second step's three
    assert (
        f"row {ODD} of pairs.jsonl (number {ODD} of" in said.split("not finite when computed alone")[1].split("\n")[0]
    )
    assert "the loss is nan" in said and "lora_A.weight" in said and "learning_rate" in said


@pytest.mark.parametrize(("options", "value"), [*((one, NAN) for one in STEPS), ({}, INF)], ids=str)
def test_one_micro_batch_of_three(value, options, tmp_path, tokenizer):
    """A loss that nothing but the trainer's own arithmetic spoils, in a pass that is not the last."""
    trainer, keep = build(tmp_path, tokenizer, PoisonedLoss, **options)
    trainer.value = value
    stopped(trainer, keep, 2)


@pytest.mark.parametrize(("value", "clip"), [(NAN, 1.0), (INF, 0.0), (-INF, 1.0)])
def test_a_single_value_of_a_gradient(value, clip, tmp_path, tokenizer):
    trainer, keep = build(tmp_path, tokenizer, max_grad_norm=clip)
    name = poison_gradient(trainer, 5, value)
    said = stopped(trainer, keep, 2)
    assert "gradients: 1 of " in said and name.removeprefix("base_model.model.").replace(".default", "") in said
    assert "but gradients are not finite" in said


def test_what_a_subclass_returns_is_neither_trained_on_nor_logged(tmp_path, tokenizer):
    """training_step says NaN, but the gradients are those of a finite loss: it is the one that is logged."""
    trainer, keep = build(tmp_path / "odd", tokenizer, PoisonedStep, max_steps=3)
    plain, plain_keep = build(tmp_path / "plain", tokenizer, max_steps=3)
    for one in (trainer, plain):
        one.train()
    losses = [[log["loss"] for log in one.state.log_history if "loss" in log] for one in (trainer, plain)]
    assert losses[0] == losses[1] and len(losses[0]) == 3 and keep.states == plain_keep.states


def test_a_gradient_whose_norm_overflows_is_finite(tmp_path, tokenizer):
    """Its square is not, in float32: the step is no error, whatever clipping makes of it."""
    trainer, _ = build(tmp_path, tokenizer, max_steps=2)
    poison_gradient(trainer, 5, 1e30)
    trainer.train()
    assert trainer.state.global_step == 2


def test_nf4_base(tmp_path, tokenizer):
    from orpo_lite.model import attach_adapter, load_base, load_tokenizer
    from orpo_lite.recipe import AdapterSection, ModelSection

    section = ModelSection(name_or_path="builtin:quickstart/model", quantization="nf4")
    own = load_tokenizer(section)
    base, _ = load_base(section, own)
    trainer, keep = build(tmp_path, own, model=attach_adapter(base, AdapterSection(r=4), tokenizer=own))
    poison_gradient(trainer, 5, NAN)
    stopped(trainer, keep, 2)


class Fp16(TrainerCallback):
    """fp16's loss scaling on the CPU, where accelerate offers none."""

    def __init__(self, trainer, scale):
        self.trainer, self.scale = trainer, scale

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        accelerator = self.trainer.accelerator
        accelerator.scaler = optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=self.scale)
        accelerator.native_amp = True
        accelerator.state._mixed_precision = "fp16"
        optimizer._accelerate_step_called = False
        optimizer._optimizer_original_step_method = optimizer.optimizer.step
        from accelerate.optimizer import patch_optimizer_step

        optimizer._optimizer_patched_step_method = patch_optimizer_step(optimizer, optimizer.optimizer.step)


@pytest.fixture
def unscaled():
    """accelerate keeps its precision for the whole process."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._shared_state["_mixed_precision"] = "no"


class TestFp16:
    @pytest.mark.parametrize("clip", [0.0, 1.0])
    def test_an_overflow_is_counted_and_no_error(self, clip, tmp_path, tokenizer, unscaled):
        trainer, keep = build(tmp_path, tokenizer, max_grad_norm=clip)
        trainer.add_callback(Fp16(trainer, 1024.0))
        poison_gradient(trainer, 5, INF)
        trainer.train()
        assert trainer.guard.overflows == 1 and trainer.accelerator.scaler.get_scale() == 512.0
        assert keep.states[2] == keep.states[1] != keep.states[3]
        assert [log["overflow_steps"] for log in trainer.state.log_history if "overflow_steps" in log] == [1] * 7

    @pytest.mark.parametrize("clip", [0.0, 1.0])
    def test_a_loss_that_is_not_finite_is_an_error(self, clip, tmp_path, tokenizer, unscaled):
        trainer, keep = build(tmp_path, tokenizer, PoisonedLoss, max_grad_norm=clip, max_steps=4)
        trainer.add_callback(Fp16(trainer, 1024.0))
        stopped(trainer, keep, 2)
        assert not trainer.guard.overflows

    def test_gradients_that_no_scale_mends_are_an_error(self, tmp_path, tokenizer, unscaled):
        trainer, keep = build(tmp_path, tokenizer)
        trainer.add_callback(Fp16(trainer, 2.0))
        next(p for p in trainer.model.parameters() if p.requires_grad).register_hook(lambda g: g * NAN)
        with pytest.raises(NonFinite, match="gradients are not finite"):
            trainer.train()
        assert trainer.guard.overflows == 2 and state_of(trainer)[0] == keep.states[0][0]


def test_an_update_that_overflows_is_not_written(tmp_path, tokenizer):
    """Gradients are fine, and the learning rate makes them infinite."""
    trainer, _ = build(tmp_path, tokenizer, learning_rate=3e38, max_steps=1, warmup_steps=0, lr_scheduler_type="constant",
                       weight_decay=10.0, save_strategy="steps")  # fmt: skip
    with pytest.raises(NonFinite, match="the update itself overflowed"):
        trainer.train()
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_watching_changes_no_number(tmp_path, tokenizer):
    """Steps with and without a second look, and those of a loop that never looks."""
    trainer, keep = build(tmp_path / "a", tokenizer)
    trainer.train()
    blind, blind_keep = build(tmp_path / "b", tokenizer)
    blind.guard.check_step = lambda: None
    blind.train()
    assert keep.states == blind_keep.states


@pytest.mark.parametrize("optim", ["galore_adamw_layerwise", "lomo", "adalomo"])
def test_optimizers_that_step_inside_of_the_backward_pass_are_refused(tmp_path, tokenizer, optim):
    with pytest.raises(ValueError, match=r"ORPOConfig.optim: found .* inside of the backward pass.*adamw_torch"):
        build(tmp_path, tokenizer, optim=optim, optim_target_modules=["q_proj"])


@pytest.mark.parametrize("wrong", ["skip", "maybe", 3])
def test_on_nonfinite_was_removed(wrong):
    """Recipes of older run folders say stop, which means nothing anymore."""
    assert "on_nonfinite" not in Recipe.load("quickstart", ["training.on_nonfinite=stop"]).training
    with pytest.raises(
        RequestError, match=r"training\.on_nonfinite: found .* removed: a step that is not finite stops"
    ):
        Recipe.load("quickstart", [f"training.on_nonfinite={wrong}"])
