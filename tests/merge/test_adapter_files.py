"""Folders of adapters as other tools leave them: every command reads them alike, or says what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from orpo_lite.common.errors import RequestError
from orpo_lite.evaluate.answering import Side
from orpo_lite.evaluate.loading import resolve_model
from orpo_lite.merge.run import merge
from orpo_lite.model import autocast, keep_4bit_differentiable, load_adapter, load_base
from orpo_lite.model.adapter import adapter_gaps
from orpo_lite.trainer.generate import Sampling
from tests.merge.test_adapter_sweep import SIZES, VISION
from tests.model.conftest import disturb, logits
from tests.tiny import chatml, tiny_model, tiny_tokenizer

WEIGHTS = "adapter_model.safetensors"
Q = "base_model.model.model.layers.1.self_attn.q_proj"


def made(base: Path, place: Path, rows: int | None = None, save: bool | str = "auto", **lora) -> PeftModel:
    """An adapter on disk, and PEFT's model with it."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    model = get_peft_model(
        model, LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | lora)
    )
    disturb(model)
    model.save_pretrained(place, save_embedding_layers=save)
    return model.eval()


def rewritten(place: Path, change) -> None:
    """Let a function give every tensor of the adapter another name and value."""
    held = {key: value.clone() for key, value in load_file(place / WEIGHTS).items()}
    save_file(dict(change(key, value) for key, value in held.items()), place / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "name",
    [lambda k: k.replace("base_model.model.", "base_model.model._orig_mod."), lambda k: f"module.{k}",
     lambda k: f"_orig_mod.module.{k}", lambda k: k.replace("base_model.model.", "base_model.model.module."),
     lambda k: k.replace(".self_attn", "._orig_mod.self_attn"), lambda k: f"_fsdp_wrapped_module.{k}",
     lambda k: k.replace(".self_attn", "._checkpoint_wrapped_module.self_attn").replace("lora_A.", "lora_A.default.")],
)  # fmt: skip
def test_names_that_wrappers_left(base_folder, section, tmp_path, caplog, name) -> None:
    right = logits(made(base_folder("llama"), tmp_path / "adapter"))
    rewritten(tmp_path / "adapter", lambda key, value: (name(key), value))
    found = logits(load_adapter(load_base(section("llama"))[0], tmp_path / "adapter"))
    torch.testing.assert_close(found, right, atol=1e-5, rtol=0)
    assert "saved from a wrapped model" in caplog.text and name(Q)[:30].split(".")[-1] in caplog.text
    merged = AutoModelForCausalLM.from_pretrained(merge(tmp_path / "adapter", tmp_path / "merged", verify=False))
    torch.testing.assert_close(logits(merged), right, atol=1e-4, rtol=0)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("rows", [300, 431])
@pytest.mark.parametrize(
    ("family", "lora"),
    [("llama", {"save": True}), ("llama-tied", {"save": True}), ("qwen2", {"trainable_token_indices": [7, 299]}),
     ("llama-tied", {"modules_to_save": ["embed_tokens", "lm_head"]})],
)  # fmt: skip
def test_a_vocabulary_of_another_size(base_folder, section, tmp_path, family, lora, rows, quantization) -> None:
    model = made(base_folder(family), tmp_path / "adapter", rows, **lora)
    found = load_adapter(load_base(section(family, quantization=quantization))[0], tmp_path / "adapter")
    assert found.get_input_embeddings().weight.shape[0] == rows == logits(found).shape[-1] == found.config.vocab_size
    if quantization == "nf4":  # whose linear layers differ
        bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        base = AutoModelForCausalLM.from_pretrained(base_folder(family), quantization_config=bits, dtype=torch.float32)
        keep_4bit_differentiable(base)  # the kernel for inference on the CPU computes in bfloat16
        base.resize_token_embeddings(rows, mean_resizing=False)
        model = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(found), logits(model), atol=1e-5, rtol=0)


def test_shapes_of_both_sides_are_named(base_folder, section, tmp_path) -> None:
    made(base_folder("llama"), tmp_path / "adapter")
    rewritten(tmp_path / "adapter", lambda key, value: (key, value.repeat(1, 2) if key.startswith(Q) else value))
    for use in (lambda: load_adapter(load_base(section("llama"))[0], tmp_path / "adapter"),
                lambda: merge(tmp_path / "adapter", tmp_path / "merged")):  # fmt: skip
        with pytest.raises(
            RequestError, match=r"q_proj.lora_A.weight is \[4, 128\], here \[4, 64\]; .*\[64, 8\], here \[64, 4\]"
        ):
            use()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda k, v: (k, v[:0]), "8 of 8 tensors are empty or flat.*ZeRO-3.*zero_to_fp32"),
        (lambda k, v: (k, v.flatten()[:20]), "8 of 8 tensors are empty or flat.*FSDP"),
        (lambda k, v: (k, v * 0 if "lora_B" in k else v), "changes nothing: in every layer lora_B"),
        (lambda k, v: ("x" if k.startswith(Q) and "A" in k else k, v), r"no place for 1 tensor\(s\), first x"),
    ],
)
def test_what_is_wrong_is_named(base_folder, section, tmp_path, caplog, change, words) -> None:
    made(base_folder("llama"), tmp_path / "adapter")
    rewritten(tmp_path / "adapter", change)
    with pytest.raises(RequestError, match=words):
        merge(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    model, _ = load_base(section("llama"))
    if "nothing" in words:  # the base's own answers
        right = logits(model)
        torch.testing.assert_close(logits(load_adapter(model, tmp_path / "adapter")), right)
        assert "changes nothing" in caplog.text
    else:
        with pytest.raises(RequestError, match=words):
            load_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize(
    "lora",
    [{"modules_to_save": ["lm_head"]}, {"use_dora": True}, {"target_modules": ["embed_tokens"]}, {"bias": "all"}, {"init_lora_weights": False},
     {"trainable_token_indices": [5]}, {"alpha_pattern": {"q_proj": 3}, "lora_alpha": 0}],
)  # fmt: skip
def test_what_is_trained_without_lora_b_is_something(base_folder, section, tmp_path, caplog, lora) -> None:
    model = made(base_folder("qwen2" if "bias" in lora else "llama"), tmp_path / "adapter", save=False, **lora)
    if not {"target_modules", "init_lora_weights", "alpha_pattern"} & lora.keys():
        for name, parameter in model.named_parameters():
            parameter.data *= 0 if "lora_B" in name else 1
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merged = AutoModelForCausalLM.from_pretrained(merge(tmp_path / "adapter", tmp_path / "merged", verify=False))
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-4, rtol=0)
    assert "changes nothing" not in caplog.text


@pytest.mark.parametrize(
    "lora", [{}, {"layers_to_transform": [0]}, {"exclude_modules": ".*layers.1.*"}, {"modules_to_save": ["lm_head"]}]
)
def test_a_file_with_only_some_of_its_tensors(base_folder, section, tmp_path, lora) -> None:
    base, place = base_folder("llama"), tmp_path / "adapter"
    made(base, place, **lora)

    def gaps() -> list[str]:
        with init_empty_weights(include_buffers=False):
            return adapter_gaps(place, AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base)))

    assert gaps() == []
    lost = [key for key in load_file(place / WEIGHTS) if "layers.0" in key and "v_proj" in key or "lm_head" in key]
    save_file({k: v.clone() for k, v in load_file(place / WEIGHTS).items() if k not in lost}, place / WEIGHTS)
    assert set(gaps()) <= set(lost) and gaps()
    for use in (lambda: load_adapter(load_base(section("llama"))[0], place), lambda: merge(place, tmp_path / "merged")):
        with pytest.raises(
            RequestError, match="tensor.s. that its adapter_config.json asks for .*save or download it again"
        ):
            use()


def test_a_configuration_without_its_numbers(base_folder, tmp_path) -> None:
    made(base_folder("llama"), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in config.items() if key not in ("r", "target_modules")}))
    with pytest.raises(
        RequestError, match=r"lacks r, target_modules: write there .* r is 4, target_modules q_proj, v_proj"
    ):
        merge(tmp_path / "adapter", tmp_path / "merged", base=str(base_folder("llama")))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_composite_model_answers_and_merges(tmp_path, quantization, caplog) -> None:
    sizes = SIZES | {"hidden_size": 128, "intermediate_size": 512, "head_dim": 32}
    config = AutoConfig.for_model("gemma3", text_config=sizes, vision_config=VISION, mm_tokens_per_image=4)
    tiny_model(config).save_pretrained(tmp_path / "base")
    tokenizer = tiny_tokenizer(("<|im_start|>", "<|im_end|>"), chatml("x"), eos="<|im_end|>", pad="<pad>")
    tokenizer.save_pretrained(tmp_path / "base")
    model = made(tmp_path / "base", tmp_path / "adapter", exclude_modules=".*vision_tower.*")
    assert type(model.get_base_model()).__name__ == "Gemma3ForConditionalGeneration"
    source = resolve_model(str(tmp_path / "adapter"))
    source.model = source.model.model_copy(update={"quantization": quantization})
    trained = Side("adapter", source)
    turns = [{"role": "user", "content": "Hi"}]
    assert trained.context == 64 and trained.mean_logps(turns, "a", "b").isfinite().all()
    for side in (trained, Side("base", source, adapted=trained)):
        assert side.reply(turns, Sampling(4)).tokens
    merged = AutoModelForCausalLM.from_pretrained(merge(tmp_path / "adapter", tmp_path / "merged"))
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-4, rtol=0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("shipped", [True, False])
def test_a_base_in_4_bits_whose_head_has_16(base_folder, section, tmp_path, shipped, dtype, tied) -> None:
    """Weights that are not quantized are in the dtype that is computed in, or autocast to it, whoever quantized."""
    family = "llama-tied" if tied else "llama"
    spec = section(family, quantization="nf4", dtype=dtype)
    if shipped:
        bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
        AutoModelForCausalLM.from_pretrained(base_folder(family), quantization_config=bits, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")  # fmt: skip
        spec = section(family, name_or_path=str(tmp_path / "base"), dtype=dtype)
    made(base_folder(family), tmp_path / "adapter")
    model, facts = load_base(spec)
    assert model.get_output_embeddings().weight.dtype == facts.precision.dtype
    model = load_adapter(model, tmp_path / "adapter", trainable=True)
    with autocast(model):
        model(input_ids=torch.arange(5, 20)[None]).logits.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
