"""Pairs by the time they take: places counted one by one, the simulation by hand, and the waiting that dealing leaves."""

import dataclasses
import json

import numpy as np
import pytest
import typer
from datasets import Dataset
from transformers import AutoConfig, PretrainedConfig
from typer.testing import CliRunner

from orpo_lite.data.lengths import pair_costs, pair_work, place_weight, places
from orpo_lite.data.step_batches import step_loader
from orpo_lite.plan.meta_model import shipped_config
from orpo_lite.recipe import Recipe
from orpo_lite.trainer.config import ORPOConfig
from tests.benchmarks.balance import MEASURED, Cost, command, recipe_lengths, simulate, synthetic, waiting, weight


def rows(*lengths: tuple[int, int, int]) -> Dataset:
    return Dataset.from_list(
        [
            {"chosen_ids": [1] * p + [2] * c, "rejected_ids": [1] * p + [3] * r, "chosen_start": p, "rejected_start": p}
            for p, c, r in lengths
        ]
    )


def test_places_are_those_of_the_mask():
    """Counted in a mask of prompt, chosen and rejected; half of the diagonal is left out of the formula."""
    p, c, r = 5, 3, 4
    n = p + c + r
    branch = np.repeat([0, 1, 2], [p, c, r])
    causal = np.tril(np.ones((n, n), dtype=bool))
    mask = causal & ((branch[None] == 0) | (branch[None] == branch[:, None]))
    assert places(np.array([p]), np.array([c]), np.array([r]))[0] == mask.sum() - n / 2


def test_work_is_tokens_and_places():
    pairs = rows((5, 3, 4), (0, 100, 20))
    found = pair_work(pairs, "shared", 0.5)
    assert found.dtype == np.int64
    assert found.tolist() == [12 + round((8**2 / 2 + 4 * (5 + 2)) / 2), 120 + round((100**2 / 2 + 20 * 10) / 2)]
    assert pair_work(pairs, "packed", 0.5).tolist() == [17 + round((64 + 81) / 4), 120 + (10000 + 400) // 4]
    assert pair_work(pairs, "padded", 0.5).tolist() == [18 + round(81 / 2), 200 + 5000]
    for layout in ("shared", "packed", "padded"):
        assert (pair_work(pairs, layout, 0.0) == pair_costs(pairs, layout)).all()


def test_attention_weighs_less_the_wider_a_model_is():
    small, wide = shipped_config("HuggingFaceTB/SmolLM2-135M-Instruct"), shipped_config("mistralai/Mistral-7B-v0.1")
    assert place_weight(small) > 5 * place_weight(wide) > 0
    # the weight is what was measured, on the model it was measured on
    assert weight() == pytest.approx(MEASURED.attention / MEASURED.token, rel=0.05)


def test_shares_of_a_training_step_go_by_work():
    """With a budget too, which goes on to count tokens: long pairs take more time than as many tokens of short ones."""
    pairs = rows(*map(tuple, np.random.default_rng(0).integers(1, [800, 200, 200], (32, 3)).tolist()))
    for budget in (None, 1300):
        args = ORPOConfig(
            per_device_train_batch_size=8, tokens_per_batch=budget, train_sampling_strategy="sequential", use_cpu=True
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ORPOConfig, "world_size", 4)
            plan = step_loader(pairs, args, "shared", None, weight=0.01).dataset.plan
        assert (plan.work == pair_work(pairs, "shared", 0.01)).all() and (
            plan.costs == pair_costs(pairs, "shared")
        ).all()
        by_tokens = dataclasses.replace(plan, work=None)
        spent = [
            waiting(np.array([sum(plan.work[batch].sum() for batch in batches) for batches in each.step(0, 0)]))
            for each in (plan, by_tokens)
        ]
        assert spent[0] < 0.02 < spent[1]


@pytest.mark.parametrize("name", ["mamba", "t5", "gemma3n", "openelm-like", "mixtral"])
def test_weight_of_other_families(name):
    """Models without attention have no places; those with a number a layer count the mean."""
    if name == "openelm-like":
        config = PretrainedConfig(hidden_size=64, num_hidden_layers=2, vocab_size=1000, head_dim=16)
        config.num_attention_heads, config.num_key_value_heads, config.intermediate_size = [4, 8], [2, 4], [128, 256]
    else:
        config = AutoConfig.for_model(name)
    found = place_weight(config)
    assert found == 0.0 if name == "mamba" else 0 < found < 0.01


def test_waiting_by_hand():
    assert waiting(np.array([1.0, 2.0, 3.0])) == pytest.approx(0.5)
    pairs = np.array([[0, 10, 0], [0, 30, 0], [0, 20, 0], [0, 20, 0]])
    found = simulate(pairs, 2, 0.0, Cost(0.0, 1.0, 0.0), each=2)
    assert (found.steps, found.dealt, found.repeated) == (1, 0.0, False)
    assert found.plain in (0.0, 0.25)  # 10 + 30 against 40, or 10 + 20 against 50
    alone = simulate(np.array([[0, 10, 0], [0, 30, 0]]), 2, 0.0, Cost(10.0, 1.0, 0.0), each=1)
    assert alone.dealt == alone.plain == pytest.approx(40 / 30 - 1)  # a step cannot be shorter than its longest pair


@pytest.mark.parametrize("gpus", [8, 64])
def test_real_lengths_leave_at_most_three_percent_waiting(gpus, shared_data):
    words = [f"data.train={shared_data / 'train.jsonl'}", "data.max_length=2048"]
    found = simulate(recipe_lengths(Recipe.load("quickstart", words)), gpus, weight())
    assert found.dealt <= 0.03 and not found.repeated
    assert found.plain > 0.3 and found.dealt < found.by_tokens


@pytest.mark.parametrize("gpus", [8, 64])
def test_lengths_like_ultrafeedback_s_leave_at_most_three_percent_waiting(gpus):
    lengths = synthetic(8192)
    assert (
        lengths.mean(0) == pytest.approx([175, 305, 285], rel=0.05)
        and (lengths[:, 0] + lengths[:, 1:].max(1)).max() <= 2048
    )
    found = simulate(lengths, gpus, weight())
    assert found.dealt <= 0.03 < 0.3 < found.plain


def test_the_command_prints_the_table():
    app = typer.Typer()
    app.command()(command)
    done = CliRunner().invoke(app, ["--gpus", "2,4", "--drawn", "64", "--json"])
    told = json.loads(done.stdout)
    assert [row["gpus"] for row in told["waiting"]] == [2, 4] and told["pairs"] == 64
    assert "dealt by work" in CliRunner().invoke(app, ["--gpus", "2", "--drawn", "64"]).stdout
