"""The recipe's rule on sample answers: the share it finds, and expressions that never come to an end."""

from types import SimpleNamespace

import pytest

from orpo_lite.common import patterns
from orpo_lite.common.errors import RequestError
from orpo_lite.evaluate.held_out import judge
from orpo_lite.recipe import Recipe, RuleSection
from orpo_lite.train import results
from orpo_lite.train.results import HeldOut, before_training, record_of

ENDLESS = r"^(([\w.,]+\s?)+)+@$"
SHORT, LONG = (
    [{"answer": "Yes."}],
    [{"answer": "Certainly, that is what it comes to in the end, as far as anybody knows"}],
)


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    return Recipe.load("quickstart", [f"evaluation.rule={{chosen: '{ENDLESS}', rejected: '[0-9]'}}"])


def test_the_shares_are_of_the_answers_that_match():
    samples = [{"answer": text} for text in ("SIR, \ud83d\ude00 yes", "yes", "no\nsir", "né")]
    assert judge(samples, RuleSection(chosen="sir", rejected="^N.$")) == {"chosen": 0.5, "rejected": 0.25}
    assert judge([], RuleSection(chosen="a", rejected="b")) is None is judge(samples, None)


def test_a_rule_without_end_on_the_answers_of_the_base_is_refused_before_training(recipe, monkeypatch):
    monkeypatch.setattr(results, "held_out", lambda *_: HeldOut(samples=LONG))
    with pytest.raises(RequestError, match=r"evaluation.rule.chosen: found .*takes more than 0.5 s.*write it without"):
        before_training(SimpleNamespace(checkpoint=None), recipe, None, None, None)


def test_a_rule_without_end_on_the_answers_after_training_costs_the_run_nothing_but_the_rule(recipe, capsys):
    record = record_of(HeldOut(samples=SHORT), HeldOut(samples=LONG), recipe)
    assert record["rule"] == {"before": None, "after": None} and record["samples"]["after"] == LONG
    said = " ".join(capsys.readouterr().out.split())
    assert "evaluation.rule.chosen" in said and "write it without" in said and "left out" in said


@pytest.mark.parametrize("pattern", [ENDLESS, r"((\w|\s)+)+@"])
def test_the_time_is_bounded_whatever_the_expression(pattern, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    with pytest.raises(patterns.Endless):
        patterns.found_in(pattern, [LONG[0]["answer"] * 100])


def test_what_is_no_expression_is_said():
    with pytest.raises(patterns.Endless, match="cannot be looked for .*unterminated"):
        patterns.found_in("[", ["a"])
