"""The recipe's rule on sample answers."""

from orpo_lite.evaluate.held_out import rule_shares
from orpo_lite.recipe import RuleSection


def test_the_shares_are_of_the_answers_that_match():
    samples = [{"answer": text} for text in ("SIR, \ud83d\ude00 yes", "yes", "no\nsir", "né")]
    assert rule_shares(samples, RuleSection(chosen="sir", rejected="^N.$")) == {"chosen": 0.5, "rejected": 0.25}
    assert rule_shares([], RuleSection(chosen="a", rejected="b")) is None is rule_shares(samples, None)
