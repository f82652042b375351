"""Exports run elsewhere: llama.cpp (xllamacpp), its quantizer, and transformers' own server."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

import orpo_lite
from orpo_lite.export.gguf import export
from orpo_lite.model import gguf as cache
from tests.model.conftest import disturb
from tests.test_smollm2 import gguf_file  # noqa: F401  # fixture
from tests.tiny import CORPUS, tiny_model

QUICKSTART = Path(orpo_lite.__file__).parent / "data" / "quickstart" / "model"
TEXTS = [
    "Hello world, how's it going? I've 12345 apples.\n\nNew  line\ttab",
    "naïve café 日本語 😀 x",
    " leading",
    "def f(x):\n    return x+1",
]


def post(address: str, path: str, body: dict) -> dict:
    request = urllib.request.Request(address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


@pytest.fixture
def llama_cpp():
    """llama_cpp(gguf file, LoRA file) -> address of a llama.cpp server."""
    xllamacpp = pytest.importorskip("xllamacpp")
    servers = []

    def start(path: Path, lora: Path | None = None) -> str:
        settings = xllamacpp.CommonParams()
        settings.model.path, settings.n_ctx, settings.warmup, settings.cpuparams.n_threads = str(path), 256, False, 1
        if lora:
            adapter = xllamacpp.CommonAdapterLoraInfo()
            adapter.path, adapter.scale = str(lora), 1.0
            settings.lora_adapters = [adapter]
        servers.append(xllamacpp.Server(settings))
        return servers[-1].listening_address

    return start


def same_as_transformers(
    address: str, model, tokenizer, texts=("The capital of France is", "Once upon a time")
) -> None:
    """Tokens of any text, and the greedy continuation with its first log-probability."""
    for text in TEXTS:
        found = post(address, "/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
        assert found == tokenizer(text)["input_ids"]
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        length = inputs["input_ids"].shape[1]
        expected = model.generate(**inputs, max_new_tokens=12, do_sample=False, top_p=None, temperature=None)[
            0, length:
        ]
        body = {"prompt": inputs["input_ids"][0].tolist(), "n_predict": 12, "temperature": 0, "n_probs": 1}
        answer = post(address, "/completion", body | {"return_tokens": True, "cache_prompt": False})
        assert answer["tokens"] == expected.tolist()
        first = model(**inputs).logits[0, -1].log_softmax(-1).max().item()
        assert abs(answer["completion_probabilities"][0]["logprob"] - first) < 0.02


@pytest.mark.slow
def test_smollm2_in_llama_cpp(converter, llama_cpp, gguf_file, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(cache.constants, "HF_HOME", str(tmp_path / "cache"))
    source = cache.cached_folder(gguf_file)
    monkeypatch.undo()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source)
    base = export(source, tmp_path / "base.gguf", ollama=True)
    same_as_transformers(llama_cpp(base), model, tokenizer)
    assert "SYSTEM" in (tmp_path / "Modelfile").read_text() and "TEMPLATE" in (tmp_path / "Modelfile").read_text()

    options = {"use_rslora": True, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"down_proj": 5}}
    peft_model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", **options))
    disturb(peft_model, 0.01)
    peft_model.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(source)
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(tmp_path / "adapter")
    lora = export(tmp_path / "adapter", tmp_path / "lora.gguf", adapter=True)
    same_as_transformers(llama_cpp(base, lora), peft_model.eval(), tokenizer)


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """As transformers 5 has Llama 2's: BPE with byte fallback, and no SentencePiece file."""
    rare = [f"<0x{i:02X}>" for i in range(256)]
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=["<unk>", "<s>", "</s>", *rare], show_progress=False)
    core.train_from_iterator([CORPUS], trainer)
    text = json.loads(core.to_str())
    text["added_tokens"] = [token for token in text["added_tokens"] if token["id"] < 3]
    core = Tokenizer.from_str(json.dumps(text))
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.slow
def test_tokenizer_with_byte_fallback_in_llama_cpp(converter, llama_cpp, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    tiny_model(LlamaConfig(**sizes, vocab_size=440, bos_token_id=1, eos_token_id=2)).save_pretrained(tmp_path / "model")
    tokenizer = sentencepiece_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    address = llama_cpp(export(tmp_path / "model", tmp_path / "a.gguf", quant="f32"))
    for text in TEXTS:
        found = post(address, "/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
        assert found == tokenizer(text)["input_ids"]


HELD_OUT = (
    "Water boils at one hundred degrees Celsius at sea level, and at a lower temperature in the mountains. The quick brown "
    "fox jumps over the lazy dog, and then it sleeps for the rest of the day under an old tree near the river."
)


def distributions(address: str, tokenizer) -> torch.Tensor:
    """Log-probabilities (positions, vocabulary) of the next token on held-out text, as llama.cpp computes them."""
    ids, rows = tokenizer(HELD_OUT)["input_ids"], []
    for end in range(4, len(ids), 5):
        body = {"prompt": ids[:end], "n_predict": 1, "temperature": 0, "n_probs": len(tokenizer), "cache_prompt": True}
        found = post(address, "/completion", body)["completion_probabilities"][0]["top_logprobs"]
        row = torch.full((len(tokenizer),), -40.0)
        row[[one["id"] for one in found]] = torch.tensor([max(one["logprob"], -40.0) for one in found])
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.slow
def test_k_quants_of_a_real_model_in_llama_cpp(converter, llama_cpp, gguf_file, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Next-token distributions on held-out text stay close to the float file's, closer with more bits; and it answers."""
    monkeypatch.setattr(cache.constants, "HF_HOME", str(tmp_path / "cache"))
    source = cache.cached_folder(gguf_file)
    monkeypatch.undo()
    tokenizer = AutoTokenizer.from_pretrained(source)
    floats = export(source, tmp_path / "f16.gguf", quant="f16")
    right, drift, answers = distributions(llama_cpp(floats), tokenizer), {}, {}
    for quant in ("q2_k", "q4_k_m", "q6_k"):
        capsys.readouterr()
        out = export(source, tmp_path / f"{quant}.gguf", quant=quant)
        said = " ".join(capsys.readouterr().out.split())
        assert "hold the source's values" in said and "(rows not a multiple of 256)" in said and "quantized by " in said
        assert out.stat().st_size < 0.6 * floats.stat().st_size
        address = llama_cpp(out)
        there = distributions(address, tokenizer)
        drift[quant] = (right.exp() * (right - there)).sum(-1).mean().item()
        body = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 24}
        answers[quant] = post(address, "/v1/chat/completions", body | {"temperature": 0})["choices"][0]["message"][
            "content"
        ]
    print(drift, answers)
    assert "Paris" in answers["q6_k"] and all(answers.values())
    assert drift["q6_k"] < drift["q4_k_m"] < drift["q2_k"]
    assert drift["q6_k"] < 0.02 and drift["q4_k_m"] < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["q4_k_m", "q6_k"])
def test_k_quants(converter, llama_cpp, tmp_path, quant, capsys):
    """By llama.cpp's program where there is one, else by the library in its wheel."""
    out = export(QUICKSTART, tmp_path / "a.gguf", quant=quant, llama_quantize=os.environ.get("LLAMA_QUANTIZE"))
    assert "hold the source's values" in capsys.readouterr().out
    assert out.stat().st_size < QUICKSTART.joinpath("model.safetensors").stat().st_size / 2
    assert post(llama_cpp(out), "/completion", {"prompt": "Hello", "n_predict": 4, "ignore_eos": True})["content"]


@pytest.mark.slow
def test_run_with_peft_and_merged_in_transformers_serve(adapter_folder, tmp_path):
    from orpo_lite.merge.run import merge

    lacking = [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]
    if lacking:
        pytest.skip(f"transformers serve needs {', '.join(lacking)}: pip install 'transformers[serving]'")
    model, folder = adapter_folder("llama")
    base = AutoModelForCausalLM.from_pretrained(model.get_base_model().name_or_path)
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        again = PeftModel.from_pretrained(base, folder).eval()(tokens).logits
        torch.testing.assert_close(again, model.eval()(tokens).logits, atol=1e-5, rtol=1e-5)

    merged = merge(folder, tmp_path / "merged")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(merged)]
    words += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = (tmp_path / "log").open("w")
    (tmp_path / "hub").mkdir()
    home = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub")}
    server = subprocess.Popen(words, stdout=log, stderr=log, env=home)
    try:
        body = {"model": str(merged), "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
        for _ in range(120):
            assert server.poll() is None, (tmp_path / "log").read_text()
            try:
                answer = post(f"http://127.0.0.1:{port}", "/v1/chat/completions", body | {"stream": False})
                break
            except urllib.error.HTTPError as error:
                raise AssertionError(error.read().decode()) from error
            except urllib.error.URLError:
                time.sleep(1)
        assert answer["choices"][0]["message"]["role"] == "assistant"
    finally:
        server.terminate()
        server.wait(20)
