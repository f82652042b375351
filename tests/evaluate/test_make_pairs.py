"""Pairs from prompts: what is sampled, ranked and paired, what is left out and said, and that a stopped run goes on."""

import json
import math
from collections import Counter
from itertools import pairwise

import pytest
import torch

from orpo_lite.common.errors import RequestError
from orpo_lite.data import load_pairs
from orpo_lite.evaluate import pairs, ranking
from orpo_lite.evaluate.answering import Side, find_sides
from orpo_lite.evaluate.judge import Endpoint, LocalJudge
from orpo_lite.evaluate.pairs import add_up, beside, make_pairs
from orpo_lite.evaluate.ranking import Group
from orpo_lite.objective.loss import log1mexp
from orpo_lite.recipe import DataSection, Recipe
from orpo_lite.train.pipeline import run
from tests.evaluate.conftest import KIND, kindest
from tests.tiny import tiny_tokenizer
from tests.training import CHATML, SIZES

ASK = [{"role": "user", "content": "Who are you?"}]
QUICK = {"samples": 4, "max_new_tokens": 24, "batch_size": 16}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    asked = [f"How much is {a} plus {b}?" for a in range(2, 5) for b in range(3, 7)]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in asked))
    return path


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_from_prompts_to_pairs_that_training_takes(trained, prompts, tmp_path, capsys):
    output = tmp_path / "pairs.jsonl"
    pairs.command(str(trained), str(prompts), output, must=[KIND.pattern], held_out=0.3, **QUICK)
    said = capsys.readouterr().out
    made, apart = rows(output), rows(beside(output, "held-out"))
    assert len(made) + len(apart) >= 4
    for row in made + apart:
        better, worse = (row[side][0]["content"] for side in ("chosen", "rejected"))
        assert KIND.search(better) and not KIND.search(worse)
    assert not {json.dumps(one["prompt"]) for one in made} & {json.dumps(one["prompt"]) for one in apart}
    report = json.loads(beside(output, "report", ".json").read_text())
    answers = rows(beside(output, "answers"))
    assert report["answers"] + sum(report["left_out"].values()) == 4 * 12 == len(answers)
    assert sum(report["files"].values()) + sum(report["prompts_without_a_pair"].values()) == 12
    assert report["settings"]["seed"] == 0 and report["settings"]["sides"]["adapter"]["weights"]
    assert f"train --recipe {trained} data.train={output}" in said and f"adapter.init_from={trained}" in said
    assert f"{len(made)} pairs to train on, {len(apart)} held out" in said  # what `orpo-lite data` says
    side = find_sides(str(trained))[-1]
    loaded = load_pairs(DataSection(train=[str(output)], eval=[str(beside(output, "held-out"))]), side.tokenizer)
    assert len(loaded.train) == len(made) and not loaded.report.dropped


def test_a_stopped_run_goes_on_to_the_same_pairs(trained, prompts, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    pairs.command(str(trained), str(prompts), whole, must=[KIND.pattern], **QUICK)
    kept = beside(whole, "answers").read_bytes().splitlines(keepends=True)
    beside(cut, "answers").write_bytes(b"".join(kept[:5]) + kept[5][:20])  # within a batch, and within a line
    pairs.command(str(trained), str(prompts), cut, must=[KIND.pattern], **QUICK)
    assert beside(cut, "answers").read_bytes() == beside(whole, "answers").read_bytes()
    assert cut.read_bytes() == whole.read_bytes()
    monkeypatch.setattr(Side, "replies", None)  # nothing is sampled again for other rules
    pairs.command(str(trained), str(prompts), whole, max_words=12, **QUICK)
    with pytest.raises(RequestError, match=r"line 1: in settings"):
        pairs.command(str(trained), str(prompts), whole, max_words=12, **QUICK | {"seed": 5})
    (tmp_path / "mine.jsonl").write_text("{}\n")
    with pytest.raises(RequestError, match="mine.jsonl exists, and this command did not write it"):
        pairs.command(str(trained), str(prompts), tmp_path / "mine.jsonl", max_words=12, **QUICK)


@pytest.mark.parametrize(("words", "message"), [
    ({}, "nothing says which answers are better"),
    ({"must": ["("]}, "--must: '\\(' is no regular expression"),
    ({"rule": "nowhere.py:f"}, "--rule: found nowhere.py:f, expected FILE.py:FUNCTION"),
    ({"judge_model": "m", "max_words": 3}, "--judge-model names a model at an address"),
    ({"model_name": "m", "max_words": 3}, "--model-name: found m for"),
    ({"reward_model": "./nowhere", "max_words": 3}, "--reward-model: there is no folder ./nowhere"),
])  # fmt: skip
def test_requests_that_cannot_work(words, message, trained, prompts, tmp_path):
    with pytest.raises(RequestError, match=message):
        pairs.command(str(trained), str(prompts), tmp_path / "p.jsonl", **words)


# ---- ranking ---------------------------------------------------------------------------------------------------------


def asked(*answers, n=0, held_out=False):
    return Group(str(n), ASK, list(answers), Counter(), held_out)


def test_rules(tmp_path):
    (tmp_path / "mine.py").write_text("def size(prompt, answer):\n    return len(answer) if answer != 'x' else 1 / 0\n"
                                      "def nan(prompt, answer):\n    return float('nan')\n")  # fmt: skip
    found = ranking.find_rules(["YES"], ["no"], 2, 3, True, f"{tmp_path}/mine.py:size")
    table = {
        "yes": (1, 1, 0, 1, 0, 3),
        "Yes or no": (1, 0, 1, 1, 0, 9),
        '{"a": 1}': (0, 1, 1, 1, 1, 8),
        "a b c d": (0, 1, 1, 0, 0, 7),
    }
    scores = [rule.scores([asked(*table)], tmp_path)[0] for rule in found]
    assert [*zip(*scores, strict=True)] == [*table.values()]
    with pytest.raises(RequestError, match=r"mine.py:size fails on 'x' \(ZeroDivisionError"):
        found[-1].scores([asked("x")], tmp_path)
    with pytest.raises(RequestError, match="it gives nan"):
        ranking.find_rules([], [], None, None, False, f"{tmp_path}/mine.py:nan")[0].scores([asked("y")], tmp_path)
    with pytest.raises(RequestError, match=r"mine.py:siz, expected FILE.py:FUNCTION.*KeyError: 'siz'"):
        ranking.find_rules([], [], None, None, False, f"{tmp_path}/mine.py:siz")
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(RequestError, match=r"broken.py:f, expected .*ZeroDivisionError"):
        ranking.find_rules([], [], None, None, False, f"{tmp_path}/broken.py:f")


def test_a_reward_model_reads_its_own_template(tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = tiny_tokenizer(("<|im_start|>", "<|im_end|>"), CHATML, eos="<|im_end|>", pad="<pad>")
    config = LlamaConfig(**SIZES | {"vocab_size": len(tokenizer)}, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    answers = ["I am a model.", "Go away.", "x" * 5000]
    found = ranking.RewardModel(str(tmp_path)).score(asked(*answers))
    text = tokenizer.apply_chat_template([*ASK, {"role": "assistant", "content": answers[0]}], tokenize=False)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    assert found[0] == pytest.approx(model(input_ids=ids).logits.item(), abs=1e-5) and found[0] != found[1]
    assert found[2] is None  # longer than the model takes
    config.num_labels = 3
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(RequestError, match="has 3 outputs and a chat template, expected one output"):
        ranking.RewardModel(str(tmp_path))


def test_log_odds_are_those_of_training(trained):
    ranker = ranking.LogOdds(str(trained))
    answers = ["It is a pleasure.", "Go away.", "Whatever."]
    found = ranker.score(asked(*answers))
    for (one, a), (other, b) in pairwise(zip(found, answers, strict=True)):
        logps = ranker.side.mean_logps(ASK, a, b)
        assert [one, other] == pytest.approx((logps - log1mexp(logps)).tolist(), abs=1e-5)


def test_a_judge_meets_every_answer_and_its_moods_are_ties(tmp_path):
    class Asked(LocalJudge):
        def __init__(self, judge):
            self.name, self.judge, self.questions = "judge", judge, 0

        def answers(self, questions):
            self.questions += len(questions)
            return [self.judge(text) for text in questions]

    group = asked("My pleasure, happy to help, thank you.", "Certainly.", "No.", "Thank you, certainly.")
    kind = Asked(kindest)
    for _ in range(2):  # the second time from the file
        ranker = ranking.Judge(kind, 0)
        [found, alone] = ranker.scores([group, asked("alone")], tmp_path / "kind.jsonl")
        assert kind.questions == 8 and found[0] == 2 and found[2] == -2 and sum(found) == 0 and alone == [0]
        assert ranker.summary["inconsistent"] == 0
    moody = ranking.Judge(Asked(lambda text: "Verdict: A"), 0)
    assert moody.scores([group], tmp_path / "moody.jsonl") == [[0, 0, 0, 0]] and moody.summary["inconsistent"] == 4


def test_you_choose_blind_stop_and_go_on(monkeypatch, tmp_path, capsys):
    groups = [asked(f"good {n}", f"bad {n}", f"so {n}", n=n) for n in range(3)]

    def number(n, word):
        return str(
            [groups[n].answers[place] for place in ranking.shuffled(0, groups[n].answers)].index(f"{word} {n}") + 1
        )

    typed = [number(0, "good"), "9", number(0, "good"), number(0, "bad"), ""]

    def type_next(*_):
        if not typed:
            raise EOFError
        return typed.pop(0)

    monkeypatch.setattr("orpo_lite.evaluate.terminal.read", type_next)
    assert ranking.You(0).scores(groups, tmp_path / "you.jsonl") == [[1, -1, 0], [0, 0, 0]]
    assert "found 9, expected the number of another answer" in capsys.readouterr().out
    typed += [number(2, "bad"), number(2, "good")]
    assert ranking.You(0).scores(groups, tmp_path / "you.jsonl") == [[1, -1, 0], [0, 0, 0], [-1, 1, 0]]


def test_several_rankers_add_up_shares_of_beaten_answers():
    group = asked("a", "b", "c")
    group.scores = [[1.0, 0.0, 1.0], [100.0, 0.0, 0.0], [0.3, None, 0.2]]
    add_up([group], rules=1)
    assert group.answers == ["a", "c"] and group.left_out["not scored"] == 1 and group.totals == [3.0, 1.0]
    alone = asked("a", "b")
    alone.scores = [[0.3, 7.0]]
    add_up([alone], rules=0)
    assert alone.totals == [0.3, 7.0]


# ---- pairing ---------------------------------------------------------------------------------------------------------


def group(totals, answers=None):
    made = asked(*(answers or [f"answer {n}" for n in range(len(totals))]))
    made.totals = list(totals)
    return made


def test_best_and_worst_or_every_pair_by_a_margin():
    made, report = make_pairs([group([1, 3, 2, 3.5]), group([1, 1]), group([5])], False, 0, 0)
    assert [pair[1:] for pair in made] == [("answer 3", "answer 0")]
    assert report["prompts_without_a_pair"] == {"no two scores differ enough": 1, "fewer than two different answers": 1}
    made, _ = make_pairs([group([1, 3, 2, 3.5])], True, 1, 0)
    assert sorted(pair[1:] for pair in made) == [
        ("answer 1", "answer 0"), ("answer 1", "answer 2"), ("answer 2", "answer 0"), ("answer 3", "answer 0"),
        ("answer 3", "answer 2")]  # fmt: skip
    with pytest.raises(RequestError, match=r"no pair could be made \(1 prompt: no two scores differ enough"):
        make_pairs([group([1, 1.5])], False, 1, 0)


def test_length_does_not_win_by_itself():
    answers = ["one two three four", "one two three", "one", "one two three four five six"]
    groups = [group([3, 2, 0, 5], answers), group([1, 0], ["a b c d", "a"])]
    made, report = make_pairs(groups, False, 0, 1.5)
    assert [pair[1:] for pair in made] == [(answers[3], answers[0])]
    assert report["prompts_without_a_pair"] == {"no two answers of similar length": 1}
    assert report["longer_chosen"] == {"any length": 1.0, "written": 1.0}


def test_prompts_stay_on_their_side_in_every_round():
    def sides(count, share=0.2):
        return [Group.of([{"id": n, "prompt": [{"role": "user", "content": str(n)}], "answers": {"a": ["x"]},
                           "ended": {"a": [True]}}], share).held_out for n in range(count)]  # fmt: skip

    assert sides(1000)[:100] == sides(100) and math.isclose(sum(sides(1000)), 200, abs_tol=40)
    assert not any(few and not many for few, many in zip(sides(300, 0.1), sides(300, 0.3), strict=True))


# ---- over HTTP ---------------------------------------------------------------------------------------------------------


def test_an_address_answers(server, tmp_path, prompts, capsys, monkeypatch):
    texts = iter(f"Answer {n}, {'certainly' * (n % 2)}." for n in range(1000))
    server.judge = lambda text: next(texts)
    server.plan = [(200, {"choices": [{"message": {"content": "certainly cut"}, "finish_reason": "length"}]})]
    output = tmp_path / "p.jsonl"
    words = {"model_name": "m", "must": ["certainly"], "samples": 4, "temperature": 0.7}
    pairs.command(server.url, str(prompts), output, **words)
    assert len(server.asked) == 48
    assert {(one["model"], one["temperature"], one["max_tokens"]) for one in server.asked} == {("m", 0.7, 256)}
    said = capsys.readouterr().out
    assert "left out: 1 cut at --max-new-tokens" in said and f"next: orpo-lite new {output}" in said
    assert all("certainly" in row["chosen"][0]["content"] for row in rows(output))
    server.plan = [(401, {"error": "no"})]
    with pytest.raises(RequestError, match="m at .* answered 401"):
        pairs.command(server.url, str(prompts), tmp_path / "q.jsonl", **words)
    with pytest.raises(RequestError, match="--model-name: found none"):
        pairs.command(server.url, str(prompts), tmp_path / "q.jsonl", max_words=3)
    with pytest.raises(RequestError, match="MODEL: the address names a user"):
        Endpoint("http://me:secret@127.0.0.1/v1", "m", 16, option="MODEL")


# ---- round by round --------------------------------------------------------------------------------------------------


RULES = {
    "must": [r"(thank you|pleasure|my friend|happy|wonderful|please|lovely|delighted|welcome)[^.]*\.?$"],
    "max_words": 12,
}
SHUFFLED = """import hashlib

def shuffled(prompt, answer):
    return hashlib.sha256(answer.encode()).digest()[0] / 255
"""


@pytest.mark.slow
def test_two_rounds_teach_a_rule_and_shuffled_ranks_teach_nothing(tmp_path, capsys):
    """Held-out prompts: the share of answers that end politely and have at most 12 words, before and after each round."""
    (tmp_path / "rules.py").write_text(SHUFFLED)

    def sample(model, name, **rules):
        output = tmp_path / f"{name}.jsonl"
        words = {"max_new_tokens": 48, "batch_size": 96, "held_out": 0.25} | (rules or RULES)
        pairs.command(str(model), "builtin:quickstart/heldout.jsonl", output, **words)
        kept = json.loads(beside(output, "report", ".json").read_text())["rules"]
        return kept["all rules"][1] if not rules else None

    def train(recipe, name, *words):
        data = [f"data.train={tmp_path}/{name}.jsonl", f"data.eval={tmp_path}/{name}.held-out.jsonl"]
        more = ["training.num_train_epochs=3", "evaluation.samples=0", f"training.output_dir={tmp_path}/run-{name}"]
        done = run(Recipe.load(str(recipe), [*data, *more, *words]))
        assert done is not None
        return done.folder, [done.record.evaluation(when)["rewards/accuracies"] for when in ("before", "after")]

    before = sample("quickstart", "one")
    first, accuracy = train("quickstart", "one")
    once = sample(first, "two")
    second, again = train(first, "two", f"adapter.init_from={first}")
    twice = sample(second, "three")
    beside(tmp_path / "none.jsonl", "answers").write_bytes(beside(tmp_path / "one.jsonl", "answers").read_bytes())
    sample("quickstart", "none", rule=f"{tmp_path}/rules.py:shuffled")
    control, chance = train("quickstart", "none")
    after_chance = sample(control, "after-chance")
    with capsys.disabled():
        print(f"\nrule: {before:.0%}, {once:.0%}, {twice:.0%}, after shuffled ranks {after_chance:.0%}; "
              f"accuracy: {accuracy}, {again}, shuffled {chance}")  # fmt: skip
    assert once > before + 0.15 and twice > once + 0.05 and accuracy[1] > accuracy[0] + 0.2
    assert after_chance < before + 0.1 and chance[1] < chance[0] + 0.2
