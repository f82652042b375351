"""`orpo-lite new`: the recipe that it writes trains as printed, cuts nothing or little, and says why it is as it is."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from transformers import LlamaConfig

from orpo_lite.__main__ import load
from orpo_lite.common.console import run_command
from orpo_lite.recipe import Recipe
from orpo_lite.recipe.loading import resolve_path
from orpo_lite.train.new import Draft, choose_steps, length_for
from tests.tiny import tiny_config, tiny_model, tiny_tokenizer

MODEL = "builtin:quickstart/model"
FOLDER = Path(resolve_path(MODEL))
CHAT = [
    {
        "prompt": [{"role": "user", "content": f"How much is {n} plus {n}?"}],
        "chosen": [{"role": "assistant", "content": f"It is {2 * n}, gladly."}],
        "rejected": [{"role": "assistant", "content": f"Look it up, {n}."}],
    }
    for n in range(40)
]
PLAIN = [
    {side: turns if isinstance(turns, str) else turns[0]["content"] for side, turns in row.items()} for row in CHAT
]


@pytest.fixture
def new(tmp_path, monkeypatch, capfd):
    """Runs a command in an empty folder, by default with data in it: exit status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ORPO_LITE_CACHE", str(tmp_path / "cache"))

    def call(rows, *words, command="new"):
        if rows is not None:
            Path("my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        monkeypatch.setattr(sys, "argv", [f"orpo-lite {command}", *(["my.jsonl"] if rows is not None else []), *words])
        with pytest.raises(SystemExit) as stop:
            run_command(load(command))
        return int(stop.value.code or 0), *capfd.readouterr()

    return call


def base(folder, **tokenizer):
    """A tiny Llama with this tokenizer."""
    made = tiny_tokenizer(bos="<s>", pad="<pad>", **tokenizer)
    made.save_pretrained(folder)
    tiny_model(tiny_config(LlamaConfig(), made)).save_pretrained(folder)
    return str(folder)


def recipe(name="quickstart-my.yaml"):
    return Recipe.load(name)


def test_what_it_prints_is_what_to_type_next_and_trains(new):
    status, out, err = new(CHAT, "--model", MODEL, "--gpu", "12GB")
    assert status == 0, err
    commands = [line for line in out.splitlines() if line.startswith("  orpo-lite ")]
    assert commands == ["  orpo-lite data --recipe quickstart-my.yaml", "  orpo-lite train --recipe quickstart-my.yaml"]
    assert "40" in out and "32 pairs to train on, 8 held out" in out
    told = recipe()
    assert told.data.apply_template is False and told.model.chat_template is None
    assert (
        told.orpo.tokens_per_batch and told.memory.checkpointing == "none"
    )  # the model is tiny: the whole step at once
    assert "GB of 12 GB, as planned: 8 pairs of the longest at once, no layer checkpointed" in told.needs
    text = Path("quickstart-my.yaml").read_text("utf-8")
    for said in ("the run's name in its report", "outputs/<name>", "output_dir: FOLDER", "nothing is cut", *commands):
        assert said in " ".join(text.replace("#", "").split()) or said in text
    for line in commands:
        _, command, *words = shlex.split(line)
        status, out, err = new(None, *words, command=command)
        assert status == 0 and "dropped 0" not in out, err
    assert Path("outputs/quickstart-my/run.json").is_file()
    assert "32 training pairs, 8 held out" in out and "steps of" not in out


def test_nothing_is_written_over(new):
    assert new(CHAT[:4], "--model", MODEL, "--output", "a.yaml")[0] == 0
    before = Path("a.yaml").read_text("utf-8")
    status, _, err = new(CHAT, "--model", MODEL, "--output", "a.yaml")
    assert status == 2 and "a.yaml: exists already" in err and Path("a.yaml").read_text("utf-8") == before


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "found no --model"),
        (["--model", "no/where"], "--model: no/where is neither a local folder nor in the download cache"),
        (
            ["--model", "Qwen/Qwen2-0.5B-Instruct"],
            "download https://huggingface.co/Qwen/Qwen2-0.5B-Instruct beforehand",
        ),
        (["--model", "./no"], "--model: there is no folder"),
        (["--model", MODEL, "--gpu", "rtx-3061"], "did you mean rtx-3060"),
        (["--model", MODEL, "--gpu", "all"], "expected one card"),
        (["--model", MODEL, "--output", "a.txt"], "ending in .yaml"),
        (["--model", MODEL, "data.maxlength=3"], "did you mean data.max_length=3?"),
        (["--model", MODEL, "data.columns={prompt:question}"], "data.columns={prompt: question}"),
        (["--model", MODEL, "data.train=none.jsonl"], "none.jsonl: no such file"),
    ],
)
def test_what_cannot_be_is_said_and_nothing_is_written(new, words, told):
    status, out, err = new(CHAT[:2], *words)
    assert status == 2 and told in err and not out
    assert not list(Path().glob("*.yaml"))


def test_plain_text_gets_the_template_unless_it_has_one_already(new):
    assert new(PLAIN, "--model", MODEL)[0] == 0 and recipe().data.apply_template
    assert new(PLAIN, "--model", MODEL, "data.apply_template=false", "--output", "given.yaml")[0] == 0
    assert not recipe("given.yaml").data.apply_template
    assert "# given on the command line\n  apply_template: false" in Path("given.yaml").read_text("utf-8")
    marked = [
        row | {"prompt": f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"} for row in PLAIN
    ]
    assert new(marked, "--model", MODEL, "--output", "marked.yaml")[0] == 0
    assert not recipe("marked.yaml").data.apply_template
    assert "the text holds the template's marks already (<|im_end|>, <|im_start|>)" in Path("marked.yaml").read_text(
        "utf-8"
    )


def test_a_base_without_a_template_gets_one_for_conversations(new, tmp_path):
    shutil.copytree(FOLDER, tmp_path / "chatml", ignore=shutil.ignore_patterns("*.jinja"))
    for model, template in (("./chatml", "chatml"), (base(tmp_path / "plain"), "zephyr")):
        assert new(CHAT, "--model", model, "--output", f"{template}.yaml")[0] == 0
        found = recipe(f"{template}.yaml")
        assert found.model.chat_template == template and not found.data.apply_template
    status, _, _ = new(PLAIN, "--model", base(tmp_path / "plain"), "--output", "text.yaml")
    assert status == 0 and recipe("text.yaml").model.chat_template is None
    assert not recipe("text.yaml").data.apply_template and "it continues the text" in Path("text.yaml").read_text(
        "utf-8"
    )


def test_variables_of_the_template_that_would_mislead_are_set(new, tmp_path):
    source = "{% if enable_thinking %}T{% endif %}{% if not date_string is defined %}{% set date_string = strftime_now('%d') %}{% endif %}{{ date_string }}"  # fmt: skip
    source += "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    model = base(tmp_path / "thinks", chat_template=source)
    assert new(CHAT, "--model", model, "--output", "plain.yaml")[0] == 0
    assert recipe("plain.yaml").data.template_kwargs == {"enable_thinking": False, "date_string": "26 Jul 2024"}
    thought = [
        row | {"chosen": [{"role": "assistant", "content": f"<think>{n}</think> {n}"}]} for n, row in enumerate(CHAT)
    ]
    assert new(thought, "--model", model, "--output", "thought.yaml")[0] == 0
    assert recipe("thought.yaml").data.template_kwargs == {"date_string": "26 Jul 2024"}


def test_names_that_are_no_plain_words_and_given_fields_come_back_as_they_are(new):
    data = Path("a: 'b' #1\n.jsonl")
    data.write_text("".join(json.dumps(row) + "\n" for row in CHAT[:4]), "utf-8")
    words = [str(data), 'description="it\'s: #1"', "training.output_dir=out", "orpo={beta: 0.3}", "--model", MODEL]
    status, out, err = new(None, *words, "--output", "its own.yaml")
    assert status == 0 and "--recipe 'its own.yaml'" in out, err
    found = recipe("its own.yaml")
    assert [source.path for source in found.data.train] == [str(data)] and found.description == "it's: #1"
    assert found.orpo.beta == 0.3 and str(found.folder) == "out" and found.name == "quickstart-a-b-1"


@pytest.mark.parametrize(
    ("tokens", "places", "limit", "said"),
    [
        ([44], None, 64, "nothing is cut"),
        ([64] * 9, None, 64, "nothing is cut"),
        (range(1, 1001), None, 1024, "nothing is cut"),
        ([*[500] * 999, 9000], None, 512, "1 of 1,000 pairs is longer and dropped"),
        ([*[500] * 999, 700], None, 704, "nothing is cut"),
        ([300, 5000], 4096, 4096, "the model's longest; 1 of 2 pairs is longer"),
    ],
)
def test_lengths_cut_nothing_or_little(tokens, places, limit, said):
    found, why = length_for(np.array([*tokens]), places)
    assert found == limit and said in why


@pytest.mark.parametrize(
    ("pairs", "size", "held_out", "batch", "epochs", "rate"),
    [
        (1, 1e6, 0, 8, 3, "4e-3"),
        (10, 1.3e8, 2, 8, 3, "2e-4"),
        (500, 5e8, 25, 8, 2, "1e-4"),
        (2000, 3e9, 100, 16, 1, "1e-4"),
        (61_000, 7e9, 500, 32, 1, "5e-5"),
    ],
)
def test_steps_follow_from_the_pairs_and_the_rate_from_the_model(pairs, size, held_out, batch, epochs, rate):
    draft = Draft("my.jsonl", "org/model", [])
    choose_steps(draft, pairs, size, None)
    found = draft.recipe()
    training = found.training
    assert min(round(pairs * found.data.eval_fraction), found.data.max_eval_rows or pairs) == pytest.approx(
        held_out, abs=1
    )
    assert found.pairs_at_once * training["gradient_accumulation_steps"] == batch
    assert training["num_train_epochs"] == epochs and training["learning_rate"] == float(rate)
    text = draft.text("x")
    assert Recipe.parse(yaml.safe_load(text)) == found
    assert all(re.match(r" *(# |[\w.]+:)|$", line) and len(line) <= 120 for line in text.splitlines())
