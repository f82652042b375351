"""Two processes under a real torchrun, and who takes part by SLURM's variables."""

import json
import os
import re

import pytest

from orpo_lite.common.errors import RequestError
from orpo_lite.trainer import distributed, launcher


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
    assert said.count("dealt by their cost") == 1
    assert [path.name for path in out.parent.iterdir()] == ["run"]


def test_slurm_variables_say_who_takes_part(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what is set here is undone afterwards
        monkeypatch.delenv(name)
    for name, value in {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "SLURM_NNODES": "2",
                        "SLURM_JOB_NODELIST": "gpu[07-08],cpu1", "SLURM_JOB_ID": "123456"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    launcher.from_slurm()
    found = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}  # fmt: skip
    assert found == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "gpu07", "MASTER_PORT": "18456"}  # fmt: skip
    assert (launcher.rank(), launcher.processes()) == (3, 4)


@pytest.mark.parametrize(("nodes", "first"), [("n1", "n1"), ("n[1-3]", "n1"), ("a-b[007,9]", "a-b007"), ("x,y[1-2]", "x")])  # fmt: skip
def test_the_first_node_of_a_list(nodes, first):
    assert launcher.first_node(nodes) == first


def test_a_launcher_that_speaks_is_believed(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_LOCALID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    launcher.from_slurm()
    assert launcher.processes() == 2


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_what_a_cpu_would_quietly_do_otherwise_is_refused(monkeypatch, name):
    monkeypatch.setenv(name, "true")
    with pytest.raises(RequestError, match="silently use DDP"):
        distributed.init_process_group(10, use_cpu=True)
