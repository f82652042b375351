"""Every layout means the same on every family that takes it, and families that it is not exact for are refused."""

import copy
import json
import re

import pytest
import torch
import transformers as tf
from datasets import Dataset
from packaging.version import Version
from peft import LoraConfig, get_peft_model

from orpo_lite import ORPOTrainer
from orpo_lite.objective.layout import choose_layout
from tests.tiny import tiny_model
from tests.training import SIZES, Catch, config, gradients, rows

S = SIZES | dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
HEADS = {key: value for key, value in S.items() if key != "num_key_value_heads"}
MOE = dict(num_local_experts=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True)
EAGER = dict(attn_implementation="eager")
SHARED = {
    "llama": tf.LlamaConfig(**S),
    "llama-eager": tf.LlamaConfig(**S, **EAGER),
    "mistral-window": tf.MistralConfig(**S, sliding_window=8),
    "qwen2": tf.Qwen2Config(**S, tie_word_embeddings=True),
    "qwen2-window": tf.Qwen2Config(**S, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "qwen3": tf.Qwen3Config(**S, head_dim=8),
    "gemma2": tf.Gemma2Config(**S, head_dim=8, sliding_window=8, attn_logit_softcapping=5.0, **EAGER),
    "gemma3": tf.Gemma3TextConfig(**S, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
    "gemma4-sizes-by-layer": tf.Gemma4TextConfig(
        **S, head_dim=8, global_head_dim=16, num_global_key_value_heads=1, attention_k_eq_v=True, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"], hidden_size_per_layer_input=0),
    "phi3": tf.Phi3Config(**S, sliding_window=8),
    "mixtral": tf.MixtralConfig(**S, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5),
    "qwen3_moe": tf.Qwen3MoeConfig(**S, **MOE, head_dim=8, output_router_logits=True, router_aux_loss_coef=0.5),
    "gpt_neox": tf.GPTNeoXConfig(**HEADS),
    "gpt2": tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=512, n_positions=256),
    "opt": tf.OPTConfig(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=512,
                        word_embed_proj_dim=32, max_position_embeddings=256),
    "gpt_oss-sinks": tf.GptOssConfig(**S, num_local_experts=4, head_dim=8, sliding_window=8, **EAGER),
    "cohere-scale": tf.CohereConfig(**S, logit_scale=0.25),
    "granite-scales": tf.GraniteConfig(**S, logits_scaling=4.0, attention_multiplier=0.1, residual_multiplier=0.5),
    "phi-partial-rotary": tf.PhiConfig(**HEADS),
    "starcoder2": tf.Starcoder2Config(**S, sliding_window=8),
    "olmo2": tf.Olmo2Config(**S),
    "deepseek_v3-latent": tf.DeepseekV3Config(
        **{**S, "num_key_value_heads": 4}, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_group=1, topk_group=1,
        first_k_dense_replace=1),
    "phi3-longrope": tf.Phi3Config(
        **{**S, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4},
        original_max_position_embeddings=64,
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 32, "long_factor": [2.0] * 32},
    ),
    "cwm": tf.CwmConfig(**S, head_dim=8, sliding_window=8, layer_types=["full_attention", "sliding_attention"]),
}  # fmt: skip
if Version(tf.__version__) < Version("5.4"):  # there GPT-2 builds its own masks, and takes padded batches
    del SHARED["gpt2"]
PADDED = {
    "llama4": (  # scales queries by their place in the row
        tf.Llama4TextConfig(**{**S, "num_hidden_layers": 4}, intermediate_size_mlp=48, attention_chunk_size=8, num_local_experts=2, num_experts_per_tok=1,
                            head_dim=8),
        "differs",
    ),
    "falcon": (tf.FalconConfig(**HEADS, alibi=False), "does not go through|differs|checked"),
    "falcon-alibi": (tf.FalconConfig(**HEADS, alibi=True, new_decoder_architecture=False), "."),
    "bloom": (tf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=512), "AttentionInterface"),
    "mpt": (tf.MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=512), "AttentionInterface"),
    "mamba": (tf.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=512, state_size=4), "."),
    "jamba": (tf.JambaConfig(**S, num_experts=2, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False), "."),
    "qwen3_next": (
        tf.Qwen3NextConfig(**S, **MOE, head_dim=8, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
                           linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"]),
        "linear_attention layers are not attention alone",
    ),
    "lfm2": (tf.Lfm2Config(**S, layer_types=["conv", "full_attention"]), "conv"),
}  # fmt: skip


def adapted(model_config):
    # a trainer writes its tokenizer's special tokens into the config
    model = tiny_model(copy.deepcopy(model_config))
    torch.manual_seed(1)
    # Llama 4's router is a linear layer that returns a pair
    model = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", exclude_modules=".*router")
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="module")
def pairs():
    """Uneven pairs, among them one whose answers open alike and one whose answers share nothing."""
    made = rows(4, seed=5).to_list()
    opening = "river stone cloud bread "
    for side in ("chosen", "rejected"):
        made[1][side][0]["content"] = opening + made[1][side][0]["content"]
    return Dataset.from_list(made)


@pytest.mark.parametrize("name", SHARED)
def test_shared_and_packed_equal_padded(name, tmp_path, tokenizer, pairs):
    model = adapted(SHARED[name])
    outcomes, computed = {}, {}
    for layout, checkpointing in (("padded", False), ("packed", True), ("shared", False), ("shared", True)):
        args = config(tmp_path, layout=layout, gradient_checkpointing=checkpointing, beta=0.5)
        twin = copy.deepcopy(model)
        trainer = ORPOTrainer(twin, args, None, pairs, processing_class=tokenizer)
        if checkpointing:
            twin.enable_input_require_grads()
            twin.gradient_checkpointing_enable({"use_reentrant": False})
        twin.train()
        batch = next(iter(trainer.get_train_dataloader()))
        computed[layout] = batch["input_ids"].numel()
        with torch.no_grad():
            stats, _ = trainer.objective.statistics(twin, batch)
        loss, metrics = trainer.compute_loss(twin, batch, return_outputs=True)
        outcomes[layout, checkpointing] = stats, metrics, gradients(twin, loss), loss.item()
    stats, metrics, gradient, loss = outcomes["padded", False]
    assert gradient.norm() > 0
    for got_stats, got_metrics, got_gradient, got_loss in outcomes.values():
        for expected, got in zip(stats, got_stats, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        assert got_loss == pytest.approx(loss, abs=1e-5)
        assert got_metrics == pytest.approx(metrics, abs=1e-5)
        assert ((got_gradient - gradient).norm() / gradient.norm()).item() < 1e-4
    assert computed["shared"] < 0.7 * computed["padded"]


@pytest.mark.parametrize("name", SHARED)
def test_auto_takes_shared_and_says_why(name):
    layout = choose_layout(tiny_model(SHARED[name]))
    assert layout.name == "shared" and "checked exact" in layout.why and "attention" in layout.why


@pytest.mark.parametrize("name", PADDED)
def test_what_is_not_exact_is_refused(name):
    model_config, why = PADDED[name]
    model = tiny_model(model_config)
    layout = choose_layout(model)
    assert layout.name == "padded"
    assert re.search(why, layout.why), layout.why
    for asked in ("shared", "packed"):
        with pytest.raises(ValueError, match=rf"layout '{asked}' is not exact for {type(model).__name__}: .*padded"):
            choose_layout(model, asked)
    assert choose_layout(model, "padded").name == "padded"


def test_an_unknown_model_is_checked_not_believed():
    """A Llama whose attention looks at absolute places in the row passes for a Llama, and is found out."""
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    class Sneaky(LlamaForCausalLM):
        def forward(self, input_ids=None, **kwargs):
            output = super().forward(input_ids=input_ids, **kwargs)
            place = torch.arange(output.logits.shape[1], device=output.logits.device)[:, None]
            output.logits = output.logits + torch.sin(place.to(output.logits.dtype)) * torch.arange(
                output.logits.shape[2], device=output.logits.device
            ).remainder(7)
            return output

    layout = choose_layout(Sneaky(tf.LlamaConfig(**S)))
    assert layout.name == "padded" and "differs by" in layout.why


def one_step(folder, tokenizer, **options):
    """Gradient and log of an optimizer step over the same eight pairs."""
    catch = Catch()
    args = config(folder, per_device_train_batch_size=8 // options.get("gradient_accumulation_steps", 1), max_steps=1,
                  max_grad_norm=0, beta=0.5, **options)  # fmt: skip
    trainer = ORPOTrainer(adapted(SHARED["llama"]), args, None, rows(8), processing_class=tokenizer, callbacks=[catch])
    trainer.train()
    return catch.gradient, trainer.state.log_history[0]


@pytest.fixture(scope="module")
def padded_step(tmp_path_factory, tokenizer):
    return one_step(tmp_path_factory.mktemp("padded"), tokenizer, layout="padded")


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
@pytest.mark.parametrize("budget", [100, 400, 10_000])
def test_any_token_budget_gives_the_same_step(layout, budget, tmp_path, tokenizer, padded_step):
    expected, logs = padded_step
    got, log = one_step(tmp_path, tokenizer, tokens_per_batch=budget, layout=layout, gradient_accumulation_steps=2)
    assert ((got - expected).norm() / expected.norm()).item() < 1e-6 * (1 if layout == "padded" else 5)
    for key in ("loss", "nll_loss", "rewards/margins", "rewards/accuracies", "log_odds_ratio", "logps/chosen"):
        assert log[key] == pytest.approx(logs[key], abs=1e-5), key


def test_budget_steps_resume_mid_epoch_bit_for_bit(tmp_path, tokenizer):
    """Epochs of 3 steps; stopped after step 4, inside the second."""

    def trained(output, checkpoint=None, steps=6):
        args = config(output, per_device_train_batch_size=4, tokens_per_batch=150, max_steps=steps, save_strategy="steps",
                      save_steps=2, train_sampling_strategy="random")  # fmt: skip
        trainer = ORPOTrainer(adapted(SHARED["llama"]), args, None, rows(11), processing_class=tokenizer)
        trainer.train(resume_from_checkpoint=checkpoint)
        log = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
        return [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad], log

    whole, log = trained(tmp_path)
    resumed, log_again = trained(tmp_path, str(tmp_path / "out" / "checkpoint-4"))
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    assert [e["step"] for e in log] == [e["step"] for e in log_again] == [1, 2, 3, 4, 5, 6]
    assert [e["loss"] for e in log] == [e["loss"] for e in log_again]
    assert json.dumps(log[-1]["epoch"]) == json.dumps(2.0)
