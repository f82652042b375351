"""What is used of transformers.Trainer beyond its public API, held by name on every supported version:

- `_save_checkpoint(model, trial)` writes `args.output_dir/checkpoint-N` through `save_model`, and is called where
  `control.should_save` is set. Overridden, to write it aside first.
- `_load_best_model()` is called at the end where `args.load_best_model_at_end` is set. Overridden, to check it first.
- For each optimizer step, in this order: `get_batch_samples`, `training_step` for each item it returned, clipping,
  `on_pre_optimizer_step`, `optimizer.step`, `on_optimizer_step`, `on_step_end`, `log`, `evaluate`, `_save_checkpoint`.
- No item and `control.should_training_stop` from `get_batch_samples` end training without another step.
- Nobody divides the loss by the number of accumulation steps but `training_step`, which ORPOTrainer replaces as a whole.
"""

import inspect
import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, Trainer, TrainerCallback

import orpo_lite.trainer
from orpo_lite import ORPOTrainer
from tests.tiny import tiny_model
from tests.training import SIZES, config, rows

PRIVATE = {"_save_checkpoint": ("model", "trial"), "_load_best_model": ()}
"""Private methods of transformers.Trainer that are overridden, and their parameters. No private attribute is read."""
SOURCES = Path(orpo_lite.trainer.__path__[0])


def private_names():
    """Private methods and attributes that this version's Trainer has."""
    source = inspect.getsource(Trainer)
    names = {name for name in vars(Trainer) if name.startswith("_") and not name.startswith("__")}
    return names | set(re.findall(r"self\.(_[a-z]\w*)", source))


@pytest.mark.parametrize("name", PRIVATE)
def test_a_private_method_is_there_with_its_parameters(name):
    parameters = tuple(inspect.signature(getattr(Trainer, name)).parameters)[1:]
    assert parameters == PRIVATE[name], f"transformers.Trainer.{name} takes {parameters} in this version"


def test_no_other_private_name_is_overridden_or_read():
    assert len(PRIVATE) <= 5
    defined = {name for one in ORPOTrainer.__mro__ if one.__module__.startswith("orpo_lite.") for name in vars(one)}
    assert private_names() & defined <= {*PRIVATE, "_tag_names", "_name"}, "TRL's class attributes aside"
    used = set()
    for file in SOURCES.glob("*.py"):
        used |= set(re.findall(r"\b(?:self|trainer|super\(\))\.(_[a-z]\w*)", file.read_text("utf-8")))
    assert used & private_names() - defined <= set(PRIVATE)


class Order(TrainerCallback):
    """The events of training, beside the calls that `Recorded` notes."""

    def __init__(self, events):
        self.events = events

    def __getattribute__(self, name):
        events = object.__getattribute__(self, "events") if name.startswith("on_") else None
        if events is None or name in ("on_init_end", "on_epoch_begin", "on_train_begin", "on_prediction_step"):
            return object.__getattribute__(self, name)
        return lambda *args, **kwargs: events.append(name)


class Recorded(ORPOTrainer):
    """Notes what transformers calls, and when."""

    def get_batch_samples(self, *args, **kwargs):
        self.events.append("get_batch_samples")
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, *args, **kwargs):
        self.events.append("training_step")
        return super().training_step(*args, **kwargs)

    def evaluate(self, *args, **kwargs):
        self.events.append("evaluate")
        return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args, **kwargs):
        self.events.append("_save_checkpoint")
        return super()._save_checkpoint(*args, **kwargs)

    def _load_best_model(self):
        self.events.append("_load_best_model")
        return super()._load_best_model()


def recorded(tmp_path, tokenizer, **options):
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 1} | options
    trainer = Recorded(
        tiny_model(LlamaConfig(**SIZES)), config(tmp_path, **options), None, rows(8), rows(2, 1), tokenizer
    )
    trainer.events = []
    trainer.add_callback(Order(trainer.events))
    return trainer


def test_the_order_of_an_optimizer_step(tmp_path, tokenizer):
    """Guard, logs and checkpoints each count on what has happened before them."""
    trainer = recorded(tmp_path, tokenizer, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
                       load_best_model_at_end=True, logging_steps=1, max_steps=2)  # fmt: skip
    trainer.train()
    second = trainer.events.index("get_batch_samples", 1)
    assert trainer.events[:second] == [
        "get_batch_samples", "on_step_begin", "training_step", "on_substep_end", "training_step", "on_pre_optimizer_step",
        "on_optimizer_step", "on_step_end", "on_log", "evaluate", "on_log", "on_evaluate", "_save_checkpoint", "on_save",
    ]  # fmt: skip
    assert trainer.events.count("_load_best_model") == 1 and trainer.events[-1] == "on_train_end"


@pytest.mark.parametrize("accumulation", [1, 3])
def test_nobody_divides_the_loss(accumulation, tmp_path, tokenizer):
    """The optimizer sees the gradient of the loss that `Objective.loss` returns, added up over the step."""
    options = dict(gradient_accumulation_steps=accumulation, max_grad_norm=0.0, optim="sgd", learning_rate=1.0,
                   lr_scheduler_type="constant")  # fmt: skip
    trainer = recorded(tmp_path, tokenizer, **options)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    loss = trainer.objective.loss
    seen = []
    trainer.objective.loss = lambda *args: seen.append(loss(*args)) or seen[-1]
    trainer.train()
    change = torch.cat([(old - new).flatten() for old, new in zip(before, trainer.model.parameters(), strict=True)])
    with torch.no_grad():
        for old, new in zip(before, trainer.model.parameters(), strict=True):
            new.copy_(old)
    trainer.model.zero_grad()
    items, totals = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), accumulation, trainer.args.device)
    assert len(items) == accumulation
    sum(loss(trainer.model, [item], totals)[0] for item in items).backward()
    wanted = torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trainer.model.parameters()]
    )
    assert (change - wanted).norm() <= 1e-5 * wanted.norm()
    (logged,) = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert logged == pytest.approx(sum(float(one) for one, _ in seen[:accumulation]), rel=1e-6)


def test_no_items_and_a_stop_end_training_without_a_step(tmp_path, tokenizer):
    trainer = recorded(tmp_path, tokenizer, max_steps=4)

    class Ended(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.ended = state.global_step == 2

    trainer.add_callback(Ended())
    assert trainer.train().global_step == 2
    assert trainer.events.count("training_step") == 4


def test_a_checkpoint_is_written_below_the_output_dir(tmp_path, tokenizer):
    trainer = recorded(tmp_path, tokenizer, save_strategy="steps", save_steps=1)
    trainer.train()
    assert [path.name for path in (tmp_path / "out").glob("*checkpoint*")] == ["checkpoint-1"]
