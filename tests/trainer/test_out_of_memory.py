"""Memory that runs out while training: the same run in smaller micro-batches, no pair lost, and errors that help.

The card is played by hooks that raise torch's own error once a forward or a backward pass holds too many tokens.
"""

import json
import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, MixtralConfig, TrainerCallback

from orpo_lite import ORPOTrainer
from orpo_lite.common.errors import RequestError
from orpo_lite.data.collate import collator_of, pair_tokens, select_pairs
from orpo_lite.data.lengths import pair_costs
from orpo_lite.recipe import Recipe
from orpo_lite.trainer.callbacks import MetricsFile
from orpo_lite.trainer.checkpoint_folder import seal
from orpo_lite.trainer.interruptions import OutOfMemory, named, ran_out
from orpo_lite.trainer.run_folder import RunFolder
from tests.tiny import tiny_model
from tests.training import SIZES, config, rows

FAILURE = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 11.76 GiB. Of the allocated ..."
)


class Card:
    """Hooks on a model that raise where a pass holds more than `tokens`: entering the second layer, or leaving it on the
    way back. The first `spared` such passes go through."""

    def __init__(self, model, tokens, phase, spared=0, error=None):
        self.tokens, self.phase, self.spared, self.failed = tokens, phase, spared, 0
        self.error = error or torch.OutOfMemoryError(FAILURE)
        layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
        layers[1].register_forward_pre_hook(self.enter)
        layers[0].register_forward_hook(self.leave)

    def too_much(self, hidden):
        return hidden.shape[0] * hidden.shape[1] > self.tokens

    def run_out(self, *_):
        if self.spared:
            self.spared -= 1
            return
        self.failed += 1
        raise self.error

    def enter(self, module, args):
        if self.phase == "forward" and self.too_much(args[0]):
            self.run_out()

    def leave(self, module, args, output):
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        if self.phase == "backward" and hidden.requires_grad and self.too_much(hidden):
            hidden.register_hook(self.run_out)  # layer 1's gradients are there then, layer 0's are not


class Seen(TrainerCallback):
    """Pairs whose backward pass went into each optimizer step."""

    def __init__(self, trainer):
        self.steps, self.step = [], []
        plain, self.plain_zero = trainer.accelerator.backward, trainer.model.zero_grad
        statistics = trainer.objective.statistics
        batch_rows = []

        def score(model, batch):
            if model.training:
                batch_rows[:] = batch["pair_rows"].tolist()
            return statistics(model, batch)

        def backward(loss, **kwargs):
            plain(loss, **kwargs)
            self.step += batch_rows

        def zero_grad(*args, **kwargs):
            self.step = []
            self.plain_zero(*args, **kwargs)

        trainer.objective.statistics, trainer.accelerator.backward, trainer.model.zero_grad = score, backward, zero_grad

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.steps.append(sorted(self.step))


def trained(tmp_path, tokenizer, name, kind=None, dropout=0.0, card=None, held_out=None, **kw):
    """A short run: adapter, metrics without clocks and memory, pairs of each step, trainer."""
    torch.manual_seed(0)
    model = tiny_model(kind or LlamaConfig(**SIZES), 0)
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=dropout))
    for key, p in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(p, std=0.1)
    args = config(tmp_path / name, max_steps=3, disable_dropout=not dropout, optim="sgd", learning_rate=0.1,
                  train_sampling_strategy="random", **kw)  # fmt: skip
    trainer = ORPOTrainer(model, args, None, rows(32), held_out, tokenizer)
    trainer.add_callback(seen := Seen(trainer))
    metrics = tmp_path / f"{name}.jsonl"
    trainer.add_callback(MetricsFile(metrics, resumed=False))
    played = Card(model, *card) if card else None
    trainer.train()
    if card:
        assert played.failed
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    clocks = ("tokens_per_second", "pairs_per_second", "peak_memory_gb", "eval_runtime", "eval_samples_per_second",
              "eval_steps_per_second")  # fmt: skip
    kept = [{key: value for key, value in line.items() if key not in clocks} for line in lines]
    weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    return weights, kept, seen.steps, trainer


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """plain(tokenizer, **options): the run that never runs out of memory, made once for the same options."""
    made = {}

    def run(tokenizer, **options):
        key = json.dumps(options, sort_keys=True)
        if key not in made:
            made[key] = trained(tmp_path_factory.mktemp("plain"), tokenizer, "plain", **options)
        return made[key]

    return run


def same(one, other, tolerance=1e-6):
    assert (one[0] - other[0]).norm() <= tolerance * other[0].norm()
    assert len(one[1]) == len(other[1]) > 0
    for line, expected in zip(one[1], other[1], strict=True):
        assert line == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert one[2] == other[2] and len(one[2]) == 3
    assert all(len(step) == len(set(step)) for step in one[2])


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_token_budget_continues_with_half_the_tokens(tmp_path, tokenizer, layout, phase, caplog, plain):
    budget = {"layout": layout, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    with caplog.at_level(logging.WARNING):
        short = trained(tmp_path, tokenizer, "short", tokens_per_batch=600, card=(260, phase, 1), **budget)
    same(short, plain(tokenizer, tokens_per_batch=600, **budget))
    met = short[3].micro_limit.ooms
    assert met and all(event["most"] == event["tokens"] // 2 for event in met)
    assert all(f"{event['tokens']:,} tokens in {event['pairs']} pairs" in caplog.text for event in met)
    assert "11.76 GiB" in caplog.text and len([r for r in caplog.records if "out of memory" in r.message]) == len(met)
    # once is enough: the smaller size stays
    assert len({event["step"] for event in met}) < 3


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("nll_mean", ["window", "micro"])
def test_pair_batches_are_halved_and_the_means_stay(tmp_path, tokenizer, nll_mean, phase, plain):
    size = {
        "layout": "padded",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "nll_mean": nll_mean,
    }
    short = trained(tmp_path, tokenizer, "short", card=(260, phase, 1), **size)
    same(short, plain(tokenizer, **size))
    met = short[3].micro_limit.ooms
    assert met and all(event["pairs"] in (2, 3, 4) and event["most"] == event["tokens"] // 2 for event in met)


def test_a_single_pair_that_does_not_fit_is_named_and_the_checkpoint_stays(tmp_path, tokenizer):
    model = get_peft_model(tiny_model(LlamaConfig(**SIZES), 0), LoraConfig(r=4, target_modules=["q_proj"]))
    args = config(tmp_path, layout="shared", tokens_per_batch=400, max_steps=4, save_strategy="steps", save_steps=1)
    data = rows(16)
    trainer = ORPOTrainer(model, args, None, data, processing_class=tokenizer)
    costs = pair_costs(trainer.train_dataset, "shared")
    longest = int(costs[4:].argmax()) + 4  # steps take 4 pairs in their order: it is not in the first
    assert (costs[:4] < costs[longest]).all()
    Card(model, int(costs[longest]) - 1, "backward")
    with pytest.raises(OutOfMemory, match="checkpointing") as caught:
        trainer.train()
    message = str(caught.value)
    assert (
        f"single pair of {costs[longest]:,} tokens, row {longest} (number {longest} of the tokenized pairs" in message
    )
    for word in ("data.max_length", "model.quantization", "memory.offload_activations", "11.76 GiB"):
        assert word in message
    step = trainer.state.global_step
    assert step >= 1 and (tmp_path / "out" / f"checkpoint-{step}" / "adapter_model.safetensors").is_file()


def test_evaluation_goes_on_with_half_the_pairs(tmp_path, tokenizer, caplog):
    size = {"layout": "padded", "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 8}
    held_out = rows(11, seed=3)
    plain = trained(tmp_path, tokenizer, "plain", held_out=held_out, **size)
    short = trained(tmp_path, tokenizer, "short", held_out=held_out, card=(1200, "forward"), **size)
    same(short, plain)
    assert any("eval_loss" in line for line in short[1])
    assert short[3].eval_limit.ooms and not short[3].micro_limit.ooms
    assert "out of memory in the evaluation at step 2" in caplog.text


def test_a_step_that_cannot_begin_again_says_so(tmp_path, tokenizer, monkeypatch):
    trainer = ORPOTrainer(
        tiny_model(LlamaConfig(**SIZES), 0), config(tmp_path), None, rows(8), processing_class=tokenizer
    )
    Card(trainer.model, 10, "forward")
    batches, totals = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.args.device)
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    with pytest.raises(OutOfMemory, match="not repeated in smaller micro-batches.*tokens_per_batch"):
        trainer.training_step(trainer.model, batches[0], totals)
    assert not trainer.micro_limit.ooms


def test_other_errors_pass_through(tmp_path, tokenizer):
    trainer = ORPOTrainer(
        tiny_model(LlamaConfig(**SIZES), 0), config(tmp_path), None, rows(8), processing_class=tokenizer
    )
    Card(trainer.model, 10, "forward", error=RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="^shapes differ$"):
        trainer.train()


def test_what_a_run_was_doing_is_named():
    with pytest.raises(OutOfMemory, match=r"while loading the base model: .*\(CUDA out of memory.*11.76 GiB\)$"):
        with named("loading the base model"):
            raise torch.OutOfMemoryError(FAILURE)
    with pytest.raises(RuntimeError, match="^another$"), named("loading the base model"):
        raise RuntimeError("another")
    assert ran_out(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))


@pytest.mark.parametrize("scope", ["prompt+chosen", "chosen"])
@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_a_part_of_a_batch_is_what_its_collator_makes_of_those_pairs(layout, scope):
    generator = torch.Generator().manual_seed(0)

    def ids(low, high):
        count = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, 9, (count,), generator=generator).tolist()

    pairs = []
    for row in range(6):
        prompt, opening = ids(2, 9), ids(0, 3)
        pair = {"chosen_ids": opening + ids(1, 12), "rejected_ids": opening + ids(1, 12), "row": 10 + row}
        sides = {side: prompt + pair[side] + [1, 2, 1] for side in ("chosen_ids", "rejected_ids")}
        for side in ("chosen", "rejected"):  # the last but one is no label
            pair[f"{side}_context"] = [len(sides[f"{side}_ids"]) - 2, len(sides[f"{side}_ids"]) - 1]
        pairs.append(pair | sides | {"chosen_start": len(prompt), "rejected_start": len(prompt)})
    collator = collator_of(layout, scope)
    batch = collator(pairs)
    assert pair_tokens(batch) == pair_costs(Dataset.from_list(pairs), layout).tolist()
    for chosen in ([0], [5], [1, 4], [0, 2, 3, 5], list(range(6))):
        part, expected = select_pairs(batch, chosen), collator([pairs[i] for i in chosen])
        assert part.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(part[name], value) if isinstance(value, torch.Tensor) else part[name] == value, name


def test_parts_of_a_step_of_experts_add_up(tmp_path, tokenizer):
    model = tiny_model(MixtralConfig(**SIZES, num_local_experts=4), 0)
    args = config(tmp_path, per_device_train_batch_size=8, max_completion_length=32)
    trainer = ORPOTrainer(model, args, None, rows(8), processing_class=tokenizer)
    batches, totals = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.args.device)
    found = []
    for most in (None, sum(pair_tokens(batches[0])) // 3):
        trainer.micro_limit.tokens = most
        model.zero_grad()
        loss = trainer.training_step(model, batches[0], totals)
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((loss, grads))
    assert torch.allclose(found[0][0], found[1][0])
    assert (found[0][1] - found[1][1]).norm() <= 1e-6 * found[0][1].norm()


def test_a_run_that_ran_out_goes_on_with_other_settings_of_memory(tmp_path):
    def recipe(*words):
        return Recipe.load("quickstart", [f"training.output_dir={tmp_path}", "orpo.tokens_per_batch=4000", *words])

    checkpoint = RunFolder.create(recipe()).checkpoints / "checkpoint-2"
    checkpoint.mkdir()
    seal(checkpoint, {"processes": 1, "pairs_per_step": recipe().training["per_device_train_batch_size"]})
    smaller = ["orpo.tokens_per_batch=2000", "memory.checkpointing=all", "training.per_device_eval_batch_size=1"]
    assert RunFolder.create(recipe(*smaller), resume=True).path == tmp_path
    assert RunFolder.open(tmp_path).recipe().orpo.tokens_per_batch == 2000
    for word in ("orpo.tokens_per_batch=null", "data.max_length=64", "training.per_device_train_batch_size=1"):
        with pytest.raises(RequestError, match="other settings"):  # other pairs, or in another order
            RunFolder.create(recipe(*smaller, word), resume=True)
