"""What the tests of this folder share: a tiny trainer, ways to poison a step of it, and the bytes that must not change."""

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, TrainerCallback

from orpo_lite import ORPOTrainer
from tests.tiny import tiny_model
from tests.training import SIZES, config, rows

ODD = 5
"""The row whose chosen answer holds a token that no other row has."""


def data(count=24):
    found = rows(count).to_list()
    found[ODD]["chosen"][0]["content"] += " @"
    return Dataset.from_list(found)


def bytes_of(tensors):
    return [t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors]


def state_of(trainer):
    """Adapter and optimizer state, bit for bit."""
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    states = getattr(trainer.optimizer, "optimizer", trainer.optimizer).state
    kept = [value for p in trained for _, value in sorted(states.get(p, {}).items()) if isinstance(value, torch.Tensor)]
    return bytes_of(trained), bytes_of(kept)


class Keep(TrainerCallback):
    """State after each step, by step; and the learning rates that steps were taken with."""

    def __init__(self):
        self.states, self.rates, self.trainer = {}, {}, None

    def on_train_begin(self, args, state, control, **kwargs):
        self.states[0] = state_of(self.trainer)

    def on_optimizer_step(self, args, state, control, lr_scheduler=None, **kwargs):
        self.rates[state.global_step + 1] = lr_scheduler.get_last_lr()[0]

    def on_step_end(self, args, state, control, **kwargs):
        self.states[state.global_step] = state_of(self.trainer)


def llama():
    torch.manual_seed(1)
    return get_peft_model(tiny_model(LlamaConfig(**SIZES)), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


def build(tmp_path, tokenizer, kind=ORPOTrainer, model=None, train=None, **options):
    """A trainer of eight steps of three micro-batches of one pair, whose states are kept."""
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3, "num_train_epochs": 1} | options
    args = config(tmp_path, **options)
    trainer = kind(model or llama(), args, None, train or data(), None, tokenizer)
    keep = Keep()
    keep.trainer = trainer
    trainer.add_callback(keep)
    return trainer, keep


def poison_token(trainer, value):
    """NaN or inf for one row's odd token, wherever it is embedded: a real culprit."""
    others = {
        t for i, row in enumerate(trainer.train_dataset) if i != ODD for t in row["chosen_ids"] + row["rejected_ids"]
    }
    (odd,) = set(trainer.train_dataset[ODD]["chosen_ids"]) - others

    def hook(module, args, output):
        return torch.where((args[0] == odd)[..., None], torch.full_like(output, value), output)

    trainer.model.get_input_embeddings().register_forward_hook(hook)
    return odd


class PoisonedLoss(ORPOTrainer):
    """The loss of one call of compute_loss in training is not what it was; `calls` counts from 1."""

    call, value, calls = 5, float("nan"), 0

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss = super().compute_loss(model, inputs, return_outputs, **kwargs)
        self.calls += 1
        return loss * self.value if self.calls == self.call else loss


class PoisonedStep(ORPOTrainer):
    """training_step says NaN, and gradients are as they were: nobody but transformers hears of it."""

    calls = 0

    def training_step(self, *args, **kwargs):
        self.calls += 1
        return super().training_step(*args, **kwargs) * (float("nan") if self.calls == 5 else 1.0)


def poison_gradient(trainer, backward, value, element=3):
    """One value of one gradient, in the n-th backward pass."""
    name, parameter = next((n, p) for n, p in trainer.model.named_parameters() if "lora_A" in n and p.requires_grad)
    seen = [0]

    def hook(gradient):
        seen[0] += 1
        if seen[0] != backward:
            return gradient
        spoilt = gradient.clone()
        spoilt.view(-1)[element] = value
        return spoilt

    parameter.register_hook(hook)
    return name
