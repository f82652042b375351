"""No pickle is loaded, and no code is run, on the say of a model, an adapter, a data set or a checkpoint."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from orpo_lite.__main__ import load
from orpo_lite.trainer.checkpoint_folder import manifest, seal
from tests.malformed.models import MODEL, adapter, edited, holding, model
from tests.malformed.models import run as a_run
from tests.security.conftest import Bomb, command, quick, write_rows

EVIL = "open({!r}, 'w').close()\n"


def bombs(mark: Path, how: str) -> bytes:
    """A pickle in either of torch's two formats, or a bare one."""
    import io

    out = io.BytesIO()
    if how == "bare":
        return pickle.dumps(Bomb(mark))
    torch.save({"state": Bomb(mark)}, out, _use_new_zipfile_serialization=how == "zip")
    return out.getvalue()


def test_the_bomb_goes_off(tmp_path: Path) -> None:
    for how in ("bare", "zip", "legacy"):
        (tmp_path / "bomb").write_bytes(bombs(tmp_path / how, how))
        if how == "bare":
            pickle.loads((tmp_path / "bomb").read_bytes())
        else:
            torch.load(tmp_path / "bomb", weights_only=False)
        assert (tmp_path / how).exists()


@pytest.mark.parametrize(
    ("name", "how"),
    [("optimizer.pt", "bare"), ("optimizer.pt", "zip"), ("optimizer.pt", "legacy"), ("scheduler.pt", "zip"),
     ("rng_state.pth", "legacy"),
     ("training_args.bin", "zip"), ("training_args.bin", "bare"), ("extra.pkl", "bare")],
)  # fmt: skip
def test_a_checkpoint(name: str, how: str, mark: Path, tmp_path: Path, monkeypatch, capfd, stopped) -> None:
    from orpo_lite.common import console as cli
    from orpo_lite.train.__main__ import command as train

    shutil.copytree(stopped, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-1"
    facts = {key: value for key, value in manifest(checkpoint).items() if key != "files"}
    (checkpoint / name).parent.mkdir(exist_ok=True)
    (checkpoint / name).write_bytes(bombs(mark, how))
    seal(checkpoint, facts)  # as whoever gives the folder away could
    (tmp_path / "rows.jsonl").write_bytes((stopped.parent / "rows.jsonl").read_bytes())
    monkeypatch.chdir(tmp_path)
    words = quick(Path("run"), "rows.jsonl", "training.save_strategy=steps", "training.save_steps=1")
    monkeypatch.setattr("sys.argv", [*words, "--resume"])
    if name in ("training_args.bin", "extra.pkl"):  # nothing loads them
        train(recipe="quickstart", overrides=words[3:], resume=True)
        assert (tmp_path / "run" / "run.json").is_file()
        return
    with pytest.raises(SystemExit) as stop:
        cli.run_command(train)
    told = capfd.readouterr().err
    assert stop.value.code == 1 and "weights_only" in told, told  # torch loads weights only


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has a checkpoint of its first step, and is not finished."""
    place = tmp_path_factory.mktemp("stopped")
    write_rows(place / "rows.jsonl", [f"row {n}" for n in range(20)])
    done = command(
        *quick(Path("run"), "rows.jsonl", "training.save_strategy=steps", "training.save_steps=1"), cwd=place
    )
    assert done.returncode == 0, done.stderr
    shutil.rmtree(place / "run" / "checkpoints" / "checkpoint-2")
    (place / "run" / "run.json").unlink()
    return place / "run"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pytorch_model.bin", "save_pretrained(NEW_FOLDER)"),
        ("model.safetensors", "not a whole safetensors file"),
        ("consolidated.00.pth", "no model.safetensors"),
    ],
)
@pytest.mark.parametrize("verb", ["train", "plan", "data", "export"])
def test_a_model(verb: str, name: str, words: str, mark: Path, tmp_path: Path, monkeypatch, capfd) -> None:
    folder = model(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(bombs(mark, "zip"))
    code, told = called(verb, {
        "train": ["--recipe", "quickstart", "model.name_or_path=./base", "model.quantization=none", "--dry-run"],
        "plan": ["--recipe", "quickstart", "model.name_or_path=./base", "--gpu", "8GB"],
        "data": ["--recipe", "quickstart", "model.name_or_path=./base"],
        "export": ["base", "--output", "x.gguf"],
    }[verb], tmp_path, monkeypatch, capfd)  # fmt: skip
    if verb == "plan":  # takes the configuration alone
        assert code == 0, told
    else:
        assert code == 2 and words in told, told


def called(verb: str, words: list[str], place: Path, monkeypatch, capfd) -> tuple[int, str]:
    """Exit status and stderr of a command, run in this process."""

    from orpo_lite.common import console as cli

    monkeypatch.chdir(place)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(place / "cache"))
    monkeypatch.setattr("sys.argv", [verb, *words])
    try:
        cli.run_command(load(verb))
    except SystemExit as stop:
        return int(stop.code or 0), capfd.readouterr().err
    return 0, capfd.readouterr().err


@pytest.mark.parametrize("verb", ["train", "merge", "export", "evaluate", "push"])
def test_an_adapter(verb: str, mark: Path, tmp_path: Path, monkeypatch, capfd) -> None:
    def pickled(folder: Path) -> None:
        (folder / "adapter_model.safetensors").unlink()
        (folder / "adapter_model.bin").write_bytes(bombs(mark, "zip"))

    if verb in ("evaluate", "push"):
        a_run(damage=pickled)(tmp_path)
    else:
        adapter(tmp_path, pickled)
    code, told = called(verb, {
        "train": ["--recipe", "quickstart", "adapter.init_from=./adapter", "model.quantization=none"],
        "merge": ["adapter", "--output", "merged"],
        "export": ["adapter", "--output", "x.gguf", "--adapter"],
        "evaluate": ["run"],
        "push": ["run", "--repo", "a/b", "--dry-run"],
    }[verb], tmp_path, monkeypatch, capfd)  # fmt: skip
    assert code == 2 and "adapter_model.bin" in told and "pickle" in told, told


def extension(mark: Path) -> pa.Table:
    """A column of pyarrow's old extension type, whose type is a pickle (CVE-2023-47248)."""
    field = pa.field("chosen", pa.string(), metadata={
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": pickle.dumps(Bomb(mark)),
    })  # fmt: skip
    return pa.table([["a"], ["b"]], schema=pa.schema([field, pa.field("rejected", pa.string())]))


@pytest.mark.parametrize("kind", ["rows.pkl", "rows.pt", "a-folder", "a-script", "parquet", "saved"])
def test_data(kind: str, mark: Path, tmp_path: Path, monkeypatch, capfd) -> None:
    place, expected = tmp_path / kind, "not a data file by its name; expected .jsonl"
    if kind.startswith("rows"):
        place.write_bytes(bombs(mark, "bare" if kind.endswith("pkl") else "zip"))
    elif kind == "a-folder":
        place.mkdir()
        (place / "train.pkl").write_bytes(bombs(mark, "bare"))
        expected = "No (supported) data files found"
    elif kind == "a-script":
        place.mkdir()
        (place / "a-script.py").write_text(EVIL.format(str(mark)))
        expected = "Dataset scripts are no longer supported"
    elif kind == "parquet":
        place.mkdir()
        pyarrow.parquet.write_table(extension(mark), place / "train.parquet")
        expected = ""  # read as the text that it stores
    else:
        Dataset.from_dict({"chosen": ["a"], "rejected": ["b"]}).save_to_disk(place)
        with pa.OSFile(str(place / "data-00000-of-00001.arrow"), "wb") as sink, pa.ipc.new_stream(
            sink, (table := extension(mark)).schema
        ) as writer:  # fmt: skip
            writer.write_table(table)
        expected = ""
    code, told = called("data", ["--recipe", "quickstart", f"data.train={place}"], tmp_path, monkeypatch, capfd)
    assert expected in told and (code == 2 or not expected), told


def code_in(folder: Path, mark: Path) -> None:
    """Everything by which a repository can ask for its own code to be run."""
    for name in (
        "configuration_evil.py",
        "modeling_evil.py",
        "tokenization_evil.py",
        "custom_generate/generate.py",
        "evil.py",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(EVIL.format(str(mark)) + "class Evil: pass\ndef generate(*a, **k): pass\n")
    code = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    if (folder / "config.json").is_file():
        edited("config.json", auto_map=code)(folder)
    if (folder / "tokenizer_config.json").is_file():
        edited("tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]})(folder)  # fmt: skip
    if (folder / "generation_config.json").is_file():
        edited("generation_config.json", custom_generate=str(folder))(folder)
    else:
        holding("generation_config.json", json.dumps({"custom_generate": str(folder)}).encode())(folder)


@pytest.mark.parametrize("kind", [None, "mine"])
def test_remote_code_of_a_model(kind: str | None, mark: Path, tmp_path: Path, monkeypatch, capfd) -> None:
    folder = model(tmp_path)
    code_in(folder, mark)
    if kind:
        edited("config.json", model_type=kind)(folder)
    write_rows(tmp_path / "rows.jsonl", [f"row {n}" for n in range(9)])
    words = quick(Path("run"), "rows.jsonl", "model.name_or_path=./base")[1:]
    code, told = called("train", words, tmp_path, monkeypatch, capfd)
    if kind:
        assert code == 2 and "model.trust_remote_code" in told, told
    else:  # transformers' own class of that name
        assert code in (0, 2), told


def test_it_is_run_where_the_recipe_says_so(tmp_path: Path, monkeypatch, capfd) -> None:
    folder, mark = model(tmp_path), tmp_path / "meant"
    code_in(folder, mark)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    called("data", ["--recipe", "quickstart", "model.name_or_path=./base", "model.trust_remote_code=true"],
           tmp_path, monkeypatch, capfd)  # fmt: skip
    assert mark.exists()


@pytest.mark.parametrize("verb", ["merge", "evaluate", "export"])
def test_an_adapters_recipe_is_not_the_users(verb: str, mark: Path, tmp_path: Path, monkeypatch, capfd) -> None:
    base = model(tmp_path)
    code_in(base, mark)
    edited("config.json", model_type="mine")(base)

    def trusting(folder: Path) -> None:
        recipe = (folder / "recipe.yaml").read_text().replace("builtin:quickstart/model", str(base))
        (folder / "recipe.yaml").write_text(recipe.replace("trust_remote_code: false", "trust_remote_code: true"))
        edited("adapter_config.json", base_model_name_or_path=str(base))(folder)

    a_run(damage=trusting)(tmp_path)
    assert "trust_remote_code: true" in (tmp_path / "run" / "recipe.yaml").read_text()
    words = {"merge": ["run", "--output", "merged"], "evaluate": ["run"], "export": ["run", "--output", "x.gguf"]}[verb]
    code, told = called(verb, words, tmp_path, monkeypatch, capfd)
    assert code == 2 and "--trust-remote-code" in told, told


@pytest.mark.parametrize("verb", ["train", "merge"])
@pytest.mark.parametrize(
    "fields",
    [
        {"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"}, "task_type": None},
        {"megatron_config": {"a": 1}, "megatron_core": "evil"},
    ],
)
def test_an_adapters_config_imports_nothing(
    verb: str, fields: dict[str, Any], mark: Path, tmp_path: Path, monkeypatch, capfd
) -> None:
    folder = adapter(tmp_path, edited("adapter_config.json", **fields))
    content = json.loads((folder / "adapter_config.json").read_text()) | fields
    (folder / "adapter_config.json").write_text(json.dumps(content))
    for place in (folder, tmp_path):
        code_in(place, mark)
    (tmp_path / "generation_config.json").unlink()
    monkeypatch.syspath_prepend(str(tmp_path))
    write_rows(tmp_path / "rows.jsonl", [f"row {n}" for n in range(9)])
    words = {
        "train": quick(Path("run"), "rows.jsonl", "adapter.init_from=./adapter")[1:],
        "merge": ["adapter", "--output", "merged", "--no-verify"],
    }[verb]
    code, told = called(verb, words, tmp_path, monkeypatch, capfd)
    assert code == 0, told
    saved = tmp_path / "run" / "adapter_config.json"
    assert not saved.is_file() or "evil" not in saved.read_text()


def test_the_tokenizer_of_the_quickstart_is_one(tmp_path: Path) -> None:
    """What the damages above start from is whole."""
    assert load_file(MODEL / "model.safetensors") and not list(MODEL.glob("*.py"))
