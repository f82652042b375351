"""The recipe's rule on sample answers: the share of either style that it finds."""

from orpo_lite.evaluate.held_out import judge
from orpo_lite.recipe import RuleSection


def test_the_shares_are_of_the_answers_that_match():
    samples = [{"answer": text} for text in ("SIR, \ud83d\ude00 yes", "yes", "no\nsir", "né")]
    assert judge(samples, RuleSection(chosen="sir", rejected="^N.$")) == {"chosen": 0.5, "rejected": 0.25}
    assert judge([], RuleSection(chosen="a", rejected="b")) is None is judge(samples, None)
