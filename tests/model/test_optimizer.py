"""The optimizer's groups: LoRA+ rates."""

import pytest
import torch
from transformers import TrainingArguments

from orpo_lite.common.errors import RequestError
from orpo_lite.model import attach_adapter, load_base
from orpo_lite.trainer.setup import loraplus_optimizer
from tests.model.conftest import disturb


@pytest.fixture
def args(tmp_path):
    def make(**fields):
        return TrainingArguments(
            str(tmp_path), use_cpu=True, report_to=[], learning_rate=1e-3, weight_decay=0.1, **fields
        )

    return make


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "rmsprop"])
def test_loraplus_gives_b_its_own_rate(attach, args, optim):
    model = attach("llama", "nf4")
    optimizer = loraplus_optimizer(model, args(optim=optim), 16)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    names = {n: rates[id(p)] for n, p in model.named_parameters() if p.requires_grad}
    assert {r for n, r in names.items() if "lora_A" in n} == {1e-3}
    assert {r for n, r in names.items() if "lora_B" in n} == {16e-3}
    assert all(g["params"] and g["weight_decay"] == 0.1 for g in optimizer.param_groups)
    disturb(model)
    tokens = torch.arange(5, 25)[None]
    first = model(input_ids=tokens, labels=tokens).loss
    first.backward()
    optimizer.step()
    assert model(input_ids=tokens, labels=tokens).loss != first


def test_loraplus_needs_a_lora_adapter(section, args):
    with pytest.raises(RequestError, match="LoRA"):
        loraplus_optimizer(attach_adapter(load_base(section("gpt2"))[0], None), args(), 16)


def test_the_first_step_of_adam_is_the_learning_rate(attach, args):
    """Adam's first step is its rate times the gradient's sign, so the rates show in what moves."""
    model = attach("llama")
    disturb(model)
    optimizer = loraplus_optimizer(model, args(optim="adamw_torch", adam_epsilon=1e-12), 16)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    tokens = torch.arange(5, 25)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    for name, parameter in trained.items():
        rate = 16e-3 if "lora_B" in name else 1e-3
        torch.testing.assert_close(
            (parameter.detach() - before[name]).abs().median().item(), rate, rtol=1e-2, atol=0, msg=name
        )
