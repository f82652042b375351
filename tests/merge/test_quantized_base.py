"""The weights that quantized training saw, and what merging onto the original ones changes."""

import json

import pytest
import torch

from orpo_lite.merge.base import Base
from orpo_lite.merge.run import merge
from orpo_lite.merge.safetensors_blocks import blocks
from orpo_lite.model import attach_adapter, load_base, load_tokenizer, save_adapter
from orpo_lite.recipe import AdapterSection, ModelSection, Recipe
from tests.model.conftest import disturb


@pytest.mark.parametrize("method", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("elements", [1 << 12, 1 << 20])
def test_weights_that_training_saw(base_folder, monkeypatch, method, double, elements):
    """Block by block, and whole, they are what transformers' own quantized model dequantizes to."""
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


def test_drift_from_the_model_that_was_trained(base_folder, tmp_path, capsys):
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
        "against base and adapter unmerged" in said and "against the quantized base and adapter of training: KL" in said
    )
    merge(tmp_path / "run", tmp_path / "quantized", onto="quantized")
    said = " ".join(capsys.readouterr().out.split())
    assert "of training" not in said and "top-1 agreement 100.0%" in said
