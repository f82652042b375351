"""Shell completion by typer: commands from the table, options and recipes of the command on the line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orpo_lite.__main__ import COMMANDS


def orpo_lite(*words, **environment):
    command = [sys.executable, "-m", "orpo_lite", *words]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def offered(line):
    """Words that bash offers at the end of a line."""
    place = len(line.split()) - (not line.endswith(" "))
    done = orpo_lite(_ORPO_LITE_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(place))
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("orpo-lite ", list(COMMANDS)),
        ("orpo-lite ev", ["evaluate"]),
        ("orpo-lite train --dry", ["--dry-run"]),
        ("orpo-lite train --recipe mis", ["mistral-qlora", "mistral-qlora-t4", "mistral-v0.3-qlora"]),
        ("orpo-lite plan --recipe mixt", ["mixtral-8x7b"]),
    ],
)
def test_what_is_offered(line, words):
    assert sorted(offered(line)) == sorted(words)


@pytest.mark.parametrize(("shell", "file"), [("bash", ".bashrc"), ("zsh", ".zshrc"), ("fish", "orpo-lite.fish")])
def test_installed_where_the_shell_reads_it(shell, file, tmp_path):
    done = orpo_lite("--install-completion", shell, HOME=str(tmp_path))
    assert done.returncode == 0 and f"{shell} completion installed in" in done.stdout, done.stderr
    [place] = tmp_path.rglob(file)
    told = "".join(path.read_text() for path in Path(tmp_path).rglob("*") if path.is_file())
    assert "_ORPO_LITE_COMPLETE" in told and place.read_text()


def test_scripts_are_shown_and_unknown_shells_refused():
    assert "Register-ArgumentCompleter" in orpo_lite("--show-completion", "pwsh").stdout
    done = orpo_lite("--install-completion", "tcsh")
    assert done.returncode == 2 and "'tcsh'" in done.stderr and "'bash'" in done.stderr
