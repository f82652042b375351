"""What ORPOTrainer's constructor makes of its arguments, which are TRL's: model, adapter, tokenizer, options; the optimizer."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from torch.utils.data import IterableDataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from orpo_lite.common.errors import RequestError
from orpo_lite.data.token_cache import TokenizeOptions
from orpo_lite.model import autocast, keep_4bit_differentiable
from orpo_lite.model.adapter import prepare_frozen, wrap
from orpo_lite.model.base import attention_for
from orpo_lite.model.inspection import check_decoder_only, unwrap
from orpo_lite.objective.head import head_transform
from orpo_lite.objective.layout import disable_dropout
from orpo_lite.trainer.callbacks import check_trackers
from orpo_lite.trainer.config import ORPOConfig
from orpo_lite.trainer.objective import Objective

if TYPE_CHECKING:
    from orpo_lite.trainer.trainer import ORPOTrainer

logger = logging.getLogger(__name__)


def check_arguments(args: Any, train_dataset: Any, eval_dataset: Any, preprocess_logits: Any) -> None:
    """Raise where arguments of ORPOTrainer cannot be used, and set those that it needs otherwise."""
    if train_dataset is None and eval_dataset is None:
        raise ValueError("ORPOTrainer: `train_dataset` is required")
    if not isinstance(args, ORPOConfig):
        raise TypeError(
            f"ORPOTrainer: args is a {type(args).__module__}.{type(args).__name__}, expected orpo_lite.ORPOConfig, which takes "
            "the same fields: from orpo_lite import ORPOConfig"
        )
    check_trackers(args.report_to)
    if preprocess_logits is not None or args.batch_eval_metrics:
        raise ValueError(
            "ORPOTrainer: preprocess_logits_for_metrics and batch_eval_metrics are not supported, since predictions "
            "are one row per pair (orpo_lite.objective.metrics.COLUMNS) and no logits; use compute_metrics"
        )
    if args.n_gpu > 1:
        logger.warning("one of %d GPUs is used: start with `accelerate launch` to use all", args.n_gpu)
        args._n_gpu = 1
    args.remove_unused_columns = False  # our collator reads columns that no model's forward takes


def load_by_name(name: str, args: ORPOConfig, with_adapter: bool) -> Any:
    """Load a model with the config's model_init_kwargs; the dtype follows the device unless they name one.

    float32 on the CPU; on a GPU the checkpoint's own, but on one without bfloat16 float16 under an adapter and float32
    for full fine-tuning, whose float16 gradients could not be unscaled.
    """
    kwargs: dict[str, Any] = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
    if dtype is None:
        cpu = args.device.type == "cpu"
        dtype = torch.float32 if cpu or (args.fp16 and not with_adapter) else torch.float16 if args.fp16 else "auto"
    elif isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype)
    found = {key: kwargs[key] for key in ("revision", "trust_remote_code") if key in kwargs}
    config = AutoConfig.from_pretrained(name, **found)
    check_decoder_only(config, f"ORPOTrainer: {name}")
    if attention := attention_for(config):
        kwargs.setdefault("attn_implementation", attention)
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **kwargs)


def prepare_model(model: Any, args: ORPOConfig, peft_config: PeftConfig | None) -> Any:
    """Load a model given by name, attach a new adapter, switch dropout off, and let gradients pass 4-bit layers.

    Raises:
        TypeError: not a PeftConfig.
        ValueError: the model is an encoder-decoder, carries an adapter already, or a kind of adapter that the loss cannot
            be computed through.
    """
    if isinstance(model, str):
        model = load_by_name(model, args, peft_config is not None)
    elif args.model_init_kwargs is not None:
        raise ValueError("ORPOTrainer: `model_init_kwargs` are for a model given by name; this one is loaded already")
    if model is None:
        return None
    check_decoder_only(model.config, f"ORPOTrainer: the {type(unwrap(model)).__name__}")
    keep_4bit_differentiable(model)
    if peft_config is not None:
        model = adapt(model, peft_config, checkpointing=bool(args.gradient_checkpointing))
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        kind = model.active_peft_config.peft_type
        raise ValueError(
            f"ORPOTrainer: {kind} adapters put virtual tokens before the prompt, which ORPO's labels do not allow for; use LoRA"
        )
    if args.disable_dropout:
        disable_dropout(model)
    return model


def adapt(model: Any, peft_config: PeftConfig, checkpointing: bool) -> PeftModel:
    """Attach a new adapter, and prepare a quantized base for it."""
    if not isinstance(peft_config, PeftConfig):
        raise TypeError(
            f"ORPOTrainer: peft_config is a {type(peft_config).__name__}, expected a peft.PeftConfig such as LoraConfig"
        )
    if isinstance(model, PeftModel):
        raise ValueError(
            "ORPOTrainer: the model is a PeftModel already: remove peft_config, or merge its adapter first"
        )
    adapted = wrap(model, peft_config)
    prepare_frozen(adapted)
    if checkpointing:
        model.enable_input_require_grads()
    return adapted


def tokenize_options(args: ORPOConfig) -> TokenizeOptions:
    """Return how rows are tokenized, by the arguments."""
    return TokenizeOptions(
        max_length=args.max_length if args.max_length is not None else 512,
        max_prompt_length=args.max_prompt_length,
        max_completion_length=args.max_completion_length,
        overlong=args.overlong,  # type: ignore[arg-type]
        completion_end=args.completion_end,  # type: ignore[arg-type]
        apply_template=False,
        template_kwargs=args.template_kwargs or {},  # type: ignore[arg-type]
    )


def tokenizer_of(model: Any, args: ORPOConfig) -> Any:
    """Load the tokenizer beside the model's weights.

    Raises:
        ValueError: the model was not loaded from a folder or the hub.
    """
    if not model.config._name_or_path:
        raise ValueError(
            "ORPOTrainer: this model was not loaded from a folder or the hub: pass its tokenizer as processing_class"
        )
    revision = (args.model_init_kwargs or {}).get("revision")  # type: ignore[union-attr]
    return AutoTokenizer.from_pretrained(
        model.config._name_or_path, revision=revision, trust_remote_code=args.trust_remote_code
    )


def untokenized(rows: Any) -> bool:
    """Tell whether rows are still to be tokenized."""
    return isinstance(rows, IterableDataset) or isinstance(rows, Dataset) and "chosen_ids" not in rows.column_names


def make_objective(trainer: ORPOTrainer) -> Objective:
    """Make the objective, and find how the model's head is scored."""
    args, model = trainer.args, trainer.model
    objective = Objective(args, model.config, None, trainer.accelerator.num_processes)
    objective.attention = trainer.layout.attention
    if objective.router_loss and not objective.router_coefficient:
        logger.warning("output_router_logits is on, but router_aux_loss_coef is 0: the router's loss has no effect")
    exact = 1e-3 if args.mixed_precision == "no" and next(model.parameters()).dtype == torch.float32 else 0.2
    with autocast(trainer.unwrapped()):
        objective.head = head_transform(trainer.unwrapped(), args.device, exact)
    return objective


def loraplus_optimizer(model: nn.Module, args: TrainingArguments, ratio: float) -> torch.optim.Optimizer:
    """Make the optimizer of args.optim in which every B matrix learns at `ratio` times the rate (LoRA+, arXiv 2402.12354).

    Raises:
        RequestError: the model has no LoRA adapter, or the optimizer builds its own parameter groups.
    """
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)  # type: ignore[arg-type]
    if {"params", "model", "optimizer_dict"} & set(options):
        raise RequestError(
            f"training.optim: {args.optim} sorts parameters itself and cannot be combined with LoRA+ groups"
        )
    if not isinstance(model, PeftModel):
        raise RequestError("adapter.loraplus_lr_ratio: LoRA+ needs a LoRA adapter, and the model has none")
    optimizer = create_loraplus_optimizer(
        model, kind, loraplus_lr_ratio=ratio, loraplus_weight_decay=args.weight_decay, **options
    )
    # PEFT makes a group for every kind of parameter, and some optimizers fail on empty groups
    optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
    if kind.__module__.startswith("bitsandbytes"):
        # states of 8 bits are unstable for embeddings; transformers does the same without LoRA+
        from bitsandbytes.optim.optimizer import GlobalOptimManager

        for module in model.modules():
            if isinstance(module, nn.Embedding):
                GlobalOptimManager.get_instance().register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer
