"""An adapter whose base is itself an adapter (SFT, then ORPO): no command drops the first, and what is printed works."""

import json
import re
import shlex
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from orpo_lite.common.errors import RequestError
from orpo_lite.evaluate.loading import resolve_model
from orpo_lite.export.gguf import export
from orpo_lite.export.hub import merge_beside
from orpo_lite.merge.run import merge
from orpo_lite.model import load_base, load_tokenizer, locating
from orpo_lite.model.adapter import load_adapter
from orpo_lite.recipe import ModelSection
from orpo_lite.trainer.run_folder import base_section
from tests.model.conftest import disturb, logits


@pytest.fixture
def chain(base_folder, tmp_path, monkeypatch):
    """chain(names) -> (adapter folders from below, each trained on the one before it, and PEFT's logits of the last)."""
    monkeypatch.chdir(tmp_path)

    def make(*names: str) -> tuple[list[Path], torch.Tensor]:
        model, below, folders = AutoModelForCausalLM.from_pretrained(base_folder("llama")), base_folder("llama"), []
        for name in names:
            model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
            disturb(model, 0.05)
            model.save_pretrained(name)
            config = json.loads(Path(name, "adapter_config.json").read_text()) | {"base_model_name_or_path": str(below)}
            Path(name, "adapter_config.json").write_text(json.dumps(config))
            model, below = model.merge_and_unload(), Path(name)
            folders.append(below)
        return folders, logits(model)

    return make


def printed(message: str) -> list[list[str]]:
    return [shlex.split(line) for line in re.findall(r"^  python -m orpo_lite\.merge (.+)$", message, re.M)]


@pytest.mark.parametrize("names", [["sft"], ["sft one", "dpo"], ["a/checkpoint-5", "b", "c"]])
def test_commands_that_are_printed_merge_the_whole_chain(chain, names):
    folders, expected = chain(*names, "orpo")
    with pytest.raises(RequestError, match=r"orpo: its base .* is itself an adapter, which would be lost") as refused:
        merge("orpo", "out")
    steps = printed(str(refused.value))
    assert [Path(step[0]) for step in steps] == folders
    for adapter, *options in steps:
        given = dict(zip(options[::2], options[1::2], strict=True))
        made = merge(adapter, given["--output"], base=given.get("--base"))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(made)), expected, atol=1e-5, rtol=1e-5)
    assert f"and give --base {shlex.quote(given['--base'])} here" in str(refused.value)
    below = ModelSection(name_or_path=given["--base"], quantization="none")
    adapted = load_adapter(load_base(below)[0], "orpo")
    torch.testing.assert_close(logits(adapted), expected, atol=1e-5, rtol=1e-5)


def test_every_command_says_so(chain, base_folder, tmp_path):
    chain("sft", "orpo")
    root = str(base_folder("llama"))
    uses = {
        "orpo: its base sft is itself": [
            lambda: base_section(Path("orpo")),
            lambda: base_section(Path("orpo"), root),  # which would leave out sft
            lambda: base_section(Path("orpo"), f"{tmp_path}/sft"),
            lambda: resolve_model("orpo"),
            lambda: export("orpo", "x.gguf"),
            lambda: merge("orpo", "out", base=root),
            lambda: merge_beside(Path("orpo"), ExitStack()),
            lambda: load_adapter(load_base(ModelSection(name_or_path=root, quantization="none"))[0], "orpo"),
        ],
        r"model.name_or_path: sft is an adapter, not a model(.|\n)*--output sft-merged(.|\n)*set model.name_or_path=sft-merged; to "
        "train the adapter itself further: .*adapter.init_from=sft": [
            lambda: load_tokenizer(ModelSection(name_or_path="sft")),
            lambda: load_base(ModelSection(name_or_path="sft")),
        ],
    }  # fmt: skip
    for words, calls in uses.items():
        for call in calls:
            with pytest.raises(RequestError, match=words) as refused:
                call()
            assert printed(str(refused.value))[0] == ["sft", "--output", "sft-merged"]


def test_hub_ids_trainers_configs_and_loops(chain, base_folder, tmp_path, monkeypatch):
    """A folder with the base's config.json beside the adapter (axolotl), an adapter on the hub, one that names itself."""
    chain("sft", "orpo")
    config = Path("orpo/adapter_config.json")
    Path("sft/config.json").write_text((base_folder("llama") / "config.json").read_text())
    with pytest.raises(RequestError, match="its base sft is itself an adapter"):
        base_section(Path("orpo"))
    on_hub = {"someone/sft": str(tmp_path / "sft/adapter_config.json"), "someone/model": None}
    monkeypatch.setattr(locating, "hub_adapter_config", lambda name, revision=None: on_hub[name])
    monkeypatch.setattr(locating, "has_file", lambda place, name, _: Path(place, name).is_file())
    for named, words in {
        "someone/sft": r"someone/sft is itself an adapter(.|\n)*orpo_lite\.merge someone/sft --output sft-merged",
        "orpo": r"orpo_lite\.merge orpo --base BASE --output orpo-merged",
    }.items():
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": named}))
        with pytest.raises(RequestError, match=words):
            base_section(Path("orpo"))
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "someone/model"}))
    assert base_section(Path("orpo")).name_or_path == "someone/model"
    Path("orpo/model.safetensors").touch()  # a whole model that kept its adapter's configuration
    assert locating.adapter_config("orpo") is None
