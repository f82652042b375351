"""Two processes under a real torchrun, and what a CPU cannot do."""

import json
import re

import pytest

from orpo_lite import ORPOConfig
from orpo_lite.common.errors import RequestError
from orpo_lite.model import load_base, load_tokenizer
from orpo_lite.recipe import ModelSection, Recipe
from orpo_lite.train.__main__ import command
from orpo_lite.trainer import distributed
from tests.scale import checks


@pytest.mark.slow
def test_two_processes_write_one_run_folder_and_speak_once(whole):
    out, said = whole
    facts = json.loads((out / "run.json").read_text())
    assert facts["processes"] == 2 and facts["steps"] == 8
    assert facts["effective_batch"] % 4 == 0
    assert len(facts["samples"]["after"]) == 2
    assert len(re.findall(r"^run folder", said, re.MULTILINE)) == 1
    assert "2 by ddp over gloo" in said
    assert said.count("distributed by cost") == 1
    assert [path.name for path in out.parent.iterdir()] == ["run"]


def test_what_a_cpu_would_quietly_do_otherwise_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RequestError, match="silently use DDP"):
        distributed.init_process_group(10, use_cpu=True)


def test_deepspeed_is_refused_by_name(monkeypatch, tmp_path):
    refused = (
        r"DeepSpeed is asked for, and orpo_lite shards with FSDP2: start with recipes/accelerate/fsdp2-qlora\.yaml"
    )
    with pytest.raises(RequestError, match=refused):
        Recipe.load("quickstart", ["training.deepspeed=zero3.json"])
    with pytest.raises(RequestError, match=refused):
        ORPOConfig(output_dir=str(tmp_path), deepspeed={"zero_optimization": {"stage": 3}})
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(RequestError, match=refused):
        ORPOConfig(output_dir=str(tmp_path))
    with pytest.raises(RequestError, match=refused):
        command("quickstart")


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_base_that_will_be_sharded_is_loaded_whole_to_the_host(tmp_path, quantization):
    checks.save_base(tmp_path / "base")
    spec = ModelSection(name_or_path=str(tmp_path / "base"), quantization=quantization, new_tokens=["<new>"])
    model, _ = load_base(spec, load_tokenizer(spec), device="cpu", to_shard=True)
    stored = {str(p.dtype) for p in model.parameters() if getattr(p, "quant_state", None) is not None}
    assert stored == ({"torch.float32"} if quantization == "nf4" else set())
    with pytest.raises(RequestError, match="int8 weights cannot be sharded by FSDP"):
        load_base(spec.model_copy(update={"quantization": "int8"}), device="cpu", to_shard=True)
