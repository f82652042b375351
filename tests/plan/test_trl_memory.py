"""TRL's step planned beside ours: held against TRL's real trainer, and by hand."""

import json

import pytest
from transformers import LlamaConfig

from orpo_lite.common.console import console
from orpo_lite.common.errors import RequestError
from orpo_lite.plan.allocations import ADAPTER, BASE, CONSTANTS, ENDS, GRADIENTS, HEAD, OPTIMIZER
from orpo_lite.plan.gpus import Target
from orpo_lite.plan.predict import Plan
from orpo_lite.recipe import Recipe
from tests.benchmarks.plan_accuracy import Case
from tests.benchmarks.trl_memory import TrlPasses, as_dict, command, plan_trl, show, training_step
from tests.plan.test_accuracy import check
from tests.plan.test_plan import SIZES, near, recipe
from tests.plans import plan

VOCABULARY, LENGTH = 20_000, 128
CUDA = Target("cuda")


@pytest.mark.parametrize(
    "case",
    [Case("llama", length=96, trl=True), Case("qwen2", checkpointing="none", pairs=2, length=64, trl=True)],
    ids=lambda case: case.name,
)
def test_plan_is_what_trl_s_step_takes(case):
    check(case)  # the slow tests of test_accuracy.py have more of them


def saved(folder, layers: int):
    config = LlamaConfig(
        **SIZES | {"vocab_size": VOCABULARY}, num_hidden_layers=layers, architectures=["LlamaForCausalLM"]
    )
    config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("llama"), 2)


@pytest.fixture(scope="module")
def both(base) -> tuple[Recipe, Plan, Plan]:
    asked = recipe(base, data={"max_length": LENGTH, "max_completion_length": 32})
    ours = plan(asked, CUDA)
    return asked, ours, plan_trl(asked, ours)


def test_what_is_held_all_the_time_is_the_same(both):
    _, ours, theirs = both
    for phase in ("forward", "backward", "step"):
        for part in (BASE, CONSTANTS, ENDS, ADAPTER, OPTIMIZER):
            assert theirs.phases[phase][part] == ours.phases[phase][part]
    assert theirs.phases["load"] == ours.phases["load"] and theirs.phases["step"][GRADIENTS] > 0
    assert (
        theirs.shape is ours.shape and theirs.optimizer == ours.optimizer and theirs.dtype == ours.dtype == "bfloat16"
    )
    assert ours.layout == "shared" and theirs.layout == "padded"
    assert "evaluation" in ours.phases and "evaluation" not in theirs.phases


def test_trl_s_logits_are_the_difference(both):
    _, ours, theirs = both
    logits = 2 * LENGTH * VOCABULARY * 4  # float32, both completions with their prompt
    # forward: logits, and the chosen half's log-probabilities; of a single pair the shifted logits are no copy
    assert theirs.phases["forward"][HEAD] == pytest.approx(1.5 * logits, rel=0.05)
    # backward: logits, their gradient by the odds ratio, and the chosen half's log-probabilities
    assert theirs.phases["backward"][HEAD] == pytest.approx(2.5 * logits, rel=0.05)
    assert theirs.peak - training_step(ours).peak > logits
    assert theirs.peak == theirs.phases["backward"].total()


def test_float32_logits_count_twice_as_wide_as_the_model_s_dtype(base):
    asked = recipe(base, model={"dtype": "float32"})
    exact = plan_trl(asked, plan(asked, CUDA))
    half = recipe(base)
    rounded = plan_trl(half, plan(half, CUDA))
    assert exact.phases["backward"][HEAD] == pytest.approx(rounded.phases["backward"][HEAD], rel=0.02)


@pytest.mark.parametrize("target", [CUDA, pytest.param(Target("cpu"), marks=pytest.mark.slow)], ids=["cuda", "cpu"])
def test_few_layers_say_what_all_of_them_would(target, tmp_path):
    asked = recipe(saved(tmp_path, 6), memory={"checkpointing": "all"}, data={"eval_fraction": 0})
    ours = plan(asked, target)
    short, whole = plan_trl(asked, ours), plan_trl(asked, ours, whole=True)
    assert short.facts == whole.facts
    for phase, parts in whole.phases.items():
        # gradient clipping stacks as many norms as there are tensors, rounded up to a block
        assert near(short.phases[phase], parts, 8192 if phase == "step" else 0), phase


def test_trl_checkpoints_all_layers_or_none(base):
    def beside(**memory):
        asked = recipe(base, memory=memory)
        return plan_trl(asked, plan(asked, CUDA))

    everything, some, none = (beside(checkpointing=wish) for wish in ("all", 1, "none"))
    assert everything.recomputed == some.recomputed == "all layers" and some.phases == everything.phases
    assert none.recomputed == "no layer" and none.peak > everything.peak


def test_command_prints_both(base, tmp_path, capsys):
    path = tmp_path / "one.yaml"
    recipe(base, data={"max_length": LENGTH, "eval_fraction": 0}).save(path)
    command(str(path), as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["peak_bytes"] > found["ours"]["peak_bytes"] and found["layout"] == "padded"
    assert found["peak_bytes"] == max(phase["total"] for phase in found["phases"].values())
    assert found["times_ours"]["peak"] == found["peak_bytes"] / found["ours"]["peak_bytes"]
    assert any(sentence.startswith("TRL: ") for sentence in found["assumptions"])


def test_both_stand_side_by_side(both, capsys):
    show(console, *both[1:])
    assert "times our memory" in capsys.readouterr().out


def test_our_evaluation_is_no_part_of_the_comparison(base):
    asked = recipe(base, training={"per_device_eval_batch_size": 64})
    ours = plan(asked, CUDA)
    found = as_dict(ours, plan_trl(asked, ours))
    assert ours.fullest == "evaluation" and found["ours"]["fullest_phase"] != "evaluation"
    assert found["ours"]["peak_bytes"] < ours.peak


def test_what_cannot_be_planned_is_told(base, tmp_path, monkeypatch):
    def reads(self, model, inputs):
        return model(inputs["chosen_input_ids"]).logits.mean().item()

    asked = recipe(base)
    ours = plan(asked, CUDA)
    monkeypatch.setattr(TrlPasses, "compute_loss", reads)
    with pytest.raises(RequestError, match=r"step of TRL .* cannot be planned"):
        plan_trl(asked, ours)
