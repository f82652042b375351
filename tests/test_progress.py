"""The line of what is under way: by the width of a terminal, in a pipe, in a notebook's cell and command, beside other output."""

from __future__ import annotations

import itertools
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orpo_lite.common import console
from orpo_lite.common.console import Line, fitted, load, progress

FIGURES = ("loss 0.6931", "accuracy 100%", "margin 0.1234", "12,345 tokens/s")


def lines_at(width: int, **facts) -> str:
    """The line of a training of 60 steps at step 35, as text."""
    with progress("training", 60) as update:
        update(35, figures=FIGURES, **facts)
        task = Line.current.tasks[-1]
        time.sleep(0.02)
        update(1)
        screen = console.Console(width=width, force_terminal=True, color_system="truecolor")
        with screen.capture() as capture:
            screen.print(fitted(task, width - 1))
    return re.sub(r"\x1b\[[0-9;]*m", "", capture.get())


@pytest.mark.parametrize(
    ("width", "shown", "bar"),
    [(30, 1, 0), (60, 2, 0), (80, 2, 10), (120, 4, 10), (200, 4, 40)],
)
def test_the_least_important_columns_drop_out(width, shown, bar):
    told = lines_at(width)
    assert told.count("\n") == 1 and len(told.strip()) < width
    assert told.startswith("training") and "36/60" in told
    assert [figure in told for figure in FIGURES] == [n < shown for n in range(4)] or width == 30
    assert len(re.findall("[━╸╺]", told)) >= bar if bar else "━" not in told
    for word in re.findall(r"accuracy \S*|loss \S*", told):
        assert word in FIGURES  # whole, or not at all


def test_a_long_label_leaves_room_for_the_count():
    with progress("tokenizing /a/very/long/path/" + "x" * 200 + ".jsonl", 4000) as update:
        update(1234)
        told = console.Console(width=60)
        with told.capture() as capture:
            told.print(fitted(Line.current.tasks[-1], 59))
    assert "1234/4000" in capture.get() and capture.get().count("\n") == 1 and "…" in capture.get()


WORK = """
import logging, sys, time
import orpo_lite.common.console
from orpo_lite.common.console import console, errors, progress
from tqdm.auto import tqdm
orpo_lite.common.console.SILENCE = 1
with progress("training \\x1b[5mx", 60) as update:
    for step in range(6):
        time.sleep(0.3)
        update(10, figures=["loss 0.5000"])
        if step == 3:
            console.print("printed"); errors.print("reported"); print("raw"); logging.warning("warned")
with progress("loading the weights"):
    for _ in tqdm(range(10), desc="Loading weights"):
        time.sleep(0.05)
console.print("done")
"""


def run(code: str, environment: dict[str, str], columns: int = 0) -> str:
    """What a program writes to a pipe, or to a terminal of some columns."""
    home = {"PYTHONPATH": str(Path(__file__).parents[1]), "TERM": "xterm-256color"}
    words, environment = [sys.executable, "-c", code], {**os.environ, **home, **environment}
    if not columns:
        return subprocess.run(
            words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ).stdout
    top, bottom = pty.openpty()
    started = subprocess.Popen(words, env=environment | {"COLUMNS": str(columns)}, stdout=bottom, stderr=bottom)
    os.close(bottom)
    found = b""
    try:
        while part := os.read(top, 1 << 16):
            found += part
    except OSError:
        pass
    os.close(top)
    assert started.wait(30) == 0
    return found.decode()


def test_a_terminal_keeps_what_is_printed_and_no_bar():
    told = run(WORK, {}, 80)
    assert "\x1b[5m" not in told and "training \\x1b[5mx" in told and "loading the weights  " in told
    # what a screen shows in the end: each line after its last return and erasure
    left = re.sub(r"\x1b\[1A\x1b\[2K", "\x00", told)
    lines: list[str] = [""]
    for part in re.split(r"(\r\n|\n|\r|\x00|\x1b\[2K)", left):
        if part in ("\r\n", "\n"):
            lines.append("")
        elif part == "\x00":
            lines.pop()
            lines[-1:] = [""]
        elif part in ("\r", "\x1b[2K"):
            lines[-1] = ""
        else:
            lines[-1] += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", part)
    assert [line.strip() for line in lines if line.strip()] == [
        "printed",
        "reported",
        "raw",
        "WARNING:root:warned",
        "done",
    ]


@pytest.mark.parametrize(
    ("environment", "columns"),
    [({}, 0), ({"FORCE_COLOR": "1"}, 0), ({"JPY_PARENT_PID": "1", "NO_COLOR": "1"}, 80), ({"TERM": "dumb"}, 80)],
    ids=["pipe", "pipe with colors", "notebook's command", "dumb terminal"],
)
def test_nothing_raw_where_no_line_can_be_drawn(environment, columns):
    told = run(WORK, environment, columns).replace("\r\n", "\n")
    assert "\r" not in told and "\x1b" not in told and "Loading weights" not in told
    [line] = re.findall("training.*", told)
    assert re.fullmatch(r"training \\x1b\[5mx: [345]0/60, 0:00:0[01] left, loss 0.5000", line)
    assert told.split("\n")[-2] == "done"


def test_lines_in_a_pipe_get_rarer(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    with progress("tokenizing x", 100_000) as update:
        clock = itertools.count(time.monotonic(), 0.5)
        Line.current.get_time = Line.current.tasks[-1]._get_time = lambda: next(clock)
        for _ in range(10_000):  # some hours
            update(1)
            Line.current.refresh()
    assert 10 < capsys.readouterr().err.count("tokenizing x: ") < 60


def test_what_is_short_or_on_another_rank_shows_nothing(capsys, monkeypatch):
    load("json")
    monkeypatch.setenv("RANK", "1")
    with progress("training", 3) as update:
        update(1, figures=["x"])
        assert Line.current is None
    assert capsys.readouterr().err == ""


def test_a_failure_ends_the_line():
    with pytest.raises(ValueError), progress("outer"), progress("inner", 3):
        raise ValueError
    assert Line.current is None and not console.errors._live_stack
    with progress("again"):
        time.sleep(0.01)


NOTEBOOK = """
import time
from orpo_lite.common.console import progress
with progress("measuring", 4) as update:
    for _ in range(4):
        time.sleep(1); update(1)
"""


@pytest.mark.slow
def test_a_cell_of_a_notebook_gets_plain_lines(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    nbformat, client = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    (tmp_path / "cell.py").write_text(NOTEBOOK)
    cells = [nbformat.v4.new_code_cell(code) for code in (NOTEBOOK, f"!{sys.executable} {tmp_path / 'cell.py'}")]
    book = nbformat.v4.new_notebook(cells=cells)
    client.NotebookClient(book, kernel_name="python3").execute()
    for cell in book.cells:
        told = "".join(output.get("text", "?") for output in cell.outputs)
        assert re.fullmatch(r"measuring: [23]/4, 0:00:0\d left\r?\n", told), told
