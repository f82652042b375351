"""Training data other than a recipe's own: what the recipe says about its data is dropped, and said; the rest is kept."""

import json
import re

import pytest
import yaml

from orpo_lite.recipe import Recipe
from orpo_lite.recipe.loading import shipped_recipes
from orpo_lite.recipe.own_data import run_name

SHIPPED = shipped_recipes()


def other(recipe, *words):
    return Recipe.load(recipe, ["data.train=my.jsonl", *words])


@pytest.mark.parametrize("name", SHIPPED)
def test_what_a_recipe_says_about_its_data_is_not_carried_over(name, capsys):
    own, mine = Recipe.load(name), other(name)
    said = " ".join(capsys.readouterr().err.split())
    assert [source.path for source in mine.data.train] == ["my.jsonl"]
    assert mine.data.eval is None and mine.data.columns is None and mine.data.max_rows is None
    assert mine.data.split == "train" and mine.evaluation.rule is None and "max_steps" not in mine.training
    assert not mine.description and mine.name.endswith("-my") and mine.name != own.name
    dropped = {"data.eval": own.data.eval, "evaluation.rule": own.evaluation.rule, "data.max_rows": own.data.max_rows,
               "training.max_steps": own.training.get("max_steps"), "description": own.description, "name": own.name}  # fmt: skip
    assert all((field in said) == bool(value) for field, value in dropped.items()), said
    assert mine.name in said and "give it in the same command" in said
    # model, adapter, lengths, loss, optimizer and template are not about the data
    for section in ("model", "adapter", "orpo", "memory"):
        assert getattr(mine, section) == getattr(own, section)
    assert mine.training == {key: value for key, value in own.training.items() if key != "max_steps"}
    assert mine.data.template_kwargs == own.data.template_kwargs and mine.data.max_length == own.data.max_length


@pytest.mark.parametrize("name", SHIPPED)
def test_the_recipe_s_own_data_changes_nothing(name, capsys):
    own = Recipe.load(name)
    again = [source.model_dump(exclude_defaults=True) for source in own.data.train]
    for words in ([], [f"data.train={json.dumps(again)}"], ["data.max_rows=7", "training.max_steps=3"]):
        found = Recipe.load(name, words)
        assert (found.name, found.description, found.data.eval) == (own.name, own.description, own.data.eval)
        assert found.evaluation == own.evaluation
    assert capsys.readouterr().err == ""


def test_the_demo_s_other_pairs_are_not_evaluated_judged_or_titled_as_the_demo():
    mine = other("quickstart")
    assert mine.training["num_train_epochs"] == 1  # instead of the steps of the demo's 480 pairs
    assert mine.folder.name == "quickstart-my"


@pytest.mark.parametrize(
    ("word", "kept"),
    [
        ("name=mine", lambda recipe: recipe.name == "mine"),
        ("description=a b", lambda recipe: recipe.description == "a b"),
        ("data.eval=held_out.jsonl", lambda recipe: recipe.data.eval[0].path == "held_out.jsonl"),
        ("data.eval.path=held_out.jsonl", lambda recipe: recipe.data.eval[0].path == "held_out.jsonl"),
        ("data.columns={prompt: question}", lambda recipe: recipe.data.columns == {"prompt": "question"}),
        ("evaluation.rule.chosen=good", lambda recipe: recipe.evaluation.rule.rejected.startswith(r"\b(obviously")),
        ("evaluation={rule: {chosen: a, rejected: b}}", lambda recipe: recipe.evaluation.rule.chosen == "a"),
        ("training.max_steps=60", lambda recipe: recipe.training["max_steps"] == 60),
        ("training={max_steps: 5}", lambda recipe: recipe.training == {"max_steps": 5}),
    ],
)
def test_what_is_given_in_the_same_command_stays(word, kept, capsys, tmp_path):
    base = yaml.safe_load(SHIPPED["quickstart"].read_text("utf-8"))
    if word.startswith("data.eval.path"):
        base["data"]["eval"] = {"path": "theirs.jsonl"}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(base), "utf-8")
    assert kept(Recipe.load(path, [word, "data.train=my.jsonl"]))
    assert kept(Recipe.load(path, ["data.train=my.jsonl", word]))
    assert not re.search(rf"{re.escape(word.partition('=')[0])}(,| \()", capsys.readouterr().err)


def test_other_data_by_its_path_alone_leaves_the_old_split_behind(capsys):
    mine = Recipe.load("phi-2-orpo", ["data.train.path=my.jsonl"])
    assert mine.data.train[0].split is None and "data.train.split (" in capsys.readouterr().err
    assert Recipe.load("phi-2-orpo", ["data.train.path=a/b", "data.train.split=x"]).data.train[0].split == "x"


def test_a_run_folder_with_its_own_data_and_with_other_data(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    run = Recipe.load("quickstart", [f"training.output_dir={folder}", "data.max_rows=24"])
    run.save(folder / "recipe.yaml")
    assert Recipe.load(folder) == run == Recipe.load(folder, ["data.train=builtin:quickstart/train.jsonl"])
    assert capsys.readouterr().err == ""
    mine = other(folder)
    assert mine.folder == folder and mine.name == "quickstart-my" and mine.data.max_rows is None
    mine.save(folder / "recipe.yaml")  # the run of other data is a run as any
    assert Recipe.load(folder) == mine == Recipe.load(folder, ["data.train=my.jsonl"])
    # the folder that a file names is a place for runs, and RunFolder numbers them
    (tmp_path / "mine.yaml").write_text((folder / "recipe.yaml").read_text("utf-8") + "\n", "utf-8")
    kept = Recipe.load(tmp_path / "mine.yaml", [f"training.output_dir={folder}", "data.train=b.jsonl"])
    assert kept.folder == folder


@pytest.mark.parametrize(
    "word", ["data.train=null", "data.train=3", "data.train=[]", "data.train=[{pth: a}]", "data=1"]
)
def test_data_that_is_no_data_is_refused_and_nothing_is_said_of_it(word, capsys):
    with pytest.raises(Exception, match="command line"):
        Recipe.load("quickstart", [word])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "held_out", ["2020-01-01", "{2020-01-01: b}", "!!binary aGk=", "[.nan]", '"\\ud800"', "x" * 500]
)
def test_whatever_a_recipe_says_about_its_data_can_be_dropped(held_out, tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(f"model: {{name_or_path: a/b}}\ndata: {{train: a.jsonl, eval: {held_out}}}\n", "utf-8")
    assert other(path).data.eval is None and "data.eval" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "model", "name"),
    [
        ("my.jsonl", "Qwen/Qwen2-0.5B", "qwen2-0.5b-my"),
        ("a/b c.json.gz", "builtin:quickstart/model", "quickstart-b-c"),
        ("data/*.jsonl", "./models/tiny/", "tiny"),
        ("org/Set", None, "set"),
        ("данные.jsonl", "", "own-data"),
        ("a" * 5000, "b", "b-" + "a" * 60),
    ],
)
def test_a_run_is_named_by_model_and_data(data, model, name):
    assert run_name(data, model) == name
    Recipe.parse({"name": name, "model": {"name_or_path": "x"}, "data": {"train": "y"}})
