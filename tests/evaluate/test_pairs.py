"""Held-out results by length and source, of every kind of folder."""

from __future__ import annotations

import json

import numpy as np
import pytest
from datasets import Dataset

import orpo_lite.evaluate.__main__ as evaluate
from orpo_lite.common.errors import RequestError
from orpo_lite.evaluate.answering import find_sides
from orpo_lite.evaluate.held_out import breakdown, by_length
from orpo_lite.evaluate.loading import evaluate_sides
from orpo_lite.merge.run import merge
from tests.quickstart.corpus import preference_rows


def test_buckets_by_hand():
    lengths = [(2, 3, 2), (2, 2, 3), (5, 4, 4), (9, 1, 2)]
    pairs = Dataset.from_list(
        [
            {"chosen_ids": [0] * (p + c), "rejected_ids": [0] * (p + r), "chosen_start": p, "rejected_start": p}
            for p, c, r in lengths
        ]
    )
    found = breakdown(np.array([-1.0, -2, -3, -1]), np.array([-2.0, -1, -4, -3]), 0.1, pairs, ["b", "a", "b", "b"])
    assert [(b["bucket"], b["pairs"]) for b in found["prompt_tokens"]] == [("up to 16", 4)]
    assert [(b["bucket"], b["pairs"], b["accuracy"]) for b in found["longer_answer"]] == [
        ("chosen longer", 1, 1.0), ("equally long", 1, 1.0), ("chosen shorter", 2, 0.5)]  # fmt: skip
    assert [(b["bucket"], b["pairs"], b["accuracy"]) for b in found["source"]] == [("b", 3, 1.0), ("a", 1, 0.0)]
    assert found["source"][0]["margin"] == pytest.approx(0.1 * (1 + 1 + 2) / 3)
    assert found["source"][0]["interval"] == pytest.approx((0.4385, 1.0), abs=1e-4)


def test_prompts_are_split_by_length_and_none_is_lost():
    tokens = np.array([1, 16, 17, 32, 33, 16384, 16385, 10**6])
    found = by_length(tokens)
    assert {name: mask.sum() for name, mask in found if mask.any()} == {
        "up to 16": 2, "17 to 32": 2, "33 to 64": 1, "8193 to 16384": 1, "16385 and more": 2}  # fmt: skip
    assert np.array_equal(sum(mask.astype(int) for _, mask in found), np.ones(len(tokens)))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_groups_add_up_to_all_pairs(trained, tmp_path):
    """Rows that are dropped before others do not shift the groups."""
    rows = preference_rows(0)["heldout"][:8]
    rows[1]["chosen"] = rows[1]["rejected"]
    results, _ = evaluate_sides(find_sides(str(trained)), write(tmp_path / "held.jsonl", rows))
    assert list(results) == ["base", "adapter"]
    for result in results.values():
        for group in result["by"].values():
            assert sum(bucket["pairs"] for bucket in group) == result["pairs"] == 7
            assert sum(b["accuracy"] * b["pairs"] for b in group) / 7 == pytest.approx(result["rewards/accuracies"])
            assert sum(b["margin"] * b["pairs"] for b in group) / 7 == pytest.approx(
                result["rewards/margins"], abs=1e-6
            )
        assert [(b["bucket"], b["pairs"]) for b in result["by"]["source"]] == [(str(tmp_path / "held.jsonl"), 7)]


def test_the_run_keeps_its_buckets(trained):
    facts = json.loads((trained / "run.json").read_text())
    assert sum(bucket["pairs"] for bucket in facts["eval"]["after"]["by"]["longer_answer"]) == 8


def test_a_merged_model_and_a_bare_adapter_take_data(trained, tmp_path, capsys):
    merged = merge(trained, tmp_path / "merged")
    held = write(tmp_path / "held.jsonl", preference_rows(0)["heldout"][:8])
    capsys.readouterr()
    evaluate.command(str(trained), data=held, as_json=True)
    run = json.loads(capsys.readouterr().out)
    evaluate.command(str(merged), data=held, as_json=True)
    model = json.loads(capsys.readouterr().out)
    assert set(model) == {"model", "drops"}
    for key in ("rewards/accuracies", "logps/chosen", "nll_loss"):
        assert model["model"][key] == pytest.approx(run["adapter"][key], abs=1e-4)
    evaluate.command(str(merged), data=held)
    told = " ".join(capsys.readouterr().out.split())
    assert (
        told.startswith(f"model: {merged}, a whole model 8 held-out pairs model reward accuracy")
        and "few held-out pairs (8)" in told
    )
    with pytest.raises(RequestError, match="give --data FILE"):
        evaluate.command(str(merged))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"judge": "x"}, "--judge goes with --prompts"),
        ({"output": "x"}, "--output goes with --prompts"),
        ({"data": "x", "prompts": "y"}, "two kinds"),
        ({"prompts": "z", "top_p": 0.5}, "--temperature"),
    ],
)
def test_requests_that_mean_nothing_are_refused(options, words, trained):
    with pytest.raises(RequestError, match=words):
        evaluate.command(str(trained), **options)
