"""The text half of a multimodal model in a GGUF file, and adapters of it."""

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma3Config

from orpo_lite.export import gguf_file
from orpo_lite.export.gguf import export
from tests.model.conftest import SIZES, disturb
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training import CHATML

VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
          "patch_size": 14}  # fmt: skip


@pytest.mark.slow
def test_text_half_and_its_adapter_are_read_back(converter, tmp_path, capsys, monkeypatch):
    tokenizer = tiny_tokenizer(("<|im_start|>", "<|im_end|>"), CHATML, eos="<|im_end|>", pad="<pad>")
    text = SIZES | {"vocab_size": len(tokenizer) + 8, "head_dim": 16}
    tiny_model(Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4)).save_pretrained(
        tmp_path / "b"
    )
    tokenizer.save_pretrained(tmp_path / "b")
    config = LoraConfig(r=2, target_modules=r".*language_model.*(q_proj|down_proj)", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "b"), config)
    disturb(model)
    model.save_pretrained(tmp_path / "adapter")
    export(tmp_path / "adapter", tmp_path / "lora.gguf", adapter=True)
    export(tmp_path / "adapter", tmp_path / "whole.gguf")
    said = capsys.readouterr().out
    assert "4 LoRA pairs" in said and "15 of 15 matrices (99% of the weights) hold the source's values" in said
    monkeypatch.setattr(gguf_file, "get_tensor_name_map", lambda *_: None)
    with pytest.raises(gguf_file.Mismatch, match="nothing can be compared"):
        gguf_file.compare_values(tmp_path / "whole.gguf", tmp_path / "b", 0.1)
