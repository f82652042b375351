"""A run on rows that attack whatever shows them, and pickles that leave a mark where they are loaded."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import commands

ROOT = Path(__file__).parents[2]
SCRIPT = "<script>document.title='owned'</script>"
ATTACKS = [
    SCRIPT,
    "<img src=x onerror=\"document.title='owned'\">",
    "</pre></td></script><svg onload=\"document.title='owned'\">",
    "<iframe src='http://127.0.0.1:9/out'></iframe><link rel=stylesheet href='http://127.0.0.1:9/out'>",
    "'><a href=javascript:document.title='owned'>x</a>",
    "[click](javascript:alert(1)) ![x](http://127.0.0.1:9/out.png) | `cell` | <b>bold</b> **b**",
    "```\n## Not a heading of ours\n<script>alert(1)</script>",
    "---\nlicense: wtfpl\n---",
    "{{ 7 * 7 }} {% for %} ${7*7} &lt;b&gt;",
    "\x1b[31mred\x1b[2J\x1b]0;title\x07\x1b]8;;http://127.0.0.1:9/\x1b\\link\x1b]8;;\x1b\\ \x1b]52;c;YQ==\x07",
    "\x9b31mc1 \x9d0;title\x9c \rover \x08\x08 \u202egnp.exe \u2066x\u2069 \u200b",
    "[bold red]markup[/] [link=http://127.0.0.1:9/]x[/link] [/]",
]

NAME = "<b onclick=alert(1)>[red]x[link](javascript:1) \x1b[31m\u202e.jsonl"
"""Of a data file."""


def command(*words: Any, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m orpo_lite.NAME ...` as a user would."""
    return commands.command(*words, cwd=cwd, **{"HF_DATASETS_CACHE": str(cwd / "cache")} | environment)


def quick(folder: Path, data: str = "rows.jsonl", *more: str) -> list[str]:
    """Words of a run of two steps on the quickstart's model."""
    return ["train", "--recipe", "quickstart", f"data.train={data}", "data.eval=null", "data.eval_fraction=0.3",
            "data.apply_template=true", "model.quantization=none", "training.max_steps=2", "evaluation.samples=8",
            "training.per_device_train_batch_size=4", "evaluation.max_new_tokens=4", f"training.output_dir={folder}", *more]  # fmt: skip


def write_rows(path: Path, texts: list[str]) -> None:
    lines = [
        json.dumps({"prompt": text, "chosen": f"good {text}", "rejected": f"bad {text}", text: text})
        for text in texts
        for _ in range(2)
    ]
    path.write_text("\n".join(lines), "utf-8")


@pytest.fixture(scope="session")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A finished run on hostile rows, and what the command printed."""
    place = tmp_path_factory.mktemp("attacked")
    (place / "rows").mkdir()
    write_rows(place / "rows" / NAME, [f"{attack} \x1b[31mred" for attack in ATTACKS])
    done = command(*quick(Path("run"), "rows"), cwd=place)
    assert done.returncode == 0, done.stderr
    return place / "run", done


class Bomb:
    """Pickled, it writes a file where it is loaded."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return exec, (f"open({str(self.mark)!r}, 'w').close()",)


@pytest.fixture
def mark(tmp_path: Path) -> Any:
    """The file that a loaded bomb writes; it must not be there at the end."""
    yield tmp_path / "owned"
    assert not (tmp_path / "owned").exists(), "a pickle or foreign code was run"
