"""ORPOTrainer against TRL's on the same batch, and the properties that TRL's does not have."""

import copy
import logging
import math
import re
import sys
import types

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
    T5Config,
    T5ForConditionalGeneration,
)

from orpo_lite import ORPOConfig, ORPOTrainer
from orpo_lite.common.errors import RequestError
from orpo_lite.objective.metrics import COLUMNS
from orpo_lite.trainer.generate import log_answers
from orpo_lite.trainer.objective import micro_batches
from orpo_lite.trainer.trl_names import trl_columns
from tests.tiny import tiny_model
from tests.training import SIZES, Catch, config, gradients, rows

CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen2-tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "gemma2-softcap": Gemma2Config(
        **SIZES, head_dim=8, final_logit_softcapping=5.0, sliding_window=8, attn_implementation="eager"
    ),
    "cohere-scale": CohereConfig(**SIZES, logit_scale=0.25, pad_token_id=None, eos_token_id=1, bos_token_id=None),
    "granite-scale": GraniteConfig(**SIZES, logits_scaling=4.0),
    "mixtral-router": MixtralConfig(**SIZES, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=512, n_positions=256),
}
TARGETS = {"gpt2": ["c_attn", "c_proj"]}


def adapted(name, seed=0):
    model = tiny_model(CONFIGS[name], seed)
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS.get(name, ["q_proj", "v_proj"])))
    for key, p in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(p, std=0.1)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_metrics_and_gradients_equal_trl(name, tmp_path, tokenizer, trl_orpo):
    from trl.experimental.orpo import ORPOConfig as TRLConfig

    model = adapted(name)
    twin = copy.deepcopy(model)
    data = rows(4)
    args = config(tmp_path, beta=0.3, max_completion_length=64)
    ours = ORPOTrainer(model, args, None, data, processing_class=tokenizer)
    theirs = trl_orpo.ORPOTrainer(
        twin,
        TRLConfig(output_dir=str(tmp_path / "trl"), beta=0.3, max_length=128, bf16=False, report_to="none", gradient_checkpointing=False,
                  per_device_train_batch_size=4, train_sampling_strategy="sequential", max_completion_length=64),
        train_dataset=data,
        processing_class=tokenizer,
    )  # fmt: skip
    ours.model.train(), theirs.model.train()
    batch, reference_batch = next(iter(ours.get_train_dataloader())), next(iter(theirs.get_train_dataloader()))
    expected, expected_metrics = theirs.compute_loss(theirs.model, reference_batch, return_outputs=True)
    wanted = gradients(theirs.model, expected)
    for form in (batch, reference_batch):  # TRL's own batches are taken too
        loss, metrics = ours.compute_loss(ours.model, form, return_outputs=True)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
        for key, value in expected_metrics.items():
            if not key.startswith("logits/"):
                assert metrics[key] == pytest.approx(value, abs=1e-5), key
        got = gradients(ours.model, loss)
        assert ((got - wanted).norm() / wanted.norm()).item() < 1e-5
    if name == "mixtral-router":
        assert metrics["aux_loss"] > 0


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_answers_of_several_turns_are_labeled_turn_by_turn(layout, tmp_path, tokenizer):
    """Log-probs are means over the answers' tokens, predicted from all before them: a naive pass over each side."""

    def steps(row):
        turns = {"role": "tool", "content": "lamp chair"}, {"role": "assistant", "content": "the end"}
        return {side: [*row[side], *turns] for side in ("chosen", "rejected")}

    args = config(tmp_path, layout=layout, max_length=512)
    trainer = ORPOTrainer(adapted("llama"), args, None, rows(4).map(steps), rows(4).map(steps), tokenizer)
    found = trainer.predict(trainer.eval_dataset).predictions
    columns = dict(zip(COLUMNS, torch.tensor(found).T, strict=True))
    for number, row in enumerate(trainer.train_dataset):
        assert row["chosen_context"] and row["rejected_context"]
        for side in ("chosen", "rejected"):
            ids, columns_of_trl = torch.tensor([row[f"{side}_ids"]]), trl_columns(row)
            labels = torch.tensor(columns_of_trl[f"{side}_labels"])
            text = tokenizer.decode(labels[labels != -100])
            assert "the end<|im_end|>" in text and "lamp chair" not in text
            logps = trainer.model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            expected = logps[labels[1:] != -100].mean().item()
            assert columns[f"logps/{side}"][number].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_any_split_of_a_step_gives_the_same_gradients(checkpointing, tmp_path, tokenizer):
    results = {}
    for batch, accumulation in ((8, 1), (4, 2), (1, 8), (3, 3)):
        catch = Catch()
        args = config(tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_steps=1,
                      max_grad_norm=0, gradient_checkpointing=checkpointing, beta=0.5)  # fmt: skip
        trainer = ORPOTrainer(adapted("llama"), args, None, rows(8), None, tokenizer, callbacks=[catch])
        trainer.train()
        results[batch] = (catch.gradient, trainer.state.log_history[0])
    reference, logs = results[8]
    for gradient, log in results.values():
        assert ((gradient - reference).norm() / reference.norm()).item() < 1e-6
        for key in ("loss", "nll_loss", "rewards/margins", "rewards/accuracies", "log_odds_ratio", "logps/chosen"):
            assert log[key] == pytest.approx(logs[key], abs=1e-5), key


def test_micro_is_trls_mean_of_means(tmp_path, tokenizer):
    catch, whole = Catch(), Catch()
    for callback, batch, accumulation, mean in ((catch, 2, 2, "micro"), (whole, 2, 2, "window")):
        args = config(tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_steps=1,
                      max_grad_norm=0, nll_mean=mean)  # fmt: skip
        trainer = ORPOTrainer(adapted("llama"), args, None, rows(4), processing_class=tokenizer, callbacks=[callback])
        trainer.train()
    trainer = ORPOTrainer(
        adapted("llama"), config(tmp_path, per_device_train_batch_size=2), None, rows(4), processing_class=tokenizer
    )
    trainer.model.train()
    halves = [gradients(trainer.model, trainer.compute_loss(trainer.model, b)) for b in trainer.get_train_dataloader()]
    expected = sum(halves) / 2
    assert ((catch.gradient - expected).norm() / expected.norm()).item() < 1e-6
    assert ((whole.gradient - expected).norm() / expected.norm()).item() > 1e-4


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_evaluation_weighs_by_pairs(batch, tmp_path, tokenizer):
    data = rows(7, seed=3)
    trainer = ORPOTrainer(
        adapted("llama"), config(tmp_path, per_device_eval_batch_size=batch), None, data, data, tokenizer
    )
    got = trainer.evaluate()
    trainer.model.eval()
    whole = trainer.collator([trainer.eval_dataset[i] for i in range(7)])
    with torch.no_grad():
        loss, metrics = trainer.compute_loss(trainer.model, whole, return_outputs=True)
    assert got["eval_loss"] == pytest.approx(loss.item(), abs=1e-5)
    for key, value in metrics.items():
        assert got[f"eval_{key}"] == pytest.approx(value, abs=1e-5), key


def test_generate_during_eval_answers_held_out_prompts(tmp_path, tokenizer, monkeypatch):
    args = config(tmp_path, generate_during_eval=True, per_device_eval_batch_size=3, max_completion_length=6)
    trainer = ORPOTrainer(adapted("llama"), args, None, rows(4), rows(7), tokenizer)
    trainer.evaluate()
    prompts = [tokenizer.decode(row["chosen_ids"][: row["chosen_start"]]) for row in trainer.eval_dataset]
    assert len(trainer.answers) == 3 and all(sample["prompt"] in prompts for sample in trainer.answers)
    sent = []
    wandb = types.ModuleType("wandb")
    wandb.Table, wandb.log = lambda columns, data: (columns, data), sent.append
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    trainer.args.report_to = ["wandb"]
    log_answers(trainer, trainer.eval_dataset)
    columns, data = sent[0]["game_log"]
    assert columns == ["Prompt", "Policy"] and len(data) == 3 and all(prompt in prompts for prompt, _ in data)


def test_a_script_written_for_trl(tmp_path, tokenizer):
    """TRL's quick start: a model, a config, a data set, and nothing about devices."""
    model = tiny_model(CONFIGS["llama"])
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    args = ORPOConfig(
        output_dir=str(tmp_path / "Qwen2-0.5B-ORPO"), max_steps=2, report_to="none", per_device_train_batch_size=2
    )
    trainer = ORPOTrainer(model=str(tmp_path / "base"), args=args, train_dataset=rows(4), peft_config=LoraConfig(r=4))
    trainer.train()
    trainer.save_model()
    assert isinstance(trainer.model, PeftModel)
    assert (tmp_path / "Qwen2-0.5B-ORPO" / "adapter_model.safetensors").is_file()
    assert args.beta == 0.1 and args.learning_rate == 1e-6 and args.max_length == 1024 and args.logging_steps == 10


def test_checkpointing_is_on_and_precision_follows_the_device(tmp_path):
    args = ORPOConfig(output_dir=str(tmp_path))
    assert args.gradient_checkpointing is True and not args.bf16 | torch.cuda.is_available()


def test_low_learning_rate_for_lora_is_warned_about(tmp_path, tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        ORPOTrainer(adapted("llama"), config(tmp_path, learning_rate=1e-6), None, rows(2), processing_class=tokenizer)
    assert "1e-06 is low for LoRA" in caplog.text


def test_prompts_that_fill_max_length_never_reach_the_loss(tmp_path, tokenizer):
    """TRL trains NaN here and logs 0.0."""
    data = rows(6)
    long = dict(data[0]) | {"prompt": [{"role": "user", "content": "stone " * 200}]}
    data = Dataset.from_list([*data, long, long])
    trainer = ORPOTrainer(
        adapted("llama"), config(tmp_path, max_length=96, max_steps=3), None, data, processing_class=tokenizer
    )
    assert len(trainer.train_dataset) == 6 and len(trainer.drop_reports["train"].drops) == 2
    trainer.train()
    assert all(math.isfinite(log["loss"]) for log in trainer.state.log_history if "loss" in log)
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_evaluates_and_predicts_rows_that_are_not_tokenized(tmp_path, tokenizer):
    trainer = ORPOTrainer(adapted("llama"), config(tmp_path), None, rows(4), rows(5), tokenizer)
    assert trainer.evaluate(rows(5))["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], abs=1e-6)
    assert trainer.predict(rows(5)).predictions.shape[0] == 5


def test_model_init_gets_the_layout_too(tmp_path, tokenizer):
    def trainer(layout, init=lambda: adapted("llama")):
        args = config(tmp_path, layout=layout, is_encoder_decoder=False, max_steps=1)
        return ORPOTrainer(None, args, None, rows(4), None, tokenizer, model_init=init)

    def bloom():
        return tiny_model(BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=512))

    assert trainer("auto").layout.name == "shared"
    trainer("shared").train()
    with pytest.raises(ValueError, match="layout 'shared' is not exact"):
        trainer("shared", bloom)
    with pytest.raises(ValueError, match="with model_init, give a processing_class"):
        ORPOTrainer(None, config(tmp_path), None, rows(4), model_init=bloom)


def test_encoder_decoders_are_refused_by_name(tmp_path, tokenizer):
    small = T5Config(vocab_size=512, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    small.save_pretrained(tmp_path / "t5")
    rest = (
        " is an encoder-decoder (t5), and orpo_lite trains decoder-only models: use one of those, or TRL's ORPOTrainer"
    )
    by_name, made = str(tmp_path / "t5"), T5ForConditionalGeneration(small)
    adapter = get_peft_model(copy.deepcopy(made), LoraConfig(r=4, target_modules=["q", "v"]))
    for model, init, named in ((by_name, None, by_name), (made, None, "the T5ForConditionalGeneration"),
                               (adapter, None, "the T5ForConditionalGeneration"),
                               (None, lambda: made, "the T5ForConditionalGeneration")):  # fmt: skip
        with pytest.raises(RequestError, match=re.escape(f"ORPOTrainer: {named}{rest}")):
            ORPOTrainer(
                model, config(tmp_path, is_encoder_decoder=True), None, rows(4), None, tokenizer, model_init=init
            )


def test_nll_scope_chosen_leaves_the_prompt_out(tmp_path, tokenizer):
    whole = ORPOTrainer(adapted("llama"), config(tmp_path), None, rows(4), processing_class=tokenizer)
    answer = ORPOTrainer(
        adapted("llama"), config(tmp_path, nll_scope="chosen"), None, rows(4), processing_class=tokenizer
    )
    batches = [next(iter(t.get_train_dataloader())) for t in (whole, answer)]
    count = [(b["nll_pair"] >= 0).sum().item() for b in batches]
    assert count[1] == (batches[0]["chosen_pair"] >= 0).sum().item() < count[0]


def test_hooks_are_gone_and_generation_is_untouched(tmp_path, tokenizer):
    trainer = ORPOTrainer(adapted("llama"), config(tmp_path, max_steps=1), None, rows(4), processing_class=tokenizer)
    trainer.train()
    assert not any(m._forward_pre_hooks for m in trainer.model.modules() if m is trainer.model.get_output_embeddings())
    assert not trainer.model._forward_hooks
    ids = torch.arange(5)[None]
    assert trainer.model(input_ids=ids).logits.shape == (1, 5, 512)
    assert trainer.model.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape[1] > 5


def test_trained_heads_get_gradients(tmp_path, tokenizer):
    model = tiny_model(CONFIGS["llama"])
    peft = LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    trainer = ORPOTrainer(model, config(tmp_path), None, rows(4), processing_class=tokenizer, peft_config=peft)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch).backward()
    touched = {key for key, p in trainer.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any("lm_head.lora_B" in key for key in touched)


def test_virtual_tokens_are_refused_by_name(tmp_path, tokenizer):
    peft = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ValueError, match="PREFIX_TUNING.*use LoRA"):
        ORPOTrainer(
            tiny_model(CONFIGS["llama"]), config(tmp_path), None, rows(2), processing_class=tokenizer, peft_config=peft
        )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layout", "diagonal"),
        ("nll_mean", "mean"),
        ("beta", -1),
        ("overlong", "cut"),
        ("tokens_per_batch", 0),
        ("train_sampling_strategy", "group_by_length"),
    ],
)
def test_wrong_arguments_are_named(field, value, tmp_path):
    with pytest.raises(ValueError, match=rf"ORPOConfig.{field}: found {value!r}, expected"):
        ORPOConfig(output_dir=str(tmp_path), **{field: value})


@pytest.mark.parametrize("data_seed", [None, 7])
def test_a_token_budget_keeps_the_pairs_of_each_step(data_seed, tmp_path, tokenizer):
    def steps(**settings) -> list[list[int]]:
        seen: list[list[int]] = []

        class Watched(ORPOTrainer):
            def get_batch_samples(self, *words):
                batches, counts = super().get_batch_samples(*words)
                found = [
                    row for batch in batches for micro in micro_batches(batch) for row in micro["pair_rows"].tolist()
                ]
                seen.append(sorted(found))
                return batches, counts

        args = config(tmp_path, max_steps=-1, num_train_epochs=2, per_device_train_batch_size=2, data_seed=data_seed, train_sampling_strategy="random",
                      gradient_accumulation_steps=2, **settings)  # fmt: skip
        model = get_peft_model(tiny_model(CONFIGS["llama"]), LoraConfig(r=2, target_modules="all-linear"))
        Watched(model, args, None, rows(14), processing_class=tokenizer).train()
        return seen

    plain = steps()
    assert [len(step) for step in plain] == [4, 4, 4, 2] * 2 and plain[:4] != plain[4:]
    assert steps(tokens_per_batch=60) == plain


def test_an_evaluation_before_training_leaves_nf4_gradients_as_they_were(tmp_path, tokenizer):
    """On CPUs with AVX512-BF16 bitsandbytes packs the weights in an evaluation and trains without gradients then."""
    torch.manual_seed(0)
    # weights large enough that the gradient passes through the layers and not only beside them
    wide = LlamaConfig(**SIZES | {"hidden_size": 64, "intermediate_size": 128}, initializer_range=0.3)
    AutoModelForCausalLM.from_config(wide).save_pretrained(tmp_path / "b")
    found = []
    for passes in ("none", "evaluate", "before the trainer"):
        four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "b", quantization_config=four)
        if passes == "before the trainer":
            with torch.no_grad():
                model(torch.tensor([[1, 2, 3]]))
            states = [m.weight.quant_state for m in model.modules() if type(m).__name__ == "Linear4bit"]
            if any(getattr(state, "packing_format_for_cpu", False) for state in states):
                with pytest.raises(RequestError, match="load the model again"):
                    ORPOTrainer(model, config(tmp_path), None, rows(4), None, tokenizer)
                break
        torch.manual_seed(1)
        catch = Catch()
        trainer = ORPOTrainer(model, config(tmp_path, max_steps=1), None, rows(4), rows(2, 1), tokenizer, callbacks=[catch],
                              peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))  # fmt: skip
        if passes == "evaluate":
            trainer.evaluate()
        trainer.train()
        found.append(catch.gradient)
        # the constructor's own checks run passes without gradients as well
        states = [m.weight.quant_state for m in trainer.model.modules() if type(m).__name__ == "Linear4bit"]
        assert states and not any(getattr(state, "packing_format_for_cpu", False) for state in states)
    assert torch.equal(found[0], found[1])
