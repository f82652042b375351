"""The notebooks: clean, made for Colab, and run through the cells that a user runs, with the quickstart model."""

from __future__ import annotations

import base64
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import nbformat
import pytest

from orpo_lite.common.errors import RequestError
from orpo_lite.export.llama_cpp import converter_folder

ROOT = Path(__file__).parents[2]
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
NAMES = ("evaluate-and-compare", "merge-export-push", "mistral-qlora-t4", "quickstart", "your-data")
BADGE = re.compile(
    r"\[!\[Open in Colab\]\(https://colab\.research\.google\.com/assets/colab-badge\.svg\)\]"
    r"\(https://colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)/blob/main/notebooks/([\w-]+)\.ipynb\)"
)


def read(name: str) -> Any:
    return nbformat.read(NOTEBOOKS[name], as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_these_notebooks_are_there() -> None:
    assert tuple(NOTEBOOKS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_clean_and_made_for_colab(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec == {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(notebook))
    badge = BADGE.match(notebook.cells[0].source)
    assert badge and badge[2] == name
    install, settings = code_cells(notebook)[:2]
    assert "pip" in install.source and '"google.colab" in sys.modules' in install.source
    # one repository, wherever it is named, and in code in one variable
    owner, project = badge[1].split("/")
    assert f'\nOWNER = "{owner}"  #@param' in install.source and f"github.com/{{OWNER}}/{project}" in install.source
    assert all(badge[1] not in cell.source for cell in notebook.cells[1:])
    assert "torch=={torch_before}" in install.source and "assert" in install.source
    assert settings.metadata.tags == ["parameters"]
    assert all("#@param" in line for line in settings.source.splitlines() if "=" in line.split("#")[0])
    others = [cell for cell in code_cells(notebook) if cell is not install]
    assert not any("pip" in cell.source or "!apt" in cell.source for cell in others)
    assert not any("parameters" in cell.metadata.get("tags", ()) for cell in others if cell is not settings)


def test_the_question_of_the_quickstart_is_a_held_out_one() -> None:
    rows = (ROOT / "orpo_lite/data/quickstart/heldout.jsonl").read_text("utf-8").splitlines()
    settings = code_cells(read("quickstart"))[1].source
    question = re.search(r'QUESTION = "(.+)"  #', settings)[1]  # type: ignore[index]
    assert question in {json.loads(row)["prompt"][-1]["content"] for row in rows}


def test_readme_and_site_link_to_the_notebooks() -> None:
    owners = {BADGE.match(read(name).cells[0].source)[1] for name in NAMES}  # type: ignore[index]
    readme, site = ((ROOT / page).read_text("utf-8") for page in ("README.md", ".docs/pages/guides/colab.md"))
    links = re.findall(
        r"\(https://colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)/blob/main/notebooks/(.+?)\.ipynb\)", site
    )
    for found in (BADGE.findall(readme), links):  # no badge on the site, which asks for nothing outside of itself
        assert {name for _, name in found} == set(NAMES) and {owner for owner, _ in found} == owners


@pytest.fixture
def colab(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Colab's own modules, as far as the notebooks call them, and a pip that only notes what it was asked."""
    seen = SimpleNamespace(pip=[], mounted=[], torch="2.9.0+cu126")
    module, drive, files = (ModuleType(f"google.colab{name}") for name in ("", ".drive", ".files"))
    drive.mount, files.upload = seen.mounted.append, lambda: {"uploaded.jsonl": b"{}"}  # type: ignore[attr-defined]
    module.drive, module.files = drive, files  # type: ignore[attr-defined]
    for each in (module, drive, files):
        monkeypatch.setitem(sys.modules, each.__name__, each)
    monkeypatch.setattr(subprocess, "run", lambda words, check: seen.pip.append(words))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: seen.torch if name == "torch" else "0.1.0")
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_the_install_cell_on_colab(name: str, colab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip is held to the torch that is there, a torch that changed all the same is told, and so is an unset address."""
    source = code_cells(read(name))[0].source
    with pytest.raises(ValueError, match="set OWNER"):
        exec(source, {})
    assert not colab.pip
    exec(source.replace('WHEEL = ""', 'WHEEL = "one.whl"'), {})
    assert "one.whl" in colab.pip.pop()
    source = source.replace('OWNER = "OWNER"', 'OWNER = "somebody"')
    exec(source, {})
    assert colab.pip[0][:4] == [sys.executable, "-m", "pip", "install"]
    assert {"git+https://github.com/somebody/orpo_lite", "torch==2.9.0+cu126"} <= set(colab.pip[0])

    def changed(words: list[str], check: bool) -> None:
        colab.torch = "2.13.0"

    monkeypatch.setattr(subprocess, "run", changed)
    with pytest.raises(AssertionError, match="torch"):
        exec(source, {})


def test_drive_and_upload_on_colab(colab: SimpleNamespace) -> None:
    def cell(name: str, words: str) -> str:
        return next(cell.source for cell in code_cells(read(name)) if words in cell.source)

    names: dict[str, Any] = {"USE_DRIVE": True, "FOLDER": "orpo_lite/mistral"}
    exec(cell("mistral-qlora-t4", "drive.mount"), names)
    assert colab.mounted == ["/content/drive"] and str(names["folder"]) == "/content/drive/MyDrive/orpo_lite/mistral"
    names = {"FILE": ""}
    exec(cell("your-data", "files.upload"), names)
    assert names["FILE"] == "uploaded.jsonl"


@pytest.fixture
def execute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """execute(name, **parameters) -> all that its cells print; the cells are those of the file.

    widgets: whether ipywidgets is there, as on Colab.
    """
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))

    def run(name: str, widgets: bool = True, **parameters: Any) -> str:
        notebook = read(name)
        place = notebook.cells.index(code_cells(notebook)[1])
        given = set(re.findall(r"^(\w+) =", notebook.cells[place].source, re.MULTILINE))
        assert parameters.keys() <= given, f"{name} has no such parameter: {parameters.keys() - given}"
        lines = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
        lines += "" if widgets else "\nimport sys; sys.modules['ipywidgets'] = None"
        notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(lines))
        client = nbclient.NotebookClient(notebook, timeout=400, resources={"metadata": {"path": str(tmp_path)}})
        client.execute()
        outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
        run.pictures = [  # type: ignore[attr-defined]
            base64.b64decode(output.data["image/png"]) for output in outputs if "image/png" in output.get("data", {})
        ]
        run.html = "".join(output.data.get("text/html", "") for output in outputs if "data" in output)  # type: ignore[attr-defined]
        told = "".join(output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in outputs)
        told += "".join(output.data.get("text/markdown", "") for output in outputs if "data" in output)
        # what libraries say that concerns no user; tqdm's warning, where ipywidgets is missing, says to install it
        assert not re.search(r"gemm_4bit|(?<!Tqdm)Warning:|^\[transformers\]|warnings\.warn", told, re.MULTILINE), told[
            -3000:
        ]
        assert not re.search(r"^(error|failed):|Traceback|SystemExit", told, re.MULTILINE), told[-3000:]
        assert "<progress" not in run.html  # type: ignore[attr-defined]  # transformers' own bar beside ours
        assert any("widget-view" in kind for output in outputs for kind in output.get("data", {})) == widgets
        return told

    return run


@pytest.mark.slow
def test_quickstart(execute, tmp_path: Path) -> None:
    told = execute("quickstart", widgets=False, STEPS=8, FOLDER="runs/one")
    assert json.loads((tmp_path / "runs/one/run.json").read_text("utf-8"))["steps"] == 8
    assert "before:" in told and "after:" in told and "reward accuracy" in told
    assert "Cairo" in told.partition("after:")[2]  # the question of the notebook is one that the toy can answer
    assert len(execute.pictures) == 1 and execute.pictures[0].startswith(b"\x89PNG")
    assert "srcdoc=" in execute.html and "8 steps in" in told


@pytest.mark.slow
def test_a_t4_session_that_ends_goes_on_with_the_same_cells(
    execute, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was stopped after a checkpoint stands for the session that went away."""
    from orpo_lite import Recipe
    from orpo_lite.train.pipeline import run
    from orpo_lite.trainer.interruptions import Stopped
    from orpo_lite.trainer.trainer import ORPOTrainer

    words = dict(
        RECIPE="quickstart", ROWS=48, STEPS=8, LEARNING_RATE=1e-3, SAVE_MINUTES=10, FOLDER="drive/mistral", CARD="8GB"
    )
    overrides = ["data.max_rows=48", "training.max_steps=8", "training.learning_rate=0.001", "training.save_minutes=10"]
    recipe = Recipe.load("quickstart", [*overrides, "training.output_dir=drive/mistral"])
    monkeypatch.chdir(tmp_path)  # a changed output_dir would be another run
    with pytest.MonkeyPatch.context() as patch:
        step, made = ORPOTrainer.training_step, []

        def stopping(trainer: ORPOTrainer, *args: Any, **kwargs: Any) -> Any:
            made.append(step(trainer, *args, **kwargs))
            if len(made) == 4:
                os.kill(os.getpid(), 15)
            return made[-1]

        patch.setattr(ORPOTrainer, "training_step", stopping)
        with pytest.raises(Stopped):
            run(recipe)
    assert list((tmp_path / "drive/mistral/checkpoints").glob("checkpoint-4"))
    told = execute("mistral-qlora-t4", **words)
    assert "resuming from checkpoint-4" in " ".join(told.split())
    assert len(execute.pictures) == 1 and "reward accuracy" in told
    assert (tmp_path / "drive/mistral/adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_your_data(execute, tmp_path: Path) -> None:
    told = execute("your-data", STEPS=3)
    assert "empty" in told and len(execute.pictures) == 1
    facts = json.loads((tmp_path / "outputs/mine/run.json").read_text("utf-8"))
    assert facts["steps"] == 3 and "srcdoc=" in execute.html


@pytest.mark.slow
def test_merge_export_push(execute, tmp_path: Path) -> None:
    try:
        converter = bool(converter_folder())
    except RequestError:
        converter = False
    told = execute("merge-export-push", STEPS=3, GGUF=converter, REPO="somebody/quickstart")
    assert (tmp_path / "merged/model.safetensors").is_file()
    assert (tmp_path / "model.gguf").is_file() == converter and (not converter or "FROM" in told)
    assert "adapter_model.safetensors" in told


@pytest.mark.slow
def test_evaluate_and_compare(execute, tmp_path: Path) -> None:
    told = execute("evaluate-and-compare", STEPS=6)
    assert "| orpo.beta=0.1 |" in told and "| orpo.beta=1.0 |" in told and "| base |" in told
    assert len(execute.pictures) == 1 and len(list((tmp_path / "outputs").iterdir())) == 2
    assert (tmp_path / "compare.html").is_file() and "srcdoc=" in execute.html
