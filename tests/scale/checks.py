"""What a group of processes computes, to be compared with what one computes."""

import contextlib
import os
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from datasets import load_from_disk
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, TrainerCallback

from orpo_lite import ORPOTrainer
from orpo_lite.data.token_cache import TokenizeOptions, tokenize_rows
from orpo_lite.model.adapter import prepare_frozen
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training import CHATML, config, rows

SIZES = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=512)  # fmt: skip
PAIRS, STEP = 19, 8
"""Two whole steps of 8 pairs, and one of 3 that no number of processes divides."""


def tokenizer():
    return tiny_tokenizer(("<|im_start|>", "<|im_end|>"), CHATML, eos="<|im_end|>", pad="<pad>")


def save_base(folder):
    """The base that all processes load, and its pairs."""
    model = tiny_model(LlamaConfig(**SIZES))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    options = TokenizeOptions(max_length=128)
    tokenize_rows(rows(PAIRS), tokenizer(), options)[0].save_to_disk(f"{folder}/train")
    tokenize_rows(rows(7, seed=9), tokenizer(), options)[0].save_to_disk(f"{folder}/eval")


def load(folder, base="float", dtype=torch.float32, **lora):
    """The base with an adapter whose B is not 0, so that every gradient counts."""
    options = {}
    if base == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        options["device_map"] = {"": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    torch.manual_seed(1)
    lora = dict(r=4, target_modules="all-linear", init_lora_weights=False) | lora
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
    prepare_frozen(model)
    return model


class Steps(TrainerCallback):
    """Gradients of every optimizer step, flat."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def trained(folder, out, cases):
    """Gradients, logs and evaluations of three steps, for each case: (base, layout, options of ORPOConfig)."""
    results = []
    processes = int(os.environ.get("WORLD_SIZE", 1))
    for number, (base, layout, options) in enumerate(cases):
        results.append(one(folder, f"{out}-{processes}-{number}", base, layout, options))
    return results


def prepared(folder, out, base, layout, options):
    """What a trainer takes: model, arguments and pairs."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    options = dict(options)
    lora = options.pop("lora", {})
    size = options.pop("per_device_train_batch_size", STEP // processes)
    options = (
        dict(use_cpu=True, max_steps=3, optim="sgd", max_grad_norm=1e9, train_sampling_strategy="random") | options
    )
    args = config(
        Path(out), layout=layout, per_device_train_batch_size=size,
        per_device_eval_batch_size=2, gradient_accumulation_steps=STEP // processes // size, **options,
    )  # fmt: skip
    AcceleratorState._reset_state()
    return load(folder, base, **lora), args, load_from_disk(f"{folder}/train"), load_from_disk(f"{folder}/eval")


def one(folder, out, base, layout, options):
    model, args, pairs, held = prepared(folder, out, base, layout, options)
    steps = Steps()
    trainer = steps.trainer = ORPOTrainer(model, args, None, pairs, held, tokenizer(), callbacks=[steps])
    before = trainer.evaluate()
    trainer.train()
    names = ("loss", "rewards/margins", "logps/chosen", "logits/rejected", "nll_loss", "log_odds_ratio", "grad_norm")
    logs = [[log[name] for name in names] for log in trainer.state.log_history if "grad_norm" in log]
    after = trainer.evaluate()
    measured = sorted(key for key in after if "runtime" not in key and "second" not in key and "time" not in key)
    return {
        "gradients": steps.gradients,
        "logs": logs,
        "eval": [[one[name] for name in measured] for one in (after, before) if one],
        "layout": trainer.layout.name,
        "engine": type(trainer.model_wrapped).__name__,
        "weights": weights_of(trainer.model),
    }


class Died(Exception):
    pass


class Dies(TrainerCallback):
    """The end, right after the checkpoint of a step, and the rows of every step's pairs."""

    def __init__(self, step, out):
        self.step, self.rows, self.out = step, [], out

    def on_step_begin(self, args, state, control, **kwargs):
        batches = [b for item in self.trainer.step_in_progress.items for b in item.get("micro_batches", [item])]
        self.rows.append(sorted(row for b in batches for row in b["pair_rows"].tolist()))

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Died


def stretch(folder, out, dies=None, resume=None, base="float", **more):
    """Six steps of AdamW with a checkpoint every second, broken off at one, or gone on with from one.

    Args:
        more: further options of ORPOConfig.
    """
    options = dict(max_steps=6, optim="adamw_torch", save_strategy="steps", save_steps=2, save_total_limit=2, eval_strategy="steps", eval_steps=3) | more  # fmt: skip
    model, args, pairs, held = prepared(folder, out, base, "shared", options)
    watch = Dies(dies, out)
    trainer = watch.trainer = ORPOTrainer(model, args, None, pairs, held, tokenizer(), callbacks=[watch])
    with contextlib.suppress(Died):
        trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(f"{out}/last")
    names = ("loss", "grad_norm", "rewards/margins", "eval_loss")
    logs = [{name: log[name] for name in names if name in log} for log in trainer.state.log_history if "train_loss" not in log]  # fmt: skip
    return {
        "weights": weights_of(trainer.model),
        "logs": logs,
        "rows": watch.rows,
        "loss": trainer.state.log_history[-1].get("train_loss"),
    }


def stretches(folder, out, *parts):
    """Several of them in one group."""
    return [stretch(folder, f"{out}/{part.pop('out')}", **part) for part in map(dict, parts)]
