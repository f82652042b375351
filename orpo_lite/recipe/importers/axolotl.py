"""axolotl's `rl: orpo` YAML (fields as of 0.18) as a recipe."""

from __future__ import annotations

from orpo_lite.recipe.importers.axolotl_data import convert_data
from orpo_lite.recipe.importers.axolotl_training import convert_training
from orpo_lite.recipe.importers.draft import PACKING, Draft
from orpo_lite.recipe.loading import find_template

ATTENTION = (
    "flash_attention",
    "sdp_attention",
    "flex_attention",
    "eager_attention",
    "xformers_attention",
    "sage_attention",
)
LEFT = {
    "streaming": "data is read in batches and its tokens stay on disk",
    "tokenizer_type": "the tokenizer is found by the model's own files",
    "model_type": "the model is found by its own config",
    "base_model_config": "the model's own config is taken",
    "tokenizer_config": "the model's own tokenizer is taken; put another beside the weights",
    "is_llama_derived_model": "the model is found by its own config",
    "is_mistral_derived_model": "the model is found by its own config",
    "is_falcon_derived_model": "the model is found by its own config",
    "is_qwen_derived_model": "the model is found by its own config",
    "remove_unused_columns": "columns that are not trained on are left out by themselves",
    "dataset_prepared_path": "tokens are cached by themselves, beside those of `datasets`",
    "train_on_inputs": "the scope of the NLL is orpo.nll_scope",
    "sample_packing": PACKING,
    "eval_sample_packing": PACKING,
    "pad_to_sequence_len": PACKING,
    "pad_to_multiple_of": PACKING,
    "group_by_length": "set orpo.tokens_per_batch, which puts pairs of like length together inside each step",
    "max_prompt_len": "axolotl does not hand it to ORPO either; data.max_prompt_length is there",
    "lora_fan_in_fan_out": "found by the layers themselves",
    "lora_on_cpu": "the adapter is small beside the base",
    "loss_watchdog_threshold": "a loss that is not finite stops the run (training.on_nonfinite); alarms tell of the rest",
    "loss_watchdog_patience": "a loss that is not finite stops the run (training.on_nonfinite); alarms tell of the rest",
    "resume_from_checkpoint": "give --resume to train, or the same command again",
    "auto_resume_from_checkpoints": "the same command goes on by itself",
    "hf_use_auth_token": "log in with `hf auth login`",
    "save_safetensors": "safetensors is the only format",
    "trust_remote_code": "set model.trust_remote_code: true yourself once you have read the repository's code",
    "deepspeed": "start with `accelerate launch`, configured for it",
    "fsdp": "start with `accelerate launch`, configured for it",
    "fsdp_config": "start with `accelerate launch`, configured for it",
    "plugins": "the head is computed in chunks already, and attention without padding",
    "special_tokens": "the tokenizer's own are kept; a padding token is chosen that is not EOS, and masks go by length",
    "default_system_message": "write system turns into the data",
    "eot_tokens": "answers end at the chat template's own end of turn",
    "chat_template_jinja": "save the template as a file and set model.chat_template to its path",
    "xformers_attention": "sdpa takes its place",
    "wandb_project": "set the environment variable WANDB_PROJECT",
    "wandb_entity": "set the environment variable WANDB_ENTITY",
    "wandb_watch": "set the environment variable WANDB_WATCH",
    "wandb_log_model": "set the environment variable WANDB_LOG_MODEL",
    "wandb_mode": "set the environment variable WANDB_MODE",
    "wandb_run_id": "set the environment variable WANDB_RUN_ID",
    "mlflow_tracking_uri": "set the environment variable MLFLOW_TRACKING_URI",
    "mlflow_experiment_name": "set the environment variable MLFLOW_EXPERIMENT_NAME",
    "comet_api_key": "set the environment variable COMET_API_KEY",
    "trackio_project_name": "set training.project",
    "shuffle_merged_datasets": "rows are shuffled by training.seed",
    "torch_compile": "not with the packed layouts",
}


def convert(draft: Draft) -> None:
    """Fill the draft's recipe from an axolotl configuration."""
    draft.carry("base_model", "model.name_or_path", change=lambda path: draft.place_of(str(path)))
    draft.carry("revision_of_model", "model.revision")
    draft.carried_as("rl", draft.take("rl"), "orpo")
    inside = draft.source.get("trl")
    if isinstance(inside, dict):
        draft.take("trl")
        for name, value in inside.items():
            draft.source[f"trl.{name}"] = value
    betas = [name for name in ("trl.beta", "rl_beta", "orpo_alpha") if name in draft.source]
    draft.carry(betas[0] if betas else "orpo_alpha", "orpo.beta", 0.1)
    for name in betas[1:]:
        draft.leave(name, f"{betas[0]} goes before it, as in axolotl")
    convert_weights(draft)
    convert_data(draft)
    convert_training(draft, LEFT)
    draft.rest(LEFT)


def convert_weights(draft: Draft) -> None:
    """Quantisation, adapter, precision and attention."""
    adapter, four, eight = draft.take("adapter"), draft.flag("load_in_4bit"), draft.flag("load_in_8bit")
    kind = "none"
    if adapter and (four or four is None and adapter == "qlora"):
        kind = "nf4"
    elif adapter and eight:
        kind = "int8"
    options = draft.take("bnb_config_kwargs", {})
    if kind == "nf4" and isinstance(options, dict) and options:
        for name, value in options.items():
            if name == "bnb_4bit_quant_type":
                kind = value
            elif name == "bnb_4bit_use_double_quant":
                draft.put("model.double_quant", value)
            else:
                draft.leave_value(f"bnb_config_kwargs.{name}", value, "chosen by the device")
        draft.carried_as("bnb_config_kwargs", options, "model.quantization")
    for name, value in (("adapter", adapter), ("load_in_4bit", four), ("load_in_8bit", eight)):
        if value is not None:
            draft.carried_as(name, value, "model.quantization")
    draft.put("model.quantization", kind)
    if not adapter:
        draft.put("adapter", None)
        if four or eight:
            draft.differ("adapter", None, "quantised weights cannot be trained whole: model.quantization is none")
        for name in [name for name in draft.source if name.startswith(("lora_", "peft_"))]:
            draft.leave(name, "no adapter is trained")
    else:
        if adapter not in ("lora", "qlora"):
            draft.differ("adapter", adapter, "a LoRA is trained in its place")
        convert_adapter(draft)
    for name in ("bf16", "fp16", "bfloat16", "float16", "float32"):
        if name in draft.source and (wanted := draft.take(name)) is not None:
            if name == "float32" and wanted:
                draft.put("model.dtype", "float32")
                draft.carried_as(name, wanted, "model.dtype")
            elif wanted:
                draft.differ(name, wanted, "model.dtype: auto takes bfloat16 where the card has it, float16 on older ones, float32 on a CPU")  # fmt: skip
            else:
                draft.carried_as(name, wanted, "model.dtype")
    if "attn_implementation" in draft.source:
        convert_attention(draft, "attn_implementation", draft.take("attn_implementation"))
    for name in ATTENTION:
        if name in draft.source:
            wanted = draft.flag(name)
            convert_attention(
                draft, name, {"eager_attention": "eager", "sdp_attention": "sdpa"}.get(name, name) if wanted else None
            )
    draft.carry("tokens", "model.new_tokens")
    template = draft.source.get("chat_template")
    if isinstance(template, str):
        draft.take("chat_template")
        if template == "tokenizer_default":
            draft.carried_as("chat_template", template, "model.chat_template: null")
        elif name := find_template(template.removeprefix("tokenizer_default_fallback_")):
            draft.carried_as("chat_template", template, "model.chat_template")
            if template.startswith("tokenizer_default"):
                draft.differ("chat_template", template, "set whether or not the tokenizer has one of its own")
            draft.put("model.chat_template", name)
        else:
            draft.leave_value("chat_template", template, "not known by this name: the tokenizer's own is taken; if it has none, set model.chat_template to a Jinja file")  # fmt: skip
    draft.carry("chat_template_kwargs", "data.template_kwargs")


def convert_attention(draft: Draft, name: str, wanted: str | None) -> None:
    if wanted == "eager":
        draft.put("model.attention", "eager")
        draft.carried_as(name, wanted, "model.attention")
    elif wanted in (None, "sdpa"):
        draft.carried_as(name, wanted or False, "model.attention: auto")
    else:
        draft.differ(name, True if wanted == name else wanted, "model.attention: auto takes sdpa, and the layouts need no padding; set model.attention=flash_attention_2 where that is installed")  # fmt: skip


def convert_adapter(draft: Draft) -> None:
    draft.carry("lora_model_dir", "adapter.init_from", change=lambda path: draft.place_of(str(path)))
    draft.carry("lora_r", "adapter.r")
    draft.carry("lora_alpha", "adapter.alpha")
    draft.carry("lora_dropout", "adapter.dropout", 0.0)
    linear, targets = draft.flag("lora_target_linear"), draft.take("lora_target_modules")
    if linear:
        draft.put("adapter.target_modules", "all-linear")
        draft.carried_as("lora_target_linear", linear, "adapter.target_modules: all-linear")
        if targets:
            draft.carried_as("lora_target_modules", targets, "adapter.target_modules: all-linear, which has them")
    elif linear is not None:
        draft.carried_as("lora_target_linear", linear, "adapter.target_modules")
    if targets and not linear:
        draft.carried_as("lora_target_modules", targets, "adapter.target_modules")
        draft.put("adapter.target_modules", targets)
    elif not linear:
        draft.differ(
            "lora_target_modules", None, "not given: all linear layers are adapted, where PEFT chooses by the model"
        )
    draft.carry(
        "lora_target_parameters", "adapter.target_parameters", change=lambda it: [it] if isinstance(it, str) else it
    )
    for theirs, ours in (("lora_modules_to_save", "modules_to_save"), ("lora_rank_pattern", "rank_pattern"),
                         ("lora_alpha_pattern", "alpha_pattern"), ("peft_use_dora", "use_dora"), ("peft_use_rslora", "use_rslora"),
                         ("peft_init_lora_weights", "init_lora_weights"), ("loraplus_lr_ratio", "loraplus_lr_ratio")):  # fmt: skip
        draft.carry(theirs, f"adapter.{ours}")
