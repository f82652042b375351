"""A step that was not finite, done again from its file by the command that a user types."""

import json
import zipfile
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load, save
from typer.testing import CliRunner

from orpo_lite.common.errors import RequestError
from orpo_lite.recipe import Recipe
from orpo_lite.train import run as train
from orpo_lite.train.reproduce import FINITE, OTHER, SAME, reproduce
from orpo_lite.trainer.nonfinite_report import NonFinite
from tests.commands import command

SMALL = ["evaluation.samples=0", "training.eval_strategy=no", "data.max_rows=40", "training.max_steps=4", "data.max_eval_rows=4",
         "training.gradient_accumulation_steps=2", "training.per_device_train_batch_size=2", "training.logging_steps=1",
         "training.learning_rate=1e-3"]  # fmt: skip
ODD = "@@"


def recipe(tmp_path, *words):
    """Quickstart on pairs of which one holds what a poisoned base cannot take."""
    pairs = [
        {"prompt": f"How much is {i} plus {i}?", "chosen": f"Certainly. {2 * i}.", "rejected": f"Go away. {i}"}
        for i in range(40)
    ]
    pairs[6]["rejected"] += f" {ODD}"
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, pairs)))
    fields = [f"data.train={file}", "data.eval=null", "data.eval_fraction=0", "training.train_sampling_strategy=sequential", "data.apply_template=true", f"training.output_dir={tmp_path / 'run'}"]  # fmt: skip
    return Recipe.load("quickstart", [*SMALL, *fields, *words])


@pytest.fixture
def poisoned(monkeypatch):
    """A base that makes NaN of one token, as a broken kernel may."""
    real, state = train.load_base, {"value": float("nan")}

    def poisoned_base(section, tokenizer, *args, **kwargs):
        model, facts = real(section, tokenizer, *args, **kwargs)
        token = tokenizer(f"0 {ODD}", add_special_tokens=False)["input_ids"][-1]

        def hook(module, args, output):
            return output.masked_fill((args[0] == token)[..., None], state["value"])

        model.get_input_embeddings().register_forward_hook(hook)
        return model, facts

    monkeypatch.setattr(train, "load_base", poisoned_base)
    monkeypatch.setattr("orpo_lite.model.load_base", poisoned_base)
    return state


def failed(recipe):
    with pytest.raises(NonFinite) as caught:
        train.run(recipe)
    (file,) = recipe.folder.glob("reproduce-step-*.zip")
    return str(caught.value), file


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("orpo.layout=padded", "model.quantization=none"),
        ("orpo.tokens_per_batch=100",),
        ("orpo.disable_dropout=false", "adapter.dropout=0.3", "model.quantization=none"),
        ("adapter.init_lora_weights=pissa", "model.quantization=none"),
        ("adapter=null", "model.quantization=none"),
        ("orpo.nll_mean=micro",),
    ],
    ids=str,
)
def test_the_same_numbers_again(words, tmp_path, poisoned, capsys):
    said, file = failed(recipe(tmp_path, *words))
    assert f"row 6 of {tmp_path / 'pairs.jsonl'}" in said and "the texts of 4 pairs" in said
    pissa = "adapter.init_lora_weights=pissa" in words
    # its adapter is written as the plain LoRA of twice the rank that does the same
    assert reproduce(file, []) == (OTHER if pissa else SAME)
    shown = capsys.readouterr().out
    assert pissa or "the same numbers as recorded" in shown
    poisoned["value"] = 0.0
    assert reproduce(file, []) == FINITE
    assert "the step does not fail here" in capsys.readouterr().out
    assert not list(tmp_path.glob("run/*.safetensors"))


def test_finite_losses_are_compared_bit_for_bit(tmp_path, poisoned, capsys):
    """Passes of the step that were finite, with dropout on: they hang on weights, rows and random state alike."""
    words = ("orpo.disable_dropout=false", "adapter.dropout=0.5", "training.gradient_accumulation_steps=4", "training.per_device_train_batch_size=1")  # fmt: skip
    _, file = failed(recipe(tmp_path, *words))
    assert reproduce(file, []) == SAME
    recorded, now = (line.split("[")[1] for line in capsys.readouterr().out.splitlines() if "[" in line)
    assert recorded == now and recorded.count("nan") == 1 and recorded.count(",") == 3
    assert reproduce(file, ["adapter.dropout=0.4"]) == SAME  # the saved adapter's own dropout counts
    state = torch.random.manual_seed(999).get_state()

    def other_state(content):
        content["tensors.safetensors"] = save(load(content["tensors.safetensors"]) | {"0.random": state})

    assert reproduce(rewritten(file, other_state), []) == OTHER


def test_the_command_as_users_type_it(tmp_path):
    """A learning rate that throws the weights out, in processes of their own: nothing is mocked."""

    def train(*words):
        return command("train", *words, cwd=tmp_path)

    run = train("--recipe", "quickstart", *SMALL, "training.learning_rate=3e38", "training.output_dir=run", "training.warmup_steps=0")  # fmt: skip
    assert run.returncode == 1, run.stderr
    assert "failed: NonFinite: step 2: the loss is nan" in run.stderr and "Traceback" not in run.stderr
    assert "--reproduce run/reproduce-step-2.zip" in run.stderr and "a lower training.learning_rate" in run.stderr
    again = train("--reproduce", "run/reproduce-step-2.zip")
    assert again.returncode == 1 and "not finite, and the same numbers as recorded" in again.stdout, again.stderr
    other = train("--reproduce", "run/recipe.yaml")
    assert other.returncode == 2 and "run/recipe.yaml: damaged or not a reproducer" in other.stderr


def rewritten(file, change):
    """The file with its members changed by a function of a dict."""
    with zipfile.ZipFile(file) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    change(content)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in content.items():
            archive.writestr(name, value)
    return file


def edit(**changes):
    def change(content):
        content["step.json"] = json.dumps(json.loads(content["step.json"]) | changes).encode()

    return change


def test_damaged_and_foreign_files_are_refused(tmp_path, poisoned):
    _, file = failed(recipe(tmp_path))
    whole = file.read_bytes()

    def refused(words, *overrides):
        with pytest.raises(RequestError, match=words) as caught:
            reproduce(file, list(overrides))
        assert "--reproduce" in str(caught.value) or overrides
        file.write_bytes(whole)

    file.write_bytes(whole[: len(whole) // 2])
    refused("damaged or not a reproducer")
    place = whole.index(b'"format"')
    file.write_bytes(whole[:place] + b"X" + whole[place + 1 :])
    refused("damaged or not a reproducer")
    for change, words in (
        (lambda c: c.pop("tensors.safetensors"), "without step.json and tensors.safetensors"),
        (lambda c: c.update({"tensors.safetensors": b"x" * 100}), "damaged or not a reproducer"),
        (lambda c: c.update({"step.json": b"{"}), "damaged or not a reproducer"),
        (lambda c: c.update({"step.json": b"[]"}), "format: found 'list'"),
        (lambda c: c.update({"bomb": b"0" * 10**9}), "more than 200 times as large"),
        (edit(format="orpo_lite step, version 9"), "found 'orpo_lite step, version 9', expected"),
        (edit(recipe=None), "a script made the run"),
        (edit(processes=[]), "something is missing|of another kind"),
        (edit(processes=3), "of another kind than a run writes"),
        (edit(found=None), "of another kind than a run writes"),
    ):
        rewritten(file, change)
        refused(words)

    def remote(content):
        facts = json.loads(content["step.json"])
        facts["recipe"]["model"]["trust_remote_code"] = True
        content["step.json"] = json.dumps(facts).encode()

    rewritten(file, remote)
    refused("add model.trust_remote_code=true to the command")
    refused("nothing_such", "model.nothing_such=1")
    with pytest.raises(RequestError, match="found no file"):
        reproduce(tmp_path / "nothing.zip", [])


def test_names_in_the_file_lead_nowhere_else(tmp_path, poisoned):
    _, file = failed(recipe(tmp_path))
    rewritten(
        file,
        lambda c: c.update(
            {"weights/../../../escaped.json": b"{}", "/absolute.json": b"{}", "weights/run.py": b"boom"}
        ),
    )
    assert reproduce(file, []) == SAME
    assert not list(tmp_path.rglob("escaped.json")) and not Path("/absolute.json").exists()


def test_the_file_holds_no_token(tmp_path, poisoned, monkeypatch):
    with pytest.raises(RequestError, match="training.hub_token: a token in a recipe"):
        recipe(tmp_path, "training.hub_token=hf_canary123")
    monkeypatch.setenv("HF_TOKEN", "hf_canary123")
    _, file = failed(recipe(tmp_path))
    with zipfile.ZipFile(file) as archive:
        assert not any(b"hf_canary123" in archive.read(name) for name in archive.namelist())


def test_words_that_do_not_go_together():

    app = typer.Typer()
    app.command()(train.command)
    for words, said in (
        (["--reproduce", "x.zip", "--recipe", "quickstart"], "takes its recipe from the file"),
        (["--reproduce", "x.zip", "--dry-run"], "takes its recipe from the file"),
        ([], "found no --recipe"),
    ):
        outcome = CliRunner().invoke(app, words)
        assert isinstance(outcome.exception, RequestError) and said in str(outcome.exception)
