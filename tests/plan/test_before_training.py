"""The plan before a run starts: over the data's own pairs, and against the card that is there."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from orpo_lite.common.errors import RequestError
from orpo_lite.plan import before_training as start
from orpo_lite.plan.before_training import Lengths, costliest
from orpo_lite.plan.gpus import CONTEXT_BYTES, Target
from orpo_lite.plan.search import Planner, changed
from orpo_lite.plan.step import Shape
from orpo_lite.recipe import Recipe
from orpo_lite.train import results
from orpo_lite.train.pipeline import plan_memory, run
from tests.plans import plan

PAIRS = np.array([[10, 20, 30], [40, 5, 5], [5, 50, 8], [8, 8, 8], [20, 40, 36]])


@pytest.fixture
def recipe(tmp_path):
    """A small llama's recipe."""
    config = LlamaConfig(vocab_size=3000, hidden_size=128, intermediate_size=320, num_attention_heads=4,
                         num_key_value_heads=2, num_hidden_layers=2, architectures=["LlamaForCausalLM"])  # fmt: skip
    config.save_pretrained(tmp_path / "base")

    def make(*words):
        content = {
            "name": "small",
            "model": {"name_or_path": str(tmp_path / "base"), "quantization": "none"},
            "data": {"train": "x.jsonl", "max_length": 128},
            "training": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        }
        made = changed(Recipe.parse(content), list(words))
        assert made is not None
        return made

    return make


@pytest.fixture
def lengths():
    return Lengths(PAIRS, PAIRS[:2])


@pytest.fixture
def card(monkeypatch):
    """A CUDA card by mocked calls: total and free bytes, and what torch holds of it."""

    def make(total, others=0, reserved=0, allocated=0, name="Test Card"):
        free = total - others - reserved - CONTEXT_BYTES
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (int(free), int(total)))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
        for kind, size in (("memory", reserved), ("max_memory", reserved)):
            monkeypatch.setattr(torch.cuda, f"{kind}_reserved", lambda device=None, size=size: size)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: allocated)
        return torch.device("cuda", 0)

    return make


def fit(recipe, lengths, device):
    """The recipe as a run on a device takes it."""
    return start.plan_before_loading(recipe, lengths, device, force=True, command="again", asked=False)[0]


def test_the_costliest_pairs_of_each_layout():
    # shared: 60 50 63 24 96; packed: 70 90 68 32 116; padded: 80 90 110 32 120
    assert costliest(PAIRS, "shared", 2, None) == ((20, 40, 36), (5, 50, 8))
    assert costliest(PAIRS, "packed", 2, None) == ((20, 40, 36), (40, 5, 5))
    assert costliest(PAIRS, "padded", 9, None)[:3] == ((20, 40, 36), (5, 50, 8), (40, 5, 5))
    assert costliest(PAIRS, "shared", 9, 160) == ((20, 40, 36), (5, 50, 8))
    assert costliest(PAIRS, "shared", 9, 150) == ((20, 40, 36), (40, 5, 5))
    assert costliest(PAIRS, "padded", 9, 359) == ((20, 40, 36), (5, 50, 8))  # a third would be padded to 120
    assert costliest(PAIRS, "shared", 9, 1) == ((20, 40, 36),)  # alone, though it is over the budget


def test_shape_is_of_the_data_and_of_tighter_limits(recipe, lengths):
    shape = lengths.shape(recipe("data.eval=y.jsonl", "training.per_device_eval_batch_size=1"), "shared")
    assert shape.pairs == ((20, 40, 36), (5, 50, 8), (10, 20, 30), (40, 5, 5))
    assert shape.held_out == ((10, 20, 30),)
    assert lengths.shape(recipe("orpo.tokens_per_batch=400"), "shared").pairs[-1] == (8, 8, 8)
    dropped = lengths.shape(recipe("data.max_length=50", "data.overlong=drop"), "shared")
    assert dropped.pairs == ((10, 20, 30), (40, 5, 5), (8, 8, 8))
    cut = lengths.shape(recipe("data.max_length=50", "data.overlong=truncate"), "shared")
    assert cut.pairs[0] == (20, 30, 30)
    nothing = lengths.shape(recipe("data.max_length=8", "data.overlong=drop"), "shared")
    assert "that data allows" in nothing.why


def test_a_plan_of_unequal_answers_and_held_out_pairs_moves_with_both(recipe):
    made = {
        name: plan(recipe("data.eval=y.jsonl"), shape=lambda _, p=pairs, h=held_out: Shape(p, "", h))
        for name, pairs, held_out in (
            ("even", ((8, 40, 40),), ((8, 40),)),
            ("chosen shorter", ((8, 20, 40),), ((8, 40),)),
            ("long held out", ((8, 40, 40),), ((8, 400),)),
        )
    }
    same = plan(recipe("data.eval=y.jsonl"), shape=lambda _: Shape(((8, 40),), "", ((8, 40),)))
    assert made["even"].phases == same.phases
    assert made["chosen shorter"].phases["backward"].total() < made["even"].phases["backward"].total()
    assert made["long held out"].phases["evaluation"].total() > made["even"].phases["evaluation"].total()
    assert made["long held out"].phases["backward"] == made["even"].phases["backward"]


def test_a_card_with_room_gets_a_line(recipe, lengths, card, capsys):
    _, made = start.plan_before_loading(recipe(), lengths, card(12e9), False, "again")
    assert made is not None
    line = capsys.readouterr().out.strip()
    assert (
        line.startswith("memory: planned ")
        and f"of 12.0 GB (tensors {made.peak / 1e9:.2f} GB" in line
        and ", fits; 4 of" in line
    )


def test_what_cannot_fit_is_refused_with_a_remedy_that_works(recipe, lengths, card, capsys, caplog):
    needs = plan(recipe(), shape=lambda layout: lengths.shape(recipe(), layout))
    device = card(int(needs.needed - needs.assumed["fragmentation margin"] - 1e6))
    command = "python -m orpo_lite.train --recipe small"
    with pytest.raises(RequestError, match="small needs") as caught:
        start.plan_before_loading(recipe(), lengths, device, False, command)
    message = str(caught.value)
    assert "Test Card has" in message and "--force" in message and "held by" not in message
    words = message.split(command)[1].split("\n")[0].split()
    assert words and "=" in words[0]
    start.plan_before_loading(recipe(*words), lengths, device, False, command)  # it does fit
    assert start.plan_before_loading(recipe(), lengths, device, True, command)[1] is not None
    assert "starting anyway because of --force" in caplog.text


def test_several_processes_are_checked_by_the_card_that_is_there(recipe, lengths, card, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RequestError, match="needs .*, and Test Card has 0.4 GB"):
        start.plan_before_loading(recipe("memory.gpu_gb=80"), lengths, card(0.4e9), False, "again")


def test_who_else_is_on_the_card_is_said(recipe, lengths, card):
    device = card(12e9, others=11.6e9)
    with pytest.raises(RequestError) as caught:
        start.plan_before_loading(recipe(), lengths, device, False, "again")
    message = str(caught.value)
    assert "0.4 GB left of 12.0 GB, since 11.6 GB are held by other programs" in message
    assert "It fits once those programs have ended" in message and "Nothing that was tried makes it fit" in message


def test_a_plan_that_fails_stops_nothing(recipe, lengths, card, capsys, tmp_path):
    gone = recipe(f"model.name_or_path={tmp_path / 'nothing'}")
    assert start.plan_before_loading(gone, lengths, card(12e9), False, "again") == (gone, None)
    out = capsys.readouterr().out
    assert "memory: no plan, because model.name_or_path" in out and "training continues without" in out


def test_measured_beside_planned(recipe, lengths, card, capsys):
    made = Planner(lengths.shape)(recipe(), Target("cuda"))
    device = card(12e9, allocated=made.peak * 2, reserved=made.peak * 3)
    record = results.memory_facts(made, device)
    assert record == made.as_dict() | {
        "measured": {"allocated_bytes": made.peak * 2, "reserved_bytes": made.peak * 3}, "error": -0.5}  # fmt: skip
    assert "-50.0%" in capsys.readouterr().out
    assert results.memory_facts(None, device)["measured"]["allocated_bytes"] == made.peak * 2
    assert results.memory_facts(None, torch.device("cpu")) is None


def test_on_the_cpu_a_run_plans_when_asked(tmp_path, capsys):
    words = ["training.max_steps=1", "evaluation.samples=1", "evaluation.max_new_tokens=4", "data.max_rows=40"]
    recipe = Recipe.load("quickstart", [*words, f"training.output_dir={tmp_path / 'run'}"])
    assert plan_memory(recipe, None, asked=False, force=False, again="") == (recipe, None)
    assert not capsys.readouterr().out
    facts = run(recipe, plan=True).record.model_dump()
    assert "memory: planned" in capsys.readouterr().out
    assert facts["out_of_memory"] == {"training": [], "evaluation": []}
    written = json.loads((Path(recipe.folder) / "run.json").read_text())
    recorded = {name: value for name, value in facts["plan"].items() if value is not None}
    assert recorded.items() <= written["plan"].items() and facts["plan"]["device"] == "cpu"
    assert facts["plan"]["peak_bytes"] > 0


def test_gpu_gb_fits_the_recipe_to_its_card(recipe, card, capsys):
    lengths = Lengths(np.repeat(PAIRS[-1:], 16, 0), PAIRS[:2])
    asked = recipe("memory.gpu_gb=12", "memory.checkpointing=all")
    found = fit(asked, lengths, card(24e9))
    assert found.memory.checkpointing == "none" and found.memory.gpu_gb == 12 and found.name == "small"
    # the budget holds the step's pairs as long as the longest of the data is, not as the recipe would let through
    assert found.orpo.tokens_per_batch == 8 * (20 + 40 + 36)
    assert "memory.gpu_gb=12: 8 pairs of the longest at once, no layer checkpointed" in capsys.readouterr().out
    assert fit(recipe(), lengths, card(24e9)) == recipe()


def test_gpu_gb_without_a_gpu_leaves_the_recipe(recipe, lengths, capsys):
    asked = recipe("memory.gpu_gb=12")
    assert fit(asked, lengths, torch.device("cpu")) == asked
    assert "there is no GPU here" in capsys.readouterr().out


AUTO = "training.per_device_train_batch_size=auto"


def test_auto_takes_what_the_card_holds_and_keeps_the_pairs_of_a_step(recipe, card, capsys):
    lengths = Lengths(np.repeat(PAIRS[-1:], 16, 0), PAIRS[:2])
    asked = recipe(AUTO, "training.gradient_accumulation_steps=8")
    small = plan(recipe("training.per_device_train_batch_size=1"), shape=lambda layout: lengths.shape(asked, layout))
    found = {size: fit(asked, lengths, card(size)) for size in (24e9, small.needed + 1e6)}
    large, tight = found.values()
    assert large.memory.checkpointing == "none" and large.orpo.tokens_per_batch == 8 * (20 + 40 + 36)
    assert tight.orpo.tokens_per_batch < large.orpo.tokens_per_batch or tight.memory.checkpointing != "none"
    for one in found.values():
        assert (one.pairs_at_once, one.training["gradient_accumulation_steps"]) == (1, 8)
    said = capsys.readouterr().out
    assert "of the longest at once" in said and "on Test Card" in said


def test_what_is_given_beside_auto_stays(recipe, lengths, card):
    layers = fit(recipe(AUTO, "memory.checkpointing=all"), lengths, card(24e9))
    assert layers.memory.checkpointing == "all" and layers.orpo.tokens_per_batch
    budget = fit(recipe(AUTO, "orpo.tokens_per_batch=200"), lengths, card(24e9))
    assert budget.orpo.tokens_per_batch == 200 and budget.memory.checkpointing == "none"
    micro = fit(recipe(AUTO, "orpo.nll_mean=micro"), lengths, card(24e9))
    assert micro.orpo.tokens_per_batch is None and micro.memory.checkpointing == "none"


def test_auto_where_nothing_can_be_planned_takes_one_pair(recipe, lengths, card, capsys, monkeypatch):
    assert fit(recipe(AUTO), lengths, torch.device("cpu")) == recipe(AUTO)
    assert "no GPU here; training with micro-batches of one pair" in capsys.readouterr().out
    assert fit(recipe(AUTO), lengths, card(0.56e9)) == recipe(AUTO)
    assert "nothing that was tried fits" in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert fit(recipe(AUTO), lengths, card(24e9)) == recipe(AUTO)
    assert "set memory.gpu_gb to the size of the smallest" in capsys.readouterr().out
    assert fit(recipe(AUTO, "memory.gpu_gb=12"), lengths, card(11e9)).orpo.tokens_per_batch


def test_a_run_with_auto_keeps_it_in_its_folder(tmp_path, capsys):
    words = ["training.max_steps=1", "evaluation.samples=1", "evaluation.max_new_tokens=4", "data.max_rows=40", AUTO]
    recipe = Recipe.load("quickstart", [*words, "training.gradient_accumulation_steps=4",
                                        f"training.output_dir={tmp_path / 'run'}"])  # fmt: skip
    run(recipe)
    assert "training with micro-batches of one pair" in capsys.readouterr().out
    kept = Recipe.load(tmp_path / "run")
    assert kept.plans_batches and kept.orpo.tokens_per_batch is None
    assert json.loads((tmp_path / "run" / "run.json").read_text())["effective_batch"] == 4
