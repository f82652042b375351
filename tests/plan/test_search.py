"""Fits: what is counted, what is kept, what is chosen, and the recipe that comes out."""

import json
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, LlamaConfig

from orpo_lite.common.console import run_command
from orpo_lite.common.errors import RequestError
from orpo_lite.model.activation_offload import checkpointing_layers
from orpo_lite.plan import search
from orpo_lite.plan.__main__ import cards_asked_for, command
from orpo_lite.plan.allocations import FLOPS, KEPT, MOVED, UNPACKED
from orpo_lite.plan.gpus import CARDS, FITS, Card, Target, verdict
from orpo_lite.plan.predict import Study
from orpo_lite.plan.search import changed
from orpo_lite.recipe import Recipe
from orpo_lite.trainer.config import ORPOConfig
from orpo_lite.trainer.config_from_recipe import arguments
from tests.benchmarks import plan_accuracy as truth
from tests.plans import plan

CONFIG = LlamaConfig(vocab_size=3000, hidden_size=256, intermediate_size=640, num_attention_heads=4, num_key_value_heads=2,
                     num_hidden_layers=12)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    CONFIG.architectures = ["LlamaForCausalLM"]
    CONFIG.save_pretrained(folder)
    return folder


def recipe(base: Path, **sections) -> Recipe:
    content = {
        "name": "small",
        "model": {"name_or_path": str(base)},
        "data": {"train": "x.jsonl", "max_length": 1024},
        "training": {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "per_device_eval_batch_size": 1,
            "optim": "adamw_torch",
        },
    }
    for section, fields in sections.items():
        content[section] = content.get(section, {}) | fields
    return Recipe.parse(content)


def needs(base: Path, **sections) -> float:
    """GB that a plan asks for."""
    return plan(recipe(base, **sections)).needed / 1e9


def fit(asked: Recipe, card: Card) -> SimpleNamespace:
    """The fastest choice that fits, all that was tried, and the recipe with that choice."""
    search_ = search.Search(asked, card, search.Planner())
    choice = search_.first_that_fits(shorten=True)
    fitted = changed(asked, list(choice.words)) if choice else None
    return SimpleNamespace(choice=choice, tried=search_.tried, recipe=fitted)


ONE = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize("checkpointing", ["all", "none", 2])
def test_flops_are_those_of_real_steps(checkpointing):
    case = truth.Case("gemma2", "none", checkpointing, "padded", length=48)
    # gemma2's attention is made of plain products: the counter does not know the CPU's own kernel
    with (
        mock.patch.object(truth, "profile", lambda **_: FlopCounterMode(display=False)),
        mock.patch.object(truth, "fullest", lambda counter: counter.get_total_flops()),
        mock.patch.object(truth, "plan", lambda asked, target: mock.Mock(peak=plan(asked, target).facts[FLOPS])),
    ):
        held = truth.compare(case)
    micro_batches = 4
    assert held.measured - held.before == pytest.approx(micro_batches * held.planned, rel=1e-3)


def test_quantized_weights_are_unpacked_and_multiplied_as_others(base):
    plain, packed = (plan(recipe(base, model={"quantization": name})).facts for name in ("none", "nf4"))
    assert plain[FLOPS] == packed[FLOPS]
    layers = 12 * (256 * 256 * 2 + 256 * 128 * 2 + 3 * 256 * 640)
    assert plain[UNPACKED] == 0 and packed[UNPACKED] == 3 * layers  # forward, recomputed forward, backward


def test_checkpointing_and_offloading_move_the_plan(base):
    study = Study(recipe(base), Target("cuda"))
    plans = [study.plan(count) for count in (None, 8, 4, 0)]
    assert [p.peak for p in plans] == sorted(p.peak for p in plans)
    flops = [p.facts[FLOPS] for p in plans]
    assert flops == sorted(flops, reverse=True)
    # the forward pass is repeated, which is a third of all with a frozen base
    assert 0.6 < flops[-1] / flops[0] < 0.8
    away = plan(recipe(base, memory={"offload_activations": True}))
    assert away.phases["forward"][KEPT] < plans[0].phases["forward"][KEPT] / 2
    # every layer's input: what adapters add to is in float32 from the embeddings on
    assert away.facts[MOVED] == sum(2 * a + p for p, a in away.shape.pairs) * 256 * 12 * 4
    assert away.facts[FLOPS] == flops[0]


@pytest.mark.slow
def test_a_roomy_card_does_without_recomputation(base):
    found = fit(recipe(base), Card("roomy", 80))
    assert found.choice.checkpointing == "none" and found.choice.pairs == 2
    everything = search.Search(recipe(base), Card("roomy", 80), search.Planner())
    assert found.choice.cost < 0.8 * everything.choice((), everything.start, None).cost


@pytest.mark.slow
def test_larger_cards_are_never_slower(base):
    low = needs(base, training=ONE, memory={"checkpointing": "all"})
    costs = [fit(recipe(base), Card("some card", low * share)).choice.cost for share in (1.01, 1.5, 8)]
    assert all(b <= 1.02 * a for a, b in zip(costs, costs[1:], strict=False)) and costs[-1] < 0.8 * costs[0]


@pytest.mark.slow
def test_a_step_that_is_bound_by_launches_takes_larger_micro_batches(base, monkeypatch):
    asked = recipe(base, training=ONE | {"gradient_accumulation_steps": 8})
    card = Card("some card", needs(base, training=ONE, memory={"checkpointing": "none"}))
    pairs = []
    for launching in (0.0, search.LAUNCHING):
        monkeypatch.setattr(search, "LAUNCHING", launching)
        pairs.append(fit(asked, card).choice.pairs)
    assert pairs[0] < pairs[1]


@pytest.mark.slow
def test_the_fit_fits_and_keeps_the_optimizer_batch(base, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "LAUNCHING", 0.0)  # this small model's steps would take the largest micro-batch
    asked = recipe(base)
    low = needs(base, training=ONE, memory={"checkpointing": "all"})
    high = needs(base, training=ONE, memory={"checkpointing": "none"})
    costs = []
    for share in (0.35, 0.8):
        card = Card("some card", low + share * (high - low))
        found = fit(asked, card)
        again = plan(found.recipe)
        assert verdict(again, card) == FITS and again.peak == found.choice.plan.peak
        assert found.choice.checkpointing not in ("all", "none")
        costs.append(found.choice.cost)
        assert found.choice.cost <= 1.02 * min(choice.cost for choice in found.tried if choice.fits)
        facts = mock.Mock(precision=mock.Mock(bf16=False, fp16=False))
        args: ORPOConfig = arguments(found.recipe, tmp_path, facts, has_eval=False, checkpointing=None)
        assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 2
        unchanged = found.recipe.model_dump(exclude={"name", "needs", "memory", "orpo", "training"})
        assert unchanged == asked.model_dump(exclude={"name", "needs", "memory", "orpo", "training"})
    assert costs == sorted(costs, reverse=True)


@pytest.mark.slow
def test_offloading_comes_before_a_shorter_length(base):
    least = needs(base, training=ONE, memory={"checkpointing": "all"})
    away = needs(base, training=ONE, memory={"checkpointing": "all", "offload_activations": True})
    assert away < least
    found = fit(recipe(base), Card("small", (least + away) / 2))
    assert found.recipe.memory.offload_activations and found.recipe.data.max_length == 1024
    shorter = fit(recipe(base), Card("smaller", away - 0.002))
    assert shorter.recipe.data.max_length < 1024
    assert fit(recipe(base), Card("tiny", 0.58)).choice is None


def test_a_mean_over_micro_batches_keeps_them(base):
    found = fit(recipe(base, orpo={"nll_mean": "micro"}), Card("roomy", 80))
    assert found.recipe.orpo.tokens_per_batch is None
    assert found.recipe.training["per_device_train_batch_size"] == 1
    assert {choice.pairs for choice in found.tried} == {1}


def run(*words: str) -> int:
    """The command's exit status."""
    with mock.patch("sys.argv", ["plan", *words]), pytest.raises(SystemExit) as left:
        run_command(command)
    return left.value.code or 0


@pytest.fixture
def written(base, tmp_path) -> Path:
    path = tmp_path / "small.yaml"
    recipe(base).save(path)
    return path


@pytest.mark.parametrize("json_", [False, True])
def test_the_command_says_what_auto_chooses_on_a_card(json_, written, capsys):
    words = ["--recipe", str(written), "training.per_device_train_batch_size=auto", "--gpu", "24GB"]
    assert run(*words, *["--json"] * json_) == 0
    printed = capsys.readouterr().out
    chosen = "memory.checkpointing=none orpo.tokens_per_batch=4094"
    if json_:
        told = json.loads(printed)
        assert told["cards"][0]["chosen"] == chosen and told["checkpointing"] == "no layer"
    else:
        assert f"on 24 GB auto is 2 pairs of the longest at once, no layer checkpointed: {chosen}" in printed


def test_gpu_gb_says_which_card(written):
    asked = Recipe.load(written, ["memory.gpu_gb=24"])
    assert cards_asked_for(asked, None) == [Card("24 GB", 24)]
    assert cards_asked_for(asked, "rtx-3060") == [CARDS["rtx-3060"]]


def test_more_layers_than_there_are_are_refused(base):
    with pytest.raises(RequestError, match="memory.checkpointing: found 40, but the model has 12 layers"):
        plan(recipe(base, memory={"checkpointing": 40}))


def test_vision_layers_do_not_count():
    text = dict(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=9, num_attention_heads=4,
                num_key_value_heads=2, head_dim=16, sliding_window=32)  # fmt: skip
    vision = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    with torch.device("meta"):
        model = Gemma3ForConditionalGeneration(config)
    layers = checkpointing_layers(model)
    assert layers == list(model.model.language_model.layers)
