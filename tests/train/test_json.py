"""`--json` on the commands that report: stdout is one JSON document, whatever else is said goes to stderr."""

import json
import sys

import pytest

from orpo_lite.__main__ import load
from orpo_lite.common.console import run_command
from orpo_lite.recipe import Recipe
from orpo_lite.train.pipeline import run

WORDS = ["training.max_steps=1", "training.logging_steps=1", "evaluation.samples=0", "data.max_rows=16", "data.max_eval_rows=4",
         "training.save_strategy=no"]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "quick"
    run(Recipe.load("quickstart", [*WORDS, f"training.output_dir={folder}"]))
    return folder


@pytest.mark.parametrize(
    ("line", "keys"),
    [
        ("recipes", None),
        ("data --recipe quickstart data.max_rows=20", {"sources", "report", "pairs", "lengths"}),
        ("plan --recipe quickstart --gpu 12GB", None),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_stdout_is_json_alone(line, keys, trained, tmp_path, monkeypatch, capfd):
    words = line.format(run=trained, new=tmp_path / "new").split()
    monkeypatch.setattr(sys, "argv", [words[0], *words[1:], "--json"])
    try:
        run_command(load(words[0]))
    except SystemExit as stop:
        assert not stop.code, capfd.readouterr().err
    found = json.loads(capfd.readouterr().out)
    assert found and (keys is None or keys <= found.keys())
    if words[0] == "recipes":
        assert all(row["needs"] and row["base"] and row["data"] for row in found)


def test_the_table_of_recipes_fits_a_terminal_of_80_columns(monkeypatch, capsys):
    from orpo_lite.recipe.listing import command
    from orpo_lite.recipe.loading import shipped_recipes

    monkeypatch.setenv("COLUMNS", "80")
    command(as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines)
    assert all(any(line.strip().startswith(name) for line in lines) for name in shipped_recipes())
    assert any("mistralai/Mistral-7B-v0.1" in line for line in lines) and any("ultrafeedback" in line for line in lines)
