"""Loading the base: quantization and what it reaches, attention, vocabulary, and errors that say what to do."""

import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
)

from orpo_lite.common.errors import RequestError
from orpo_lite.merge.base import Base
from orpo_lite.model import attach_adapter, base_name, check_quantized_share, load_base, routers, trainable_share
from orpo_lite.recipe import AdapterSection, ModelSection, Recipe
from tests.model.conftest import CONFIGS, SIZES, logits
from tests.tiny import tiny_model

LINEAR = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 128 * 3)  # weights of the tiny llama's linear layers


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2"])
@pytest.mark.parametrize("method", ["nf4", "fp4"])
def test_quantized_as_asked(section, family, method):
    model, facts = load_base(section(family, quantization=method))
    assert (facts.quantization, facts.quantized_share) == (method, 1.0)
    full, _ = load_base(section(family))
    held = {type(p).__name__ for n, p in model.named_parameters() if n.endswith("q_proj.weight") or "c_attn.w" in n}
    assert held == {"Params4bit"}
    assert trainable_share(model)[1] == sum(p.numel() for p in full.parameters())
    drift = (logits(model) - logits(full)).abs().mean() / logits(full).std()
    assert 0 < drift < 0.5
    assert not model.training and method in facts.sentences[0] and "100.0%" in facts.sentences[0]


def test_double_quantization_and_compute_dtype(section):
    for double in (True, False):
        model, _ = load_base(section("llama", quantization="nf4", double_quant=double))
        layer = model.model.layers[0].mlp.up_proj
        assert layer.weight.quant_state.nested is double
        assert (layer.weight.quant_state.quant_type, layer.compute_dtype) == ("nf4", torch.float32)


def test_gradients_after_an_evaluation_are_those_before(section):
    """bitsandbytes repacks 4-bit weights on some CPUs in evaluation, for a kernel that has no gradient."""
    base, _ = load_base(section("llama", quantization="nf4"))
    model = attach_adapter(base, AdapterSection(r=4))
    ids = torch.arange(5, 45).view(4, 10)

    def gradients():
        model.train()
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    before = gradients()
    with torch.no_grad():
        model.eval()(input_ids=ids)
    for one, other in zip(before, gradients(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_quantized_repository_is_used_as_it_is(section, tmp_path):
    """Another compute dtype in its config is replaced by this device's; the recipe's method does not apply."""
    model, _ = load_base(section("llama", quantization="nf4"))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["bnb_4bit_compute_dtype"] = "bfloat16"
    (tmp_path / "config.json").write_text(json.dumps(config))
    again, facts = load_base(ModelSection(name_or_path=str(tmp_path), quantization="fp4"))
    assert (facts.quantization, facts.quantized_share) == ("nf4", 1.0)
    assert "as the repository ships it (model.quantization=fp4 does not apply)" in facts.sentences[0]
    assert again.model.layers[0].mlp.up_proj.compute_dtype == torch.float32
    torch.testing.assert_close(logits(again), logits(model))


def test_eight_bits_are_refused_by_name(section, base_folder, tmp_path):
    """As a wish of the recipe, and as what a repository ships."""
    with pytest.raises(RequestError, match=r"model\.quantization: found 'int8', expected: 'nf4', 'fp4' or 'none'"):
        Recipe.load("quickstart", ["model.quantization=int8"])
    eight = BitsAndBytesConfig(load_in_8bit=True)
    AutoModelForCausalLM.from_pretrained(base_folder("llama"), quantization_config=eight).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(base_folder("llama")).save_pretrained(tmp_path)
    spec = ModelSection(name_or_path=str(tmp_path), quantization="none")
    with pytest.raises(RequestError, match=r"ships in 8 bits \(int8\).*16-bit weights.*quantization=nf4, or none"):
        load_base(spec)
    for onto in ("original", "quantized"):
        with pytest.raises(RequestError, match=r"ships quantized \(int8\).*--base.*4 bits alone"):
            Base(spec, onto)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen2_moe", "granitemoe"])
def test_fused_experts_that_escape_quantization_are_refused(section, family):
    with pytest.raises(
        RequestError,
        match=r"(?s)only \d+\.\d% .*(experts\.gate_up_proj|input_linear\.weight): [\d,]+ weights.*quantization=none",
    ) as e:
        load_base(section(family, quantization="nf4"))
    assert "router" not in str(e.value) and ".gate:" not in str(e.value) and "embed" not in str(e.value)
    model, facts = load_base(section(family))
    assert facts.quantized_share is None and routers(model)


def test_share_counts_weights_not_modules(section):
    """Ten small quantized layers do not outweigh a big one that is not."""
    model, _ = load_base(section("llama", quantization="nf4"))
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(64, 128, bias=False)
    with pytest.raises(RequestError) as e:
        check_quantized_share(model)
    assert f"{1 - 64 * 128 / LINEAR:.1%}" in str(e.value) and "model.layers.0.mlp.up_proj.weight" in str(e.value)


def test_routers_are_found_by_structure(section):
    names = {family: {n.split(".", 3)[3] for n in routers(load_base(section(family))[0])} for family in CONFIGS if "moe" in family or family == "mixtral"}  # fmt: skip
    assert names["mixtral"] == names["qwen3_moe"] == {"mlp.gate"}
    assert names["qwen2_moe"] == {"mlp.gate", "mlp.shared_expert_gate"}
    assert "block_sparse_moe.router" in names["granitemoe"]
    assert routers(load_base(section("llama"))[0]) == set()


@pytest.mark.parametrize(("family", "kernel"), [("llama", "sdpa"), ("gemma2", "eager")])
def test_attention_is_exact_for_the_model(section, family, kernel):
    _, facts = load_base(section(family))
    assert facts.attention == kernel and kernel in facts.sentences[2]
    model, facts = load_base(section(family, attention="eager"))
    assert facts.attention == model.config._attn_implementation == "eager" and "asks" in facts.sentences[2]


def test_attention_that_cannot_be_had_is_refused(section):
    with pytest.raises(RequestError, match=r"model\.attention: sdpa.*auto"):
        load_base(section("gemma2", attention="sdpa"))
    with pytest.raises(RequestError, match=r"model\.attention: flash.*auto"):
        load_base(section("llama", attention="flash_attention_2"))


def test_text_half_of_a_multimodal_model(tmp_path):
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "vision_use_head": False,
    }
    config = Gemma3Config(text_config=SIZES | {"head_dim": 16}, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    whole = Gemma3ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path)
    model, facts = load_base(ModelSection(name_or_path=str(tmp_path), quantization="nf4"))
    assert facts.quantized_share is not None and facts.quantized_share >= 0.95
    for targets in ("all-linear", ["q_proj", "v_proj"]):
        model, _ = load_base(ModelSection(name_or_path=str(tmp_path), quantization="nf4"))
        adapted = attach_adapter(model, AdapterSection(target_modules=targets)).targeted_module_names
        assert adapted and all("language_model" in name for name in adapted)
    model, _ = load_base(ModelSection(name_or_path=str(tmp_path), quantization="none"))
    with torch.no_grad():
        tokens = torch.arange(5, 25)[None]
        torch.testing.assert_close(logits(model), whole(input_ids=tokens).logits)


def refused(spec: ModelSection, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        load_base(spec)


def test_local_folders_that_are_no_models(base_folder, tmp_path):
    none = {"quantization": "none"}
    refused(ModelSection(name_or_path=str(tmp_path / "nowhere"), **none), "there is no folder .*nowhere")
    refused(ModelSection(name_or_path="./nowhere", **none), "there is no folder")
    refused(ModelSection(name_or_path="builtin:quickstart/nowhere", **none), "there is no folder")
    refused(ModelSection(name_or_path=str(tmp_path), **none), r"no config\.json")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    refused(ModelSection(name_or_path=str(tmp_path), **none), r"model\.gguf_file=a\.gguf")
    refused(ModelSection(name_or_path=str(tmp_path / "a.gguf"), **none), r"is a file.*model\.gguf_file=a\.gguf")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(ModelSection(name_or_path=str(tmp_path), **none), r"(?s)is an adapter.*merge it first.*adapter\.init_from")


@pytest.fixture
def copy(base_folder, tmp_path):
    """A copy of the tiny llama in two shards, to break."""
    folder = tmp_path / "copy"
    model = AutoModelForCausalLM.from_pretrained(base_folder("llama"))
    model.save_pretrained(folder, max_shard_size="300KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder, ModelSection(name_or_path=str(folder), quantization="none")


def test_missing_and_broken_weights_are_named(copy, tmp_path):
    folder, spec = copy
    shard = sorted(folder.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    refused(spec, f"{shard.name} is not a whole safetensors file")
    shard.unlink()
    refused(spec, f"{shard.name} is missing, though model.safetensors.index.json names it")
    for path in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        path.unlink()
    refused(spec, r"no model\.safetensors")
    torch.save({}, folder / "pytorch_model.bin")
    refused(spec, "pickle")


def test_weights_that_would_start_random_are_refused(copy):
    folder, spec = copy
    shutil.rmtree(folder)
    tiny_model(CONFIGS["llama"]()).model.save_pretrained(folder)  # a body without its head
    refused(spec, r"lacks 1 weight.*lm_head\.weight")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 32}))
    refused(spec, "do not fit config.json|size")
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "nosuch", "architectures": None}))
    refused(spec, "nosuch")


def test_code_in_the_repository_needs_consent(copy):
    folder, spec = copy
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "homemade", "auto_map": {"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "c.py").write_text("raise SystemError('this code must not run')")
    refused(spec, r"model\.trust_remote_code.*=true")


def test_without_bitsandbytes(section, monkeypatch, caplog):
    """tests/test_platforms.py has the rest."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    model, _ = load_base(section("llama", quantization="nf4"))
    assert "nf4 is skipped, since bitsandbytes does not work here" in caplog.text
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    load_base(section("llama"))


class Hub(BaseHTTPRequestHandler):
    """A hub with a gated repository, one with a revision missing, one without config.json, and nothing else."""

    def do_HEAD(self) -> None:
        codes = {"/gated/": "GatedRepo", "/old/": "RevisionNotFound", "/only-gguf/": "EntryNotFound"}
        code = next((code for part, code in codes.items() if part in self.path), "RepoNotFound")
        self.send_response(403 if code == "GatedRepo" else 404)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", "no")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *args) -> None:
        pass


ASK = """
import sys
from orpo_lite.common.errors import RequestError
from orpo_lite.model import load_base, load_tokenizer
from orpo_lite.recipe import AdapterSection, ModelSection
for name in sys.argv[1:]:
    for load in (load_base, load_tokenizer):
        try:
            load(ModelSection(name_or_path=name, quantization="none"))
        except RequestError as error:
            print(error)
"""


def test_what_the_hub_refuses_is_told_with_the_page(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    names = ["meta/gated", "meta/absent", "meta/old", "meta/only-gguf"]
    try:
        done = subprocess.run(
            [sys.executable, "-c", ASK, *names], env=os.environ | here, capture_output=True, text=True, timeout=300
        )
    finally:
        server.shutdown()
    lines = done.stdout.splitlines()
    assert len(lines) == 8, done.stderr
    assert lines[0::2] == lines[1::2]
    assert "https://huggingface.co/meta/gated" in lines[0] and "gated" in lines[0] and "hf auth login" in lines[0]
    assert "neither a local folder nor a model" in lines[2] and "https://huggingface.co/meta/absent" in lines[2]
    assert lines[4].startswith("model.revision: meta/old")
    assert "https://huggingface.co/meta/only-gguf/tree/main" in lines[6] and "model.gguf_file" in lines[6]


def test_offline_and_not_in_the_cache():
    refused(ModelSection(name_or_path="meta/absent", quantization="none"), "the hub cannot be reached")


def test_facts_name_the_base(section, base_folder):
    model, facts = load_base(section("llama"))
    assert base_name(model) == facts.name == str(base_folder("llama")) and facts.revision is None
    assert facts.precision.dtype == model.dtype == torch.float32
