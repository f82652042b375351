"""ORPOConfig: transformers.TrainingArguments, TRL's ORPO fields by TRL's names, and our own."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.utils.import_utils import is_torch_tf32_available

from orpo_lite.common.console import refuse_sharding
from orpo_lite.model import choose_precision

logger = logging.getLogger(__name__)

CHECKPOINTING = "activation_checkpointing"
"""transformers 5.23 renamed gradient_checkpointing to this; earlier versions only have the old name."""
RENAMED = CHECKPOINTING in {f.name for f in fields(TrainingArguments)}

CHOICES = {
    "overlong": ("truncate", "drop"),
    "completion_end": ("trl", "turn"),
    "nll_scope": ("prompt+chosen", "chosen"),
    "nll_mean": ("window", "micro"),
    "layout": ("auto", "shared", "packed", "padded"),
    "kernels": ("auto", "liger", "none"),
}
"""Values that a field takes."""
POSITIVE = ("tokens_per_batch", "head_chunk", "checkpointed_layers", "max_length", "max_prompt_length",
            "max_completion_length", "save_minutes", "early_stopping_patience")  # fmt: skip
"""Fields whose value, if any, is above 0."""


def _help(text: str, **default: Any) -> Any:
    return field(metadata={"help": text}, **default)


@dataclass
class ORPOConfig(TrainingArguments):
    """Arguments of an ORPO run: `ORPOConfig(output_dir="out", beta=0.1, max_length=1024)`.

    Takes every field of transformers.TrainingArguments and of trl.experimental.orpo.ORPOConfig, with TRL's defaults
    (learning_rate 1e-6, logging_steps 10, checkpointing on), except that the precision follows the device: bf16 from
    compute capability 8.0, fp16 below, float32 on the CPU, unless `fp16` or `bf16` says otherwise; and that
    `logging_nan_inf_filter` is off, so that a NaN loss is visible.

    Raises:
        ValueError: a field outside its range; the message names it, what was found and what was expected.
        TypeError: no such field.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs", "template_kwargs"]

    learning_rate: float = _help("Initial learning rate. TRL's default is far too low for LoRA.", default=1e-6)
    logging_steps: float = _help("Steps between logs; below 1, a share of all steps.", default=10)
    bf16: bool | None = _help("bfloat16 autocast; unset, chosen by the device.", default=None)
    fp16: bool = _help("float16 autocast with loss scaling; with bf16 unset, chosen by the device.", default=False)
    gradient_checkpointing: bool = _help("Recompute activations in the backward pass.", default=True)
    logging_nan_inf_filter: bool = _help("Show the running mean in place of a NaN loss.", default=False)

    max_length: int | None = _help("Tokens of prompt and completion together.", default=1024)
    max_prompt_length: int | None = _help("Tokens of the prompt; unset leaves it to max_length.", default=None)
    max_completion_length: int | None = _help("Tokens of an answer that is generated; unset, 128.", default=None)
    overlong: str = _help("truncate, as TRL does, or drop: what to do with a longer pair.", default="truncate")
    completion_end: str = _help("trl, or turn: cut the completion after the first end-of-turn token.", default="trl")
    template_kwargs: dict[str, Any] | str | None = _help("Variables of the chat template.", default=None)
    beta: float = _help("Weight of the odds-ratio term, lambda in the paper.", default=0.1)
    nll_scope: str = _help("prompt+chosen, as in TRL, or chosen: the labels of the NLL term.", default="prompt+chosen")
    nll_mean: str = _help("window: means over the optimizer step; micro: TRL's mean of means.", default="window")
    layout: str = _help("auto, shared, packed or padded: how pairs become a batch.", default="auto")
    tokens_per_batch: int | None = _help("Tokens of a micro-batch, in place of a number of pairs.", default=None)
    disable_dropout: bool = _help("Set every dropout in the model to 0.", default=True)
    padding_value: int | None = _help("Token id of padding; unset takes the tokenizer's.", default=None)
    generate_during_eval: bool = _help("Answer and log some held-out prompts at each evaluation.", default=False)
    is_encoder_decoder: bool | None = _help("TRL's; not used, since such models are refused.", default=None)
    model_init_kwargs: dict[str, Any] | str | None = _help("Arguments of from_pretrained.", default=None)
    trust_remote_code: bool = _help("Run Python code that the model's repository ships.", default=False)
    dataset_num_proc: int | None = _help("TRL's; not used, since a tokenizer uses all cores by itself.", default=None)
    head_chunk: int | None = _help("Rows of logits held at a time; unset chooses by vocabulary.", default=None)
    checkpointed_layers: int | None = _help("First layers that recompute with checkpointing; unset, all.", default=None)
    offload_activations: bool = _help("Keep what checkpointing saves in host memory.", default=False)
    kernels: str = _help("liger: its fused kernels, without its losses; auto: on CUDA where exact.", default="none")
    save_minutes: float | None = _help("Minutes between checkpoints, besides save_strategy's.", default=None)
    early_stopping_patience: int | None = _help("Evaluations without a better metric before a stop.", default=None)
    loraplus_lr_ratio: float | None = _help("LoRA+: learning rate of B over that of A.", default=None)

    def __post_init__(self) -> None:
        refuse_sharding(fsdp=self.fsdp, fsdp_config=self.fsdp_config, deepspeed=self.deepspeed)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"ORPOConfig.{name}: found {getattr(self, name)!r}, expected one of {', '.join(choices)}"
                )
        if self.use_liger_kernel:  # transformers would also replace the loss, and its own classes for the whole process
            if self.liger_kernel_config:
                found = f"ORPOConfig.liger_kernel_config: found {self.liger_kernel_config}"
                raise ValueError(f"{found}, but all kernels except the losses are used: leave it out")
            self.use_liger_kernel, self.kernels = False, "liger"
        optim = str(getattr(self.optim, "value", self.optim))
        if "lomo" in optim or "layerwise" in optim:
            raise ValueError(
                f"ORPOConfig.optim: found {optim}, which changes weights inside of the backward pass, where no check of a step "
                "could stop it: expected one that steps afterwards, such as adamw_torch or paged_adamw_8bit"
            )
        if not self.beta >= 0:
            raise ValueError(f"ORPOConfig.beta: found {self.beta!r}, expected a number from 0 up")
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"ORPOConfig.{name}: found {value!r}, expected a number above 0, or None")
        if self.max_length is None:
            logger.warning("ORPOConfig.max_length is None: 512 tokens, as in TRL")
        if self.tokens_per_batch and self.nll_mean == "micro":
            raise ValueError(
                "ORPOConfig.nll_mean: micro gives all micro-batches the same weight, but with tokens_per_batch they hold "
                "different numbers of pairs; set nll_mean to window"
            )
        if self.train_sampling_strategy == "group_by_length":
            raise ValueError(
                "ORPOConfig.train_sampling_strategy: found 'group_by_length', expected random or sequential; set "
                "tokens_per_batch instead, which groups pairs of similar length inside each optimizer step"
            )
        if self.early_stopping_patience:
            if str(getattr(self.eval_strategy, "value", self.eval_strategy)) == "no":
                raise ValueError(
                    f"ORPOConfig.early_stopping_patience: found {self.early_stopping_patience}, but eval_strategy is no, so "
                    "there is no evaluation to stop after; set eval_strategy to epoch or steps, and give held-out pairs"
                )
            self.metric_for_best_model = self.metric_for_best_model or "loss"
            if self.greater_is_better is None:
                self.greater_is_better = not self.metric_for_best_model.endswith("loss")
        self._choose_precision()
        self._choose_checkpointing()
        # pinning helps copies to a GPU, and without one torch warns at every loader
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        super().__post_init__()

    def _choose_precision(self) -> None:
        """Choose autocast by the device; warn about a request that it cannot serve, and change it."""
        here = choose_precision("auto", "cpu" if self.use_cpu else None)
        if self.bf16 and not here.bf16:
            logger.warning("bf16=True, but %s: training in %s", here.why, "fp16" if here.fp16 else "float32")
            self.bf16, self.fp16 = False, here.fp16
        elif self.bf16 is None and not self.fp16:
            self.bf16, self.fp16 = here.bf16, here.fp16
        self.bf16 = bool(self.bf16)
        if self.tf32 and not is_torch_tf32_available():
            logger.warning("tf32=True, but there is no GPU with TF32: ignored")
            self.tf32 = None

    def _choose_checkpointing(self) -> None:
        """Accept the old name or the new one, and set the one that transformers wants, so that it does not warn."""
        if RENAMED:
            if getattr(self, CHECKPOINTING) is None:
                setattr(self, CHECKPOINTING, self.gradient_checkpointing is not False)
            self.gradient_checkpointing = None  # type: ignore[assignment]  # transformers', where the new name is set
            if self.gradient_checkpointing_kwargs and not self.activation_checkpointing_kwargs:
                self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
                self.gradient_checkpointing_kwargs = None
