"""Checkpoints of several processes: whole or not at all, resumed to the same end."""

import json

import pytest
import torch
from safetensors.torch import load_file

from orpo_lite.trainer.checkpoint_folder import damage, manifest
from tests.scale import checks
from tests.scale.group import together


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saving")
    together(checks.save_base, 1, folder / "make", str(folder / "base"))
    return folder


@pytest.fixture(scope="module")
def first(base):
    """Two processes' run that never stopped and one that died after step 4."""
    parts = [{"out": "whole"}, {"out": "broken", "dies": 4}]
    both = together(checks.stretches, 2, base / "first", str(base / "base"), str(base), *parts)
    checkpoint = base / "broken" / "out" / "checkpoint-4"
    assert damage(checkpoint) is None
    assert manifest(checkpoint)["processes"] == 2
    assert not list(checkpoint.parent.glob(".*")), "nothing is left aside"
    return [each[0] for each in both], checkpoint


def gone_on_with(base, checkpoint, processes):
    """The ranks of a run that goes on from a checkpoint."""
    out = base / f"on-{processes}"
    part = {"out": "on", "resume": str(checkpoint)}
    ranks = together(checks.stretches, processes, out / "then", str(base / "base"), str(out), part)
    return [each[0] for each in ranks]


def same(one, other):
    return all(torch.equal(one["weights"][name], other["weights"][name]) for name in one["weights"])


def rows_of(ranks):
    """The rows of each step's pairs, on all processes together."""
    return [
        sorted(row for rank in step for row in rank) for step in zip(*(rank["rows"] for rank in ranks), strict=True)
    ]


@pytest.mark.slow
def test_as_many_processes_go_on_bit_for_bit(base, first):
    whole, checkpoint = first
    gone_on = gone_on_with(base, checkpoint, 2)
    assert same(whole[0], gone_on[0])
    assert whole[0]["logs"] == gone_on[0]["logs"]
    assert rows_of(whole)[4:] == rows_of(gone_on)
    names = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    assert {"adapter_model.safetensors", "adapter_config.json", "rng_state_0.pth", "rng_state_1.pth"} <= names
    assert not any(name.endswith(".py") for name in names)
    saved = load_file(base / "whole" / "last" / "adapter_model.safetensors")
    trained = {name.replace(".default.", "."): tensor for name, tensor in whole[0]["weights"].items()}
    assert saved.keys() == trained.keys()
    assert all(torch.equal(saved[name], trained[name]) for name in saved)


def test_a_checkpoint_of_two_processes_is_whole(base):
    """The fast half of what the slow tests look at."""
    out = base / "fast"
    part = {"out": "broken", "dies": 2}
    ranks = together(checks.stretches, 2, out / "first", str(base / "base"), str(out), part)
    checkpoint = out / "broken" / "out" / "checkpoint-2"
    assert damage(checkpoint) is None
    assert json.loads((checkpoint / "running.json").read_text())["logged_at_step"] == 2
    assert same(ranks[0][0], ranks[1][0])


@pytest.mark.slow
@pytest.mark.parametrize("then", [1, 4])
def test_another_number_of_processes_goes_on_with_the_same_pairs(base, first, then):
    whole, checkpoint = first
    gone_on = gone_on_with(base, checkpoint, then)
    assert rows_of(whole)[4:] == rows_of(gone_on)
    for name, tensor in whole[0]["weights"].items():
        assert (gone_on[0]["weights"][name] - tensor).abs().max() < 1e-5, name
    assert len(whole[0]["logs"]) == len(gone_on[0]["logs"])
    for one, other in zip(whole[0]["logs"], gone_on[0]["logs"], strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-5)
