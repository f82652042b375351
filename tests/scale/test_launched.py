"""Two processes under a real torchrun, and what a CPU cannot do."""

import json
import re

import pytest

from orpo_lite.common.errors import RequestError
from orpo_lite.trainer import distributed


@pytest.mark.slow
def test_two_processes_write_one_run_folder_and_speak_once(whole):
    out, said = whole
    facts = json.loads((out / "run.json").read_text())
    assert facts["world"] == {"processes": 2, "nodes": 1, "processes_per_node": 2, "strategy": "ddp", "backend": "gloo",
                              "launcher": "torchrun"}  # fmt: skip
    assert facts["steps"] == 8
    assert facts["effective_batch"] % 4 == 0
    assert len(facts["samples"]["after"]) == 2
    assert len(re.findall(r"^run folder", said, re.MULTILINE)) == 1
    assert "2 by ddp over gloo" in said
    assert said.count("distributed by cost") == 1
    assert [path.name for path in out.parent.iterdir()] == ["run"]


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_what_a_cpu_would_quietly_do_otherwise_is_refused(monkeypatch, name):
    monkeypatch.setenv(name, "true")
    with pytest.raises(RequestError, match="silently use DDP"):
        distributed.init_process_group(10, use_cpu=True)
