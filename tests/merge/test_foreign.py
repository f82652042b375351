"""Bases and adapters as other tools leave them: odd generation settings, tokens without rows, QLoRA without a recipe."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from orpo_lite.common.errors import RequestError
from orpo_lite.export.gguf import export
from orpo_lite.merge import plan
from orpo_lite.merge.base import QUANTIZED_NAME
from orpo_lite.merge.run import merge
from orpo_lite.model.inspection import keep_4bit_differentiable
from orpo_lite.trainer.run_folder import tokens_from
from tests.model.conftest import disturb, logits


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "odd",
    [
        {"do_sample": False, "top_k": 40, "min_p": 0.1, "typical_p": 0.5, "temperature": 0.6, "top_p": 0.9},
        {"do_sample": True, "temperature": 0.0},
        {"do_sample": False, "num_beams": 4, "num_return_sequences": 2, "length_penalty": 2.0},
        {"temperature": 1.0, "top_p": 1.0, "unknown": [1], "pad_token_id": 7, "eos_token_id": 0},
    ],
)
def test_generation_settings_are_the_base_s_own(adapted, tmp_path, odd):
    _, base, adapter = adapted("llama", target_modules=["q_proj"])
    (base / "generation_config.json").write_text(json.dumps(odd))
    out = merge(adapter, tmp_path / "merged")
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": [0], "pad_token_id": 1} | odd
    before, after = (AutoModelForCausalLM.from_pretrained(folder).generation_config for folder in (base, out))
    assert after.do_sample == before.do_sample


def test_what_cannot_be_written_fails_before_the_weights(adapted, tmp_path, monkeypatch):
    _, base, adapter = adapted("llama", target_modules=["q_proj"])
    monkeypatch.setattr("orpo_lite.merge.run.write_shards", lambda *_: pytest.fail("started to write"))
    for broken in ('{"num_return_sequences": 3}', '{"early_stopping": "foo"}', "{", "[]"):
        (base / "generation_config.json").write_text(broken)
        with pytest.raises(RequestError, match=r"generation_config\.json"):
            merge(adapter, tmp_path / "merged")
    (base / "generation_config.json").unlink()
    for name in ("model_card", "AutoTokenizer"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="no card"):
            place = (
                "orpo_lite.merge.run.model_card"
                if name == "model_card"
                else "transformers.PreTrainedTokenizerBase.save_pretrained"
            )
            patch.setattr(place, lambda *_, **__: (_ for _ in ()).throw(OSError("no card")))
            merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


# ---- tokens without rows -------------------------------------------------------------------------------------------------


def longer(folder, *tokens: str):
    """Give a folder the base's tokenizer with more tokens, from the first id without a row."""
    tokenizer = AutoTokenizer.from_pretrained(
        folder if (folder / "tokenizer.json").exists() else folder.parent / "base"
    )
    tokenizer.add_tokens([f"<spare{i}>" for i in range(420 - len(tokenizer))] + list(tokens), special_tokens=True)
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_tokens_without_rows_are_refused_by_name(adapted, tmp_path, monkeypatch, caplog):
    _, base, adapter = adapted("llama", target_modules=["q_proj"])
    longer(adapter)
    merge(adapter, tmp_path / "within")  # rows that nothing trained, but there
    tokenizer = longer(adapter, "<tool>", "</tool>")
    assert tokens_from(tokenizer, 420) == {"<tool>": 420, "</tool>": 421} and not tokens_from(tokenizer, 422)
    there = sorted(tmp_path.iterdir())
    for call in (
        lambda: merge(adapter, tmp_path / "merged"),
        lambda: export(adapter, tmp_path / "x.gguf"),
        lambda: export(adapter, tmp_path / "x.gguf", adapter=True),
    ):
        with pytest.raises(
            RequestError, match=r"2 token\(s\) without an embedding: <tool>, </tool>; there are 420 rows"
        ):
            call()
    assert sorted(tmp_path.iterdir()) == there
    with monkeypatch.context() as patch:  # the check at the end sees it by itself
        patch.setattr(plan, "check_tokens_have_rows", lambda *_: {})
        with pytest.raises(RuntimeError, match="writes token 421, and the merged model has 420 rows"):
            merge(adapter, tmp_path / "merged")


def test_tokens_that_the_base_has_no_rows_for_either(adapted, tmp_path, capsys):
    model, base, adapter = adapted("llama", target_modules=["q_proj"])
    longer(base, "<image_soft_token>")
    expected = logits(model)
    close(logits(AutoModelForCausalLM.from_pretrained(merge(adapter, tmp_path / "merged"))), expected)
    assert "<image_soft_token>: no embedding here" in capsys.readouterr().out


def test_new_tokens_are_in_the_check_at_the_end(base_folder, tmp_path, monkeypatch):
    """Trained rows that are wrong are found, though no sentence holds the tokens."""
    base = AutoModelForCausalLM.from_pretrained(base_folder("llama"))
    base.resize_token_embeddings(422, mean_resizing=False)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[420, 421]))
    disturb(model)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    right = plan.Rows.apply
    with monkeypatch.context() as patch:
        patch.setattr(plan.Rows, "apply", lambda self, block, start: (right(self, block, start), block[-2:].mul_(-1)))
        with pytest.raises(RuntimeError, match="not the adapter model"):
            merge(tmp_path / "adapter", tmp_path / "merged")
    merge(tmp_path / "adapter", tmp_path / "merged")


# ---- QLoRA without a recipe, and bases that ship quantized ---------------------------------------------------------------


@pytest.mark.parametrize(("method", "double"), [("nf4", False), ("nf4", True), ("fp4", False)])
def test_what_the_base_was_quantized_with(base_folder, tmp_path, capsys, method, double):
    four = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": method,
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": torch.float32,
    }
    settings = BitsAndBytesConfig(**four)
    base = AutoModelForCausalLM.from_pretrained(base_folder("llama"), quantization_config=settings, dtype=torch.float32)
    keep_4bit_differentiable(base)  # the kernel for inference on the CPU computes in bfloat16
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    disturb(model, 0.05)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    with pytest.raises(RequestError, match="--onto quantized: nothing says.*--quantization nf4.*--double-quant"):
        merge(tmp_path / "adapter", tmp_path / "merged", onto="quantized")
    said = {"quantization": method, "double_quant": double}
    found = logits(
        AutoModelForCausalLM.from_pretrained(merge(tmp_path / "adapter", tmp_path / "q", onto="quantized", **said))
    )
    close(found, expected)
    capsys.readouterr()
    original = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base_folder("llama")), tmp_path / "adapter"
    )
    close(
        logits(AutoModelForCausalLM.from_pretrained(merge(tmp_path / "adapter", tmp_path / "o", **said))),
        logits(original),
    )
    assert "against the quantized base and adapter of training: KL" in " ".join(capsys.readouterr().out.split())


def test_options_of_quantization_that_have_no_effect(adapted, tmp_path):
    _, _, adapter = adapted("llama", target_modules=["q_proj"])
    for options, words in [
        ({"double_quant": True}, "--double-quant: found --quantization None, expected nf4 or fp4"),
        ({"quantization": "int8"}, "found --quantization int8, expected nf4 or fp4"),
    ]:
        with pytest.raises(RequestError, match=words):
            merge(adapter, tmp_path / "merged", **options)
    (adapter / "recipe.yaml").write_text("name: x")
    with pytest.raises(RequestError, match=r"recipe\.yaml says how the base was quantized"):
        merge(adapter, tmp_path / "merged", quantization="nf4")


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "mxfp4", "bitsandbytes"])
@pytest.mark.parametrize("onto", ["original", "quantized"])
def test_bases_that_ship_quantized(adapted, tmp_path, method, onto):
    """The advice that is printed leads to a merge: there is a 16-bit original, and only bitsandbytes is dequantized."""
    model, base, adapter = adapted("llama", target_modules=["q_proj"])
    made = base.rename(tmp_path / f"base-{method.upper()}" if method != "bitsandbytes" else tmp_path / "base-bnb-4bit")
    config = json.loads((made / "config.json").read_text())
    quantized = {"quant_method": method, "bits": 4} | ({"load_in_4bit": True} if method == "bitsandbytes" else {})
    (made / "config.json").write_text(json.dumps(config | {"quantization_config": quantized}))
    named = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(made)}
    (adapter / "adapter_config.json").write_text(json.dumps(named))
    if (method, onto) == ("bitsandbytes", "quantized"):
        with pytest.raises(RequestError, match="ships quantized and says itself how: leave it out"):
            merge(adapter, tmp_path / "merged", onto=onto, quantization="nf4")
        return
    with pytest.raises(
        RequestError, match=rf"ships quantized \({method}\).*--base \(a guess from its name: {base};"
    ) as said:
        merge(adapter, tmp_path / "merged", onto=onto)
    assert ("or merge with --onto quantized" in str(said.value)) == (method == "bitsandbytes")


@pytest.mark.parametrize(
    ("name", "original"),
    [
        ("Qwen2.5-7B-Instruct-GPTQ-Int4", "Qwen2.5-7B-Instruct"), ("Llama-2-7B-AWQ", "Llama-2-7B"),
        ("Llama-3.1-8B-FP8-dynamic", "Llama-3.1-8B"), ("Qwen3-14B-unsloth-bnb-4bit", "Qwen3-14B"), ("x-bnb-8bit", "x"),
        ("Llama-3.2-1B-quantized.w8a8", "Llama-3.2-1B"), ("gpt-oss-20b", "gpt-oss-20b"), ("Mixtral-8x7B", "Mixtral-8x7B"),
        ("model-4bit", "model"), ("Model-int4-awq", "Model"), ("awqward-7b", "awqward-7b"),
    ],
)  # fmt: skip
def test_names_of_originals(name, original):
    assert QUANTIZED_NAME.sub("", name) == original
