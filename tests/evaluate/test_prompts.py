"""Answers to files of prompts: what is read, what is generated, and what is kept when a run is cut."""

from __future__ import annotations

import json
from typing import Any

import pytest

import orpo_lite.evaluate.__main__ as evaluate
from orpo_lite.common.errors import RequestError
from orpo_lite.evaluate.answer_file import Question, answer_questions, read_questions
from orpo_lite.evaluate.answering import Sampling, Side, find_sides

ROWS = [
    {"id": "a", "category": "sums", "turns": ["How much is 4 plus 5?", "And the capital of Peru?"]},
    {"id": "b", "prompt": "Who are you?"},
    {"prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "How much is 3 plus 3?"}]},
    {
        "question_id": 81,
        "turns": ["What is the capital of France, and why is it there and nowhere else in the country?"],
    },
    {"prompt": "Is 7 odd?"},
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture(scope="module")
def sides(trained):
    return find_sides(str(trained))


def test_forms(file, tmp_path, shared_data):
    questions = read_questions(str(file))
    assert [one.id for one in questions] == ["a", "b", "3", "81", "5"]
    assert questions[0] == Question(
        "a", "sums", [{"role": "user", "content": ROWS[0]["turns"][0]}], ROWS[0]["turns"][1:]
    )
    assert questions[2].prompt[0] == {"role": "system", "content": "Be kind."}
    (tmp_path / "p.txt").write_bytes("\ufeffFirst?\r\n\r\n  Second?\u2028\x0cThe same.\n".encode())
    assert [(one.id, one.prompt[0]["content"]) for one in read_questions(str(tmp_path / "p.txt"))] == [
        ("1", "First?"), ("3", "  Second?\u2028\x0cThe same.")]  # fmt: skip
    (tmp_path / "p.json").write_text(json.dumps(ROWS))
    assert read_questions(str(tmp_path / "p.json")) == questions
    bench = read_questions(str(shared_data / "eval_prompts.jsonl"))
    assert len(bench) == 155 and sum(bool(one.turns) for one in bench) >= 70 and bench[0].category == "writing"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "x"}, "row 2: found the columns text, expected"),
        ({"turns": []}, "row 2: turns is not a list of texts"),
        ({"turns": ["a", 3]}, "row 2: turns is not"),
        ({"prompt": " "}, "row 2: found the columns prompt"),
        (
            {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "row 2: .*ends with a turn of",
        ),
        ({"prompt": [{"content": "a"}]}, "row 2: .*has no role"),
        (["x"], "row 2 is a list"),
    ],
)
def test_rows_that_are_no_question_are_named(row, words, tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(RequestError, match=f"p.jsonl.*{words}"):
        read_questions(str(tmp_path / "p.jsonl"))


def test_files_that_are_none(tmp_path):
    with pytest.raises(RequestError, match="no such file"):
        read_questions(str(tmp_path / "gone.jsonl"))
    (tmp_path / "p.txt").write_text("\n \n")
    with pytest.raises(RequestError, match="holds no prompt"):
        read_questions(str(tmp_path / "p.txt"))


def answers(sides, questions, batch_size, output=None, sampling=None, seed=0) -> Any:
    rows = answer_questions(sides, questions, sampling or Sampling(20), seed, batch_size, output)
    return [row["answers"] for row in rows]


def test_greedy_answers_do_not_depend_on_the_batch(sides, file):
    questions = read_questions(str(file))
    alone = answers(sides, questions, 1)
    assert answers(sides, questions, 3) == answers(sides, questions, 8) == alone
    assert answers(sides, questions[::-1], 4) == alone[::-1]
    assert [len(row["base"]) for row in alone] == [2, 1, 1, 1, 1]
    assert any(row["base"] != row["adapter"] for row in alone)
    # the second turn is asked in the conversation that the side itself had
    turns = [*questions[0].prompt, {"role": "assistant", "content": alone[0]["adapter"][0]}]
    turns.append({"role": "user", "content": questions[0].turns[0]})
    assert sides[1].reply(turns, Sampling(20)).text == alone[0]["adapter"][1]


def test_drawn_answers_come_again_with_their_seed(sides, file):
    questions = read_questions(str(file))

    def drawn(seed):
        return answers(sides, questions, 2, sampling=Sampling(12, 1.5), seed=seed)

    assert drawn(1) == drawn(1) != drawn(2)


def test_what_is_written_is_gone_on_with(sides, file, tmp_path):
    questions, output = read_questions(str(file)), tmp_path / "answers.jsonl"
    answers(sides, questions, 2, output)
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 5 and json.loads(lines[0])["category"] == "sums"
    output.write_bytes(b"".join(lines[:3]) + lines[3][:40])  # killed in the middle of a line, and of a batch
    asked = []
    replies = Side.replies

    def counting(self, prompts, *rest, **more):
        asked.extend(prompts)
        return replies(self, prompts, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Side, "replies", counting)
        answers(sides, questions, 2, output)
    assert output.read_bytes() == whole and len(asked) == 6  # three questions, two sides

    idle = find_sides(sides[1].source.path)
    answer_questions(idle, questions, Sampling(20), 0, 2, output)
    assert not vars(idle[1]).keys() & {"loaded", "tokenizer"}
    for other, words in (
        (Sampling(21), "line 1: settings.max_new_tokens: was 20, is 21"),
        (Sampling(20, 0.5), "line 1: settings.temperature: was None, is 0.5"),
    ):
        with pytest.raises(RequestError, match=words):
            answers(sides, questions, 2, output, other)
    with pytest.raises(RequestError, match="line 5: there are more"):
        answers(sides, questions[:4], 2, output)
    assert output.read_bytes() == whole


def test_a_conversation_without_room_is_left_unanswered(sides, file, monkeypatch):
    questions = read_questions(str(file))[:2]
    first = len(sides[1].prompts([questions[0].prompt])[0])
    monkeypatch.setattr(Side, "context", first + 6)
    rows = answer_questions(sides, questions, Sampling(20), 0, 2, None)
    assert rows[0]["answers"]["base"][1] is None and 0 < rows[0]["tokens"]["base"][0] <= 6
    monkeypatch.setattr(Side, "context", 5)
    with pytest.raises(RequestError, match="a has .* tokens, and the model takes 5: leave it out"):
        answers(sides, questions, 2)


def test_the_command(trained, file, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    evaluate.command(str(trained), prompts=str(file), max_new_tokens=12, output=output, batch_size=5)
    told = capsys.readouterr().out
    assert "5 rows in" in told and "base: 6 answers" in told and "adapter: " in told
    evaluate.command(str(trained), prompts=str(file), max_new_tokens=12, output=output, batch_size=5, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert (
        found["answers"] == [json.loads(line) for line in output.read_text().splitlines()] and found["judged"] is None
    )
