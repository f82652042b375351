"""What a run does besides training fails alone, with a line that says what is missing and why; the adapter is there."""

import json
import os
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from peft import PeftConfig

from orpo_lite.recipe import Recipe
from orpo_lite.train import pipeline, results
from orpo_lite.trainer.run_folder import RunFolder
from orpo_lite.trainer.run_record import versions
from tests.commands import ROOT

SHORT = ["training.max_steps=2", "training.eval_strategy=no", "data.max_rows=16", "data.max_eval_rows=4", "evaluation.samples=1",
         "evaluation.max_new_tokens=4"]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run's folder, and the arguments with which its ends were called, by name."""
    called, place = {}, tmp_path_factory.mktemp("runs") / "short"

    def noted(name, real):
        def call(*given):
            called["there"] = {path.name for path in place.iterdir()} if name == "measure_held_out" else called["there"]
            called[name] = given
            return real(*given)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("measure_held_out", "record_of", "finish"):
            patch.setattr(pipeline, name, noted(name, getattr(pipeline, name)))
        folder = pipeline.run(Recipe.load("quickstart", [*SHORT, f"training.output_dir={place}"])).folder
    return folder, called


def boom(*_, **__):
    raise LookupError("no such thing\nat all")


PIECES = {
    "versions": "versions in run.json",
    "find_license": "license of the base",
    "probe_rows": "rows in run.json on which a merge is checked",
    "memory_facts": "memory in run.json",
    "rule_shares": "styles of the answers",
    "evaluate": "metrics of the held-out pairs",
    "answer": "sample answers",
    "score_answers": "sample answers",
    "write_report": "report.html",
    "draw_picture": "curves.png",
    "write_card": "README.md",
}


@pytest.mark.parametrize("piece", PIECES)
def test_each_piece_fails_alone(piece, trained, tmp_path, monkeypatch, capsys):
    done, called = trained
    folder = RunFolder(Path(shutil.copytree(done, tmp_path / "again")))
    for name in ("run.json", "report.html", "README.md", "curves.png"):
        (folder.path / name).unlink()
    monkeypatch.setattr(results, piece, boom)
    recipe, pairs, base, trainer, before, after, planned, metrics = called["record_of"]
    if piece in ("evaluate", "answer", "score_answers"):
        after = results.measure_held_out(*called["measure_held_out"])
    record = results.record_of(recipe, pairs, base, trainer, before, after, planned, metrics)
    results.finish(folder, record, {"before": before.pairs, "after": after.pairs, "beta": 0.1})
    pipeline.printout.print_finished(folder, record)
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("missing: ") == 1 and f"missing: {PIECES[piece]}" in out and "(LookupError: no such thing)" in out
    assert "orpo_lite.chat" in out and folder.finished
    there = {name for name in ("report.html", "README.md", "curves.png") if (folder.path / name).is_file()}
    assert len(there) == 3 - (piece in ("write_report", "draw_picture", "write_card"))
    facts, whole = folder.read(), json.loads((done / "run.json").read_text())
    lost = {"versions": "versions", "probe_rows": "probe", "memory_facts": "plan", "rule_shares": "rule"}.get(piece)
    assert all(facts[key] == whole[key] for key in ("steps", "adapter", "layout", "parameters", "device"))
    assert lost is None or not facts[lost]
    for key in {"versions", "probe", "plan", "rule"} - {lost} - ({"rule"} if piece == "answer" else set()):
        assert facts[key] == whole[key], key
    assert bool(facts["eval"]["after"]) == (piece != "evaluate")
    assert bool(facts["samples"]["after"]) == (piece != "answer")


def test_the_adapter_is_written_before_anything_that_can_fail(trained):
    """Measuring the trained model comes after it: even what no one foresaw leaves the adapter."""
    folder, called = trained
    assert {"adapter_model.safetensors", "tokenizer.json"} <= called["there"] and "run.json" not in called["there"]
    assert PeftConfig.from_pretrained(str(folder)).r == 16


def test_our_own_version_needs_no_installation(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", boom_not_found)
    found = versions()
    assert found.pop("orpo-lite") and found.pop("python") and not any(found.values())


def boom_not_found(name):
    raise __import__("importlib.metadata").metadata.PackageNotFoundError(name)


@pytest.mark.slow
def test_a_clone_on_the_path_trains_as_an_installed_package_does(tmp_path):
    """Every package but orpo-lite itself, in a virtual environment of its own."""
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    [there] = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    for folder in {*site.getsitepackages(), *(path for path in sys.path if path.endswith("site-packages"))}:
        for entry in Path(folder).iterdir():
            if "orpo" not in entry.name.lower() and entry.suffix != ".pth" and not (there / entry.name).exists():
                (there / entry.name).symlink_to(entry)
    words = ["-m", "orpo_lite.train", "--recipe", "quickstart", *SHORT, f"training.output_dir={tmp_path / 'run'}"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")} | {
        "PYTHONPATH": str(ROOT)
    }
    asked = [python, "-c", "import importlib.metadata as m; m.version('orpo-lite')"]
    assert b"PackageNotFoundError" in subprocess.run(asked, env=environment, cwd=tmp_path, capture_output=True).stderr
    done = subprocess.run([python, *words], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "missing:" not in done.stdout + done.stderr, done.stderr
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"adapter_model.safetensors", "run.json", "report.html", "README.md", "curves.png", "held_out.json"} <= names
    assert json.loads((tmp_path / "run" / "run.json").read_text())["versions"]["orpo-lite"]
