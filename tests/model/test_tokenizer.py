"""Padding token, chat templates by name, new tokens."""

import importlib.util
import logging
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from orpo_lite.common.errors import RequestError
from orpo_lite.model import attach_adapter, load_base, load_tokenizer, save_adapter, stop_token_ids
from orpo_lite.recipe import AdapterSection, ModelSection
from orpo_lite.recipe.loading import chat_templates
from tests.model.conftest import CONFIGS, disturb, logits
from tests.tiny import tiny_model, tiny_tokenizer

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
]


@pytest.fixture(scope="module")
def model_files(tmp_path_factory):
    """Folder with a model but no tokenizer yet."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model(CONFIGS["llama"]()).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(model_files, tmp_path):
    """save(tokenizer) -> ModelSection of a new folder with the model and this tokenizer."""

    def save(tokenizer, **fields):
        place = Path(tempfile.mkdtemp(dir=tmp_path))
        shutil.copytree(model_files, place, dirs_exist_ok=True)
        tokenizer.save_pretrained(place)
        return ModelSection(name_or_path=str(place), quantization="none", **fields)

    return save


@pytest.mark.parametrize(
    ("tokenizer", "pad"),
    [
        ({"pad": "<pad>"}, "<pad>"),
        ({"pad": "</s>", "unk": "<unk>"}, "<unk>"),
        ({"unk": "<unk>", "special_tokens": ("<|finetune_right_pad_id|>",)}, "<|finetune_right_pad_id|>"),
        ({"eos": "<|im_end|>", "pad": "<|im_end|>", "special_tokens": ("<|endoftext|>",)}, "<|endoftext|>"),
        (
            {"special_tokens": ("<|reserved_special_token_0|>", "<|reserved_special_token_1|>")},
            "<|reserved_special_token_0|>",
        ),
        ({"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>"}, "<|endoftext|>"),
        ({"bos": "<s>"}, "</s>"),
    ],
)
def test_pad_is_not_eos_where_the_vocabulary_has_another(folder, tokenizer, pad, caplog):
    caplog.set_level(logging.INFO)
    loaded = load_tokenizer(folder(tiny_tokenizer(**tokenizer)))
    assert loaded.pad_token == pad
    notes = [line for line in caplog.messages if line.startswith("padding token")]
    if pad == loaded.eos_token:
        assert "EOS" in notes[0] and "masks go by length" in notes[0]
    elif tokenizer.get("pad") == pad:
        assert notes == []
    else:
        assert pad in notes[0]


def test_pad_beyond_the_embeddings_is_no_pad(folder, caplog):
    """A Llama-2 derivative's added <pad> has the id 32000, and the model 32000 embeddings."""
    tokenizer = tiny_tokenizer(unk="<unk>")
    tokenizer.add_tokens([f"<extra{i}>" for i in range(30)] + ["[PAD]"], special_tokens=True)
    tokenizer.pad_token = "[PAD]"
    assert tokenizer.pad_token_id >= CONFIGS["llama"]().vocab_size
    with caplog.at_level(logging.INFO):
        assert load_tokenizer(folder(tokenizer)).pad_token == "<unk>"
    assert caplog.text.count("padding token") == 1


def test_no_eos_is_refused(folder):
    with pytest.raises(RequestError, match="EOS"):
        load_tokenizer(folder(tiny_tokenizer(eos=None, pad="<pad>")))


def rendered(tokenizer, chat=CHAT):
    return tokenizer.apply_chat_template(chat, tokenize=False)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "chatml",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\nHello<|im_end|>\n",
        ),
        ("zephyr", "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello</s>\n"),
        ("mistral", "<s>[INST] Be brief.\n\nHi [/INST] Hello</s>"),
        (
            "llama-3",
            "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user"
            "<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>",
        ),
        ("Llama3", None),
    ],
)
def test_templates_by_name(folder, name, text):
    loaded = load_tokenizer(folder(tiny_tokenizer(bos="<s>", pad="<pad>"), chat_template=name))
    assert rendered(loaded) == (
        text or rendered(load_tokenizer(folder(tiny_tokenizer(bos="<s>"), chat_template="llama3")))
    )
    assert rendered(loaded, CHAT[1:2]) != rendered(loaded, CHAT[1:])


@pytest.mark.parametrize("name", ["gemma", "qwen2.5"])
def test_trl_brings_the_common_ones(folder, name):
    pytest.importorskip("trl")
    assert "Hello" in rendered(load_tokenizer(folder(tiny_tokenizer(bos="<s>"), chat_template=name)), CHAT[1:])


def test_without_trl_the_extra_that_brings_a_template_is_named(folder, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "trl" else find(name))
    chat_templates.cache_clear()
    try:
        with pytest.raises(
            RequestError, match=r"no template 'qwen3'.* chatml, llama3, mistral, zephyr; .*orpo-lite\[trl\]"
        ):
            load_tokenizer(folder(tiny_tokenizer(), chat_template="qwen3"))
    finally:
        chat_templates.cache_clear()


def test_generation_prompt_is_a_prefix_of_the_answer(folder):
    for name in ("chatml", "zephyr", "mistral", "llama3"):
        loaded = load_tokenizer(folder(tiny_tokenizer(bos="<s>", pad="<pad>"), chat_template=name))
        prompt = loaded.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
        assert rendered(loaded).startswith(prompt)


def test_template_from_a_file_and_its_errors(folder, tmp_path_factory, caplog):
    caplog.set_level(logging.INFO)
    path = tmp_path_factory.mktemp("t") / "mine.jinja"
    path.write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    tokenizer = tiny_tokenizer(chat_template="the model's own")
    loaded = load_tokenizer(folder(tokenizer, chat_template=str(path)))
    assert rendered(loaded) == "[Be brief.][Hi][Hello]"
    assert "in place of the model's own" in caplog.messages[-1]
    path.write_text("{% for m in messages %}\n{{ m[ }}")
    with pytest.raises(RequestError, match="line 2"):
        load_tokenizer(folder(tokenizer, chat_template=str(path)))
    with pytest.raises(RequestError, match="did you mean chatml.*zephyr"):
        load_tokenizer(folder(tokenizer, chat_template="chatlm"))


def test_a_model_keeps_its_own_template(folder):
    assert load_tokenizer(folder(tiny_tokenizer(chat_template="{{ 'mine' }}"))).chat_template == "{{ 'mine' }}"
    assert load_tokenizer(folder(tiny_tokenizer())).chat_template is None


def test_missing_markers_are_said(folder, caplog):
    caplog.set_level(logging.INFO)
    loaded = load_tokenizer(folder(tiny_tokenizer(pad="<pad>"), chat_template="chatml"))
    assert "<|im_end|>, <|im_start|>: not in the vocabulary" in caplog.messages[-1]
    assert stop_token_ids(loaded) == [loaded.eos_token_id]
    has = tiny_tokenizer(pad="<pad>", special_tokens=("<|im_start|>", "<|im_end|>"))
    loaded = load_tokenizer(folder(has, chat_template="chatml"))
    assert caplog.messages[-1] == "chat template: chatml"
    assert stop_token_ids(loaded) == [loaded.eos_token_id, loaded.convert_tokens_to_ids("<|im_end|>")]


NEW = ["<|im_start|>", "<|im_end|>", "Zebrafish"]
MANY = [*NEW, *(f"<extra{i}>" for i in range(30))]  # more than the model has spare embeddings for


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_new_tokens_are_trained_saved_and_come_back(section, tmp_path, family, quantization):
    spec = section(family, new_tokens=MANY, chat_template="chatml", quantization=quantization)
    tokenizer = load_tokenizer(spec)
    ids = tokenizer.convert_tokens_to_ids(MANY)
    assert all(len(tokenizer(t, add_special_tokens=False)["input_ids"]) == 1 for t in MANY)
    assert tokenizer.decode(ids[:3], skip_special_tokens=True).strip() == "Zebrafish"
    model = attach_adapter(load_base(spec, tokenizer)[0], AdapterSection(r=4), tokenizer=tokenizer)
    tokens = torch.tensor([[5, *ids, 6]])
    model(input_ids=tokens, labels=tokens).loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    rows = {n: p.shape for n, p in trained.items()}
    assert set(rows.values()) == {(len(MANY), 64)} and len(rows) == (1 if family == "llama-tied" else 2)
    disturb(model)
    before = logits_of(model, tokens)
    assert before.shape[-1] == len(tokenizer) > CONFIGS[family]().vocab_size
    save_adapter(model, tmp_path)
    tokenizer.save_pretrained(tmp_path)

    again = load_tokenizer(spec.model_copy(update={"name_or_path": str(tmp_path)}))
    assert again.get_vocab() == tokenizer.get_vocab() and again.chat_template == tokenizer.chat_template
    base, _ = load_base(spec, again)
    model = attach_adapter(base, AdapterSection(init_from=str(tmp_path)), tokenizer=again)
    torch.testing.assert_close(logits_of(model, tokens), before)


@torch.no_grad()
def logits_of(model, tokens):
    return model.eval()(input_ids=tokens).logits


def test_new_tokens_that_exist_are_trained_too(section, caplog):
    caplog.set_level(logging.INFO)
    spec = section("llama", new_tokens=["<pad>"])
    tokenizer = load_tokenizer(spec)
    assert "in the vocabulary already: <pad>" in caplog.messages[-1]
    base, _ = load_base(spec, tokenizer)
    rows = base.get_input_embeddings().weight.shape[0]
    model = attach_adapter(base, AdapterSection(r=2), tokenizer=tokenizer)
    assert model.get_base_model().config.vocab_size == rows
    assert model.peft_config["default"].trainable_token_indices["embed_tokens"] == [tokenizer.pad_token_id]


def test_whole_embeddings_take_new_tokens_in(section):
    spec = section("llama", new_tokens=NEW)
    tokenizer = load_tokenizer(spec)
    adapter = AdapterSection(r=2, modules_to_save=["embed_tokens", "lm_head"])
    model = attach_adapter(load_base(spec, tokenizer)[0], adapter, tokenizer=tokenizer)
    assert model.peft_config["default"].trainable_token_indices is None
    assert logits(model).shape[-1] == CONFIGS["llama"]().vocab_size
