"""What commands say: missing folders, what a run and a plan print, and the next command of the path from pairs to a file."""

import json
import re
import shlex
import subprocess
import sys

import pytest

from orpo_lite.__main__ import load
from orpo_lite.common.console import run_command
from orpo_lite.common.errors import RequestError
from orpo_lite.common.text import at_words, counted
from orpo_lite.evaluate.loading import resolve_model
from orpo_lite.export.gguf import export
from orpo_lite.merge.run import merge
from orpo_lite.recipe.loading import PACKAGE, find_recipe
from orpo_lite.trainer.run_folder import RunFolder

TAKES_A_FOLDER = {
    "evaluate": resolve_model,
    "merge": lambda path: merge(path, "merged"),
    "export": lambda path: export(path, "made.gguf"),
    "report": RunFolder.open,
}


@pytest.mark.parametrize(
    ("word", "said"),
    [("minee.yaml", "did you mean mine.yaml?"), ("pairs.jsonl", "`orpo-lite new pairs.jsonl` makes one"),
     ("quikstart", "did you mean quickstart?")],
)  # fmt: skip
def test_what_is_no_recipe_leads_to_one(word, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mine.yaml", "pairs.jsonl"):
        (tmp_path / name).write_text("{}", "utf-8")
    with pytest.raises(RequestError, match=re.escape(said)):
        find_recipe(word)


@pytest.mark.parametrize("take", TAKES_A_FOLDER.values(), ids=TAKES_A_FOLDER)
@pytest.mark.parametrize("path", ["nope", "outputs/quikstart", "./nope", "a/b/c", "/nope/x"])
def test_a_folder_that_does_not_exist_is_said_to_be_missing_before_anything_else(take, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "quickstart").mkdir(parents=True)
    with pytest.raises(RequestError) as caught:
        take(path)
    said = str(caught.value)
    assert said.startswith(f"{path.removeprefix('./')}: there is no such folder") or said.startswith(
        f"{path}: there is no"
    )
    assert ("did you mean quickstart?" in said) == (path == "outputs/quikstart")
    if take in (resolve_model, TAKES_A_FOLDER["merge"]):  # which also take a hub id
        assert ("it is no hub id" in said) == (path == "nope") and said.endswith("or a hub id USER/NAME")


@pytest.mark.parametrize(
    ("number", "noun", "words"),
    [(0, "pair", "0 pairs"), (1, "held-out pair", "1 held-out pair"), (2000, "row", "2,000 rows"), (1, "process", "1 process"),
     (2, "process", "2 processes")],
)  # fmt: skip
def test_counts_with_their_nouns(number, noun, words):
    assert counted(number, noun) == words


def test_no_plural_is_written_beside_a_count_that_may_be_one():
    """Counts of what a user has: in what is printed of data, training and evaluation, `counted` writes them."""
    plural = re.compile(r'f"[^"]*\{(?:len\(|count)[^{}]*\} (?:pairs|rows|steps|answers)\b')
    for folder in ("data", "train", "evaluate", "recipe", "plan"):
        for path in (PACKAGE / folder).glob("*.py"):
            if path.name not in ("chat.py", "judge.py", "terminal.py", "doctor.py"):
                found = [
                    line
                    for line in path.read_text("utf-8").splitlines()
                    if plural.search(line) and not re.search(" of |all ", line)
                ]
                assert not found, (path.name, found)


def test_lines_break_between_words_and_commands_and_paths_stay_whole():
    path = "/a/very/" + "long/" * 30 + "path"
    text = at_words(f"{'word ' * 30}{path} and\n  python -m orpo_lite.chat {path}", "", 80)
    lines = text.splitlines()
    assert lines[-1] == f"  python -m orpo_lite.chat {path}" and path in lines
    assert all(len(line) <= 80 for line in lines if path not in line)
    assert " ".join(text.split()) == f"{'word ' * 30}{path} and python -m orpo_lite.chat {path}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gpu", "first", "last"),
    [("t4", "smollm2-135m-qlora on t4 (15.8 GB): fits, needs", "next: orpo-lite train --recipe smollm2-135m-qlora data.max_rows=100"),
     ("1GB", "smollm2-135m-qlora on 1 GB: does not fit, needs", "next: orpo-lite train --recipe smollm2-135m-qlora data.max_rows=100 "),
     ("0.1GB", "smollm2-135m-qlora on 0.1 GB: does not fit, needs", "on 0.1 GB nothing that was tried fits")],
)  # fmt: skip
def test_a_plan_begins_with_its_verdict_and_ends_with_the_command_that_trains(gpu, first, last, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["orpo-lite plan", "--recipe", "smollm2-135m-qlora", "data.max_rows=100", "--gpu", gpu]
    )
    with pytest.raises(SystemExit) as stop:
        run_command(load("plan"))
    lines = capsys.readouterr().out.splitlines()
    assert not stop.value.code and lines[0].startswith(first) and len(lines) <= 20, lines
    assert any(line.startswith(last) for line in lines) and ("next:" in last) == lines[-1].startswith(last)


ROWS = [
    {"prompt": f"How much is {n} plus {n}?", "chosen": f"It is {2 * n}, gladly.", "rejected": f"Look it up, {n}."} for n in range(60)
]  # fmt: skip


@pytest.mark.slow
def test_each_command_of_the_path_from_pairs_to_a_file_prints_the_next(tmp_path, monkeypatch, capsys):
    """A stranger pastes what is printed: 60 pairs become a GGUF file in at most eight commands."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")
    line, pasted = "orpo-lite new my.jsonl --model builtin:quickstart/model", []
    while line:
        _, name, *words = shlex.split(line)
        monkeypatch.setattr(
            sys,
            "argv",
            [f"orpo-lite {name}", *words, *(["--prompt", "How much is 4 plus 5?"] if name == "chat" else [])],
        )
        with pytest.raises(SystemExit) as stop:
            run_command(load(name))
        out, err = capsys.readouterr()
        assert not stop.value.code, (line, err)
        pasted.append(name)
        told = re.findall(r"(?:next: |  )(orpo-lite \w+ .+)", out)
        line = next((one for one in told if one.split()[1] not in pasted), "")
        if name == "train":  # after the conversation
            merge = told[-1]
        if name == "chat" and not line:
            line = merge
    assert pasted == ["new", "data", "train", "chat", "merge", "export"]
    assert list((tmp_path / "outputs").glob("*.gguf"))


def test_a_missing_folder_or_recipe_is_said_before_torch_is_imported(tmp_path):
    asked = [
        "chat ./gone",
        "evaluate ./gone",
        "evaluate builtin:quickstart/model --against ./gone",
        "report ./gone",
        "merge ./gone --output m",
        "merge --adapter ./gone:0.3 --output m",
        "export ./gone --output m.gguf",
        "push ./gone --repo me/it",
        "data --recipe gone.yaml",
        "plan --recipe gone.yaml",
        "train --recipe gone.yaml",
        "train --recipe quickstart adapter.init_from=./gone",
        "train --recipe quickstart data.train=gone.jsonl",
        "pairs ./gone --max-words 3",
        "pairs gone.yaml --max-words 3",
        "pairs quickstart",
        "pairs quickstart --must gone(",
        "pairs quickstart --rule gone.py:f",
        "pairs quickstart --rule mine.py:gone",
        "pairs quickstart --reward-model ./gone",
        "pairs quickstart --log-odds ./gone",
        "pairs quickstart --judge ./gone",
        "pairs quickstart --judge-model gone",
        "pairs quickstart --max-words 3 --prompts gone.jsonl",
    ]
    prompts = "--prompts builtin:quickstart/heldout.jsonl"
    asked = [f"{words} {'' if '--prompts' in words else prompts} --output gone.jsonl" if words.startswith("pairs") else words
             for words in asked]  # fmt: skip
    (tmp_path / "mine.py").write_text("def f(prompt, answer): return 1\n")
    code = (
        "import sys\nfrom orpo_lite.__main__ import main\n"
        "for words in sys.argv[1:]:\n    sys.argv[1:] = words.split()\n"
        "    try: main()\n    except SystemExit as stop: print(stop.code, 'torch' in sys.modules, words)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *asked], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines() == [f"2 False {words}" for words in asked], done.stderr
    assert done.stderr.count("gone") >= len(asked) - 1 and "Traceback" not in done.stderr
