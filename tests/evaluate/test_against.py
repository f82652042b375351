"""Any two models side by side, each as PEFT or transformers has it alone; adapters on another base."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

import orpo_lite.evaluate.__main__ as evaluate
from orpo_lite.common.errors import RequestError
from orpo_lite.common.text import visible
from orpo_lite.data import load_pairs
from orpo_lite.evaluate import chat, terminal
from orpo_lite.evaluate.answering import Reply, Sampling, Side, find_sides
from orpo_lite.evaluate.chat import Comparison, PreferenceFile
from orpo_lite.evaluate.loading import evaluate_sides, resolve_model
from orpo_lite.merge.run import merge
from orpo_lite.model import load_base
from orpo_lite.recipe import DataSource, ModelSection
from orpo_lite.recipe.schema import DataSection
from tests.quickstart.corpus import preference_rows
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training import CHATML, SIZES

ASK = [{"role": "user", "content": "What is the capital of France?"}]
KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True, "target_modules": ["q_proj", "down_proj"], "r": 2},
    "dora": {"use_dora": True},
    "head": {"modules_to_save": ["lm_head"]},
    "embeddings": {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": ["v_proj"]},
    "bias": {"bias": "all"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "rows": {"trainable_token_indices": [5, 7]},
    "saved": {"saved": True},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two bases, `one` and `two`, and an adapter of each kind on `one`."""
    place = tmp_path_factory.mktemp("against")
    tokenizer = tiny_tokenizer(("<|im_start|>", "<|im_end|>"), CHATML, eos="<|im_end|>", pad="</s>")
    for seed, name in enumerate(("one", "two")):
        config = LlamaConfig(**SIZES | {"vocab_size": len(tokenizer), "intermediate_size": 128}, attention_bias=True,
                             eos_token_id=tokenizer.eos_token_id, initializer_range=0.3)  # fmt: skip
        tiny_model(config, seed).save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    for seed, (kind, options) in enumerate(KINDS.items()):
        make_adapter(place / kind, place / "one", seed, **options)
    make_adapter(place / "elsewhere" / "lora", place / "one", 20)
    make_adapter(place / "other", place / "two", 21)
    return place


def make_adapter(folder, base, seed, **options):
    torch.manual_seed(seed)
    saved = options.pop("saved", "auto")  # embeddings as a whole, which loading puts into the base
    options = {"target_modules": ["q_proj", "v_proj"], "r": 4, "task_type": "CAUSAL_LM"} | options
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    if saved is True:
        model.get_input_embeddings().weight.data += 0.1
    model.save_pretrained(folder, save_embedding_layers=saved)


def right(place, name, base="one"):
    """What PEFT or transformers makes of a folder by itself."""
    model = AutoModelForCausalLM.from_pretrained(
        place / base if (place / name / "adapter_config.json").exists() else place / name
    )
    return (
        PeftModel.from_pretrained(model, place / name).eval()
        if (place / name / "adapter_config.json").exists()
        else model.eval()
    )


def greedy(model, prompt, tokenizer):
    ids = torch.tensor([prompt])
    made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
                          pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)  # fmt: skip
    return made[0, len(prompt) :]


def is_right(side, model):
    """Logits within 1e-5 and the same greedy answer."""
    answerer = side
    [prompt] = answerer.prompts([ASK])
    expected = greedy(model, prompt, answerer.tokenizer)
    with side.model() as mine, torch.no_grad():
        both = [one(input_ids=torch.tensor([prompt])).logits for one in (mine, model)]
    text = answerer.tokenizer.decode(expected, skip_special_tokens=True).strip()
    return torch.allclose(*both, atol=1e-5, rtol=0) and answerer.reply(ASK, Sampling(12)).text == text


@pytest.mark.parametrize(
    "first", [pytest.param(k, marks=[pytest.mark.slow] * (k not in ("lora", "dora"))) for k in KINDS]
)
def test_each_side_is_what_it_is_alone(place, first):
    """Against other kinds, loaded before or after it, and against its base."""
    kinds = [*KINDS, "elsewhere/lora", "one", "two"]
    here = kinds.index(first)
    seconds = dict.fromkeys([*(kinds[here + step - len(kinds)] for step in (1, 4)), "elsewhere/lora", "two"])
    alone = {name: right(place, name) for name in (*seconds, first, "one")}
    for second in seconds:
        sides = find_sides(str(place / first), against=str(place / second))
        for side, name in random.Random(first + second).sample(list(zip(sides, (second, first), strict=True)), 2):
            assert is_right(side, alone[name]), (first, second, name)
    base, adapter = find_sides(str(place / first))
    assert is_right(adapter, alone[first]) and is_right(base, alone["one"]) and is_right(adapter, alone[first])


def test_names_tell_the_sides_apart(place):
    def names(*given):
        return [side.name for side in find_sides(str(given[0]), against=str(given[1]), base=(*given, None)[2])]

    assert names(place / "lora", place / "dora/") == ["dora", "lora"]
    assert names(place / "lora", place / "elsewhere/lora") == [str(place / "elsewhere/lora"), str(place / "lora")]
    both = names(place / "lora", place / "lora", str(place / "two"))
    assert both == [f"{place / 'lora'} on {place / 'one'}", f"{place / 'lora'} on {place / 'two'}"]
    with pytest.raises(RequestError, match="--against: .*lora is the model that"):
        names(place / "lora", place / "lora")


# ---- the commands ---------------------------------------------------------------------------------------------------


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "p.txt").write_text("How much is 4 plus 5?\nWho are you?\n")
    return str(tmp_path / "p.txt")


def test_an_adapter_on_a_merged_adapter(place, tmp_path):
    """Refused with the commands on the adapter alone, right on the merged first one, and comparable with it."""
    second = shutil.copytree(place / "rslora", tmp_path / "second")
    config = json.loads((second / "adapter_config.json").read_text())
    (second / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(place / "lora")}))
    with pytest.raises(RequestError, match="orpo_lite.merge .*lora"):
        find_sides(str(second))
    merged = merge(place / "lora", tmp_path / "lora-merged")
    first = right(place, "lora").merge_and_unload()
    [base, adapter] = find_sides(str(second), base=str(merged))
    assert is_right(base, first) and is_right(adapter, PeftModel.from_pretrained(first, second).eval())
    [one, adapter] = find_sides(str(second), base=str(merged), against=str(place / "lora"))
    assert is_right(one, right(place, "lora"))
    assert is_right(adapter, PeftModel.from_pretrained(right(place, "lora").merge_and_unload(), second).eval())


def test_another_base_is_under_the_adapter_in_each_command(place, prompts, tmp_path, capsys):
    """Also where the adapter names a base that is gone."""
    gone = shutil.copytree(place / "lora", tmp_path / "gone")
    config = json.loads((gone / "adapter_config.json").read_text())
    (gone / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "./gone"}))
    base = str(place / "two")
    tokenizer = find_sides(base)[0].tokenizer
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), gone).eval()
    prompt = tokenizer.apply_chat_template(ASK, add_generation_prompt=True)["input_ids"]
    text = tokenizer.decode(greedy(model, prompt, tokenizer), skip_special_tokens=True).strip()
    capsys.readouterr()
    chat.command(str(gone), base=base, prompt=ASK[0]["content"], max_new_tokens=12)
    assert capsys.readouterr().out == visible(text) + "\n"
    (tmp_path / "ask.jsonl").write_text(json.dumps({"prompt": ASK}))
    evaluate.command(str(gone), base=base, prompts=str(tmp_path / "ask.jsonl"), max_new_tokens=12, as_json=True)
    assert json.loads(capsys.readouterr().out)["answers"][0]["answers"]["adapter"] == [text]
    rows = preference_rows(0)["heldout"][:3]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results, _ = evaluate_sides(find_sides(str(gone), base=base), str(tmp_path / "held.jsonl"))
    before, _ = evaluate_sides(find_sides(base), str(tmp_path / "held.jsonl"))
    assert results["base"]["logps/chosen"] == pytest.approx(before["model"]["logps/chosen"], abs=1e-5)
    with pytest.raises(RequestError, match="--base: .*one is a whole model"):
        chat.command(str(place / "one"), base=base, prompt="x")
    with pytest.raises(RequestError, match="--base: .*one is a whole model"):
        evaluate.command(str(place / "one"), base=base)


def test_pairs_of_one_run_by_two_models(trained, place, tmp_path, capsys):
    """The held-out pairs are the run's; another tokenizer reads the same rows in its own form."""
    evaluate.command(str(trained), against=str(place / "two"), as_json=True)
    found = json.loads(capsys.readouterr().out)
    evaluate.command(str(trained), as_json=True)
    alone = json.loads(capsys.readouterr().out)
    assert list(found) == ["two", trained.name, "drops"]
    assert found[trained.name] == alone["adapter"]
    for name in ("two", trained.name):
        assert sum(one["pairs"] for one in found[name]["by"]["prompt_tokens"]) == found[name]["pairs"]
    data = resolve_model(str(trained)).recipe.data
    section = DataSection(train=data.eval, eval_fraction=0, max_rows=data.max_eval_rows, max_length=data.max_length)
    logps, model = [], right(place, "two")
    for row in load_pairs(section, find_sides(str(place / "two"))[0].tokenizer).train:
        ids = torch.tensor([row["chosen_ids"]])
        with torch.no_grad():
            each = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        logps.append(each[row["chosen_start"] - 1 :].mean().item())
    assert found["two"]["logps/chosen"] == pytest.approx(sum(logps) / len(logps), abs=1e-5)
    evaluate.command(str(trained), against=str(place / "two"))
    told = capsys.readouterr().out
    assert "two" in told and trained.name in told


def test_answers_of_two_runs_and_a_judge(place, prompts, server, tmp_path, capsys):
    output = tmp_path / "a.jsonl"
    options = {"prompts": prompts, "max_new_tokens": 8, "output": output}
    one, two = str(place / "lora"), str(place / "elsewhere" / "lora")
    evaluate.command(one, against=two, judge=server.url, judge_model="m", **options)
    assert "wins, ties, losses" in capsys.readouterr().out
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [set(row["answers"]) for row in rows] == [{one, two}] * 2
    for name in (one, two):
        [_, side] = find_sides(name)
        assert rows[1]["answers"][name] == [side.reply(rows[1]["prompt"], Sampling(8)).text]
    for other in (str(place / "dora"), str(place / "one")):
        with pytest.raises(RequestError, match=r"line 1: settings\.sides"):
            evaluate.command(one, against=other, **options)
    with pytest.raises(RequestError, match=r"line 1: settings\.sides"):
        evaluate.command(one, against=two, base=str(place / "two"), **options)


def test_choices_between_two_runs_are_signed_and_train(place, tmp_path, capsys, monkeypatch):
    answerers = find_sides(str(place / "lora"), against=str(place / "two"))
    file = tmp_path / "mine.jsonl"
    talk = Comparison(answerers, Sampling(8), None, PreferenceFile(file), True, random.Random(0), True)
    typed = iter(["Who are you?", "1", "And you?", "e", "Nobody."])
    monkeypatch.setattr(terminal, "read_message", lambda *_: next(typed, "/quit"))
    monkeypatch.setattr(terminal, "read_choice", lambda *_: next(typed))
    talk.run()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    said = {one.name: one.reply(rows[0]["prompt"], Sampling(8)).text for one in answerers}
    assert {rows[0]["chosen_model"], rows[0]["rejected_model"]} == {"lora", "two"}
    assert rows[0]["chosen"][0]["content"] == said[rows[0]["chosen_model"]]
    assert rows[0]["rejected"][0]["content"] == said[rows[0]["rejected_model"]]
    assert (rows[1]["chosen_model"], rows[1]["rejected_model"]) == ("you", "lora")
    told = capsys.readouterr()
    assert "kept; 1 was" in told.out and "the answer of lora was preferred" in told.err
    section = DataSection(train=[DataSource(path=str(file))], eval_fraction=0)
    assert len(load_pairs(section, answerers[0].tokenizer).train) == 2


def test_an_answer_without_words_is_named(place, monkeypatch, capsys):
    monkeypatch.setattr(Side, "reply", lambda *_, **__: Reply("", 1, True))
    chat.command(str(place / "lora"), prompt="Hello")
    told = capsys.readouterr()
    assert told.out == "" and "(ended at once)" in told.err
    chat.command(str(place / "lora"), prompt="Hello", compare=True)
    assert "(1 base: ended at once)" in capsys.readouterr().out


def test_the_plain_base_is_loaded_as_a_base(place):
    model, _ = load_base(ModelSection(name_or_path=str(place / "two"), quantization="none"))
    assert is_right(find_sides(str(place / "two"))[0], model)
