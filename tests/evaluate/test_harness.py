"""The hand-off to lm-evaluation-harness: its command line, by what the run was trained on."""

from __future__ import annotations

import json
import shlex
import shutil

import pytest

import orpo_lite.evaluate.__main__ as evaluate
from orpo_lite.evaluate.lm_eval import lm_eval_commands
from orpo_lite.evaluate.loading import resolve_model


def arguments(line):
    """Options of a command as lm_eval 0.4.13 reads them; --model_args is JSON, or key=value with commas."""
    words = shlex.split(line)
    assert words[:4] == ["lm_eval", "run", "--model", "hf"]
    found = {"chat": "--apply_chat_template" in words}
    for name in ("--model_args", "--tasks", "--output_path", "--batch_size"):
        found[name[2:]] = words[words.index(name) + 1]
    given = found["model_args"]
    if not given.startswith("{"):
        found["model_args"] = dict(pair.split("=", 1) for pair in given.split(","))
    else:
        found["model_args"] = json.loads(given)
    return found


@pytest.fixture
def found(trained):
    return resolve_model(str(trained))


def test_an_adapter_on_a_base_that_is_not_quantized(found, trained):
    made = lm_eval_commands(found, "ifeval,gsm8k")
    [line] = made["commands"]
    given = arguments(line)
    assert given["model_args"] == {
        "pretrained": str(resolve_model("builtin:quickstart/model").path), "peft": str(trained), "tokenizer": str(trained),
        "dtype": "float32"}  # fmt: skip
    assert given["chat"] and given["tasks"] == "ifeval,gsm8k" and given["output_path"] == str(trained / "lm_eval")
    [base] = made["base"]
    assert arguments(base)["model_args"] == {k: v for k, v in given["model_args"].items() if k != "peft"}
    assert not made["notes"] and "lm_eval[hf,ifeval]" in made["install"]


def test_a_quantized_base_is_merged_as_trained(found, trained):
    found.model = found.model.model_copy(update={"quantization": "nf4"})
    found.facts["base_model"] = {"dtype": "bfloat16"}
    made = lm_eval_commands(found, "ifeval")
    merge, line = made["commands"]
    assert merge == f"python -m orpo_lite.merge {trained} --output {trained}-merged-quantized --onto quantized"
    assert arguments(line)["model_args"] == {
        "pretrained": f"{trained}-merged-quantized", "dtype": "bfloat16", "tokenizer": str(trained)}  # fmt: skip
    assert "transformers" in made["notes"][0]


def test_trained_embeddings_are_merged_first(found, trained):
    path = trained / "adapter_config.json"  # the session's: put back
    before = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(before) | {"modules_to_save": ["lm_head"]}))
        made = lm_eval_commands(found, "ifeval")
        assert made["commands"][0].startswith("python -m orpo_lite.merge") and "--onto" not in made["commands"][0]
        assert "lm_head" in made["notes"][0]
    finally:
        path.write_text(before)


def test_what_the_template_takes_and_awkward_paths_travel_as_json(found, trained, tmp_path):
    found.recipe.data.template_kwargs = {"enable_thinking": False}
    found.model = found.model.model_copy(
        update={"name_or_path": "owner/name", "revision": "abc", "trust_remote_code": True}
    )
    args = arguments(lm_eval_commands(found, "ifeval")["commands"][0])["model_args"]
    assert args["chat_template_args"] == {"enable_thinking": False} and args["pretrained"] == "owner/name"
    assert args["revision"] == "abc" and args["trust_remote_code"] is True
    found.recipe.data.template_kwargs = {}
    found.path = str(shutil.copytree(trained, tmp_path / "a,b"))
    assert arguments(lm_eval_commands(found, "ifeval")["commands"][0])["model_args"]["peft"] == str(tmp_path / "a,b")


def test_strings_get_no_template(found):
    for one in found.facts["data"]["sources"].values():
        one["shape"] = "strings, explicit prompt"
    assert not arguments(lm_eval_commands(found, "ifeval")["commands"][0])["chat"]


def test_a_gguf_base_is_merged_first(found, trained):
    found.model = found.model.model_copy(update={"gguf_file": "q4.gguf"})
    made = lm_eval_commands(found, "ifeval")
    assert made["commands"][0] == f"python -m orpo_lite.merge {trained} --output {trained}-merged"
    assert arguments(made["commands"][1])["model_args"] == {
        "pretrained": f"{trained}-merged", "dtype": "float32", "tokenizer": str(trained)}  # fmt: skip
    assert arguments(made["base"][0])["model_args"]["gguf_file"] == "q4.gguf" and "GGUF" in made["notes"][0]


def test_a_whole_model(babbling, capsys):
    evaluate.command(str(babbling), lm_eval="ifeval")
    told = capsys.readouterr().out.strip().splitlines()
    assert len(told) == 2 and told[0].startswith("# pip install")
    assert arguments(told[1])["model_args"] == {"pretrained": str(babbling), "dtype": "auto"}
    evaluate.command(str(babbling), lm_eval="ifeval", as_json=True)
    assert json.loads(capsys.readouterr().out)["commands"] == told[1:]
