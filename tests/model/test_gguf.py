"""GGUF bases: dequantized once into a cached folder, which is then a model like any other."""

import json
import logging

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from orpo_lite.common.errors import RequestError
from orpo_lite.merge.run import merge
from orpo_lite.model import attach_adapter, load_base, load_tokenizer, save_adapter, trainable_share
from orpo_lite.model import gguf as module
from orpo_lite.recipe import AdapterSection, ModelSection
from tests.model.conftest import disturb, logits
from tests.tiny import tiny_model, tiny_tokenizer

TEMPLATE = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Query and key rows in llama.cpp's rotary order."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, kind: Q, tied: bool = False):
    """A tiny random Llama as a GGUF file of this type; returns the model with the weights that the file holds."""
    tokenizer = tiny_tokenizer(eos="</s>", pad="<pad>")
    vocabulary = [t for t, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=0, initializer_range=0.2, tie_word_embeddings=tied,
    )  # fmt: skip
    model = tiny_model(config)
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {
        "block_count": 2, "context_length": 2048, "embedding_length": 64, "feed_forward_length": 128,
        "head_count": 4, "head_count_kv": 2, "layer_norm_rms_eps": config.rms_norm_eps, "vocab_size": len(vocabulary),
        "rope_freq_base": 10000.0,
    }.items():  # fmt: skip
        getattr(writer, f"add_{key}")(value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if t in ("</s>", "<pad>") else 1 for t in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in json.loads(tokenizer._tokenizer.to_str())["model"]["merges"]])
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(1)
    writer.add_chat_template(TEMPLATE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            stem = name.removesuffix(".weight")
            layer = stem.split(".")[2] if "layers." in stem else None
            there = f"blk.{layer}.{NAMES[stem.split('.', 3)[3]]}" if layer else NAMES[stem]
            heads = {"attn_q": 4, "attn_k": 2}.get(there.rpartition(".")[2])
            value = parameter.numpy()
            value = permuted(value, heads) if heads else value
            held = Q.F32 if value.ndim == 1 else kind
            data = gguf.quantize(value, held)
            writer.add_tensor(f"{there}.weight", data, raw_dtype=held)
            value = gguf.dequantize(data, held).reshape(value.shape)
            if heads:
                value = value.reshape(heads, -1, 2, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
            parameter.copy_(torch.from_numpy(value.copy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty Hugging Face cache."""
    monkeypatch.setattr(module.constants, "HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "orpo_lite" / "gguf"


def spec(path, **fields) -> ModelSection:
    return ModelSection(
        **{"name_or_path": str(path.parent), "gguf_file": path.name, "quantization": "none"} | fields  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(Q.F32, torch.float32), (Q.BF16, torch.bfloat16), (Q.F16, torch.float16), (Q.Q8_0, torch.float16), (Q.Q4_1, torch.float16)],
)  # fmt: skip
def test_weights_are_what_the_file_holds(tmp_path, cache, kind, dtype):
    expected = write_gguf(tmp_path / "a.gguf", kind)
    model, facts = load_base(spec(tmp_path / "a.gguf"))
    assert facts.name == f"{tmp_path}/a.gguf" and model.dtype == torch.float32
    # float16 holds a block's scale times a small integer to 11 bits
    torch.testing.assert_close(
        logits(model), logits(expected), atol=2e-2 if dtype == torch.float16 else 1e-5, rtol=1e-3
    )
    files = list(next(cache.glob("*-1")).glob("*.safetensors"))
    stored = {key: tensor for file in files for key, tensor in load_file(file).items()}
    assert len(files) == len(stored) and stored["model.layers.0.mlp.up_proj.weight"].dtype == dtype
    assert stored["model.norm.weight"].dtype == torch.float32


def test_tokenizer_and_template_come_from_the_file(tmp_path, cache):
    write_gguf(tmp_path / "a.gguf", Q.F16)
    tokenizer, original = load_tokenizer(spec(tmp_path / "a.gguf")), tiny_tokenizer(eos="</s>", pad="<pad>")
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi</s>"
    text = "The quick brown fox</s>"
    assert tokenizer(text)["input_ids"] == original(text)["input_ids"]


@pytest.mark.parametrize("tied", [False, True])
def test_quantized_trained_saved_and_merged(tmp_path, cache, tied):
    write_gguf(tmp_path / "a.gguf", Q.Q8_0, tied)
    section = spec(tmp_path / "a.gguf", quantization="nf4")
    tokenizer = load_tokenizer(section)
    base, facts = load_base(section, tokenizer)
    assert (facts.quantization, facts.quantized_share) == ("nf4", 1.0)
    model = attach_adapter(base, AdapterSection(r=4), tokenizer=tokenizer)
    assert trainable_share(model)[0] > 0
    tokens = torch.arange(5, 25)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    disturb(model)
    save_adapter(model, tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")

    merge(tmp_path / "adapter", tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    original, _ = load_base(spec(tmp_path / "a.gguf"), tokenizer)
    adapter = AdapterSection(init_from=str(tmp_path / "adapter"))
    # merged in the cache's float16
    torch.testing.assert_close(logits(plain), logits(attach_adapter(original, adapter)), atol=0.1, rtol=1e-2)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == TEMPLATE


def test_dequantized_once_until_the_file_changes(tmp_path, cache, caplog):
    write_gguf(tmp_path / "a.gguf", Q.F16)
    with caplog.at_level(logging.INFO):
        first = module.cached_folder(tmp_path / "a.gguf")
        assert module.cached_folder(tmp_path / "a.gguf") == first
    assert caplog.text.count("dequantizing") == 1
    write_gguf(tmp_path / "a.gguf", Q.Q8_0)
    assert module.cached_folder(tmp_path / "a.gguf") != first


def test_a_conversion_that_fails_leaves_nothing(tmp_path, cache, monkeypatch):
    write_gguf(tmp_path / "a.gguf", Q.F16)
    with monkeypatch.context() as broken:
        broken.setattr(module, "save_file", lambda *given, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            module.cached_folder(tmp_path / "a.gguf")
    assert [p for p in cache.iterdir() if p.is_dir()] == []
    assert module.cached_folder(tmp_path / "a.gguf").is_dir()


def test_every_wrong_way_to_name_the_file_shows_the_right_one(tmp_path, cache):
    write_gguf(tmp_path / "a.gguf", Q.F16)
    right = rf"set model\.name_or_path={tmp_path} model\.gguf_file=a\.gguf"
    for name, file in [
        ("user/model-GGUF", str(tmp_path / "a.gguf")),
        (str(tmp_path / "cache"), str(tmp_path / "a.gguf")),
        (str(tmp_path / "a.gguf"), None),
        (str(tmp_path / "a.gguf"), "a.gguf"),
    ]:
        for load in (load_base, load_tokenizer):
            with pytest.raises(RequestError, match=right):
                load(ModelSection(name_or_path=name, gguf_file=file, quantization="none"))
    with pytest.raises(RequestError, match=r"b\.gguf does not exist; GGUF files there: a\.gguf"):
        load_base(spec(tmp_path / "b.gguf"))
    with pytest.raises(RequestError, match="there is no folder"):
        load_base(spec(tmp_path / "nowhere" / "a.gguf"))
    (tmp_path / "c.gguf").write_bytes(b"not one")
    with pytest.raises(RequestError, match=r"c\.gguf is not a GGUF file"):
        load_base(spec(tmp_path / "c.gguf"))
    whole = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "c.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RequestError, match=r"c\.gguf"):
        load_base(spec(tmp_path / "c.gguf"))


def test_without_the_gguf_package(tmp_path, cache, monkeypatch):
    write_gguf(tmp_path / "a.gguf", Q.F16)
    monkeypatch.setattr("transformers.modeling_gguf_pytorch_utils.is_gguf_available", lambda: False)
    with pytest.raises(RequestError, match="Please install torch and gguf"):
        load_base(spec(tmp_path / "a.gguf"))
