"""`data.streaming: true` in a recipe, through the real commands' code: every format, resume, what is refused."""

import json

import pytest

from orpo_lite.common.console import console
from orpo_lite.data import load_pairs
from orpo_lite.data.preview import command, read_tokenizer
from orpo_lite.data.streaming import PairStream
from orpo_lite.recipe import Recipe
from orpo_lite.recipe.loading import RecipeError
from orpo_lite.train.run import run
from tests.load.big_file import FORMATS, write

TINY = ["data.eval_fraction=0", "data.eval=null", "data.streaming=true", "evaluation.samples=0", "data.max_length=200"]


def recipe(path, *words):
    return Recipe.load("quickstart", [f"data.train={path}", *TINY, *words])


@pytest.mark.parametrize("kind", FORMATS)
def test_a_stream_gives_the_pairs_of_the_table(kind, tmp_path):
    path = tmp_path / f"pairs.{kind}"
    write(path, 450, kind, characters=300)
    words = ["data.max_rows=430", "training.max_steps=2"]
    tokenizer, _ = read_tokenizer(recipe(path))
    stream = load_pairs(recipe(path, *words).data, tokenizer)
    table = load_pairs(recipe(path, *words, "data.streaming=false").data, tokenizer)
    assert isinstance(stream.train, PairStream) and list(stream.train) == table.train.to_list()
    pairs, report = stream.train.first(10_000)
    assert (report.kept, report.dropped) == (table.report.kept, table.report.dropped) and report.rows == 430
    assert list(report.drops) == list(table.report.drops) and len(pairs) == len(table.train)


def test_a_run_streams_and_says_what_was_dropped(tmp_path, caplog, capsys):
    path = tmp_path / "pairs.jsonl"
    write(path, 300, "jsonl", characters=200)
    common = ["training.max_steps=4", "training.logging_steps=2", "training.save_steps=2", "training.save_strategy=steps", "data.eval=builtin:quickstart/heldout.jsonl", "data.max_eval_rows=6", "training.eval_steps=2"]  # fmt: skip
    done = run(recipe(path, *common, f"training.output_dir={tmp_path / 'run'}"))
    assert done
    record = json.loads((done.folder / "run.json").read_text())
    assert record["steps"] == 4 and record["data"]["train_pairs"] >= 32 and record["data"]["drops"]["dropped"]
    assert record["data"]["eval_pairs"] == 6 and (done.folder / "report.html").is_file()
    assert "a stream of training pairs" in capsys.readouterr().out


def test_what_a_stream_cannot_do_is_said(tmp_path):
    path = tmp_path / "pairs.jsonl"
    write(path, 5, "jsonl")
    for words, said in (
        (["training.max_steps=-1"], "training.max_steps is not set: a stream does not say how many rows"),
        (["data.eval_fraction=0.1"], "a stream cannot hold a share of itself out; name held-out pairs in data.eval"),
        ([f"data.train=[{{path: {path}, weight: 2}}]"], "train.0.weight is 2: a stream is read once through"),
    ):
        with pytest.raises(RecipeError) as error:
            recipe(path, *words)
        assert said in " ".join(str(error.value).split())


def test_the_data_command_shows_the_first_rows(tmp_path, capsys, monkeypatch):
    path = tmp_path / "pairs.jsonl"
    write(path, 1500, "jsonl", characters=200)
    monkeypatch.setattr(console, "width", 100)
    command("quickstart", [f"data.train={path}", *TINY], examples=1)
    out = capsys.readouterr().out
    assert "980 pairs to train on" in out and "read, checked and counted while training" in out and "example 1" in out
