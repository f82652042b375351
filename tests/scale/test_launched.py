"""Two processes under a real torchrun, and engines that split a model."""

import json
import re

import pytest

from orpo_lite import ORPOConfig
from orpo_lite.common.errors import RequestError
from orpo_lite.recipe import Recipe
from orpo_lite.train.__main__ import command


@pytest.mark.slow
def test_two_processes_write_one_run_folder_and_speak_once(whole):
    out, said = whole
    facts = json.loads((out / "run.json").read_text())
    assert facts["processes"] == 2 and facts["steps"] == 8
    assert facts["effective_batch"] % 4 == 0
    assert len(facts["samples"]["after"]) == 2
    assert len(re.findall(r"^run folder", said, re.MULTILINE)) == 1
    assert "2 processes by ddp over gloo" in said
    assert said.count("distributed by cost") == 1
    assert [path.name for path in out.parent.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("engine", "field", "value"),
    [("DeepSpeed", "deepspeed", {"zero_optimization": {"stage": 3}}), ("DeepSpeed", "deepspeed", "zero3.json"),
     ("FSDP", "fsdp", "full_shard auto_wrap"), ("FSDP", "fsdp", True), ("FSDP", "fsdp_config", {"version": 2}),
     ("FSDP", "fsdp_config", "fsdp.json")],
)  # fmt: skip
def test_engines_that_split_a_model_are_refused_by_name(monkeypatch, tmp_path, engine, field, value):
    refused = rf"{engine} is asked for, .*each holds the whole 4-bit base.*recipes/accelerate/ddp\.yaml"
    with pytest.raises(RequestError, match=rf"training\.{field}: {refused}"):
        Recipe.load("quickstart", [f"training.{field}={json.dumps(value)}"])
    with pytest.raises(RequestError, match=f"^{field}: {refused}"):
        ORPOConfig(output_dir=str(tmp_path), **{field: value})
    variable = f"ACCELERATE_USE_{engine.upper()}"
    for asked in ("true", "1"):
        monkeypatch.setenv(variable, asked)
        with pytest.raises(RequestError, match=f"^{variable}: {refused}"):
            ORPOConfig(output_dir=str(tmp_path))
        with pytest.raises(RequestError, match=refused):
            command("quickstart")


def test_settings_that_split_nothing_are_taken(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    Recipe.load("quickstart", ["training.fsdp=null", "training.fsdp_config=null", "training.deepspeed=null"])
    # as transformers 5.2 fills it by itself
    defaults = {"min_num_params": 0, "xla": False, "xla_fsdp_v2": False, "xla_fsdp_grad_ckpt": False}
    ORPOConfig(output_dir=str(tmp_path), fsdp=[], fsdp_config=defaults, use_cpu=True)
