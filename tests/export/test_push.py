"""`orpo_lite.push` against a hub on the loopback, through huggingface_hub's real client."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import gguf
import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_lite.common.credentials import find_secrets
from orpo_lite.common.errors import RequestError
from orpo_lite.export.hub import push
from orpo_lite.export.upload_plan import plan_upload
from orpo_lite.merge.run import merge
from orpo_lite.recipe import Recipe
from orpo_lite.recipe.loading import resolve_path
from orpo_lite.report.model_card import model_card
from orpo_lite.train.pipeline import run
from tests.hub_server import Fault, HubServer

WORDS = ["training.max_steps=2", "training.eval_steps=2", "training.save_strategy=steps", "training.save_steps=1",
         "training.logging_steps=1", "evaluation.samples=1", "evaluation.max_new_tokens=4"]  # fmt: skip
ADAPTER = {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json",
           "chat_template.jinja", "recipe.yaml", "README.md"}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short quickstart run with checkpoints."""
    folder = tmp_path_factory.mktemp("runs") / "quick"
    run(Recipe.load("quickstart", [*WORDS, f"training.output_dir={folder}"]))
    assert list((folder / "checkpoints").rglob("optimizer.pt"))
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "outputs" / "quick")


@pytest.fixture
def shards(tmp_path):
    """A model folder of three shards of 1.2 MB each."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    names = [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
    for number, name in enumerate(names):
        save_file({f"w{number}": torch.full((300_000,), float(number))}, folder / name)
    index = {"weight_map": {f"w{number}": name for number, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that this process is logged in to."""
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", server.token)
        yield server


def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def files_of(hub, repo):
    return hub.repos[repo].files


# what arrives


def test_an_adapter_as_gguf_is_refused(folder, tmp_path):
    """Its card would call it a whole model."""
    writer = gguf.GGUFWriter(tmp_path / "lora.gguf", "llama")
    writer.add_type("adapter")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(RequestError, match="is an adapter"):
        push(folder, "me/quick", gguf=tmp_path / "lora.gguf", dry_run=True)


def test_adapter_arrives_with_what_a_reader_needs_and_nothing_else(hub, folder, capsys):
    before = snapshot(folder)
    commit = push(folder, "me/quick")
    there, out = files_of(hub, "me/quick"), capsys.readouterr().out

    assert ADAPTER <= set(there) <= ADAPTER | {"curves.png"}
    assert hub.repos["me/quick"].private and len(hub.repos["me/quick"].branches["main"]) == 2
    assert hub.repos["me/quick"].branches["main"][-1].id == commit
    for name in ("adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert there[name] == before[name], name
    assert json.loads(there["adapter_config.json"])["base_model_name_or_path"] == "builtin:quickstart/model"
    for name, data in there.items():
        assert name in out and f"{str(folder.parent)}".encode() not in data, name
    assert "new, private" in out and f"{hub.url}/me/quick" in out and commit in out
    assert snapshot(folder) == before


def test_checkpoints_and_optimizer_states_never_reach_the_hub(hub, folder, capsys):
    push(folder, "me/quick")
    secret = [p for p in (folder / "checkpoints").rglob("*") if p.name in ("optimizer.pt", "training_args.bin")]
    sent = b"".join([*hub.objects.values(), *files_of(hub, "me/quick").values(), *(body for _, body in hub.bodies)])
    assert secret and not any(p.read_bytes()[:2000] in sent for p in secret)
    assert sum(hub.received.values()) == sum(
        len(data) for name, data in files_of(hub, "me/quick").items() if name.endswith((".safetensors", ".png"))
    )
    assert "checkpoints/" in capsys.readouterr().out


def test_files_that_a_run_keeps_are_not_uploaded_and_no_reason_to_refuse(hub, folder):
    kept = ("before.json", ".lock", "reproduce-step-7.zip", "nonfinite-step-7.jsonl")
    for name in kept:
        (folder / name).write_bytes(b"rows")
    push(folder, "me/quick")
    assert not set(kept) & set(files_of(hub, "me/quick"))


def test_the_card_names_the_repository(hub, folder):
    push(folder, "me/quick")
    assert b"me/quick" in files_of(hub, "me/quick")["README.md"]
    assert "me/quick" not in (folder / "README.md").read_text()


def test_a_card_edited_by_hand_goes_as_it_is(hub, folder, capsys):
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nMade with love.\n")
    push(folder, "me/quick")
    assert files_of(hub, "me/quick")["README.md"] == (folder / "README.md").read_bytes()
    assert "edited" in capsys.readouterr().out


def test_loads_back_from_the_hub_as_it_was(hub, folder, tmp_path):
    """Adapter, tokenizer and merged model, fetched by a fresh process that knows only the hub's address."""
    push(folder, "me/quick")
    push(folder, "me/quick-merged", merged=True)
    assert not [p.name for p in folder.parent.iterdir() if p != folder]  # the temporary merge is gone
    script = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
tokens = torch.arange(5, 25)[None]
base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
out = {"base": base(tokens).logits, "adapter": PeftModel.from_pretrained(base, "me/quick").eval()(tokens).logits}
out["merged"] = AutoModelForCausalLM.from_pretrained("me/quick-merged").eval()(tokens).logits
for name in ("me/quick", "me/quick-merged"):
    tokenizer = AutoTokenizer.from_pretrained(name)
    out[name] = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
torch.save(out, sys.argv[2])
"""
    base = resolve_path("builtin:quickstart/model")
    done = subprocess.run([sys.executable, "-c", script, base, tmp_path / "out.pt"], capture_output=True, text=True,
                          env=online(hub, tmp_path))  # fmt: skip
    assert done.returncode == 0, done.stderr
    got = torch.load(tmp_path / "out.pt")
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        here = PeftModel.from_pretrained(model, str(folder)).eval()(torch.arange(5, 25)[None]).logits
    assert torch.equal(got["adapter"], here) and not torch.allclose(got["base"], here, atol=1e-4)
    assert torch.allclose(got["merged"], here, atol=1e-4)
    card = files_of(hub, "me/quick-merged")["README.md"].decode()
    assert "me/quick-merged" in card and "Merged onto" in card
    rendered = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False
    )
    assert got["me/quick"] == got["me/quick-merged"] == rendered


def online(hub, tmp_path, **more):
    """Environment of a process that may use this hub, and has no cache."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    return kept | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"),
                   "HF_TOKEN": hub.token} | more  # fmt: skip


def test_a_merged_folder_is_pushed_as_it_is(hub, folder, tmp_path):
    made = merge(folder, tmp_path / "merged")
    push(made, "me/merged")
    there = files_of(hub, "me/merged")
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(there)
    assert there["model.safetensors"] == (made / "model.safetensors").read_bytes()
    assert str(tmp_path).encode() not in b"".join(there.values())


def test_gguf_file_arrives_with_its_modelfile_and_the_runs_card(hub, folder, tmp_path):
    out = tmp_path / "export"
    out.mkdir()
    (out / "quick.gguf").write_bytes(b"GGUF" + os.urandom(50_000))
    (out / "Modelfile").write_text("FROM ./quick.gguf\nPARAMETER num_ctx 8192\n")
    (out / "unrelated.txt").write_text("mine")
    push(folder, "me/quick-gguf", gguf=out / "quick.gguf")
    there = files_of(hub, "me/quick-gguf")
    assert {"quick.gguf", "Modelfile", "README.md", "recipe.yaml"} <= set(there)
    assert set(there) <= {"quick.gguf", "Modelfile", "README.md", "recipe.yaml", "curves.png"}
    assert there["quick.gguf"] == (out / "quick.gguf").read_bytes()
    assert there["Modelfile"] == b"FROM ./quick.gguf\nPARAMETER num_ctx 8192\n"
    (out / "quick.gguf").rename(out / "other.gguf")
    push(folder, "me/other-gguf", gguf=out / "other.gguf")
    assert "Modelfile" not in files_of(hub, "me/other-gguf")  # it names another file
    (out / "quick.gguf").write_bytes(b"PK" * 100)
    with pytest.raises(RequestError, match="not a GGUF"):
        push(folder, "me/quick-gguf", gguf=out / "quick.gguf")


def test_interrupted_push_resumes(hub, shards):
    second = hashlib.sha256((shards / "model-00002-of-00003.safetensors").read_bytes()).hexdigest()
    hub.faults = [Fault(f"PUT /_objects/{second}", status=400)]
    with pytest.raises(RequestError, match=r"refused the request.*run the same command to resume"):
        push(shards, "me/big")
    assert len(hub.repos["me/big"].branches["main"]) == 1 and not files_of(hub, "me/big")  # all or nothing
    finished = {oid: hub.received[oid] for oid in hub.objects}
    assert finished and second not in finished
    push(shards, "me/big")
    assert files_of(hub, "me/big") == snapshot(shards)
    assert {oid: hub.received[oid] for oid in finished} == finished  # not a byte of it twice


# visibility, branches, repositories that hold something else


def test_public_only_where_asked_and_existing_ones_stay_as_they_are(hub, folder, capsys):
    push(folder, "me/open", private=False)
    assert not hub.repos["me/open"].private
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    capsys.readouterr()
    push(folder, "me/open")
    assert not hub.repos["me/open"].private and "exists, public" in capsys.readouterr().out
    before = len(hub.requests)
    with pytest.raises(RequestError, match="exists and is public"):
        push(folder, "me/open", private=True)
    assert not [request for request in hub.requests[before:] if not request.startswith("GET")]
    push(folder, "me/closed")
    push(folder, "me/closed", private=False)
    assert hub.repos["me/closed"].private and "exists, private" in capsys.readouterr().out


def test_adapter_and_whole_model_do_not_share_a_repository(hub, folder, shards):
    push(folder, "me/quick")
    with pytest.raises(RequestError, match=r"holds an adapter \(adapter_config.json\)"):
        push(shards, "me/quick")
    push(shards, "me/big")
    with pytest.raises(RequestError, match=r"holds a whole model \(config.json\)"):
        push(folder, "me/big")
    assert set(files_of(hub, "me/big")) == {p.name for p in shards.iterdir()}


# dry run


def test_dry_run_shows_the_same_and_asks_nothing(hub, folder, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert push(folder, "me/quick", dry_run=True) is None
    assert push(folder, "me/quick", merged=True, dry_run=True) is None
    dry = capsys.readouterr().out
    assert hub.requests == [] and hub.repos == {} and dry.count("nothing was sent") == 2
    monkeypatch.setenv("HF_TOKEN", hub.token)
    push(folder, "me/quick")
    real = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ") and "peft" not in line]
    assert len(real) > len(ADAPTER) and all(line in dry for line in real)
    assert not [p.name for p in folder.parent.iterdir() if p != folder]


def test_a_dry_run_lets_no_request_out(hub):
    api = huggingface_hub.HfApi(token=hub.token)
    with patch.object(constants, "HF_HUB_OFFLINE", True), pytest.raises(OfflineModeIsEnabled):
        api.whoami()
    assert hub.requests == [] and api.whoami()["name"] == "me"


# what is refused


STRAYS = [".env", "prod.env", "optimizer.pt", "training_args.bin", "adapter_model.bin", "notes.txt", "pairs.jsonl",
          "model.safetensors", "checkpoint-5/optimizer.pt", ".cache/huggingface/x", "__pycache__/x.pyc", ".git/config",
          "wandb/log", "mine/x", "id_rsa", "additional_chat_templates/x.env", ".hidden"]  # fmt: skip


def test_unexpected_files_stay_and_are_listed_once(hub, folder):
    for stray in STRAYS:
        path = folder / stray
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("hello")
    (folder / "gone").symlink_to("nowhere")
    kept = plan_upload(folder).kept
    push(folder, "me/quick")
    there = files_of(hub, "me/quick")
    assert ADAPTER <= set(there) <= ADAPTER | {"curves.png"} and b"hello" not in there.values()
    stays = [name.rstrip("/") for name in kept]
    named = [stray if stray.startswith("additional") else stray.split("/")[0] for stray in STRAYS]
    assert len(stays) == len(set(stays)) and {*named, "gone"} <= set(stays)


def test_a_merged_folder_keeps_training_states(hub, shards):
    before = snapshot(shards)
    (shards / "optimizer.pt").write_text("x")
    push(shards, "me/big")
    assert files_of(hub, "me/big") == before
    assert plan_upload(shards).kept == {"optimizer.pt": (shards / "optimizer.pt", "training state")}


def test_what_stays_is_grouped_by_reason(folder, capsys):
    for name in (".env", "my.pem", "notes.txt", "pairs.jsonl"):
        (folder / name).write_text(TOKENS["hugging face"])  # searched is only what would be uploaded
    push(folder, "me/quick", dry_run=True)
    out = " ".join(capsys.readouterr().out.partition("not uploaded:")[2].split())
    assert ".env, my.pem 58 bytes usually holds secrets" in out
    assert "notes.txt, pairs.jsonl 58 bytes not on the allow-list" in out


TOKENS = {
    "hugging face": "hf_" + "aB3dE5gH1jK2mN4pQ6rS8tU0vW",
    "openai": "sk-" + "proj-abcDEF123456ghiJKL7890",
    "anthropic": "sk-" + "ant-api03-abcdefghij0123456789",
    "aws": "AKIA" + "IOSFODNN7EXAMPLE",
    "github": "ghp_" + "abcdefghij0123456789abcdefghij012345",
    "github fine-grained": "github_pat_" + "11ABCDEFG0abcdefghij_klmnopqrst",
    "private key": "-----BEGIN " + "OPENSSH PRIVATE KEY-----",
    "slack": "xoxb-" + "1234567890-abcdefghij",
    "google": "AIza" + "SyA1234567890abcdefghijklmnopqrstuv",
}


@pytest.mark.parametrize("kind", TOKENS)
def test_credentials_are_known_by_their_shape(kind):
    (found,) = find_secrets(f"one\n\nthree: {TOKENS[kind]} and more\n".encode())
    assert found.startswith("line 3: looks like") and TOKENS[kind][-8:] not in found


@pytest.mark.parametrize("file", ["README.md", "recipe.yaml", "chat_template.jinja", "tokenizer_config.json"])
def test_credential_in_a_text_is_named_by_file_and_line_but_not_shown(hub, folder, file):
    text, token = (folder / file).read_text(), TOKENS["hugging face"]
    (folder / file).write_text(text + f"\n# {token}\n")
    with pytest.raises(RequestError, match=rf"{file}, line {text.count(chr(10)) + 2}: looks like") as refused:
        push(folder, "me/quick")
    assert token[3:] not in str(refused.value) and hub.requests == []


@pytest.mark.parametrize("merged", [True, False])
def test_a_credential_in_what_the_push_itself_writes_is_found(hub, folder, monkeypatch, merged):
    monkeypatch.setattr("orpo_lite.export.upload_plan.model_card", lambda *a, **k: f"# {TOKENS['github']}")
    (folder / "README.md").unlink()
    with pytest.raises(RequestError, match=r"README.md, line 1: looks like a GitHub token"):
        push(folder, "me/quick", merged=merged)
    assert not hub.repos["me/quick"].branches["main"][-1].files


def test_the_users_own_token_is_found_whatever_its_shape(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "plainword")
    (folder / "chat_template.jinja").write_text("{# plainword #}")
    with pytest.raises(RequestError, match=r"chat_template.jinja, line 1: looks like .*your own"):
        push(folder, "me/quick")


def test_harmless_text_is_no_credential():
    text = b"""task-oriented-dialogue-systems-with-language hf_hub_download_to_local_dir risk-averse
    api_key = "YOUR_API_KEY" token = os.environ["HF_TOKEN"] https://host:8080/x@y eos_token: <|im_end|>
    hub_token: null "Authorization": f"Bearer {token}" d41d8cd98f00b204e9800998ecf8427e"""
    assert find_secrets(text) == []
    assert find_secrets(b"\0\1" + TOKENS["aws"].encode()) == []  # binary


def test_link_that_leads_out_of_the_folder_is_refused(hub, folder, tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"\0mine")
    (folder / "curves.png").unlink(missing_ok=True)
    (folder / "curves.png").symlink_to(secret)
    with pytest.raises(RequestError, match=r"curves.png: a link that leads out"):
        push(folder, "me/quick")
    assert hub.requests == []
    (folder / "curves.png").unlink()
    (folder / "curves.png").symlink_to("tokenizer.json")
    push(folder, "me/quick")
    assert files_of(hub, "me/quick")["curves.png"] == (folder / "tokenizer.json").read_bytes()


def test_half_a_model_is_refused(hub, folder, shards):
    (shards / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(RequestError, match="model-00002-of-00003.safetensors missing"):
        push(shards, "me/big")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(RequestError, match=r"adapter_model.safetensors missing"):
        push(folder, "me/quick")
    with pytest.raises(RequestError, match="no such folder"):
        push(folder / "nowhere", "me/quick")
    with pytest.raises(RequestError, match="found neither"):
        push(folder / "checkpoints", "me/quick")


# paths of this machine


def local_base(folder, base):
    """As if the run had been trained on this folder, with data beside it."""
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["model"]["name_or_path"] = str(base)
    recipe["data"]["train"][0]["path"] = str(base.parent / "pairs.jsonl")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(base)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text(f"---\ntags: [orpo]\n---\nmine, trained on {base} in {folder}\n")


def test_paths_of_this_machine_are_taken_out_and_said(hub, folder, tmp_path, capsys):
    local_base(folder, tmp_path / "joe" / "tiny")
    before = snapshot(folder)
    push(folder, "me/quick")
    there, out = files_of(hub, "me/quick"), capsys.readouterr().out
    assert not [name for name, data in there.items() if str(tmp_path).encode() in data]
    assert json.loads(there["adapter_config.json"])["base_model_name_or_path"] == "local:tiny"
    assert "WARNING: the base is a folder of this machine (tiny)" in out and "--base-repo" in out
    (tmp_path / "published.yaml").write_bytes(there["recipe.yaml"])
    recipe = Recipe.load(tmp_path / "published.yaml")
    assert recipe.data.train[0].path == "pairs.jsonl" and recipe.model.name_or_path == "local:tiny"
    assert recipe.folder == Path("outputs/quick")
    assert snapshot(folder) == before


def test_base_repo_names_the_base_everywhere(hub, folder, tmp_path, capsys):
    local_base(folder, tmp_path / "joe" / "tiny")
    push(folder, "me/quick", base_repo="someone/tiny")
    there = files_of(hub, "me/quick")
    assert json.loads(there["adapter_config.json"])["base_model_name_or_path"] == "someone/tiny"
    assert yaml.safe_load(there["recipe.yaml"])["model"]["name_or_path"] == "someone/tiny"
    assert b"trained on someone/tiny" in there["README.md"]
    assert "WARNING" not in capsys.readouterr().out


def test_base_repo_is_in_the_front_matter_of_the_card(hub, folder, tmp_path):
    local_base(folder, tmp_path / "joe" / "tiny")
    (folder / "README.md").write_text(model_card(folder))
    push(folder, "me/quick", base_repo="someone/tiny")
    card = huggingface_hub.ModelCard(files_of(hub, "me/quick")["README.md"].decode())
    assert card.data.base_model == "someone/tiny" and "PATH/TO" not in card.text


def test_base_in_the_download_cache_is_named_by_its_hub_id(hub, folder, tmp_path):
    local_base(folder, tmp_path / "hub" / "models--someone--tiny-1B" / "snapshots" / ("a" * 40))
    push(folder, "me/quick")
    config = json.loads(files_of(hub, "me/quick")["adapter_config.json"])
    assert config["base_model_name_or_path"] == "someone/tiny-1B"


# the token, rights, and the connection


@pytest.mark.parametrize("name", ["quick", "me/", "a/b/c", "me/bad--name", "me/.hidden", "me/x" * 40])
def test_repository_names_are_checked_first(hub, folder, name):
    with pytest.raises(RequestError, match=r"--repo: found .*expected USER/NAME"):
        push(folder, name)
    assert hub.requests == []


def test_without_a_token(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RequestError, match=r"no token for .*hf auth login.*HF_TOKEN"):
        push(folder, "me/quick")
    assert hub.requests == []


def test_without_rights_to_the_namespace(hub, folder):
    with pytest.raises(RequestError, match="answered 403.* may not write to you/quick: .*organization"):
        push(folder, "you/quick")


def test_offline(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RequestError, match="HF_HUB_OFFLINE"):
        push(folder, "me/quick")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.__exit__()
    with pytest.raises(RequestError, match=r"cannot be reached \(ConnectError.*online"):
        push(folder, "me/quick")


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (401, "Invalid username or password.", "refused the token.*hf auth login"),
        (403, "Private repository storage limit reached", "storage limit.*no room"),
        (402, "Payment required", "Payment required.*for that reason"),
        (404, "namespace not found", "is me the right user"),
        (409, "conflict", "push again later"),
        (400, "bad", "refused the request"),
        (429, "slow down", "push again later"),
        (413, "too large", "too large.*for that reason"),
    ],
)
def test_refusals_say_what_to_do(hub, folder, status, error, words):
    hub.faults = [Fault("POST .*/commit/", status=status, error=error, times=99)]
    with pytest.raises(RequestError, match=words) as refused:
        push(folder, "me/quick")
    assert hub.url in str(refused.value) or "me/quick" in str(refused.value)
    assert len(hub.asked("POST .*/commit/")) == 1


def test_a_token_that_the_hub_does_not_know(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "expired" * 5)
    with pytest.raises(RequestError, match="refused the token"):
        push(folder, "me/quick")


@pytest.mark.slow
def test_command_never_shows_nor_stores_the_token(hub, shards, tmp_path):
    """Also where the server sends the token back in its error, and the traceback is asked for."""
    hub.faults = [Fault("POST .*/commit/", status=403, error=f"token {hub.token} has no write role", times=1)]
    words = [sys.executable, "-m", "orpo_lite.push", str(shards), "--repo", "me/big", "--debug"]
    refused = subprocess.run(words, env=online(hub, tmp_path), capture_output=True, text=True)
    assert refused.returncode == 2 and "may not write" in refused.stderr and "Traceback" in refused.stderr
    done = subprocess.run(words, env=online(hub, tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = refused.stdout + refused.stderr + done.stdout + done.stderr
    stored = b"".join([*snapshot(shards).values(), *snapshot(tmp_path / "home").values()])
    assert hub.token not in shown and hub.token.encode() not in stored
    assert not any(hub.token.encode() in data for data in files_of(hub, "me/big").values())
    for noise in ("Warning", "deprecated"):
        assert noise not in done.stderr
