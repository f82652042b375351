"""Folders as other trainers leave them: what push takes and leaves, and where the adapter is when it is in a subfolder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from orpo_lite.common.credentials import STAYS, match
from orpo_lite.common.errors import RequestError
from orpo_lite.evaluate.loading import resolve_model
from orpo_lite.export.gguf import export
from orpo_lite.export.hub import push
from orpo_lite.export.upload_plan import plan_upload
from orpo_lite.merge.run import merge
from orpo_lite.model.untrusted_files import check_adapter

TAKEN = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json",
         "chat_template.jinja", "special_tokens_map.json", "added_tokens.json", "README.md"}  # fmt: skip
LEFT = ["checkpoint-50/adapter_model.safetensors", "checkpoint-50/optimizer.pt", "training_args.bin", "training_args.yaml",
        "trainer_state.json", "trainer_log.jsonl", "all_results.json", "train_results.json", "eval_results.json",
        "runs/Nov01_host/events.out.tfevents.1", "logs/train.log", "wandb/run-1/files/config.yaml", "optimizer.pt",
        "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth", "random_states_0.pkl",
        "zero_to_fp32.py", "global_step50/mp_rank_00_model_states.pt", "latest", "train.log", "debug.log",
        "events.out.tfevents.17.host", ".ipynb_checkpoints/README-checkpoint.md", "training_loss.png", "notes.md"]  # fmt: skip


def test_a_trainers_folder_is_pushed_without_what_it_left(adapter_folder, capsys):
    """Nothing there is a credential, however much it looks like one."""
    _, folder = adapter_folder("llama")
    for name in LEFT:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("token: sk-0123456789abcdefABCDEF")  # whatever stays is no reason to refuse
    words = "token password secret user/sk-wikipedia-instructions-2024 risk-adjusted-preference-pairs-v2 hf_model_name_or_path"
    (folder / "README.md").write_text(
        f"---\nbase_model: x/y\n---\n# {words} https://user@host/x task-0123456789abcdefghij\n"
    )
    for name in ("special_tokens_map.json", "added_tokens.json"):
        (folder / name).write_text(json.dumps({"api_key": "<|password|>"}))
    assert push(folder, "me/mine", dry_run=True) is None
    plan = plan_upload(folder)
    assert plan.files.keys() == TAKEN
    reasons = {name.rstrip("/"): why for name, (_, why) in plan.kept.items()}
    assert reasons.keys() == {name.partition("/")[0] for name in LEFT}
    assert [name for name, why in reasons.items() if why == "not on the allow-list"] == ["notes.md"]
    said = capsys.readouterr().out
    assert all(name in said for name in reasons) and "secret" not in said.replace(words, "")
    (folder / "README.md").write_text("key: sk-proj-0123456789abcdefABCDEF")
    with pytest.raises(RequestError, match=r"README.md, line 1: looks like a API key"):
        push(folder, "me/mine", dry_run=True)


def test_what_secrets_are_kept_in_is_called_so():
    for name in (".env", "prod.env", "credentials.json", "id_rsa", "server.pem", "token"):
        assert match(name, STAYS) == "usually holds secrets"
    for name in ("tokenizer.model.v3", "tokens.txt", "trainer_state.json", "latest"):
        assert match(name, STAYS) != "usually holds secrets"


@pytest.mark.parametrize(
    ("places", "said"),
    [
        (["checkpoint-50"], "give its subfolder {}/checkpoint-50$"),
        (["checkpoint-200", "checkpoint-1000", "checkpoint-50"],
         "give its subfolder {}/checkpoint-1000, the newest; the others: checkpoint-200, checkpoint-50$"),
        (["orpo"], "give its subfolder {}/orpo$"),
        (["checkpoint-7/orpo"], "give its subfolder {}/checkpoint-7/orpo$"),
        ([], "[^;]*$"),
    ],
)  # fmt: skip
def test_a_folder_of_checkpoints_or_named_adapters_says_which_to_give(adapter_folder, tmp_path, places, said):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "trainer_state.json").write_text("{}")
    for number, place in enumerate(places):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        os.rename(adapter_folder("llama")[1], folder / place)
        os.utime(folder / place, (number, number))  # the step counts, not the time
    commands = {
        "merge": lambda: merge(folder, tmp_path / "merged"),
        "export": lambda: export(folder, tmp_path / "x.gguf"),
        "push": lambda: push(folder, "me/mine", dry_run=True),
        "chat and evaluate": lambda: resolve_model(str(folder)),
        "adapter.init_from": lambda: check_adapter(folder),
    }
    for name, command in commands.items():
        with pytest.raises(RequestError, match=said.format(folder)):
            command()
            pytest.fail(name)
    for place in places:
        check_adapter(Path(folder / place))
