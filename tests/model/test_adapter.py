"""Adapters: where they land, what is trained, in which dtype, and that what is saved gives the training logits."""

import copy
import json
import logging
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from orpo_lite.common.errors import RequestError
from orpo_lite.model import attach_adapter, load_base, save_adapter, trainable_share
from orpo_lite.recipe import AdapterSection
from tests.model.conftest import disturb, logits


def adapted(model):
    return {n.removeprefix("base_model.model.") for n, m in model.named_modules() if isinstance(m, LoraLayer)}


LLAMA = {f"self_attn.{x}_proj" for x in "qkvo"} | {f"mlp.{x}_proj" for x in ("gate", "up", "down")}


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_all_linear_is_all_but_the_head(attach, quantization):
    model = attach("llama", quantization)
    assert {n.split(".", 3)[3] for n in adapted(model)} == LLAMA and len(adapted(model)) == 14
    trained, total = trainable_share(model)
    assert trained == 4 * 2 * (2 * 128 + 2 * 96 + 3 * 192)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen2_moe", "granitemoe"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "o_proj"], ".*[qv]_proj"])
def test_lora_never_lands_on_a_router_or_fused_experts_unasked(attach, family, targets, caplog):
    model = attach(family, target_modules=targets)
    touched = {n for n, p in model.named_parameters() if p.requires_grad}
    assert touched and not any("router" in n or ".gate." in n or "expert_gate" in n for n in touched)
    assert not any(".experts." in n for n in touched)
    if targets == "all-linear":
        assert "not the fused experts" in caplog.text
        linear = {n.rpartition(".")[2] for n in adapted(model)}
        shared = {"gate_proj", "up_proj", "down_proj"} if family == "qwen2_moe" else set()
        assert linear == {"q_proj", "k_proj", "v_proj", "o_proj"} | shared


def test_a_router_or_expert_that_is_named_is_adapted(attach):
    names = adapted(attach("qwen2_moe", target_modules=["q_proj", "shared_expert_gate"]))
    assert any(n.endswith("shared_expert_gate") for n in names)
    model = attach("mixtral", target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    assert any("experts" in n for n, p in model.named_parameters() if p.requires_grad)
    disturb(model)
    assert logits(model).isfinite().all()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"target_modules": ["q_proj", "vv_proj"]},
            r"target_modules: .* no module called vv_proj \(did you mean v_proj",
        ),
        ({"target_modules": ".*nothing"}, "not found|no modules"),
        ({"modules_to_save": ["embeddings"]}, "modules_to_save: .* no module called embeddings"),
    ],
)
def test_what_matches_nothing_is_refused(attach, fields, words):
    with pytest.raises(RequestError, match=words):
        attach("llama", **fields)


def test_variants_reach_peft(attach):
    model = attach("llama", alpha=8, use_rslora=True, use_dora=True)
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    assert layers and all(m.scaling["default"] == 8 / 2 and m.use_dora["default"] for m in layers)


def test_quantized_norms_are_float32_and_embeddings_are_not(section):
    """As on a 16-bit device: norms and what is trained in float32, embeddings and head as they were."""
    model, _ = load_base(section("llama", quantization="nf4", dtype="bfloat16"))
    assert model.model.norm.weight.dtype == torch.bfloat16
    attached = attach_adapter(model, AdapterSection(r=4, modules_to_save=["lm_head"]))
    kinds = {n: p.dtype for n, p in attached.named_parameters()}
    assert {d for n, d in kinds.items() if "norm" in n or "lora_" in n or "modules_to_save" in n} == {torch.float32}
    assert {d for n, d in kinds.items() if "embed_tokens" in n or "original_module" in n} == {torch.bfloat16}
    plain, _ = load_base(section("llama", dtype="bfloat16"))
    attached = attach_adapter(plain, AdapterSection(r=4))
    assert plain.model.norm.weight.dtype == torch.bfloat16
    assert {p.dtype for p in attached.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen2_moe"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_adapter_gets_a_gradient(attach, family, checkpointing):
    model = attach(family, "nf4" if family in ("llama", "gpt2", "gemma2") else "none", checkpointing)
    disturb(model)
    model.train()
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": True})
    tokens = torch.arange(5, 25)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None and g.abs().sum() > 0 for g in grads.values())
    assert not any(p.grad is not None for p in model.parameters() if not p.requires_grad)


def test_attaching_warns_of_nothing(section):
    for family in ("llama", "gpt2", "mixtral"):
        model, _ = load_base(section(family))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            attach_adapter(model, AdapterSection())


def test_full_fine_tuning(section, tmp_path):
    model, _ = load_base(section("llama", dtype="bfloat16"))
    model = attach_adapter(model, None)
    trained, total = trainable_share(model)
    assert trained == total and {p.dtype for p in model.parameters()} == {torch.float32}
    save_adapter(model, tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    with pytest.raises(RequestError, match="full fine-tuning"):
        attach_adapter(load_base(section("llama", quantization="nf4"))[0], None)


VARIANTS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "saved modules": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_adapter_on_the_original_base_gives_the_training_logits(attach, base_folder, tmp_path, variant):
    model = attach("llama", **VARIANTS[variant])
    before = logits(AutoModelForCausalLM.from_pretrained(base_folder("llama")))
    torch.testing.assert_close(logits(model), before, atol=2e-4, rtol=1e-4)
    disturb(model)
    trained = logits(model)
    assert (trained - before).abs().max() > 0.1
    save_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model), trained)  # saving leaves the model as it was
    base = AutoModelForCausalLM.from_pretrained(base_folder("llama"))
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path)), trained, atol=2e-4, rtol=1e-4)
    again = attach("llama", init_from=str(tmp_path))
    torch.testing.assert_close(logits(again), trained, atol=2e-4, rtol=1e-4)
    assert trainable_share(again)[0] >= trainable_share(model)[0]


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_foreign_adapters_that_changed_their_base_are_refused_on_quantized_ones(attach, base_folder, tmp_path, init):
    base = AutoModelForCausalLM.from_pretrained(base_folder("llama"))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init))
    disturb(model)
    model.save_pretrained(tmp_path)  # needs the changed base, which an unquantized one becomes again
    again = attach("llama", init_from=str(tmp_path))
    torch.testing.assert_close(logits(again), logits(model), atol=2e-4, rtol=1e-4)
    with pytest.raises(RequestError, match="changed its base"):
        attach("llama", "nf4", init_from=str(tmp_path))


def test_going_on_from_an_adapter(attach, tmp_path, caplog):
    model = attach("llama", "nf4", r=8, alpha=4)
    disturb(model)
    save_adapter(model, tmp_path)
    with caplog.at_level(logging.INFO):
        again = attach("llama", "nf4", init_from=str(tmp_path))
    assert "r=8 alpha=4" in caplog.text
    torch.testing.assert_close(logits(again), logits(model))
    assert trainable_share(again) == trainable_share(model)
    caplog.clear()
    attach("llama-tied", init_from=str(tmp_path))
    assert "was trained on" in caplog.text


def test_a_base_of_this_package_is_itself_in_another_installation(attach, tmp_path, caplog, monkeypatch):
    save_adapter(attach("llama"), tmp_path)
    config = tmp_path / "adapter_config.json"
    content = json.loads(config.read_text("utf-8"))
    monkeypatch.setattr(
        "orpo_lite.model.adapter.base_name", lambda _: "/venv/site-packages/orpo_lite/data/quickstart/model"
    )
    for trained_on, said in (
        ("/clone/orpo_lite/data/quickstart/model", False),
        ("/clone/orpo_lite/data/other/model", True),
    ):
        config.write_text(json.dumps(content | {"base_model_name_or_path": trained_on}), "utf-8")
        caplog.clear()
        attach("llama", init_from=str(tmp_path))
        assert ("was trained on" in caplog.text) == said


def test_an_adapter_that_does_not_fit_is_refused(attach, tmp_path):
    model = attach("llama")
    save_adapter(model, tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    with pytest.raises(RequestError, match=r"does not fit .*q_proj"):
        attach("gemma2", init_from=str(changed(tmp_path, weights, wide=True)))
    first = next(iter(weights))
    fewer = {k: v for k, v in weights.items() if k != first}
    with pytest.raises(RequestError, match=f"lacks 1 tensor.*{first}"):
        attach("llama", init_from=str(changed(tmp_path, fewer)))
    more = weights | {first.replace("layers.0", "layers.7"): weights[first].clone()}
    with pytest.raises(RequestError, match="has no place for"):
        attach("llama", init_from=str(changed(tmp_path, more)))
    with pytest.raises(RequestError, match=r"no adapter_config\.json"):
        attach("llama", init_from=str(tmp_path.parent))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(RequestError):
        attach("llama", init_from=str(tmp_path))
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | {"peft_type": "IA3"}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": config["peft_type"]}))
    with pytest.raises(RequestError, match="expected LORA"):
        attach("llama", init_from=str(tmp_path))


def changed(folder, weights, wide=False):
    """The folder with other weights; `wide` doubles every A's input width."""
    if wide:
        weights = {k: torch.cat([v, v], 1) if "lora_A" in k else v for k, v in weights.items()}
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


def test_a_foreign_peft_model_can_be_saved(base_folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(base_folder("llama"))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    disturb(model)
    save_adapter(model, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(base_folder("llama"))
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path)), logits(model))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi"])
def test_norms_of_a_quantized_base_hand_on_16_bits_and_lose_nothing(family, monkeypatch):
    """Their products' inputs are what they were, the sums of the layers stay float32, and gradients come as close to float32's."""
    import transformers as tf

    from orpo_lite.model import adapter
    from tests.tiny import tiny_model

    sizes = dict(hidden_size=128, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4,
                 num_key_value_heads=4, vocab_size=512)  # fmt: skip
    kind = {"llama": tf.LlamaConfig, "qwen3": tf.Qwen3Config, "gemma2": tf.Gemma2Config, "phi": tf.PhiConfig}[family]
    model = get_peft_model(tiny_model(kind(**sizes, head_dim=32)), LoraConfig(r=4, target_modules="all-linear"))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model = model.to(torch.bfloat16)
    ids = torch.randint(512, (3, 64))

    def gradient(model, autocast):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids).loss
        grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
        return torch.cat([g.flatten().float() for g in grads])

    exact = gradient(copy.deepcopy(model).float(), False)
    monkeypatch.setattr(adapter, "is_quantized", lambda _: True)
    errors, seen = {}, []
    for hooks in (False, True):
        twin = copy.deepcopy(model)
        with monkeypatch.context() as patch:
            if not hooks:
                patch.setattr(adapter, "GradientCheckpointingLayer", int)  # finds no layers
            adapter.prepare_frozen(twin)
        if hooks:
            for name, module in twin.named_modules():
                if name.endswith(("layers.0", "layers.1")):
                    module.register_forward_hook(lambda m, a, out: seen.append(("layer", out.dtype)))
                elif "norm" in type(module).__name__.lower():
                    assert {p.dtype for p in module.parameters()} == {torch.float32}
                    module.register_forward_hook(lambda m, a, out: seen.append(("norm", out.dtype)))
        errors[hooks] = (gradient(twin, True) - exact).norm()
    assert set(seen) == {("layer", torch.float32), ("norm", torch.bfloat16)}
    assert errors[True] < 1.1 * errors[False]
