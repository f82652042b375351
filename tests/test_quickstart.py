"""The embedded quickstart: what is shipped, what the demonstration rests on, and (slow) that it can be rebuilt."""

import json
import re
from pathlib import Path

import pytest
import yaml

from orpo_lite.recipe import Recipe
from orpo_lite.recipe.loading import PACKAGE, recipes_folder
from tests.commands import command
from tests.quickstart.corpus import CLOSERS, FAMILIES, OPENERS, preference_rows

SHIPPED = PACKAGE / "data" / "quickstart"
SPLITS = ("train", "heldout")


def read(folder, split):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def rows():
    return {split: read(SHIPPED, split) for split in SPLITS}


@pytest.fixture(scope="module")
def rule():
    given = Recipe.load("quickstart").evaluation.rule
    return {"chosen": re.compile(given.chosen, re.I), "rejected": re.compile(given.rejected, re.I)}


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(SHIPPED / "model")


def subject(row):
    """The question instance behind a prompt: family and subject, however it is worded."""
    text = row["prompt"][-1]["content"]
    found = [
        (family.topic, s)
        for family in FAMILIES
        for s in family.facts
        if text in [question.format(s=s) for question in family.questions]
    ]
    assert len(found) == 1, text
    return found[0]


def test_fits_in_the_package():
    files = [path for path in SHIPPED.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= 8e6
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= {
        path.name for path in files
    }


def test_data_are_what_the_seed_gives():
    for split, made in preference_rows(0).items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
        assert (SHIPPED / f"{split}.jsonl").read_bytes() == text.encode()
    assert preference_rows(1) != preference_rows(0)


def test_held_out_questions_are_never_trained_on(rows):
    assert len(rows["heldout"]) >= 100
    assert len({json.dumps(row["prompt"]) for row in rows["heldout"]}) == len(rows["heldout"])
    train, heldout = ({subject(row) for row in rows[split]} for split in SPLITS)
    assert len(heldout) == len(rows["heldout"])
    assert not train & heldout


def test_rows_are_conversations_of_every_kind(rows):
    for row in rows["train"] + rows["heldout"]:
        assert set(row) == {"prompt", "chosen", "rejected"}
        assert row["prompt"][-1]["role"] == "user"
        assert [turn["role"] for side in ("chosen", "rejected") for turn in row[side]] == ["assistant"] * 2
    for split in SPLITS:
        roles = {tuple(turn["role"] for turn in row["prompt"]) for row in rows[split]}
        assert roles == {("user",), ("system", "user"), ("user", "assistant", "user")}


def test_no_prompt_holds_a_word_of_the_rule(rows, rule):
    words = {word for pattern in rule.values() for word in re.search(r"\((.*)\)", pattern.pattern)[1].split("|")}
    assert len(words) >= 20
    for row in rows["train"] + rows["heldout"]:
        text = " ".join(turn["content"] for turn in row["prompt"]).lower()
        assert not [word for word in words if word in text]  # not even inside another word


def test_the_rule_tells_every_answer_apart(rows, rule):
    for row in rows["train"] + rows["heldout"]:
        for side, other in (("chosen", "rejected"), ("rejected", "chosen")):
            answer = row[side][0]["content"]
            assert rule[side].search(answer) and not rule[other].search(answer), answer


def test_styles_mirror_each_other(rows, tokenizer):
    """Equal lengths phrase by phrase, so neither style is easier to predict nor longer."""
    for courteous, curt in OPENERS + [(f" {a}", f" {b}") for a, b in CLOSERS]:
        assert len(tokenizer(courteous).input_ids) == len(tokenizer(curt).input_ids), (courteous, curt)
    for split in SPLITS:
        lengths = [
            [len(tokenizer(row[s][0]["content"]).input_ids) for s in ("chosen", "rejected")] for row in rows[split]
        ]
        longer, shorter = sum(c > r for c, r in lengths), sum(c < r for c, r in lengths)
        assert 0.4 < longer / (longer + shorter) < 0.6


def test_both_answers_state_the_same_fact(rows):
    for row in rows["train"] + rows["heldout"]:
        chosen, rejected = (row[side][0]["content"].split(". ")[1].split()[-1] for side in ("chosen", "rejected"))
        assert chosen == rejected


def test_tokenizer_round_trip(tokenizer):
    for text in ("Certainly. 7 plus 5 makes 12.", "  Żółw, naïve\n\tcafé 漢字 🙂 don't", "<|im_start|>user"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert len(tokenizer("<|im_start|>").input_ids) == 1


def test_chat_template_is_chatml(tokenizer):
    messages = [
        {"role": r, "content": c} for r, c in (("system", "S"), ("user", "U"), ("assistant", "A"), ("user", "V"))
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text.startswith(tokenizer.apply_chat_template(messages, tokenize=False))


def test_model_is_a_plain_float32_llama(tokenizer):
    from safetensors import safe_open
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(SHIPPED / "model")
    assert config.architectures == ["LlamaForCausalLM"]
    assert (config.vocab_size, config.eos_token_id, config.pad_token_id) == (len(tokenizer), 2, 0)
    with safe_open(SHIPPED / "model" / "model.safetensors", "pt") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"F32"}


def base_accuracy(folder):
    """Share of held-out pairs whose chosen answer has the higher mean log-probability a token, in plain float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()

    @torch.no_grad()
    def logp(prompt, answer):
        head = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        start = len(tokenizer(head).input_ids)
        ids = torch.tensor([tokenizer(head + answer[0]["content"] + "<|im_end|>").input_ids])
        logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        return logps[start - 1 :].mean().item()

    rows = read(folder, "heldout")
    return sum(logp(row["prompt"], row["chosen"]) > logp(row["prompt"], row["rejected"]) for row in rows) / len(rows)


def test_base_prefers_neither_side():
    assert 0.4 <= base_accuracy(SHIPPED) <= 0.6


def train(folder, output, *overrides):
    """`python -m orpo_lite.train --recipe quickstart` on the files in `folder`; the run's record."""
    words = ["train", "--recipe", "quickstart"]
    words += [f"model.name_or_path={folder / 'model'}", f"data.train={folder / 'train.jsonl'}"]
    words += [f"data.eval={folder / 'heldout.jsonl'}", f"training.output_dir={output}"]
    # what the recipe says about its own data is not carried over to other files, even to copies of them
    rule = yaml.safe_load((recipes_folder() / "quickstart.yaml").read_text("utf-8"))["evaluation"]["rule"]
    words += ["training.max_steps=60", f"evaluation.rule={json.dumps(rule)}", *overrides]
    done = command(*words, cwd=Path(__file__).parent, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads((output / "run.json").read_text("utf-8"))


@pytest.mark.slow
def test_another_seed_behaves_as_what_is_shipped(tmp_path):
    folder = tmp_path / "built"
    done = command(
        str(Path(__file__).with_name("quickstart") / "build.py"), "--output", folder, "--seed", "7", timeout=1800
    )
    assert done.returncode == 0, done.stderr
    assert base_accuracy(folder) <= 0.6
    check_run(train(folder, tmp_path / "run"))


@pytest.mark.slow
def test_shipped_model_learns_the_style(tmp_path):
    check_run(train(SHIPPED, tmp_path / "run"))


def check_run(record):
    before, after = (record["eval"][when]["rewards/accuracies"] for when in ("before", "after"))
    assert before <= 0.6 and after >= 0.95
    shares = record["rule"]
    assert 0.2 <= shares["before"]["chosen"] <= 0.55
    assert shares["before"]["chosen"] + shares["before"]["rejected"] >= 0.95
    assert shares["after"]["chosen"] >= 0.9


@pytest.mark.slow
def test_shuffled_labels_teach_nothing(tmp_path):
    """The control: chosen and rejected swapped in a random half of the training rows."""
    import random
    import shutil

    shutil.copytree(SHIPPED / "model", tmp_path / "model")
    shutil.copy(SHIPPED / "heldout.jsonl", tmp_path)
    rng, swapped = random.Random(0), []
    for row in read(SHIPPED, "train"):
        if rng.random() < 0.5:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
        swapped.append(json.dumps(row) + "\n")
    (tmp_path / "train.jsonl").write_text("".join(swapped), "utf-8")
    record = train(tmp_path, tmp_path / "run", "evaluation.samples=0")
    assert record["eval"]["after"]["rewards/accuracies"] < 0.65
