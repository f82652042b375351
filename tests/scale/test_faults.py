"""Processes that are killed or fail: the others end with a message, and torchrun goes on from the last checkpoint."""

import json
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.scale.group import torchrun


@pytest.mark.slow
def test_a_killed_rank_is_started_anew_and_the_run_ends_as_if_nothing_had_happened(whole, tmp_path):
    out = tmp_path / "run"
    new_addresses = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    status, said = torchrun(out, "--max_restarts=1", HARM="kill:1:5", HARMED=str(tmp_path / "harmed"), **new_addresses)
    assert status == 0, said[-4000:]
    assert (tmp_path / "harmed").exists()
    # torchrun's SIGTERM may come first, while the checkpoint of step 4 is put into its place: then it ends with that
    assert (
        "rank 0: LostPeer: another process of the run has ended" in said or "SIGTERM: stopping after this step" in said
    )
    assert "resuming from checkpoint-4" in said
    one, other = load_file(whole[0] / "adapter_model.safetensors"), load_file(out / "adapter_model.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert one.keys() == other.keys()

    def logged(folder):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]

    assert logged(out) == logged(whole[0])


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["kill", "raise", "hang"])
def test_the_others_end_within_a_minute_and_say_why(tmp_path, harm):
    words = ["training.ddp_timeout=20"] if harm == "hang" else []
    status, said = torchrun(tmp_path / "run", words=words, HARM=f"{harm}:1:3", HARMED=str(tmp_path / "harmed"))
    assert status != 0
    assert time.time() - (tmp_path / "harmed").stat().st_mtime < 60, said[-3000:]
    assert "rank 0: LostPeer: another process of the run has ended or does not answer" in said
    if harm == "raise":
        assert "rank 1: Traceback" in said and "rank 1: RuntimeError: harmed" in said


@pytest.mark.slow
def test_a_wrong_recipe_is_told_once(tmp_path):
    status, said = torchrun(tmp_path / "run", words=["data.train=nowhere.jsonl"])
    assert status != 0
    assert said.count("nowhere.jsonl") == 1, said
