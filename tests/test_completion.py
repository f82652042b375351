"""Shell completion: what it offers is what there is, and it answers without importing anything heavy."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from orpo_lite.__main__ import COMMANDS, main
from orpo_lite.common.completion import answer, candidates, options_of, schema
from orpo_lite.common.shells import SCRIPTS
from orpo_lite.recipe import Recipe, Section
from orpo_lite.recipe.loading import shipped_recipes
from orpo_lite.recipe.training_fields import training_fields


def words(line):
    return [word for word, _ in candidates(line, COMMANDS)]


@pytest.mark.parametrize("name", COMMANDS)
def test_options_read_off_the_source_are_typers(name):
    app = typer.Typer(add_completion=False)
    app.command()(importlib.import_module(f"orpo_lite.{name}").command)
    theirs = [param for param in typer.main.get_command(app).params if not getattr(param, "hidden", False)]
    flags = {
        flag for param in theirs if param.param_type_name == "option" for flag in (*param.opts, *param.secondary_opts)
    }
    flags = {flag for flag in flags if flag.startswith("--")}
    found = options_of(name)
    assert found.flags.keys() - {"--help"} == flags - {"--help"}
    assert set(found.arguments) == {param.name for param in theirs if param.param_type_name == "argument"}


def test_fields_read_off_the_source_are_the_schemas():
    def inside(section, prefix=""):
        for name, field in section.model_fields.items():
            kinds = [
                kind
                for kind in (field.annotation, *getattr(field.annotation, "__args__", ()))
                if isinstance(kind, type)
            ]
            below = next(
                (kind for kind in kinds if issubclass(kind, Section) and kind.__name__.endswith("Section")), None
            )
            yield from inside(below, f"{prefix}{name}.") if below else [f"{prefix}{name}"]

    expected = {name for name in inside(Recipe) if name != "training"} | {
        f"training.{name}" for name in training_fields()
    }
    assert schema().keys() == expected
    assert schema()["orpo.layout"] == ["auto", "shared", "packed", "padded"]


def test_what_is_offered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("outputs/one", "elsewhere/two"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "recipe.yaml").write_text("")
    (tmp_path / "mine.yaml").write_text("")
    (tmp_path / "my pairs.jsonl").write_text("")
    assert words("orpo-lite ") == list(COMMANDS)
    assert words("orpo-lite ev") == ["evaluate"] and "--version" in words("orpo-lite --")
    assert set(shipped_recipes()) | {"mine.yaml", "outputs/one"} <= set(words("orpo-lite train --recipe "))
    assert words("orpo-lite train --recipe mis") == ["mistral-qlora", "mistral-qlora-t4"]
    assert words("orpo-lite evaluate out") == ["outputs/one"] and words("orpo-lite merge elsewhere/") == [
        "elsewhere/two"
    ]
    assert words("orpo-lite train --recipe x --dry") == ["--dry-run"]
    assert words("orpo-lite train --recipe x training.learning") == ["training.learning_rate="]
    assert words("orpo-lite train --recipe x orpo.layout=p") == ["orpo.layout=packed", "orpo.layout=padded"]
    assert words("orpo-lite train --recipe x data.apply_template=t") == ["data.apply_template=true"]
    assert words("orpo-lite train --recipe x data.train=my") == ["data.train=my pairs.jsonl"]
    assert words("orpo-lite merge x --onto ") == ["original", "quantized"]
    assert words("orpo-lite nothing ") == words('orpo-lite train "open') == []
    assert answer("bash", "orpo-lite train --recipe x orpo.layout=sh", COMMANDS) == "shared"
    assert "train\ttrain an adapter" in answer("fish", "orpo-lite tra", COMMANDS)


def test_nothing_heavy_is_imported_to_answer():
    code = (
        "import sys, time; from orpo_lite.__main__ import main; main(); "
        "print(time.process_time(), *[m for m in ('torch', 'transformers', 'pydantic', 'typer', 'rich', 'yaml') if m in sys.modules])"
    )
    line = "orpo-lite train --recipe quickstart training.weight_d"
    done = subprocess.run(
        [sys.executable, "-c", code, "--complete", "zsh", line], capture_output=True, text=True, check=True
    )
    word, spent = done.stdout.splitlines()
    assert word == "training.weight_decay=" and len(spent.split()) == 1, done.stdout
    assert float(spent) < 0.5


def test_bash_completes(tmp_path):
    """The script in a real bash, which asks this very program."""
    program = tmp_path / "orpo-lite"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m orpo_lite "$@"\n')
    program.chmod(0o755)
    test = (
        SCRIPTS["bash"]
        + """
    COMP_LINE="orpo-lite train --recipe quickstart orpo.lay"; COMP_POINT=${#COMP_LINE}; _orpo_lite; echo "${COMPREPLY[@]}"
    COMP_LINE="orpo-lite plan --recipe mixt"; COMP_POINT=${#COMP_LINE}; _orpo_lite; echo "${COMPREPLY[@]}"
    """
    )
    place = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(["bash", "-c", test], capture_output=True, text=True, env=os.environ | place, check=True)
    assert done.stdout.split() == ["orpo.layout=", "mixtral-8x7b"], done


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_installed_once_where_the_shell_reads_it(shell, tmp_path, monkeypatch, capsys):
    for name, value in {"HOME": tmp_path, "SHELL": f"/bin/{shell}"}.items():
        monkeypatch.setenv(name, str(value))
    for name in ("XDG_CONFIG_HOME", "ZDOTDIR"):
        monkeypatch.delenv(name, raising=False)
    start = tmp_path / f".{shell}rc"
    start.write_text("alias l=ls")
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["orpo-lite", "--install-completion"])
        main()
    [file] = [file for file in tmp_path.rglob("*") if file.is_file() and file.read_text() == SCRIPTS[shell]]
    assert str(file) in capsys.readouterr().out
    if shell != "fish":
        lines = start.read_text().splitlines()
        assert lines[0] == "alias l=ls" and len(lines) == 2 and str(file) in lines[1]


def test_scripts_are_shown_and_unknown_shells_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["orpo-lite", "--show-completion", "pwsh"])
    main()
    assert "Register-ArgumentCompleter" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["orpo-lite", "--show-completion", "tcsh"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and "found the shell 'tcsh', expected one of bash" in capsys.readouterr().err
