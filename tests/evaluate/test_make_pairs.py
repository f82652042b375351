"""Pairs from prompts: what is sampled, ranked and paired, what is left out and said, and that a stopped run goes on."""

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from orpo_lite.__main__ import load
from orpo_lite.common.console import run_command
from orpo_lite.common.errors import RequestError
from orpo_lite.data import load_pairs
from orpo_lite.evaluate import pairs, ranking
from orpo_lite.evaluate.answering import Side, find_sides
from orpo_lite.evaluate.judge import Endpoint, Judge
from orpo_lite.evaluate.pairs import Group, add_up, apply_rules, beside, find_rules, make_pairs
from orpo_lite.objective.loss import log1mexp
from orpo_lite.recipe import DataSection, Recipe
from orpo_lite.recipe.loading import resolve_path
from orpo_lite.train.pipeline import run
from orpo_lite.trainer.generate import Sampling
from tests.docs.blocks import ROOT, blocks, words_of
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
    with pytest.raises(RequestError, match=r"line 1: settings.seed: was 0, is 5"):
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
    ({"reward_model": "./nowhere", "max_words": 3}, "--reward-model: ./nowhere: there is no such folder"),
])  # fmt: skip
def test_requests_that_cannot_work(words, message, trained, prompts, tmp_path):
    with pytest.raises(RequestError, match=message):
        pairs.command(str(trained), str(prompts), tmp_path / "p.jsonl", **words)


def test_what_a_recipe_names_answers_unless_a_folder_has_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("name: mine\nmodel: {name_or_path: some/where, gguf_file: a.gguf, quantization: none}\n"
                                        "data: {train: builtin:quickstart/train.jsonl}\n")  # fmt: skip
    [side] = find_sides("mine.yaml")
    assert side.source.recipe.name == "mine" and side.identity() == {"model": "some/where/a.gguf"}
    assert find_sides("quickstart")[0].source.recipe.name == "quickstart"
    (tmp_path / "quickstart").mkdir()
    with pytest.raises(RequestError, match="quickstart: holds neither adapter_config.json nor config.json"):
        find_sides("quickstart")


LOCK = """import sys
from pathlib import Path
from orpo_lite.evaluate.answer_file import ResultFile
ResultFile(Path(sys.argv[1]), [])
print("held", flush=True)
sys.stdin.read()
"""


def test_two_at_once_are_refused_and_a_killed_one_is_not_in_the_way(trained, prompts, tmp_path):
    output = tmp_path / "p.jsonl"
    other = subprocess.Popen(
        [sys.executable, "-c", LOCK, beside(output, "answers")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(
        RequestError,
        match="another command is writing p.answers.jsonl; wait for it or stop it, or choose another --output",
    ):
        pairs.command(str(trained), str(prompts), output, must=["a"], **QUICK)
    assert not beside(output, "answers").read_bytes()
    other.kill()
    other.wait()
    pairs.command(str(trained), str(prompts), output, must=[KIND.pattern], **QUICK)
    assert output.exists()


# ---- ranking ---------------------------------------------------------------------------------------------------------


def asked(*answers, n=0, held_out=False):
    return Group(str(n), ASK, list(answers), Counter(), held_out)


MINE = """
def size(prompt, answer): return prompt[-1].pop("content") and len(answer) if answer != "x" else 1 / 0
def nan(prompt, answer): return float("nan")
def words(prompt, answer): return answer.split()
def digits(prompt, answer): return "3"
number = 3
"""


def test_rules():
    rules = find_rules(["YES"], ["no"], 2, 3, True, None)
    table = {
        "yes": (1, 1, 0, 1, 0),
        "Yes or no": (1, 0, 1, 1, 0),
        '{"a": 1}': (0, 1, 1, 1, 1),
        "a b c d": (0, 1, 1, 0, 0),
    }
    one = asked(*table)
    apply_rules(rules, [one])
    assert [*map(tuple, one.kept)] == [*table.values()]


@pytest.mark.parametrize(("name", "answer", "message"), [
    ("size", "x", r"mine.py:size fails at row 2 of the prompts \(id q7\), on the answer 'x' \(ZeroDivisionError: division by zero"),
    ("nan", "y", "mine.py:nan fails at row 2 .*it returns nan, expected a number, or true or false"),
    ("words", "y z", r"mine.py:words fails .*it returns \['y', 'z'\], expected a number"),
    ("digits", "y", "mine.py:digits fails .*it returns '3', expected a number"),
])  # fmt: skip
def test_what_a_function_of_the_users_returns_is_checked(name, answer, message, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    rules = find_rules([], [], None, None, False, f"{tmp_path}/mine.py:{name}")
    with pytest.raises(RequestError, match=message):
        apply_rules(rules, [asked(), asked(answer, n="q7")])
    if name == "size":
        fine = asked("four")
        apply_rules(rules, [fine])
        assert fine.kept == [[4.0]] and fine.prompt == ASK  # which the function changes


@pytest.mark.parametrize(("place", "message"), [
    ("mine.py:siz", r"KeyError: 'siz'"), ("mine.py:number", "TypeError: number is 3"), ("broken.py:f", "ZeroDivisionError"), ("quits.py:f", "SystemExit: 0"),
    ("gone.py:f", "FileNotFoundError"), ("mine.py", "Error"),
])  # fmt: skip
def test_a_function_that_is_not_there(place, message, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "quits.py").write_text("raise SystemExit(0)")
    with pytest.raises(RequestError, match=f"--rule: found .*{place}, expected FILE.py:FUNCTION.*{message}"):
        find_rules([], [], None, None, False, f"{tmp_path}/{place}")


def test_a_reward_model_reads_its_own_template(tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = tiny_tokenizer(("<|im_start|>", "<|im_end|>"), CHATML, eos="<|im_end|>", pad="<pad>")
    config = LlamaConfig(**SIZES | {"vocab_size": len(tokenizer)}, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    answers = ["I am a model.", "Go away.", "x" * 5000]
    found = ranking.reward_model(str(tmp_path)).score(asked(*answers))
    text = tokenizer.apply_chat_template([*ASK, {"role": "assistant", "content": answers[0]}], tokenize=False)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    assert found[0] == pytest.approx(model(input_ids=ids).logits.item(), abs=1e-5) and found[0] != found[1]
    assert found[2] is None  # longer than the model takes
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    )
    tokenizer.save_pretrained(tmp_path)
    told = Group("q7", [{"role": "system", "content": "Be brief."}, *ASK], answers, Counter(), False)
    with pytest.raises(RequestError, match=r"--reward-model: .* does not take prompt q7 \(no system\): leave"):
        ranking.reward_model(str(tmp_path)).score(told)
    config.num_labels = 3
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(RequestError, match="has 3 outputs and a chat template, expected one output"):
        ranking.reward_model(str(tmp_path))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_log_odds_are_those_of_training(count, trained):
    ranker, side = ranking.log_odds(str(trained)), find_sides(str(trained))[-1]
    answers = ["It is a pleasure.", "Go away.", "Whatever.", "Thank you."][:count]
    logps = torch.stack([side.mean_logps(ASK, one, "something else")[0] for one in answers])
    assert ranker.score(asked(*answers)) == pytest.approx((logps - log1mexp(logps)).tolist(), abs=1e-5)


def test_a_judge_meets_every_answer_and_its_moods_are_ties(tmp_path):
    class Asked(Judge):
        def __init__(self, judge):
            self.name, self.judge, self.questions = "judge", judge, 0

        def answers(self, questions):
            self.questions += len(questions)
            return [self.judge(text) for text in questions]

    group = asked("My pleasure, happy to help, thank you.", "Certainly.", "No.", "Thank you, certainly.")
    kind = Asked(kindest)
    for _ in range(2):  # the second time from the file
        ranker = ranking.Comparisons(kind)
        [found, alone] = ranker.scores([group, asked("alone")], tmp_path / "kind.jsonl")
        assert kind.questions == 8 and found == [2, 0, -2, 0] and alone == [0]
        assert ranker.summary["inconsistent"] == 0
    moody = ranking.Comparisons(Asked(lambda text: "Verdict: A"))
    assert moody.scores([group], tmp_path / "moody.jsonl") == [[0, 0, 0, 0]] and moody.summary["inconsistent"] == 4


def test_you_choose_stop_and_go_on(monkeypatch, tmp_path, capsys):
    groups = [asked(f"so {n}", f"good {n}", f"bad {n}", n=n) for n in range(3)]
    typed = ["2", "9", "2", "3", ""]

    def type_next(*_):
        if not typed:
            raise EOFError
        return typed.pop(0)

    monkeypatch.setattr("orpo_lite.evaluate.terminal.read", type_next)
    assert ranking.your_choice().scores(groups, tmp_path / "you.jsonl") == [[0, 1, -1], [0, 0, 0]]
    assert capsys.readouterr().out.count("found 9, expected the number of another answer") == 1
    typed += ["3", "2"]
    assert ranking.your_choice().scores(groups, tmp_path / "you.jsonl") == [[0, 1, -1], [0, 0, 0], [0, -1, 1]]


def test_what_no_number_is_for_is_not_scored():
    groups = [asked("a", "b", "c") for _ in range(9)]
    for number, one in enumerate(groups):
        one.kept, one.scores = [[]] * 3, [[math.nan if number % 2 else -math.inf, number, number + 1.0]]
    add_up(groups)
    made, report = make_pairs(groups, False, 0, 0)
    assert {pair[1:] for pair in made} == {("c", "b")} and len(made) == 9 and report["left_out"] == {"not scored": 9}


def test_an_adapter_that_was_trained_again_scores_anew(tmp_path):
    def ranker(weights, score):
        return ranking.Ranker("log-odds under runs/a", "log-odds", lambda group: score, weights)

    assert ranker("one", [1.0, 2.0]).scores([asked("a", "b")], tmp_path / "scores.jsonl") == [[1.0, 2.0]]
    with pytest.raises(RequestError, match="holds other rows .*: weights: was"):
        ranker("two", [2.0, 1.0]).scores([asked("a", "b")], tmp_path / "scores.jsonl")


def test_several_rankers_add_up_shares_of_beaten_answers():
    group = asked("a", "b", "c")
    group.kept, group.scores = [[1.0], [0.0], [1.0]], [[100.0, 0.0, 0.0], [0.3, None, 0.2]]
    none = asked("a", "b")
    none.kept, none.scores = [[1.0], [0.0]], []
    alone = asked("a", "b")
    alone.kept, alone.scores = [[], []], [[0.3, 7.0]]
    add_up([group, none, alone])
    assert group.answers == ["a", "c"] and group.left_out["not scored"] == 1 and group.totals == [3.0, 1.0]
    assert none.totals == [1.0, 0.0] and alone.totals == [0.3, 7.0]


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
    made, _ = make_pairs([group([0.1, 0.3, 0.7 - 0.6])], True, 0.2, 0)  # whatever floats make of tenths
    assert sorted(pair[1:] for pair in made) == [("answer 1", "answer 0"), ("answer 1", "answer 2")]
    few = group([1, 1.5])
    few.left_out["cut at --max-new-tokens"] = 6
    with pytest.raises(
        RequestError, match=r"no pair .* \(1 prompt: no two scores differ enough; 6 answers: cut at --max-new-tokens\)"
    ):
        make_pairs([few], False, 1, 0)


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
        Endpoint("http://me:secret@127.0.0.1/v1", "m", Sampling(16), option="MODEL")


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


@pytest.mark.slow
def test_the_loop_of_the_guide_runs_as_it_is_written(tmp_path, monkeypatch, capsys):
    """Each line of the page, on a few of the prompts."""
    monkeypatch.chdir(tmp_path)
    prompts = Path(resolve_path("builtin:quickstart/train.jsonl")).read_text().splitlines(keepends=True)[:48]
    (tmp_path / "few.jsonl").write_text("".join(prompts))
    [loop] = [block for block in blocks(ROOT / ".docs/pages/guides/pairs.md") if block.needs]
    for line in loop.lines:
        command, words = words_of(line)
        few = [word.replace("builtin:quickstart/train.jsonl", "few.jsonl") for word in words]
        monkeypatch.setattr(sys, "argv", [f"orpo-lite {command}", *few])
        with pytest.raises(SystemExit) as stop:
            run_command(load(command))
        assert not stop.value.code, (line, capsys.readouterr().err[-2000:])
    assert (
        tmp_path / "outputs" / "round2" / "run.json"
    ).is_file() and "reward accuracy" in capsys.readouterr().out.lower()
