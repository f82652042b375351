"""Every malformed input ends with status 2 and words that name place, fault and remedy; nothing is written."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import pytest

from orpo_lite.__main__ import load
from orpo_lite.common import console as cli
from orpo_lite.data.sources import open_source
from orpo_lite.recipe import DataSource, Recipe
from tests import commands
from tests.malformed import data, models, recipes
from tests.malformed.case import Case

CORPUS = {"recipe": recipes.CASES, "data": data.CASES, "model": models.MODELS, "adapter": models.ADAPTERS}


def listing(folder: Path) -> dict[str, int]:
    """Every file and folder with its size."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*")}


@pytest.fixture
def refused(
    tmp_path: Path, tmp_path_factory, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Any:
    """refused(case) -> what the command says on stderr, having left its folder as it was."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.chdir(tmp_path)

    def run(case: Case) -> str:
        name, *words = case.make(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *words])
        before = listing(tmp_path)
        command = load(name)
        started = time.process_time()
        with pytest.raises(SystemExit) as stop:
            cli.run_command(command)
        told = capfd.readouterr().err
        assert time.process_time() - started < 30
        assert stop.value.code == 2, told
        assert listing(tmp_path) == before
        return told

    return run


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=f"{kind}-{case.name}") for kind, cases in CORPUS.items() for case in cases]
)
def test_malformed_input_is_named(case: Case, refused: Any) -> None:
    told = refused(case)
    assert "Traceback" not in told
    message = told[told.index("error: ") :]
    assert len(message) < 3000
    for words in (case.place, case.found, case.remedy):
        assert words in message, message


REAL = ("recipe-billion-laughs-in-a-field", "recipe-python-tag", "data-nul-bytes", "data-gzip-truncated", "model-shard-missing",
        "adapter-pickle", "adapter-merge-nan")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_so_does_the_real_command(name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    kind, _, short = name.partition("-")
    case = next(case for case in CORPUS[kind] if case.name == short)
    command, *words = case.make(tmp_path)
    before = listing(tmp_path)
    done = commands.command(command, *words, cwd=tmp_path, HF_DATASETS_CACHE=str(tmp_path_factory.mktemp("cache")))
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and listing(tmp_path) == before
    for part in (case.place, case.found, case.remedy):
        assert part in done.stderr


def test_the_corpus_is_large_and_its_names_differ() -> None:
    names = [f"{kind}-{case.name}" for kind, cases in CORPUS.items() for case in cases]
    assert len(names) == len(set(names)) >= 60


def test_a_byte_order_mark_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = b"\xef\xbb\xbf"
    (tmp_path / "mine.yaml").write_bytes(mark + recipes.GOOD.encode())
    assert Recipe.load(tmp_path / "mine.yaml").name == "mine"
    for name, content in (("a.jsonl", data.GOOD), ("a.csv", (data.CSV + "a,b,c\n").encode())):
        (tmp_path / name).write_bytes(mark + content)
        first, *_ = open_source(DataSource(path=str(tmp_path / name)), "train", None).rows()
        assert list(first) == ["prompt", "chosen", "rejected"]


def test_a_folder_without_rights(refused: Any, tmp_path: Path) -> None:
    (tmp_path / "probe").mkdir(mode=0o500)
    if os.access(tmp_path / "probe", os.W_OK):
        pytest.skip("root may write everywhere, and so may Windows: .ci/run repeats this without root's right to")

    def make(folder: Path) -> list[str]:
        (folder / "locked").mkdir(mode=0o500)
        return [*recipes.written(recipes.GOOD)(folder), "training.output_dir=locked/run"]

    assert "training.output_dir: locked/run cannot be written (Permission denied)" in refused(
        Case("locked", make, "", "", "")
    )
