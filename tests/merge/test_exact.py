"""The merged weights themselves: float32 arithmetic rounded once, equal to PEFT's wherever PEFT's merge is right."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_lite.common.errors import RequestError
from orpo_lite.merge.run import merge
from orpo_lite.model import load_base
from orpo_lite.model.base import resize_embeddings
from orpo_lite.recipe import ModelSection
from tests.merge.conftest import tensors, weights
from tests.model.conftest import disturb, logits

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float16, torch.float32])
def test_float32_arithmetic_rounded_once(adapted, tmp_path, dtype, saved):
    _, base, adapter = adapted("llama", dtype, target_modules="all-linear", alpha_pattern={"k_proj": 3})
    file = adapter / "adapter_model.safetensors"
    save_file({key: value.to(saved) for key, value in tensors(file).items()}, file)
    merged, before, factors = weights(merge(adapter, tmp_path / "merged")), weights(base), tensors(file)
    assert merged.keys() == before.keys()
    changed = 0
    for key, weight in before.items():
        path = f"base_model.model.{key.removesuffix('.weight')}"
        if f"{path}.lora_A.weight" in factors:
            scale = (3 if "k_proj" in key else 8) / 4
            delta = (factors[f"{path}.lora_B.weight"].float() @ factors[f"{path}.lora_A.weight"].float()) * scale
            weight, changed = (weight.float() + delta).to(dtype), changed + 1
        assert merged[key].dtype == dtype and torch.equal(merged[key], weight), key
    assert changed == 14


def peft_merge(model: PeftModel, folder) -> dict[str, torch.Tensor]:
    """Weights of PEFT's own merge, as transformers stores them."""
    model.merge_and_unload().save_pretrained(folder)
    return weights(folder)


CASES = {
    "mixtral": {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
    "qwen3_moe": {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "use_rslora": True},
    "qwen2_moe": {"target_modules": ["q_proj", "shared_expert.up_proj"], "target_parameters": EXPERTS},
    "granitemoe": {"target_modules": ["v_proj"], "target_parameters": ["experts.down_proj"]},
    "gpt2": {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "lora_bias": True},
}


@pytest.mark.parametrize("shard_size", ["50GB", "40KB"])
@pytest.mark.parametrize("family", CASES)
def test_equal_to_peft(adapted, tmp_path, family, shard_size):
    """Experts that transformers stacks and the checkpoint stores one by one, spread over many shards."""
    try:
        model, base, adapter = adapted(family, shard_size=shard_size, **CASES[family])
    except ValueError as error:  # PEFT 0.19 takes Qwen's shared expert for a part of the stack
        pytest.skip(str(error))
    if not any("lora" in name and "attn" not in name for name, _ in model.named_parameters()):
        pytest.skip("the experts' parameters have other names in this version of transformers")
    merged = merge(adapter, tmp_path / "merged")
    before, after, expected = weights(base), weights(merged), peft_merge(model, tmp_path / "peft")
    assert before.keys() == after.keys() == expected.keys()
    assert all(torch.equal(after[key], expected[key]) for key in after)
    moved = {key for key in after if not torch.equal(before[key], after[key])}
    assert any("attn" not in key for key in moved)
    index = "model.safetensors.index.json"
    assert (base / index).exists() == (merged / index).exists() == (shard_size != "50GB")
    if shard_size != "50GB":
        there = [json.loads((folder / index).read_text())["weight_map"] for folder in (base, merged)]
        assert there[0] == there[1] and len(set(there[0].values())) > 2


ENDS = {
    "lora on both": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "lora on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "dora on the embedding": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "lora on the head": {"target_modules": ["q_proj", "lm_head"]},
    "trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "trained whole, each": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "some rows": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7]},
    "some rows by name": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5]}},
}


SCALED = ("lora on both", "lora on the embedding", "dora on the embedding", "some rows")
"""Ends that differ where the embedding's outputs are scaled, as in Gemma."""


@pytest.mark.parametrize(
    ("family", "end"),
    [(family, end) for family in ("llama-tied", "llama") for end in ENDS] + [("gemma2", end) for end in SCALED],
)
def test_embedding_and_head_as_one_and_as_two(adapted, tmp_path, family, end):
    """PEFT's merge is wrong on tied ends: the outputs that count are those of the unmerged model."""
    model, base, adapter = adapted(family, **ENDS[end])
    expected = logits(model)
    merged = merge(adapter, tmp_path / "merged")
    found, info = AutoModelForCausalLM.from_pretrained(merged, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(logits(found), expected, atol=1e-4, rtol=1e-4)
    tied = family != "llama" and end.startswith("some rows")
    assert found.config.tie_word_embeddings is tied
    assert ("lm_head.weight" in weights(merged)) is not tied


@pytest.mark.parametrize("rows", [300, 431])
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_resized_vocabulary(base_folder, tmp_path, family, rows):
    """An adapter that brings its own embeddings: more rows than the base, and fewer."""
    base = AutoModelForCausalLM.from_pretrained(base_folder(family))
    base.resize_token_embeddings(rows, mean_resizing=False)
    model = get_peft_model(
        base, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    )
    disturb(model)
    model.save_pretrained(tmp_path / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(merge(tmp_path / "adapter", tmp_path / "merged"))
    assert merged.config.vocab_size == rows == merged.get_output_embeddings().weight.shape[0]
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-4, rtol=1e-4)


def test_grown_rows_start_as_the_mean(base_folder, tmp_path):
    """Rows that the adapter does not hold are what they were when it was trained."""
    spec = ModelSection(name_or_path=str(base_folder("llama")), quantization="none")
    base, _ = load_base(spec)
    resize_embeddings(base, 425)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[424]))
    disturb(model)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merged = weights(merge(tmp_path / "adapter", tmp_path / "merged"))
    original = weights(base_folder("llama"))["model.embed_tokens.weight"]
    assert merged["model.embed_tokens.weight"].shape == (425, 64)
    assert torch.equal(merged["model.embed_tokens.weight"][:424], torch.cat([original, original.mean(0).expand(4, -1)]))
    assert not torch.equal(merged["model.embed_tokens.weight"][424], original.mean(0))
    assert merged["lm_head.weight"].shape == (425, 64)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adapters_that_changed_their_base(base_folder, tmp_path, init):
    base = AutoModelForCausalLM.from_pretrained(base_folder("llama"))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init))
    model.save_pretrained(tmp_path / "raw")
    config = json.loads((tmp_path / "raw" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] == init
    with pytest.raises(RequestError, match=f"initialized with {init}, which changed its base weights"):
        merge(tmp_path / "raw", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def change(adapter, edit) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file(edit(tensors(file)), file)


def test_every_tensor_of_the_adapter_has_one_place(adapted, tmp_path):
    _, _, adapter = adapted("llama", target_modules=["q_proj", "v_proj"])
    whole = tensors(adapter / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    out = tmp_path / "merged"
    for wrong, words in [
        (whole | {key.replace("layers.1", "layers.7"): whole[key].clone()}, r"has no place for 1 tensor.*layers\.7"),
        (whole | {key.replace("B.weight", "B.default.weight"): whole[key] + 1}, "are for the same place"),
        ({k: v for k, v in whole.items() if k != key}, r"lacks 1 tensor.*model\.layers\.1\.self_attn\.v_proj"),
        (
            whole | {key: whole[key][:-1].contiguous()},
            r"does not fit.*layers\.1\.self_attn\.v_proj\S+ is \[31, 4\], here \[32, 4\]",
        ),
    ]:
        save_file(wrong, adapter / "adapter_model.safetensors")
        with pytest.raises(RequestError, match=words):
            merge(adapter, out)
        assert not out.exists()
    save_file(whole | {key: torch.full_like(whole[key], float("nan"))}, adapter / "adapter_model.safetensors")
    with pytest.raises(RequestError, match=r"1 of 8 tensors are not finite.*layers\.1\.self_attn\.v_proj"):
        merge(adapter, out)
    # finite as stored, and infinite once multiplied
    save_file(whole | {key: torch.full_like(whole[key], 3e38)}, adapter / "adapter_model.safetensors")
    with pytest.raises(RuntimeError, match=r"gives (inf|nan) in model\.layers\.1\.self_attn\.v_proj\.weight"):
        merge(adapter, out)
    data = (adapter / "adapter_model.safetensors").read_bytes()
    (adapter / "adapter_model.safetensors").write_bytes(data[:-100])
    with pytest.raises(RequestError, match="not a whole safetensors file"):
        merge(adapter, out)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(RequestError, match="has no adapter_model.safetensors: copy or download it"):
        merge(adapter, out)
    assert not out.exists()


def test_what_no_weights_can_express(adapted, tmp_path):
    _, _, adapter = adapted("llama", target_modules=["q_proj"])
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    for fields, words in [
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [3]}, "ALoraLinearVariant"),
        ({"lora_bias": True}, "lacks|lora_bias"),
        ({"peft_type": "LOHA"}, "expected LORA"),
    ]:
        path.write_text(json.dumps(config | fields))
        with pytest.raises(RequestError, match=words):
            merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_base_that_is_not_whole(adapted, tmp_path):
    _, base, adapter = adapted("llama", target_modules=["q_proj"])
    stored = weights(base)
    save_file({k: v for k, v in stored.items() if "layers.1.mlp.up_proj" not in k}, base / "model.safetensors")
    with pytest.raises(RequestError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        merge(adapter, tmp_path / "merged")
    narrow = stored | {"model.norm.weight": stored["model.norm.weight"][:-1].contiguous()}
    save_file(narrow, base / "model.safetensors")
    with pytest.raises(RequestError, match=r"model\.norm\.weight has shape \[63\]"):
        merge(adapter, tmp_path / "merged")


def test_what_the_model_does_not_use_is_kept(adapted, tmp_path):
    """Old buffers, and heads that transformers ignores, are copied as they lie."""
    _, base, adapter = adapted("llama", target_modules=["q_proj"])
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(4.0), "extra.bits": torch.arange(5).byte()}
    save_file(weights(base) | more, base / "model.safetensors")
    merged = weights(merge(adapter, tmp_path / "merged"))
    assert all(torch.equal(merged[key], value) for key, value in more.items())


def test_one_shard_with_an_index(adapted, tmp_path):
    """As some repositories have it: the only shard bears a number."""
    _, base, adapter = adapted("llama", target_modules=["q_proj"])
    name = "model-00001-of-00001.safetensors"
    (base / "model.safetensors").rename(base / name)
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights(base), name)}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    merged = merge(adapter, tmp_path / "merged")
    _, info = AutoModelForCausalLM.from_pretrained(merged, output_loading_info=True)
    assert not info["missing_keys"] and weights(merged).keys() == weights(base).keys()


def test_untouched_input(adapted, tmp_path):
    """Neither base nor adapter is written to, and the base may be read-only."""
    _, base, adapter = adapted("llama", target_modules=["q_proj"])
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for folder in (base, adapter) for p in folder.iterdir()}
    for path in base.iterdir():
        path.chmod(0o444)
    merged = merge(adapter, tmp_path / "merged")
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for f in (base, adapter) for p in f.iterdir()} == before
    assert AutoTokenizer.from_pretrained(merged).eos_token == "</s>"
    card = (merged / "README.md").read_text()
    assert "base_model" in card or "adapter" in card
