"""Names from repositories, indexes and configurations stay inside of their folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from orpo_lite.common.errors import RequestError
from orpo_lite.export.upload_plan import plan_upload
from orpo_lite.model.locating import find_gguf
from orpo_lite.model.tokenizer import load_tokenizer
from orpo_lite.model.untrusted_files import check_model
from orpo_lite.recipe import ModelSection, Recipe
from orpo_lite.recipe.loading import RecipeError
from tests.malformed.models import MODEL, model, sharded
from tests.malformed.models import run as a_run

OUT = ["../two.safetensors", "/etc/passwd", "a/../../two.safetensors", "..\\two.safetensors", "C:\\two.safetensors"]


@pytest.mark.parametrize("name", OUT)
def test_an_index_of_shards(name: str, tmp_path: Path) -> None:
    folder = model(tmp_path, sharded("one.safetensors", "two.safetensors", two=name))
    shutil.copy(folder / "two.safetensors", tmp_path / "two.safetensors")
    with pytest.raises(RequestError, match=r"model.safetensors.index.json names .*expected files inside of the folder"):
        check_model(folder)


def test_links_that_are_meant_go_on_working(tmp_path: Path) -> None:
    """The hub's cache is made of links, and a user may have the whole folder behind one."""
    repo = tmp_path / "models--a--b"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for number, file in enumerate(sorted(MODEL.iterdir())):
        shutil.copy(file, repo / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    (tmp_path / "mine").symlink_to(snapshot)
    inside = shutil.copytree(MODEL, tmp_path / "inside")
    (inside / "model.safetensors").rename(inside / "weights.part")
    (inside / "model.safetensors").symlink_to("weights.part")
    for folder in (snapshot, tmp_path / "mine", inside):
        check_model(folder)
        assert load_tokenizer(ModelSection(name_or_path=str(folder))).chat_template
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("name", ["../x.gguf", "/x.gguf", "a/../../x.gguf"])
def test_a_gguf_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(RequestError, match="model.gguf_file: found .*expected the name of a file inside"):
        find_gguf(str(tmp_path / "folder"), name, None)


@pytest.mark.parametrize("name", ["../run", "/run", "a/b", "..", ".hidden", "run\n", "a\\b", "C:run", ""])
def test_a_recipes_name(name: str) -> None:
    content = {"name": name, "model": {"name_or_path": "a/b"}, "data": {"train": "x.jsonl"}}
    with pytest.raises(RecipeError, match="name"):
        Recipe.parse(content)


@pytest.mark.parametrize("name", ["README.md", "adapter_model.safetensors", "chat_template.jinja"])
def test_what_is_published(name: str, tmp_path: Path) -> None:
    a_run()(tmp_path)
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "run" / name).unlink(missing_ok=True)
    os.symlink(tmp_path / "secret", tmp_path / "run" / name)
    with pytest.raises(RequestError, match=f"{name}: a link that leads out of the folder"):
        plan_upload(tmp_path / "run")


def test_an_index_of_a_merged_model_that_is_published(tmp_path: Path) -> None:
    folder = model(tmp_path, sharded("one.safetensors", "two.safetensors"))
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = dict.fromkeys(content["weight_map"], "../../secret.safetensors")
    index.write_text(json.dumps(content))
    with pytest.raises(RequestError):
        plan_upload(folder)


def test_a_tokenizers_own_file_names(tmp_path: Path) -> None:
    """tokenizer_config.json may name files; transformers takes no other folder's for them."""
    folder = model(tmp_path)
    (tmp_path / "secret.jinja").write_text("SECRET")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for field in ("chat_template_file", "vocab_file", "tokenizer_file", "merges_file"):
        config[field] = "../secret.jinja"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(folder)))
    assert "SECRET" not in str(tokenizer.chat_template)
    out = tmp_path / "saved"
    tokenizer.save_pretrained(out)
    assert not any(b"SECRET" in path.read_bytes() for path in out.rglob("*") if path.is_file())
