"""A merged model in 4 bits, and what training over 4 bits has to do with the 16-bit merge."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from orpo_lite.common.errors import RequestError
from orpo_lite.merge.base import Base
from orpo_lite.merge.run import merge
from orpo_lite.merge.safetensors_blocks import blocks
from orpo_lite.merge.write_4bit import Survival
from orpo_lite.model import attach_adapter, load_base, load_tokenizer, save_adapter
from orpo_lite.recipe import AdapterSection, ModelSection, Recipe
from tests.merging.conftest import weights
from tests.model.conftest import disturb, logits


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_equals_the_16_bit_merge_quantised_by_transformers(adapted, tmp_path, family, kind):
    _, _, adapter = adapted(family, target_modules="all-linear")
    whole = merge(adapter, tmp_path / "whole")
    small = merge(adapter, tmp_path / "small", quantize=kind)
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    expected = AutoModelForCausalLM.from_pretrained(whole, quantization_config=settings, dtype=torch.float32)
    found, info = AutoModelForCausalLM.from_pretrained(small, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(found.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    torch.testing.assert_close(logits(found), logits(expected), atol=1e-5, rtol=1e-5)
    assert (small / "model.safetensors").stat().st_size < 0.6 * (whole / "model.safetensors").stat().st_size


def test_what_is_left_of_the_change_is_said(adapted, tmp_path, capsys):
    _, _, adapter = adapted("llama", target_modules="all-linear")
    merge(adapter, tmp_path / "small", quantize="nf4")
    said = " ".join(capsys.readouterr().out.split())
    assert "nf4 keeps" in said and "of the adapter's change" in said
    assert "keeps" in (tmp_path / "small" / "README.md").read_text()


def test_a_change_that_would_round_away_is_refused(adapted, tmp_path):
    """Over a base whose weights are 4-bit values already, a small change is less than half a step for all of them."""
    _, base, adapter = adapted("llama", target_modules="all-linear")
    from safetensors.torch import save_file

    from orpo_lite.merge.quantised_base import RoundTrip
    from orpo_lite.merge.safetensors_blocks import stored_tensors

    stored, file = weights(base), base / "model.safetensors"
    for key, one in stored_tensors([file]).items():
        if "layers" in key and len(one.shape) == 2:
            read = RoundTrip(one, "nf4", True, torch.float32).reader()
            stored[key] = torch.cat([read(block) for block in blocks(one.shape)])
    save_file(stored, file, metadata={"format": "pt"})
    factors = weights(adapter)
    small = {key: value * 0.01 if "lora_B" in key else value for key, value in factors.items()}
    save_file(small, adapter / "adapter_model.safetensors")
    with pytest.raises(RuntimeError, match="all but gone, so nothing was written"):
        merge(adapter, tmp_path / "merged", quantize="nf4")
    assert not (tmp_path / "merged").exists()
    merge(adapter, tmp_path / "merged")


def test_share_that_survives():
    survival = Survival("nf4")
    delta = torch.tensor([1.0, -2.0, 0.0])
    survival.add(torch.zeros(3), torch.tensor([0.5, -1.0, 0.0]), delta)
    assert survival.along / survival.whole == 0.5 and survival.same == 1
    assert "keeps 50%" in survival.report()[0]


def test_four_bits_only_from_the_original(adapted, tmp_path):
    _, _, adapter = adapted("llama", target_modules=["q_proj"])
    with pytest.raises(RequestError, match="take --onto original"):
        merge(adapter, tmp_path / "merged", quantize="nf4", onto="quantized")


def test_gpt2_is_refused_by_name(adapted, tmp_path):
    _, _, adapter = adapted("gpt2", target_modules=["c_attn"], fan_in_fan_out=True)
    with pytest.raises(RequestError, match="GPT2LMHeadModel are stored transposed"):
        merge(adapter, tmp_path / "merged", quantize="nf4")


@pytest.mark.parametrize("method", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("elements", [1 << 12, 1 << 20])
def test_weights_that_training_saw(base_folder, monkeypatch, method, double, elements):
    """Block by block, and whole, they are what transformers' own quantised model dequantises to."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    monkeypatch.setattr("orpo_lite.merge.safetensors_blocks.BLOCK_ELEMENTS", elements)
    monkeypatch.setattr(blocks, "__defaults__", (elements,))
    spec = ModelSection(name_or_path=str(base_folder("llama")), quantization=method, double_quant=double)
    base, model = Base(spec, "quantized"), load_base(spec)[0]
    several = 0
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            source = base.sources[f"{name}.weight"]
            read, cuts = source.reader(), list(blocks(source.shape))
            several += len(cuts) > 1
            found = torch.cat([read(block) for block in cuts])
            assert torch.equal(found, dequantize_bnb_weight(module.weight))  # type: ignore[arg-type]
    assert bool(several) == (elements == 1 << 12)


def test_drift_against_the_model_that_was_trained(base_folder, tmp_path, capsys):
    """Merged onto the original weights, the model is not the one that training saw, and the user is told how far."""
    spec = ModelSection(name_or_path=str(base_folder("llama")), quantization="nf4")
    tokenizer = load_tokenizer(spec)
    model = attach_adapter(load_base(spec)[0], AdapterSection(r=4))
    disturb(model)
    save_adapter(model, tmp_path / "run")
    tokenizer.save_pretrained(tmp_path / "run")
    Recipe(name="t", model=spec, adapter=AdapterSection(r=4), data={"train": "x.jsonl"}).save(tmp_path / "run" / "recipe.yaml")  # type: ignore[arg-type]  # fmt: skip
    rows = [[5, 6, 7, 8, 9, 10, 11, 12], list(range(20, 40))]
    (tmp_path / "run" / "run.json").write_text(json.dumps({"base_model": {"dtype": "float32"}, "probe": rows}))
    (tmp_path / "run" / "run.json").rename(tmp_path / "run.json.bak")
    merge(tmp_path / "run", tmp_path / "original")
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "against base and adapter unmerged" in said and "against the quantised base and adapter of training: KL" in said
    )
    merge(tmp_path / "run", tmp_path / "quantized", onto="quantized")
    said = " ".join(capsys.readouterr().out.split())
    assert "of training" not in said and "top-1 agreement 100.0%" in said
