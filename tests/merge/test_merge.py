"""Merging: a plain transformers model with the adapter model's logits, whole or not at all."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from orpo_lite.common.console import run_command
from orpo_lite.common.errors import RequestError
from orpo_lite.merge.__main__ import command
from orpo_lite.merge.lora_edits import LowRank
from orpo_lite.merge.run import merge
from orpo_lite.model import attach_adapter, load_base, load_tokenizer, save_adapter
from orpo_lite.recipe import AdapterSection, ModelSection, Recipe
from tests import commands
from tests.merge.conftest import tensors
from tests.model.conftest import disturb, logits, with_adapter

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
NEW = ["<|im_start|>", "<|im_end|>", *(f"<extra{i}>" for i in range(30))]


@pytest.fixture
def trained(section, tmp_path):
    """trained(family, model fields, **adapter fields) -> (adapter model after some 'training', its run folder)."""

    def make(family: str, model: dict[str, Any] | None = None, run: bool = True, **fields: Any):
        spec = section(family, **model or {})
        tokenizer = load_tokenizer(spec)
        tokenizer.chat_template = tokenizer.chat_template or TEMPLATE
        torch.manual_seed(0)  # of the adapter's start
        peft_model, adapter = with_adapter(load_base(spec, tokenizer)[0], tokenizer, **fields)
        disturb(peft_model)
        folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        save_adapter(peft_model, folder)
        tokenizer.save_pretrained(folder)
        if run:
            recipe = Recipe(name="t", model=spec, adapter=adapter, data={"train": "x.jsonl"})  # type: ignore[arg-type]
            recipe.save(folder / "recipe.yaml")
        return peft_model, folder

    return make


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def plain(folder: Path, **options: Any) -> Any:
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    if kind == "gemma2":  # as the kit loads it: older versions' own choice leaves out the soft caps
        options["attn_implementation"] = "eager"
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model


VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {".*0.*": 8}, "alpha_pattern": {".*1.*": 3}},
    "bias": {"bias": "all"},
}


FAMILIES = {"llama": VARIANTS, "gpt2": VARIANTS, "qwen2": ["lora", "dora"],
            "gemma2": ["lora", "bias"]}  # fmt: skip
"""Untied, transposed layers, tied with biases, tied and scaled."""


@pytest.mark.parametrize(("family", "variant"), [(family, v) for family in FAMILIES for v in FAMILIES[family]])
def test_merged_is_the_adapter_model(trained, tmp_path, family, variant):
    model, run = trained(family, **VARIANTS[variant])
    expected = logits(model)
    out = merge(run, tmp_path / "merged")
    merged = plain(out)
    same(logits(merged), expected)
    assert not (out / "adapter_config.json").exists() and not any("lora" in n for n, _ in merged.named_parameters())
    assert merged.config.tie_word_embeddings is model.config.tie_word_embeddings
    before, after = (plain(Path(f)).state_dict() for f in (model.get_base_model().name_or_path, out))
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}


ENDS = {
    "llama": ["embed_tokens", "lm_head"],
    "llama-tied": ["embed_tokens"],
    "qwen2": ["lm_head"],
    "gemma2": ["embed_tokens", "norm"],
    "gpt2": ["wte"],
}


@pytest.mark.parametrize("family", ENDS)
def test_modules_trained_whole(trained, tmp_path, family):
    model, run = trained(family, modules_to_save=ENDS[family])
    same(logits(plain(merge(run, tmp_path / "merged"))), logits(model))


@pytest.mark.parametrize("family", ["llama-tied", "qwen2", "gemma2"])
@pytest.mark.parametrize("end", ["lm_head", "embed_tokens"])
def test_lora_on_one_end_of_tied_embeddings(trained, tmp_path, family, end):
    model, run = trained(family, target_modules=["q_proj", end])
    same(logits(plain(merge(run, tmp_path / "merged"))), logits(model))


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
    ],
    ids=["lora", "head", "embedding"],
)
def test_ends_that_are_stored_apart_under_the_flag_of_tied_ones(trained, base_folder, tmp_path, fields):
    base = shutil.copytree(base_folder("llama-tied"), tmp_path / "base")
    weights = tensors(base / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    loaded = plain(base)
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)
    model, run = trained("llama-tied", {"name_or_path": str(base)}, **fields)
    same(logits(plain(merge(run, tmp_path / "merged"))), logits(model))


@pytest.mark.parametrize("run", [True, False])
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
@pytest.mark.parametrize("tokens", [NEW, ["<pad>"]])
def test_new_tokens(trained, tmp_path, family, run, tokens):
    """With the recipe, and from PEFT's files and the tokenizer alone."""
    model, folder = trained(family, {"new_tokens": tokens}, run=run)
    out = merge(folder, tmp_path / "merged")
    merged, tokenizer = plain(out), AutoTokenizer.from_pretrained(out)
    ids = torch.tensor([[5, *tokenizer.convert_tokens_to_ids(tokens), 6]])
    assert ids.max() < merged.get_input_embeddings().weight.shape[0] == merged.config.vocab_size
    with torch.no_grad():
        same(merged(ids).logits, model.eval()(ids).logits)


def test_new_tokens_in_embeddings_trained_whole(trained, tmp_path):
    model, run = trained("llama", {"new_tokens": NEW}, modules_to_save=["embed_tokens", "lm_head"])
    same(logits(plain(merge(run, tmp_path / "merged"))), logits(model))


@pytest.mark.parametrize(
    ("family", "method"),
    [("llama", "nf4"), ("llama", "fp4"), ("gpt2", "nf4"), ("gemma2", "nf4")],
)
def test_onto_original_and_onto_quantized(trained, section, tmp_path, family, method):
    model, run = trained(family, {"quantization": method})
    expected = logits(model)
    quantized = plain(merge(run, tmp_path / "quantized", onto="quantized"))
    same(logits(quantized), expected)
    assert not hasattr(quantized.config, "quantization_config")
    full, _ = load_base(section(family))
    expected = logits(attach_adapter(full, AdapterSection(init_from=str(run))))
    original = plain(merge(run, tmp_path / "original"))
    same(logits(original), expected)
    assert (logits(original) - logits(quantized)).abs().max() > 1e-3


def test_onto_weights_that_a_bfloat16_run_quantized(trained, tmp_path):
    """A float32 checkpoint that was read in bfloat16 and then quantized is not the float32 one quantized."""
    model, run = trained("llama", {"quantization": "nf4", "dtype": "bfloat16"})
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    from bitsandbytes.functional import dequantize_4bit

    base = dequantize_4bit(layer.base_layer.weight.data, layer.base_layer.weight.quant_state).float()
    expected = base + layer.get_delta_weight("default").float()
    out = merge(run, tmp_path / "merged", onto="quantized", dtype="float32")
    merged = plain(out).model.layers[0].mlp.up_proj.weight
    torch.testing.assert_close(merged, expected, atol=1e-3, rtol=1e-2)


def test_a_quantized_repository(section, tmp_path, capsys):
    """No original weights to merge into, unless --base names them; its own are there dequantized."""
    quantized, _ = load_base(section("llama", quantization="nf4"))
    quantized.save_pretrained(tmp_path / "model-bnb-4bit")
    spec = ModelSection(name_or_path=str(tmp_path / "model-bnb-4bit"))
    AutoTokenizer.from_pretrained(section("llama").name_or_path).save_pretrained(spec.name_or_path)
    model = attach_adapter(load_base(spec)[0], AdapterSection(r=4))
    disturb(model)
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(RequestError, match=r"ships quantized.*--base.*--onto quantized"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    out = merge(tmp_path / "adapter", tmp_path / "merged", onto="quantized")
    same(logits(plain(out)), logits(model))
    base = section("llama").name_or_path
    capsys.readouterr()
    out = merge(tmp_path / "adapter", tmp_path / "original", base=base)
    assert "against the quantized base and adapter of training: KL" in " ".join(capsys.readouterr().out.split())
    full = attach_adapter(load_base(section("llama"))[0], AdapterSection(init_from=str(tmp_path / "adapter")))
    same(logits(plain(out)), logits(full))


def test_bare_adapter_of_peft_alone(base_folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(base_folder("llama"))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    disturb(model)
    model.save_pretrained(tmp_path / "adapter")
    out = merge(tmp_path / "adapter", tmp_path / "merged")
    same(logits(plain(out)), logits(model))
    assert AutoTokenizer.from_pretrained(out).eos_token == "</s>"
    with pytest.raises(RequestError, match="nothing says how the base was quantized"):
        merge(tmp_path / "adapter", tmp_path / "other", onto="quantized")


@pytest.mark.parametrize(
    ("dtype", "kind"), [(None, torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)]
)
def test_dtype(trained, tmp_path, dtype, kind):
    _, run = trained("llama")
    out = merge(run, tmp_path / "merged", dtype=dtype)
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {kind}
    assert json.loads((out / "config.json").read_text())["dtype"] == str(kind).removeprefix("torch.")


def test_tied_weights_are_written_once(trained, tmp_path):
    _, run = trained("qwen2")
    out = merge(run, tmp_path / "merged")
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    merged = plain(out)
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight


def test_tokenizer_template_and_generation_config(trained, base_folder, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(base_folder("llama"), folder)
    # as some published models have it: sampling settings beside do_sample false, which transformers will not write
    config = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [0, 7], "max_length": 99}
    (folder / "generation_config.json").write_text(json.dumps(config))
    model = {"name_or_path": str(folder), "chat_template": "chatml", "new_tokens": NEW[:2]}
    _, run = trained("llama", model)
    out = merge(run, tmp_path / "merged")
    before, after = AutoTokenizer.from_pretrained(run), AutoTokenizer.from_pretrained(out)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert after.apply_chat_template(chat)["input_ids"] == before.apply_chat_template(chat)["input_ids"]
    assert after.chat_template == before.chat_template and after.get_vocab() == before.get_vocab()
    written = GenerationConfig.from_pretrained(out)
    assert written.eos_token_id == sorted({0, 7, after.convert_tokens_to_ids("<|im_end|>")})
    assert (written.pad_token_id, written.temperature, written.max_length) == (after.pad_token_id, 0.6, 99)
    tokens = torch.arange(5, 10)[None]
    assert plain(out).generate(tokens, do_sample=False, max_new_tokens=3).shape == (1, 8)


def test_loads_where_peft_is_not_installed(trained, tmp_path):
    model, run = trained("llama")
    out = merge(run, tmp_path / "merged")
    torch.save(logits(model), tmp_path / "expected.pt")
    script = """
import sys
sys.modules["peft"] = sys.modules["bitsandbytes"] = sys.modules["orpo_lite"] = None
import torch
from transformers import AutoModelForCausalLM
out, expected = sys.argv[1:]
with torch.no_grad():
    logits = AutoModelForCausalLM.from_pretrained(out)(torch.arange(5, 25)[None]).logits
torch.testing.assert_close(logits, torch.load(expected), atol=1e-4, rtol=1e-4)
"""
    subprocess.run([sys.executable, "-c", script, out, tmp_path / "expected.pt"], check=True, cwd=tmp_path, timeout=120)


def test_output_in_use_is_left_alone(trained, tmp_path):
    _, run = trained("llama")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("mine")
    with pytest.raises(RequestError, match="--output: .*merged exists and is not empty"):
        merge(run, tmp_path / "merged")
    with pytest.raises(RequestError, match="--output"):
        merge(run, tmp_path / "merged" / "mine.txt")
    assert [p.name for p in (tmp_path / "merged").iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    plain(merge(run, tmp_path / "empty"))
    (tmp_path / "plain.txt").touch()  # readable by whom the umask says, not by the owner alone
    assert {p.stat().st_mode for p in (tmp_path / "empty").iterdir()} == {(tmp_path / "plain.txt").stat().st_mode}
    with pytest.raises(RequestError, match="--output"):
        merge(run, run)


def test_a_merge_that_differs_is_refused(trained, tmp_path, monkeypatch):
    _, run = trained("llama")
    right = LowRank.apply
    monkeypatch.setattr(LowRank, "apply", lambda self, block, start: (right(self, block, start), block.add_(0.05)))
    there = sorted(os.listdir(tmp_path))
    with pytest.raises(RuntimeError, match="not the adapter model"):
        merge(run, tmp_path / "merged")
    assert sorted(os.listdir(tmp_path)) == there


def test_a_run_folder_called_as_a_recipe(trained, tmp_path, monkeypatch):
    model, run = trained("llama")
    run.rename(tmp_path / "quickstart")
    monkeypatch.chdir(tmp_path)
    same(logits(plain(merge("quickstart", "merged"))), logits(model))


def test_what_cannot_be_merged_is_said(trained, section, tmp_path):
    out = tmp_path / "merged"
    with pytest.raises(RequestError, match=r"no adapter_config\.json.*expected a run or adapter folder"):
        merge(tmp_path, out)
    with pytest.raises(RequestError, match=r"no adapter_config\.json.*plain model already"):
        merge(section("llama").name_or_path, out)
    _, run = trained("llama", run=False)
    config = json.loads((run / "adapter_config.json").read_text())
    for change, words in [
        ({"base_model_name_or_path": None}, "names no base model: give it with --base"),
        ({"base_model_name_or_path": "./gone"}, "there is no folder ./gone"),
        ({"base_model_name_or_path": "meta/absent"}, "the hub cannot be reached"),
    ]:
        (run / "adapter_config.json").write_text(json.dumps(config | change))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (run / name).unlink(missing_ok=True)
        with pytest.raises(RequestError, match=words):
            merge(run, out)
    with pytest.raises(RequestError, match="does not fit"):
        merge(run, out, base=section("gpt2").name_or_path)
    assert not out.exists()


def test_command(trained, tmp_path, monkeypatch, capsys):
    _, run = trained("llama")
    words = [str(run), "--output", str(tmp_path / "merged")]
    done = commands.command("merge", *words, "--dtype", "float16")
    assert (
        done.returncode == 0
        and "top-1 agreement 100.0%" in done.stdout
        and "GB/s" in done.stdout
        and "Traceback" not in done.stderr
    )
    monkeypatch.setattr(sys, "argv", ["merge", *words])
    with pytest.raises(SystemExit) as stopped:
        run_command(command)
    assert stopped.value.code == 2 and "--output" in capsys.readouterr().err
