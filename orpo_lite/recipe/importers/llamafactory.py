"""LLaMA-Factory's `stage: dpo`, `pref_loss: orpo` YAML (fields as of 0.9.6) as a recipe."""

from __future__ import annotations

from orpo_lite.recipe.importers.draft import PACKING, Draft, number
from orpo_lite.recipe.importers.llamafactory_data import convert_data, listed
from orpo_lite.recipe.loading import find_template

DEFAULTS = {"num_train_epochs": 3, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
            "learning_rate": 5e-5, "lr_scheduler_type": "linear", "warmup_steps": 0, "save_strategy": "steps", "save_steps": 500,
            "eval_strategy": "no", "report_to": "none"}  # fmt: skip
"""What LLaMA-Factory does where the file is silent."""
LEFT = {
    "do_train": "training is what `train` does",
    "do_eval": "held-out pairs are evaluated before and after training",
    "do_predict": "answers to held-out prompts are in the run folder (evaluation.samples)",
    "overwrite_output_dir": "a finished run is never written over: the next one goes to NAME-2",
    "overwrite_cache": "tokens are cached by the content of data, tokenizer and settings",
    "plot_loss": "curves are in report.html and curves.png",
    "trust_remote_code": "set model.trust_remote_code: true yourself once you have read the repository's code",
    "resume_from_checkpoint": "give --resume to train, or the same command again",
    "deepspeed": "start with `accelerate launch`, configured for it",
    "fsdp": "start with `accelerate launch`, configured for it",
    "fsdp_config": "start with `accelerate launch`, configured for it",
    "packing": PACKING,
    "neat_packing": PACKING,
    "use_fast_tokenizer": "the fast one is taken",
    "low_cpu_mem_usage": "weights are read one by one",
    "cache_dir": "set the environment variable HF_HOME",
    "hf_hub_token": "log in with `hf auth login`",
    "enable_liger_kernel": "the head is computed in chunks already",
    "use_unsloth": "the head is computed in chunks already, and each prompt once for both answers",
    "use_unsloth_gc": "set memory.offload_activations: true",
    "ref_model": "ORPO has no reference model",
    "pref_ftx": "ORPO has an NLL term already, of weight 1",
    "default_system": "write system turns into the data",
    "mix_strategy": "sources are read one after the other; weight says how often each is seen",
    "interleave_probs": "give each source a weight in data.train",
    "streaming": "data is read in batches and its tokens stay on disk",
    "buffer_size": "rows are shuffled over the whole data set",
    "preprocessing_batch_size": "rows are tokenised in batches by themselves",
    "mask_history": "only the last turn is scored, always",
    "train_on_prompt": "the scope of the NLL is orpo.nll_scope",
    "remove_unused_columns": "columns that are not trained on are left out by themselves",
    "additional_target": "set adapter.modules_to_save",
    "dataset_dir": "the data sets are found by it",
    "media_dir": "text only",
    "ignore_pad_token_for_loss": "padding is never scored",
    "include_num_input_tokens_seen": "tokens per second are logged always",
    "upcast_layernorm": "norms beside quantised weights are in float32 by themselves",
    "quantization_device_map": "the whole model lies on one card",
    "moe_aux_loss_coef": "the model's own config says so (output_router_logits, router_aux_loss_coef)",
    "torch_compile": "not with the packed layouts",
}


def convert(draft: Draft) -> None:
    """Fill the draft's recipe from a LLaMA-Factory configuration."""
    for name in ("stage", "pref_loss"):
        if name in draft.source:
            draft.carried_as(name, draft.take(name), "orpo")
    draft.carry("model_name_or_path", "model.name_or_path", change=lambda path: draft.place_of(str(path)))
    draft.carry("model_revision", "model.revision")
    draft.carry("orpo_beta" if "orpo_beta" in draft.source else "pref_beta", "orpo.beta", 0.1)
    draft.put("orpo.nll_scope", "chosen")
    convert_weights(draft)
    convert_template(draft)
    convert_data(draft)
    convert_training(draft)
    draft.rest(LEFT)


def convert_weights(draft: Draft) -> None:
    kind, bits, method = (
        draft.take("finetuning_type", "lora"),
        draft.take("quantization_bit"),
        draft.take("quantization_method", "bnb"),
    )
    draft.carried_as("finetuning_type", kind, "adapter")
    held = "none"
    if bits is not None and str(method) not in ("bnb", "bitsandbytes"):
        draft.leave_value(
            "quantization_method",
            method,
            "bitsandbytes quantises here; take a repository that is quantised already, or go without",
        )
        draft.leave_value("quantization_bit", bits, f"of {method}: model.quantization is none")
    elif bits is not None:
        quant_type = draft.take("quantization_type", "nf4")
        held = {4: quant_type, 8: "int8"}.get(int(number(bits) or 0), "none")
        draft.carried_as("quantization_bit", bits, "model.quantization")
        if held == "none":
            draft.differ("quantization_bit", bits, "bitsandbytes has 4 and 8 bits: model.quantization is none")
        if str(method) != "bnb" or bits is not None:
            draft.carried_as("quantization_method", method, "model.quantization")
    draft.carry("double_quantization", "model.double_quant")
    if kind == "full":
        draft.put("adapter", None)
        if held != "none":
            draft.differ(
                "quantization_bit", bits, "quantised weights cannot be trained whole: model.quantization is none"
            )
            held = "none"
    else:
        if kind != "lora":
            draft.differ("finetuning_type", kind, "a LoRA is trained in its place")
        convert_adapter(draft)
    draft.put("model.quantization", held)
    for name in ("bf16", "fp16", "pure_bf16"):
        if name in draft.source:
            wanted = draft.take(name)
            if wanted:
                draft.differ(name, wanted, "model.dtype: auto takes bfloat16 where the card has it, float16 on older ones, float32 on a CPU")  # fmt: skip
            else:
                draft.carried_as(name, wanted, "model.dtype")
    wanted = draft.take("flash_attn")
    if wanted in ("disabled", False):
        draft.put("model.attention", "eager")
    if wanted in ("fa2", "fa3"):
        draft.differ("flash_attn", wanted, "model.attention: auto takes sdpa, and the layouts need no padding; set model.attention=flash_attention_2 where that is installed")  # fmt: skip
    elif wanted is not None:
        draft.carried_as("flash_attn", wanted, "model.attention")
    off = draft.flag("disable_gradient_checkpointing")
    draft.put("memory.checkpointing", "none" if off else "all")
    if off:
        draft.carried_as("disable_gradient_checkpointing", off, "memory.checkpointing")
    tokens = [word for name in ("add_tokens", "add_special_tokens") for word in listed(draft, name, "model.new_tokens")]
    if tokens:
        draft.put("model.new_tokens", tokens)
        if draft.source.pop("resize_vocab", None) is not None:
            draft.carried_as("resize_vocab", True, "model.new_tokens")


def convert_adapter(draft: Draft) -> None:
    folders = listed(draft, "adapter_name_or_path", "adapter.init_from")
    if folders:
        draft.put("adapter.init_from", draft.place_of(folders[0]))
    for folder in folders[1:]:
        draft.leave_value(
            "adapter_name_or_path", folder, "one adapter is gone on with: merge the others into the base first"
        )
    draft.carry("lora_rank", "adapter.r", 8)
    alpha = 2 * (number(draft.recipe["adapter"]["r"]) or 8)
    draft.carry("lora_alpha", "adapter.alpha", alpha)
    draft.carry("lora_dropout", "adapter.dropout", 0.0)
    targets = listed(draft, "lora_target", "adapter.target_modules") or ["all"]
    draft.put("adapter.target_modules", "all-linear" if targets == ["all"] else targets)
    if more := listed(draft, "additional_target", "adapter.modules_to_save"):
        draft.put("adapter.modules_to_save", more)
    for name in ("use_rslora", "use_dora", "loraplus_lr_ratio"):
        draft.carry(name, f"adapter.{name}")
    if draft.flag("pissa_init"):
        steps = draft.take("pissa_iter", 16)
        draft.put("adapter.init_lora_weights", f"pissa_niter_{steps}" if (number(steps) or 0) > 0 else "pissa")
        draft.carried_as("pissa_init", True, "adapter.init_lora_weights")
        if draft.take("pissa_convert") is not None:
            draft.carried_as("pissa_convert", True, "the adapter is written as a plain LoRA, always")


def convert_template(draft: Draft) -> None:
    template, thinking = draft.take("template"), draft.take("enable_thinking")
    if isinstance(template, str):
        if name := find_template(template):
            draft.put("model.chat_template", name)
            draft.carried_as("template", template, "model.chat_template")
        else:
            draft.leave_value("template", template, "the tokenizer's own chat template is taken; if it has none, set model.chat_template")  # fmt: skip
        if template.endswith("_nothink") and thinking is None:
            thinking = False
    if thinking is not None:
        draft.put("data.template_kwargs", {"enable_thinking": thinking})
        draft.carried_as("enable_thinking", thinking, "data.template_kwargs")


def convert_training(draft: Draft) -> None:
    if "warmup_ratio" in draft.source:
        ratio = draft.take("warmup_ratio")
        if "warmup_steps" in draft.source and draft.source["warmup_steps"]:
            draft.leave_value("warmup_ratio", ratio, "warmup_steps goes before it")
        else:
            draft.put("training.warmup_steps", ratio)
            draft.carried_as("warmup_ratio", ratio, "training.warmup_steps, below 1 a share of all steps")
            draft.take("warmup_steps")
    if "evaluation_strategy" in draft.source:
        draft.source["eval_strategy"] = draft.take("evaluation_strategy")
    if "early_stopping_steps" in draft.source:
        draft.carry("early_stopping_steps", "training.early_stopping_patience")
    held = draft.recipe["data"]["eval_fraction"] or "eval" in draft.recipe["data"]
    if not held:
        for name in ("eval_strategy", "eval_steps"):
            draft.leave(name, "there are no held-out pairs (val_size, eval_dataset)")
    for name in [name for name in draft.source if name in LEFT]:
        draft.leave(name, LEFT[name])
    if (many := draft.source.get("disable_shuffling")) is not None:
        draft.flag("disable_shuffling")
        draft.carried_as("disable_shuffling", many, "training.train_sampling_strategy")
        draft.put("training.train_sampling_strategy", "sequential" if many else "random")
    draft.training(DEFAULTS)
    batch = number(draft.recipe["training"]["per_device_train_batch_size"]) or 1
    word = "LLaMA-Factory's NLL is the mean over the answer's tokens of each pair, then over the pairs; "
    if batch == 1:
        draft.put("orpo.nll_mean", "micro")
        draft.differ("pref_loss", "orpo", word + "one pair a micro-batch and orpo.nll_mean: micro are the same")
    else:
        draft.differ("pref_loss", "orpo", word + "here it is one mean over all answer tokens of the step, in which longer answers weigh more. For the same, set "
                     f"training.per_device_train_batch_size=1 training.gradient_accumulation_steps={int(batch * (number(draft.recipe['training']['gradient_accumulation_steps']) or 1))} "
                     "orpo.nll_mean=micro")  # fmt: skip
