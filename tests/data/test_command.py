"""`orpo-lite data` as a user sees it: counts, drops row by row, lengths, decoded examples, exit status."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from orpo_lite.common import console as cli
from orpo_lite.data.__main__ import command
from tests import commands
from tests.data.conftest import write_jsonl
from tests.data.test_readers import rows


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command in this process: exit status, stdout, stderr."""
    monkeypatch.setattr(cli.console, "width", 80)
    monkeypatch.setattr(cli.errors, "width", 80)

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["data", "--recipe", "quickstart", *words])
        with pytest.raises(SystemExit) as stop:
            cli.run_command(command)
        return int(stop.value.code or 0), *capsys.readouterr()

    return call


def test_quickstart_shows_counts_lengths_and_labels(run: Any) -> None:
    status, out, err = run()
    assert (status, err) == (0, "")
    assert "480 pairs to train on, 120 held out" in out and "conversations, explicit" in out
    assert max(map(len, out.splitlines()[: out[: out.index("example 1")].count("\n")])) <= 80
    assert [re.search(rf"{part} +(\d+)", out)[1] for part in ("prompt", "chosen", "rejected")] == ["15", "17", "17"]
    assert out.endswith("\nnext: python -m orpo_lite.train --recipe quickstart\n")
    example = out[out.index("example 1") : out.index("example 2")]
    marks = {mark: re.findall(rf"^{re.escape(mark)} (.*)$", example, re.M) for mark in
             ("prompt   .", "chosen   +", "rejected -")}  # fmt: skip
    assert marks["prompt   ."][0] == "<|im_start|>user⏎" and marks["prompt   ."][-2] == "<|im_start|>assistant⏎"
    assert all(len(marks[mark]) == 1 and marks[mark][0].endswith("<|im_end|>") for mark in ("chosen   +", "rejected -"))


def test_json_holds_the_same(run: Any) -> None:
    status, out, _ = run("--json", "--examples", "1")
    content = json.loads(out)
    assert status == 0 and content["pairs"] == {"train": 480, "eval": 120}
    [example] = content["examples"]
    [[labeled, text]] = example["chosen"]
    assert labeled and text.endswith("<|im_end|>") and example["tokens"]["chosen"] > 3
    assert example["prompt"].startswith("<|im_start|>user")
    assert content["lengths"]["train"]["prompt"]["max"] == 40


def test_dropped_rows_are_listed_with_number_and_reason(run: Any, tmp_path: Path) -> None:
    bad = [{"chosen": None}, {"rejected": []}, {"prompt": [{"role": "user", "content": "\x1b[2J word" * 200}]}]
    given = rows(9) + [rows(1)[0] | change for change in bad]
    path = write_jsonl(tmp_path / "pairs.jsonl", given)
    status, out, _ = run(f"data.train={path}", "data.eval=null", "data.eval_fraction=0", "--list-drops")
    assert status == 0 and "9 pairs to train on, none held out" in out
    assert f"{path}, row 9: empty or missing side: chosen is missing" in out
    assert f"{path}, row 10: empty or missing side: rejected holds no turn" in out
    assert f"{path}, row 11: prompt too long: the prompt has" in out and "there is room for 255" in out
    assert "\x1b" not in out
    assert f"{path}, row" not in run(f"data.train={path}", "data.eval=null", "data.eval_fraction=0")[1]


def test_text_cannot_act_on_the_terminal(run: Any, tmp_path: Path) -> None:
    row = rows(1)[0] | {"chosen": [{"role": "assistant", "content": "[bold]a\x1b[31m\u202eb\r\x07"}]}
    path = write_jsonl(tmp_path / "pairs.jsonl", [row] * 4)
    status, out, _ = run(f"data.train={path}", "data.eval_fraction=0", "data.eval=null")
    assert status == 0 and not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e]", out)
    assert r"[bold]a\x1b[31m\u202eb\r\x07" in out


def test_more_than_half_dropped_is_status_2_after_the_table(run: Any, tmp_path: Path) -> None:
    given = rows(2) + [rows(1)[0] | {"chosen": None}] * 3
    path = write_jsonl(tmp_path / "pairs.jsonl", given)
    status, out, err = run(f"data.train={path}", "data.eval=null", "--list-drops")
    assert status == 2 and "row 4: empty or missing side" in out and "60.0%" in out
    assert "3 of 5 rows dropped" in err and "more than half" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["data.train=nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["data.template_kwargs={enable_thinking: false}"], "found 'enable_thinking', which would change nothing"),
        (["data.template_kwargs={enable_thinking:false}"], "write 'data.template_kwargs={enable_thinking: false}'"),
        (["data.trian=x"], "trian"),
        (["data.columns={chosen: best}"], "maps chosen to 'best'"),
    ],
)
def test_wrong_requests_are_status_2(run: Any, words: list[str], found: str) -> None:
    status, out, err = run(*words)
    assert status == 2 and found in err and not out


REASONS = ["prompt too long", "empty prompt", *["prompt too long"] * 7, "empty or missing side", *["prompt too long"] * 2,
           *["empty or missing side"] * 2, *["chosen equal to rejected"] * 6]  # fmt: skip


def test_real_dirty_rows_are_reported_one_by_one(run: Any, shared_data: Path) -> None:
    path = shared_data / "variants" / "dirty_real_rows.jsonl"
    status, out, err = run(f"data.train={path}", "data.eval=null", "--list-drops")
    listed = re.findall(r"jsonl, row (\d+): ([^:]+): .+$", out, re.M)
    assert status == 2 and "20 of 20 rows dropped" in err
    assert listed == [(str(n), reason) for n, reason in enumerate(REASONS)]

    path = shared_data / "variants" / "dirty_hh_raw_prompt_mismatch.jsonl"
    status, out, err = run(f"data.train={path}", "data.eval=null", "--list-drops")
    listed = re.findall(r"jsonl, row (\d+): ([^:]+): they differ from .+$", out, re.M)
    assert status == 2 and listed == [(str(n), "prompts differ") for n in range(8)]


@pytest.mark.slow
def test_as_a_module(tmp_path: Path) -> None:
    words = ["data", "--recipe", "quickstart"]
    done = commands.command(*words, HF_DATASETS_CACHE=str(tmp_path))
    assert done.returncode == 0 and "480 pairs" in done.stdout and not done.stderr
    done = commands.command(*words, "data.train=none.jsonl", HF_DATASETS_CACHE=str(tmp_path))
    assert done.returncode == 2 and "\nerror: none.jsonl" in done.stderr


def test_codes_of_emoji_stay_as_they_were_written(run: Any, tmp_path: Path) -> None:
    given = [{"prompt": f"What does :fire: mean beside {fruit}?", "chosen": "It is hot :+1:", "rejected": ":question:"}
             for fruit in ("apples", "pears")]  # fmt: skip
    path = write_jsonl(tmp_path / ":rocket:.jsonl", given)
    status, out, _ = run(f"data.train={path}", "data.eval_fraction=0")
    assert (
        status == 0 and "What does :fire: mean" in out and ":+1:" in out and ":question:" in out and ":rocket:" in out
    )
    status, _, err = run("data.train=/nowhere/:fire:.jsonl")
    assert status == 2 and "/nowhere/:fire:.jsonl" in err
