"""Tokens stay where they are: not one byte of them in what commands write or print."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orpo_lite.recipe import Recipe
from orpo_lite.recipe.loading import RecipeError
from tests.commands import command
from tests.hub_server import HubServer
from tests.security.conftest import ROOT, quick, write_rows

CANARIES = {
    "HF_TOKEN": "hf_" + "CanaryOfTheEnvironment0123456789",
    "WANDB_API_KEY": "c0ffee" * 6 + "beef",
    "MY_SERVICE_PASSWORD": "correct-horse-battery-staple",
}
IN_FILE = "hf_" + "CanaryOfTheTokenFile01234567890"
IN_ADDRESS = "https://someone:hf_" + "CanaryOfAnAddress0123456789012@example.com/base"


def holders(place: Path, secrets: list[str]) -> list[str]:
    """Files under a folder, names and links among it, that hold any of the secrets."""
    found = []
    for path in place.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        if any(secret.encode() in content or secret in str(path) for secret in secrets):
            found.append(str(path))
    return found


@pytest.mark.slow
def test_no_command_writes_or_prints_a_token(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "hf").mkdir(parents=True)
    (home / "hf" / "token").write_text(IN_FILE)
    secrets = [*CANARIES.values(), IN_FILE, "CanaryOfAnAddress0123456789012"]
    written = tmp_path / "work"
    written.mkdir()
    write_rows(written / "rows.jsonl", [f"row {n}" for n in range(20)])
    # rows that quote a token in an error
    (written / "bad.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "b", "note": "x"}\n')
    with HubServer("someone", CANARIES["HF_TOKEN"]) as hub:
        environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"} | CANARIES | {
            "HOME": str(home), "HF_HOME": str(home / "hf"), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1",
            "XDG_CACHE_HOME": str(home / "cache"), "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "work")}  # fmt: skip
        train = [*quick(Path("run"), "rows.jsonl", "training.report_to=tensorboard")]
        commands: list[tuple[int, list[str]]] = [
            (0, train),
            (0, ["evaluate", "run"]),
            (0, ["merge", "run", "--output", "merged"]),
            (0, ["report", "run"]),
            (0, ["plan", "--recipe", "run", "--gpu", "8GB"]),
            (0, ["push", "run", "--repo", "someone/name", "--private"]),
            (2, ["push", "run", "--repo", "someone-else/name", "--debug"]),
            (2, [*train, f"model.name_or_path={IN_ADDRESS}", "--debug"]),
            (2, [*train, f"training.hub_token={IN_FILE}", "--debug"]),
            (2, [*train, f"model.revision={CANARIES['HF_TOKEN']}", "--debug"]),
            (2, [*train, f"training.run_name={CANARIES['MY_SERVICE_PASSWORD']}.x", "data.train=bad.jsonl", "--debug"]),
            (2, [*train, f"data.train={CANARIES['MY_SERVICE_PASSWORD']}.jsonl", "--debug"]),
            (2, ["merge", f"./{IN_FILE}", "--output", "x", "--debug"]),
        ]  # fmt: skip
        for status, (name, *words) in commands:
            if name == "push" or status == 0 and name == "train":  # the libraries' own import sees the tokens as well
                done = subprocess.run([sys.executable, "-m", f"orpo_lite.{name}", *words], cwd=written, env=environment,
                                      capture_output=True, text=True, timeout=300)  # fmt: skip
            else:
                done = command(name, *words, cwd=written, **environment)
            assert done.returncode == status, (name, words, done.stderr[-2000:])
            told = done.stdout + done.stderr
            assert not [secret for secret in secrets if secret in told], (name, words, told)
            if "--debug" in words:
                assert "Traceback" in told
    assert holders(tmp_path, secrets) == [str(home / "hf" / "token")]


def test_a_recipe_takes_no_token(tmp_path: Path) -> None:
    for word, place in (
        (f"training.hub_token={IN_FILE}", "training.hub_token"),
        ("training.hub_token=anything", "training.hub_token"),
        (f"model.name_or_path={IN_ADDRESS}", "model.name_or_path"),
        (f"needs={IN_FILE}", "needs"),
        (f"data.train=https://u:{'p' * 9}@example.com/x.jsonl", "data.train"),
        (f"training.hub_model_id={IN_FILE}", "training.hub_model_id"),
    ):
        with pytest.raises(RecipeError) as said:
            Recipe.load("quickstart", [word])
        assert place in str(said.value) and "hf auth login" in str(said.value)
        assert word.partition("=")[2] not in str(said.value)
