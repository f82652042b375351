"""Adapters alone as GGUF: base's GGUF weights plus alpha / rank * B A are the adapter model."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from orpo_lite.common.errors import RequestError
from orpo_lite.export.gguf import export
from tests.export.test_export import read_back
from tests.model.conftest import logits


def applied(base: Path, lora: Path, out: Path) -> None:
    """Write the base's GGUF file with a LoRA file added as llama.cpp adds it."""
    pairs = {t.name: torch.from_numpy(t.data.copy()) for t in gguf.GGUFReader(lora).tensors}
    held = {key: field.contents() for key, field in gguf.GGUFReader(lora).fields.items()}
    assert held["general.type"] == "adapter" and held["adapter.type"] == "lora"
    reader = gguf.GGUFReader(base)
    assert held["general.architecture"] == reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(out, held["general.architecture"])
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=inner)
    used = set()
    for tensor in reader.tensors:
        value = torch.from_numpy(tensor.data.copy())
        if f"{tensor.name}.lora_a" in pairs:
            a, b = pairs[f"{tensor.name}.lora_a"], pairs[f"{tensor.name}.lora_b"]
            value += held["adapter.lora.alpha"] / b.shape[1] * (b @ a)
            used |= {f"{tensor.name}.lora_a", f"{tensor.name}.lora_b"}
        writer.add_tensor(tensor.name, value.numpy())
    assert used == set(pairs)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        *(pytest.param(f, marks=pytest.mark.slow) for f in ("qwen2", "qwen3", "gemma2", "gpt2", "phi3", "mistral")),
    ],
)
def test_adapter_alone(converter, model_folder, adapter_folder, tmp_path, family, capsys):
    fields = {"use_rslora": True, "rank_pattern": {".*0.*": 8}, "alpha_pattern": {".*1.*": 3}}
    model, folder = adapter_folder(family, **fields)
    lora = export(folder, tmp_path / "lora.gguf", adapter=True, ollama=True)
    said = " ".join(capsys.readouterr().out.split())
    assert "as base.gguf" in said and "rank_pattern={" in said and ": vLLM scales all modules by" in said
    assert (tmp_path / "Modelfile").read_text().startswith("FROM ./base.gguf\nADAPTER ./lora.gguf\nTEMPLATE")
    base = export(model_folder(family), tmp_path / "base.gguf", quant="f32")
    applied(base, lora, tmp_path / "both.gguf")
    original, copy = read_back(tmp_path / "both.gguf", model_folder(family))
    assert not torch.allclose(logits(original), logits(model), atol=1e-2)
    torch.testing.assert_close(logits(copy), logits(model), atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_names_left_by_torch_compile_are_read(converter, adapter_folder, tmp_path):
    _, folder = adapter_folder("llama")
    right = gguf.GGUFReader(export(folder, tmp_path / "right.gguf", adapter=True)).tensors
    path = folder / "adapter_model.safetensors"
    save_file({key.replace(".layers", "._orig_mod.layers"): value for key, value in load_file(path).items()}, path)
    found = {t.name: t.data for t in gguf.GGUFReader(export(folder, tmp_path / "lora.gguf", adapter=True)).tensors}
    assert found.keys() == {t.name for t in right} and all((found[t.name] == t.data).all() for t in right)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda key, value: value * 0 if "lora_B" in key else value,
            "changes nothing: in every layer lora_B",
        ),
        (lambda key, value: value[:0], "empty|no numbers|ZeRO"),
        (
            lambda key, value: value if "layers.0" in key else None,
            r"lacks 14 tensor.*layers\.1",
        ),
        (
            lambda key, value: None if "layers.1.mlp.up_proj.lora_B" in key else value,
            r"lacks 1 tensor.*layers\.1\.mlp\.up_proj",
        ),
    ],
    ids=["dead", "empty", "half", "one matrix"],
)
def test_an_adapter_without_effect_or_with_gaps_is_refused(adapter_folder, tmp_path, change, words):
    _, folder = adapter_folder("llama")
    path = folder / "adapter_model.safetensors"
    kept = {key: new.contiguous() for key, value in load_file(path).items() if (new := change(key, value)) is not None}
    save_file(kept, path, metadata={"format": "pt"})
    with pytest.raises(RequestError, match=words):
        export(folder, tmp_path / "lora.gguf", adapter=True)
    assert not (tmp_path / "lora.gguf").exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias=all"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "LoRA on embeddings"),
    ],
)
def test_what_a_lora_file_cannot_hold(adapter_folder, tmp_path, fields, words):
    _, folder = adapter_folder("qwen2", **fields)
    with pytest.raises(RequestError, match=f"{words}.*export the merged model instead"):
        export(folder, tmp_path / "lora.gguf", adapter=True)
    assert not (tmp_path / "lora.gguf").exists()
