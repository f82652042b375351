"""liger's kernels, by Triton's interpreter: equal to PyTorch's in float32, in one model alone, refused where they are not exact."""

import copy
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from transformers.models.llama import modeling_llama

from orpo_lite import ORPOConfig, ORPOTrainer
from orpo_lite.common.errors import RequestError
from orpo_lite.model.adapter import prepare_frozen
from orpo_lite.objective import kernels, layout
from orpo_lite.plan.gpus import Target
from orpo_lite.recipe import Recipe
from tests.interpreted import liger
from tests.plans import plan
from tests.tiny import tiny_model
from tests.training import SIZES, config, gradients, rows

S = SIZES | dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
FAMILIES = {
    "llama": tf.LlamaConfig(**S),
    "qwen3": tf.Qwen3Config(**S, head_dim=8),  # norms of queries and keys
    "gemma2": tf.Gemma2Config(**S, head_dim=8, attn_logit_softcapping=5.0, attn_implementation="eager"),
    "phi3": tf.Phi3Config(**S),  # one matrix for gate and up, one for queries, keys and values
    "mixtral": tf.MixtralConfig(**S, num_local_experts=4, num_experts_per_tok=2),
}
MODULES = {"llama": 9, "qwen3": 13, "gemma2": 13, "phi3": 9, "mixtral": 7}
"""Norms, gated activations (not of experts) and attentions, which rotate, of two layers and the end."""


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


@pytest.fixture
def short(monkeypatch):
    """Make the check's pairs short: interpreted, each token takes milliseconds."""
    liger()
    pairs = [{"chosen_ids": [5, 9, 7, 8][: 3 + n], "rejected_ids": [5, 9, 3, 4, 6], "chosen_start": 2, "rejected_start": 2}
             for n in (0, 1, 1)]  # fmt: skip
    monkeypatch.setattr(layout, "check_pairs", lambda vocabulary: pairs)


def adapted(base, **kw):
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **kw))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    prepare_frozen(model)
    return model


def outcomes(model, tmp_path, tokenizer, dtype=torch.float32):
    """Return mean log-probs and gradients of two pairs in one row, each layer recomputed, by PyTorch and by liger."""
    fused, found = copy.deepcopy(model), []
    assert kernels.patch(fused.get_base_model())
    args = config(tmp_path, layout="shared", gradient_checkpointing=True)
    for twin in (model, fused):
        trainer = ORPOTrainer(twin, args, None, rows(2, seed=5), processing_class=tokenizer)
        twin.enable_input_require_grads()
        twin.gradient_checkpointing_enable({"use_reentrant": False})
        twin.train()
        batch = next(iter(trainer.get_train_dataloader()))
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            with torch.no_grad():
                stats, _ = trainer.objective.statistics(twin, batch)
            loss, _ = trainer.compute_loss(twin, batch, return_outputs=True)
            gradients(twin, loss)
        found.append((stats[0], {name: p.grad.float() for name, p in twin.named_parameters() if p.requires_grad}))
    return found


def check_equal(found, close, gradient):
    (expected, plain), (got, fused) = found
    torch.testing.assert_close(got, expected, rtol=close, atol=close)
    for name, grad in plain.items():
        assert grad.norm() > 0, name
        assert (fused[name] - grad).norm() <= gradient * grad.norm(), name


@pytest.mark.parametrize("name", [slow(name) for name in FAMILIES])
def test_adapters_get_the_same_gradients(name, tmp_path, tokenizer):
    liger()
    model = adapted(tiny_model(copy.deepcopy(FAMILIES[name])), exclude_modules=".*router")
    assert kernels.patch(copy.deepcopy(model).get_base_model()) == MODULES[name]
    check_equal(outcomes(model, tmp_path, tokenizer), 1e-5, 1e-4)


@pytest.mark.parametrize("variant", [slow(dict(use_dora=True)), slow(dict(modules_to_save=["norm"]))], ids=str)
def test_other_adapters_too(variant, tmp_path, tokenizer):
    liger()
    check_equal(outcomes(adapted(tiny_model(tf.LlamaConfig(**S)), **variant), tmp_path, tokenizer), 1e-5, 1e-4)


@pytest.mark.parametrize("dtype", [slow(torch.float32), slow(torch.float16)], ids=str)
def test_a_quantized_base_with_float32_norms(dtype, tmp_path, tokenizer):
    liger()
    wider = S | dict(hidden_size=64, intermediate_size=128)  # blocks of 64 weights
    tiny_model(tf.LlamaConfig(**wider)).save_pretrained(tmp_path / "base")
    four = tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    model = adapted(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=four, dtype=dtype))
    norm, hidden = model.get_base_model().model.norm, torch.randn(1, 3, 64, dtype=dtype)
    assert norm.weight.dtype == torch.float32
    found = outcomes(model, tmp_path, tokenizer, dtype)
    check_equal(found, *((1e-5, 1e-4) if dtype == torch.float32 else (1e-2, 5e-2)))
    fused = copy.deepcopy(model).get_base_model()
    kernels.patch(fused)
    assert fused.model.norm(hidden).dtype == norm(hidden).dtype == dtype  # by the hook of prepare_frozen


def test_nothing_outside_of_the_model_changes():
    liger()
    before, ids = dict(vars(modeling_llama)), torch.arange(3, 9)[None]
    model, other = tiny_model(tf.LlamaConfig(**S)), tiny_model(tf.LlamaConfig(**S))
    assert kernels.patch(model) == 9
    assert {key for key, value in vars(modeling_llama).items() if value is not before.get(key)} == set()
    with mock.patch("triton.runtime.interpreter.GridExecutor.__call__", side_effect=AssertionError("launched")):
        expected = other(ids).logits
        with pytest.raises(AssertionError, match="launched"):
            model(ids)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        copy.deepcopy(model).generate(ids, max_new_tokens=3), other.generate(ids, max_new_tokens=3)
    )


def test_the_check_finds_what_is_exact(short):
    cpu = torch.device("cpu")
    assert kernels.inexactness(tiny_model(FAMILIES["llama"]), cpu, torch.float16) is None
    # liger's MLP takes SiLU, whatever the model's activation is
    gelu = tiny_model(tf.LlamaConfig(**S, hidden_act="gelu"))
    assert "a small LlamaForCausalLM differs by" in kernels.inexactness(gelu, cpu, torch.float32)
    assert "liger-kernel has none for GPT2LMHeadModel" in kernels.inexactness(
        tiny_model(tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=512)), cpu, torch.float32
    )


def test_auto_says_why_not_and_liger_refuses(monkeypatch, short):
    gelu = tiny_model(tf.LlamaConfig(**S, hidden_act="gelu"))

    def wish(kernel, device):
        return kernels.fuse(gelu, SimpleNamespace(kernels=kernel, device=torch.device(device), mixed_precision="no"))

    assert wish("none", "cuda") == "PyTorch's own, as asked"
    assert wish("auto", "cpu") == "PyTorch's own: liger's need a CUDA device, and this is cpu"
    with pytest.raises(
        RequestError, match="memory.kernels: found liger.* a small LlamaForCausalLM differs by .*auto or none"
    ):
        wish("liger", "cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RequestError, match="need a CUDA device"):
        wish("liger", "cpu")
    monkeypatch.setattr(kernels, "is_liger_kernel_available", lambda: False)
    assert wish("auto", "cuda") == "PyTorch's own: liger-kernel is not installed (pip install liger-kernel)"
    with pytest.raises(RequestError, match="pip install liger-kernel"):
        wish("liger", "cuda")
    assert not any("forward" in vars(module) for module in gelu.modules())


def test_trl_and_transformers_field_means_the_kernels_without_the_loss(tmp_path, tokenizer, short):
    args = config(tmp_path, use_liger_kernel=True)
    assert (args.kernels, args.use_liger_kernel) == ("liger", False)
    model = adapted(tiny_model(tf.LlamaConfig(**S)))
    trainer = ORPOTrainer(model, args, None, rows(2), processing_class=tokenizer)
    assert trainer.kernels == "liger-kernel's in 9 modules, checked exact for LlamaForCausalLM"
    assert trainer.layout.name == "shared"  # its check runs on plain models
    assert "forward" not in vars(model.get_base_model())
    with pytest.raises(ValueError, match="liger_kernel_config: found"):
        ORPOConfig(use_liger_kernel=True, liger_kernel_config={"rope": False})


@pytest.mark.parametrize("field", ["use_liger_kernel=true", "liger_kernel_config={rope: true}"])
def test_a_recipe_names_the_field_to_set(field):
    with pytest.raises(RequestError, match="set memory.kernels=liger"):
        Recipe.load("quickstart", [f"training.{field}"])


@pytest.mark.parametrize("checkpointing", ["none", "all"])
def test_the_plan_knows_what_the_kernels_save(checkpointing):
    liger()
    wishes = {}
    for wish in ("none", "auto", "liger"):
        recipe = Recipe.load("mistral-qlora", [f"memory.kernels={wish}", f"memory.checkpointing={checkpointing}"])
        wishes[wish] = plan(recipe, Target("cuda"))
    assert wishes["auto"].peak == wishes["none"].peak > wishes["liger"].peak
    assert any("liger" in sentence for sentence in wishes["liger"].assumptions)
