"""Tokens that an adapter adds: every command has them, on what training goes on from and in what it leaves, or refuses them."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig

from orpo_lite.common.errors import RequestError
from orpo_lite.evaluate.answering import Sampling, find_sides
from orpo_lite.export.gguf import export
from orpo_lite.merge.run import merge
from orpo_lite.model.adapter import attach_adapter, load_adapter, save_adapter
from orpo_lite.model.base import load_base
from orpo_lite.model.tokenizer import load_tokenizer
from orpo_lite.recipe import AdapterSection, ModelSection, Recipe
from orpo_lite.train.pipeline import load_model
from tests.export.conftest import converter  # noqa: F401  # fixture
from tests.model.conftest import SIZES, disturb
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training import CHATML

NEW = ["<tool>", "</tool>"]
KINDS = {
    "saved": {"saved": True},
    "rows": {"trainable_token_indices": [420, 421]},
    "rows and saved": {"trainable_token_indices": [420, 421], "saved": "auto"},
    "whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "nothing": {"saved": False},
}


@pytest.fixture
def adapter(base_folder, tmp_path):
    """adapter(kind) -> (base, adapter folder with two tokens more, and PEFT's logits for `ids`)."""

    def make(kind: str):
        options = dict(KINDS[kind])
        base, folder = base_folder("llama"), tmp_path / "adapter"
        saved = options.pop("saved", "auto")
        tokenizer = tiny_tokenizer(("<|im_start|>", "<|im_end|>"), CHATML, eos="<|im_end|>", pad="<pad>")
        tokenizer.add_tokens([f"<spare{i}>" for i in range(420 - len(tokenizer))] + NEW, special_tokens=True)
        model = AutoModelForCausalLM.from_pretrained(base)
        assert len(model.get_input_embeddings().weight) == 420
        torch.manual_seed(0)
        model.resize_token_embeddings(422, mean_resizing=False)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **options))
        disturb(model)
        model.save_pretrained(folder, save_embedding_layers=saved)
        tokenizer.save_pretrained(folder)
        return base, folder, logits(model.eval())

    return make


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 17, 421, 42, 420, 9]])).logits


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "nothing"])
def test_training_goes_on_with_them_and_keeps_them(adapter, tmp_path, caplog, kind):
    """The same logits under the tokens before and after: nothing of an adapter that is continued is left behind."""
    base, folder, expected = adapter(kind)
    spec = ModelSection(name_or_path=str(base), quantization="none")
    tokenizer = load_tokenizer(spec, str(folder))
    assert tokenizer.encode("<tool>") == [420] and tokenizer.chat_template == CHATML
    assert re.search(r"tokenizer: that of adapter.init_from, .*adapter, with \d+ new tokens", caplog.text)
    recipe = Recipe.parse(
        {"name": "x", "model": spec.model_dump(), "adapter": {"init_from": str(folder)}, "data": {"train": "x.jsonl"}},
        "x",
    )
    model, _, _ = load_model(recipe, tokenizer)
    torch.testing.assert_close(logits(model.eval()), expected, atol=1e-5, rtol=1e-5)
    save_adapter(model, tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    again = json.loads((folder / "adapter_config.json").read_text())
    (tmp_path / "again" / "adapter_config.json").write_text(json.dumps(again))
    again = load_adapter(load_base(spec)[0], tmp_path / "again")
    torch.testing.assert_close(logits(again), expected, atol=1e-5, rtol=1e-5)
    merged = AutoModelForCausalLM.from_pretrained(merge(tmp_path / "again", tmp_path / "merged"))
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["saved", "rows", "whole"])
def test_adapter_and_base_are_asked_with_them(adapter, kind, capfd):
    """Also the base, which has no such tokens; PEFT saves the whole embeddings wherever they grew."""
    _, folder, expected = adapter(kind)
    base, side = find_sides(str(folder))
    asked = [{"role": "user", "content": "use <tool>"}]
    assert base.reply(asked, Sampling(3)).tokens and side.reply(asked, Sampling(3)).tokens
    with side.model() as model:
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    assert ("base: tokens from 420 on, which the adapter adds" in capfd.readouterr().err) == (kind != "whole")


def test_tokens_without_rows_are_refused_by_chat_and_training(adapter):
    base, folder, _ = adapter("nothing")
    spec = ModelSection(name_or_path=str(base), quantization="none")
    recipe = Recipe.parse(
        {"name": "x", "model": spec.model_dump(), "adapter": {"init_from": str(folder)}, "data": {"train": "x.jsonl"}},
        "x",
    )
    for call in (
        lambda: find_sides(str(folder))[-1].loaded,
        lambda: load_model(recipe, load_tokenizer(spec, str(folder))),
    ):
        with pytest.raises(
            RequestError, match=r"2 token\(s\) without an embedding: <tool>, </tool>; there are 420 rows"
        ):
            call()


def test_new_tokens_that_a_continued_adapter_does_not_train(adapter):
    base, folder, _ = adapter("rows")
    for new, right in {"<tool>": True, "<other>": False}.items():
        spec = ModelSection(name_or_path=str(base), quantization="none", new_tokens=[new])
        tokenizer = load_tokenizer(spec, str(folder))
        model, _ = load_base(spec, tokenizer)
        if right:
            attach_adapter(model, AdapterSection(init_from=str(folder)), tokenizer=tokenizer)
            continue
        with pytest.raises(RequestError, match=r"model\.new_tokens: .* trains no embedding of <other>: leave them out"):
            attach_adapter(model, AdapterSection(init_from=str(folder)), tokenizer=tokenizer)


@pytest.mark.parametrize("kind", ["saved", "rows", "whole"])
@pytest.mark.parametrize("dry_run", [True, False])
def test_a_lora_file_cannot_hold_them(adapter, tmp_path, kind, dry_run):
    _, folder, _ = adapter(kind)
    with pytest.raises(RequestError, match="export the merged model instead"):
        export(folder, tmp_path / "x.gguf", adapter=True, dry_run=dry_run)


def test_a_base_that_is_gone_is_named_by_what_names_it(adapter, tmp_path):
    _, folder, _ = adapter("nothing")
    config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": "/gone/base"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    for call in (
        lambda **base: merge(folder, tmp_path / "merged", **base),
        lambda **base: export(folder, tmp_path / "x.gguf", **base),
        lambda **base: find_sides(str(folder), **base)[-1].loaded,
    ):
        with pytest.raises(
            RequestError, match=r"adapter_config\.json, base_model_name_or_path: .*\(--base names another base\)"
        ):
            call()
        with pytest.raises(RequestError, match=r"^--base: there is no folder /gone/too"):
            call(base="/gone/too")


@pytest.mark.slow
def test_the_command_printed_for_a_pickle_reads_it(adapter, tmp_path):
    _, folder, _ = adapter("nothing")
    weights = folder / "adapter_model.safetensors"
    held = load_file(weights)
    torch.save(held, folder / "adapter_model.bin")
    weights.unlink()
    with pytest.raises(RequestError) as said:
        merge(folder, tmp_path / "merged")
    [command] = re.findall(r"^  python (.*)$", str(said.value), re.M)
    subprocess.run([sys.executable, *shlex.split(command)], check=True, env=os.environ)
    assert all(torch.equal(value, held[key]) for key, value in load_file(weights).items())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_tokenizer_without_merges_or_of_another_class_is_written_as_it_is(base_folder, tmp_path, converter, family):  # noqa: F811
    """transformers replaces the class of a tokenizer beside a Qwen2 model; llama.cpp reads no file without merges."""
    from gguf import GGUFReader
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [
        "<pad>",
        "<|im_end|>",
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        *(f"<s{i}>" for i in range(162)),
        *NEW,
    ]
    core = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<pad>")
    model = AutoModelForCausalLM.from_pretrained(base_folder(family))
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    disturb(model)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    tokenizer.save_pretrained(tmp_path / "adapter")
    made = export(tmp_path / "adapter", tmp_path / "x.gguf", quant="f32")
    assert GGUFReader(made).fields["tokenizer.ggml.tokens"].contents() == words
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter").get_vocab() == tokenizer.get_vocab()


@pytest.mark.slow
def test_rows_without_a_token_stay_in_a_file(tmp_path, converter):  # noqa: F811
    """Gemma 3's converter would cut them off by another count of the tokens."""
    tokenizer = tiny_tokenizer(("<|im_start|>", "<|im_end|>"), CHATML, eos="<|im_end|>", pad="<pad>")
    config = Gemma3TextConfig(**SIZES | {"vocab_size": len(tokenizer) + 8}, head_dim=16)
    tiny_model(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert export(tmp_path / "model", tmp_path / "x.gguf").is_file()  # which reads it back
