"""ORPOTrainer: transformers.Trainer with the ORPO loss, TRL's constructor, and means over whole optimizer steps."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader, IterableDataset

from orpo_lite.common.errors import RequestError
from orpo_lite.common.memory import peak_memory_bytes
from orpo_lite.data.collate import PackedCollator, PaddedCollator
from orpo_lite.data.lengths import place_weight
from orpo_lite.data.step_batches import step_loader
from orpo_lite.data.token_cache import DropReport, TokenizeOptions, check_same_stream, tokenize_rows
from orpo_lite.model import keep_4bit_differentiable
from orpo_lite.model.activation_offload import CheckpointedLayers
from orpo_lite.model.inspection import outside_text, routers, unwrap
from orpo_lite.objective.layout import choose_layout, disable_dropout
from orpo_lite.objective.metrics import finish_metrics
from orpo_lite.objective.packed_attention import plain_attention
from orpo_lite.trainer.config import ORPOConfig
from orpo_lite.trainer.distributed import check_data_parallel, complete, zero_stage
from orpo_lite.trainer.engine_trainer import EngineTrainer
from orpo_lite.trainer.model_setup import (
    adapt,
    check_tokenized,
    decoder_start,
    load_by_name,
    pad_token,
    tokenizer_of,
)
from orpo_lite.trainer.objective import Objective, micro_batches
from orpo_lite.trainer.optimizer import optimizer_for
from orpo_lite.trainer.out_of_memory import Limit
from orpo_lite.trainer.trackers import check_trackers
from orpo_lite.trainer.trl_names import TrlNames, TrlRows, stored_metrics, with_columns

logger = logging.getLogger(__name__)


def untokenised(rows: Any) -> bool:
    """Whether rows are still to be tokenised."""
    return isinstance(rows, IterableDataset) or isinstance(rows, Dataset) and "chosen_ids" not in rows.column_names


def pairs_needed(args: ORPOConfig) -> int:
    """Return the pairs that `args.max_steps` optimizer steps train on, over all processes.

    Raises:
        RequestError: max_steps is not set.
    """
    if args.max_steps <= 0:
        raise RequestError(
            f"ORPOConfig.max_steps: found {args.max_steps}, expected a number above 0: a streaming train_dataset does not "
            "say how many rows it has, so max_steps says how far it is read"
        )
    return args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size


class ORPOTrainer(TrlNames, EngineTrainer):
    """Trains a model, usually a PEFT one, with ORPO (arXiv 2403.07691).

    Takes what trl.experimental.orpo.ORPOTrainer takes, so that a script written for it runs with the import changed.
    Loss, gradients and metrics equal TRL's on the same batch in float32 (logits/* aside, which here average
    completion rows only), and stay finite where TRL's do not. With `args.nll_mean == "window"`, the default, the NLL
    is normalised by its labels and the odds-ratio term by its pairs over the whole optimizer step on all processes:
    batch 8 x 1, 4 x 2 and 1 x 8 give the same gradients.

    Args:
        model: a model, a PeftModel, or the name or path of one.
        args: an ORPOConfig.
        data_collator: replaces our collator; it is given tokenised pairs, by our names and by TRL's, with the other columns
            of the data, and may return batches of TRL's form.
        train_dataset: rows with prompt (or none), chosen, rejected as text or messages; or pairs tokenised already. A
            streaming one (of `datasets` or torch) is read once to disk, as far as `args.max_steps` needs, which must be set.
        eval_dataset: the same, or a dict of several. A streaming one is read once to disk, to its end.
        processing_class: the tokenizer; left out, the model's own.
        peft_config: adapter to train; quantised models are prepared for it.
        The rest as in transformers.Trainer.

    Raises:
        ValueError: no data set, an adapter both in `model` and in `peft_config`, or a kind of adapter that the
            loss cannot be computed through.
        RequestError: more than half of the rows cannot be used; a stream without `max_steps`.
    """

    _tag_names = ["orpo", "orpo-lite"]

    def __init__(
        self,
        model: Any = None,
        args: ORPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Any = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        preprocess_logits_for_metrics: Any = None,
        peft_config: PeftConfig | None = None,
        compute_metrics: Any = None,
    ):
        if train_dataset is None and eval_dataset is None:
            raise ValueError("ORPOTrainer: `train_dataset` is required")
        args = args or ORPOConfig(output_dir="outputs")
        if not isinstance(args, ORPOConfig):
            raise TypeError(
                f"ORPOTrainer: args is a {type(args).__module__}.{type(args).__name__}, expected orpo_lite.ORPOConfig, which takes "
                "the same fields: from orpo_lite import ORPOConfig"
            )
        check_trackers(args.report_to)
        if preprocess_logits_for_metrics is not None or args.batch_eval_metrics:
            raise ValueError(
                "ORPOTrainer: preprocess_logits_for_metrics and batch_eval_metrics are not supported, since predictions "
                "are one row a pair (orpo_lite.objective.metrics.COLUMNS) and no logits; use compute_metrics"
            )
        if type(data_collator).__name__ == "DPODataCollatorWithPadding":
            logger.warning("TRL's data collator is not needed: ours takes its place")
            data_collator = None
        if args.n_gpu > 1:
            logger.warning("one of %d GPUs is used: start with `accelerate launch` to use all", args.n_gpu)
            args._n_gpu = 1
        args.remove_unused_columns = False  # our collator reads columns that no model's forward takes
        torch.manual_seed(args.seed)  # a new adapter's weights are random
        self._peft_config, self._stored, self._own_collator = peft_config, stored_metrics(), data_collator is not None
        if isinstance(model, str):
            model = load_by_name(model, args, peft_config is not None)
        elif args.model_init_kwargs is not None:
            raise ValueError(
                "ORPOTrainer: `model_init_kwargs` are for a model given by name; this one is loaded already"
            )
        if model is not None:
            encoder_decoder = bool(model.config.is_encoder_decoder)
            model = self._ready(model, args)
        elif args.is_encoder_decoder is None:
            raise ValueError("ORPOTrainer: with model_init, set ORPOConfig.is_encoder_decoder")
        else:
            encoder_decoder = args.is_encoder_decoder
        self.is_encoder_decoder = encoder_decoder
        if processing_class is None:
            if model is None:
                raise ValueError("ORPOTrainer: with model_init, give a processing_class")
            processing_class = tokenizer_of(model, args)
        tokenizer = self.tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self.answers: list[dict[str, str]] = []  # of the last evaluation, with generate_during_eval

        self.drop_reports: dict[str, DropReport] = {}
        self._tokenize_options = TokenizeOptions(
            max_length=args.max_length if args.max_length is not None else 512,
            max_prompt_length=args.max_prompt_length,
            max_completion_length=args.max_completion_length or (128 if encoder_decoder else None),
            overlong=args.overlong,  # type: ignore[arg-type]
            completion_end=args.completion_end,  # type: ignore[arg-type]
            apply_template=False,
            template_kwargs=args.template_kwargs or {},  # type: ignore[arg-type]
            encoder_decoder=encoder_decoder,
            num_proc=args.dataset_num_proc,
        )
        with args.main_process_first(desc="tokenising"):
            streamed = isinstance(train_dataset, IterableDataset)
            if train_dataset is not None:
                train_dataset = self._tokenised(train_dataset, "train", pairs_needed(args) if streamed else None)
            if isinstance(eval_dataset, dict):
                eval_dataset = {k: self._tokenised(d, k) for k, d in eval_dataset.items()}
            elif eval_dataset is not None:
                eval_dataset = self._tokenised(eval_dataset, "eval")
        if streamed:
            check_same_stream(train_dataset, "train", args.world_size)

        if args.ddp_find_unused_parameters is None and model is not None:
            # a search of the graph in every pass, for what only experts and parts beside the language model can be
            base = unwrap(model)
            args.ddp_find_unused_parameters = bool(routers(base) or outside_text(base))
        self._accumulation = args.gradient_accumulation_steps
        if args.tokens_per_batch or args.world_size > 1:
            # one item of the loader is an optimizer step: transformers must not count micro-batches itself
            args.per_device_train_batch_size *= args.gradient_accumulation_steps
            args.gradient_accumulation_steps = 1
        super().__init__(
            model=model,
            args=args,
            # ours needs the layout, and that the model
            data_collator=TrlRows(data_collator, tokenizer) if data_collator else list,  # type: ignore[arg-type]
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.layout = choose_layout(unwrap(self.model), args.layout)
        self.collator: PaddedCollator | PackedCollator
        if self.layout.name == "padded":
            start = decoder_start(self.model.config) if encoder_decoder else None
            self.collator = PaddedCollator(pad_token(args, tokenizer), args.nll_scope, start)
        else:
            self.collator = PackedCollator(args.nll_scope, share=self.layout.name == "shared")
        if data_collator is None:
            self.data_collator = self.collator
        # compute_loss normalises over the step itself; transformers must not divide once more
        self.loss_is_scaled_for_ga = True
        self.objective = Objective(args, self.model.config, None, self.accelerator.num_processes)
        if self.objective.router_loss and not self.objective.router_coefficient:
            logger.warning(
                "output_router_logits is on, but router_aux_loss_coef is 0: the router's loss counts nothing"
            )
        check_data_parallel(self.accelerator)
        self.head_known = complete(self.model) and not self.is_fsdp_enabled and zero_stage(self.accelerator) != 3
        if self.head_known:
            self.find_head(self.model)
        if args.gradient_checkpointing and (args.checkpointed_layers is not None or args.offload_activations):
            self.add_callback(CheckpointedLayers(args.checkpointed_layers, args.offload_activations))
        self._sums: dict[str, Tensor] = {}
        self.micro_limit, self.eval_limit = Limit(by_tokens=bool(args.tokens_per_batch)), Limit(by_tokens=False)
        self._clock = time.monotonic()
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(self._tag_names)

    def _ready(self, model: Any, args: ORPOConfig) -> Any:
        """Adapter on, dropout off, 4-bit layers such that gradients pass."""
        keep_4bit_differentiable(model)
        if any(isinstance(module, FSDPModule) for module in model.modules()):
            # it is sharded already: accelerate must not put DDP around it
            model.is_distributed_loading_by_transformers = True
        if self._peft_config is not None:
            model = adapt(model, self._peft_config, checkpointing=bool(args.gradient_checkpointing))
        if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
            kind = model.active_peft_config.peft_type
            raise ValueError(
                f"ORPOTrainer: {kind} adapters put virtual tokens before the prompt, which ORPO's labels do not allow for; use LoRA"
            )
        if args.disable_dropout:
            disable_dropout(model)
        return model

    def call_model_init(self, trial: Any = None) -> Any:
        return self._ready(super().call_model_init(trial), self.args)

    def _tokenised(self, rows: Any, name: str, enough: int | None = None) -> Dataset:
        if isinstance(rows, Dataset) and "chosen_ids" in rows.column_names:
            check_tokenized(rows, name)
            return rows
        pairs, report = tokenize_rows(rows, self.tokenizer, self._tokenize_options, name, enough)
        self.drop_reports[name] = report
        logger.log(logging.WARNING if report.counts or report.truncated else logging.INFO, "%s: %s", name, report)
        return with_columns(pairs, rows) if self._own_collator and isinstance(rows, Dataset) else pairs

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Batches of held-out pairs; rows that are not tokenised yet are tokenised as the others were."""
        if untokenised(eval_dataset):
            eval_dataset = self._tokenised(eval_dataset, "eval")
        return super().get_eval_dataloader(eval_dataset)  # type: ignore[arg-type]

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """As `get_eval_dataloader`, for `predict`."""
        if untokenised(test_dataset):
            test_dataset = self._tokenised(test_dataset, "test")
        return super().get_test_dataloader(test_dataset)  # type: ignore[arg-type]

    # ---- whole optimizer steps -------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Micro-batches; with `tokens_per_batch` or several processes whole optimizer steps, of micro-batches by their cost."""
        args, weight = self.args, place_weight(self.model.config)
        if not args.tokens_per_batch and args.world_size == 1:
            return super().get_train_dataloader()
        return step_loader(
            self.train_dataset, args, self.layout.name, self.data_collator, self.collator, self._accumulation, weight
        )  # fmt: skip

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """transformers' estimate, over all micro-batches of a step."""
        return sum(super(ORPOTrainer, self).floating_point_ops(batch) for batch in micro_batches(inputs))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.args.loraplus_lr_ratio:
            self.optimizer = optimizer_for(self.model, self.args, self.args.loraplus_lr_ratio)
            return self.optimizer
        return super().create_optimizer(model)

    # ---- metrics -------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last log: exact means over all pairs of all micro-batches and processes."""
        if "loss" in logs and self._sums:
            names = list(self._sums)
            totals = self._total(torch.stack([self._sums[name].double() for name in names])).tolist()
            sums, self._sums = dict(zip(names, totals, strict=True)), {}
            seconds, self._clock = time.monotonic() - self._clock, time.monotonic()
            logs |= finish_metrics(sums)
            logs["tokens_per_second"] = sums["tokens"] / seconds
            logs["pairs_per_second"] = sums["pairs"] / seconds
            logs["peak_memory_gb"] = peak_memory_bytes(self.args.device) / 1e9
        super().log(logs, start_time)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._clock = time.monotonic()
        try:
            return super().train(*args, **kwargs)
        finally:
            plain_attention(unwrap(self.unwrapped()))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        started, clock = time.monotonic(), self._clock
        metrics = super().evaluate(*args, **kwargs)  # of several data sets: this method again, for each
        if not self.is_in_train:
            plain_attention(unwrap(self.unwrapped()))
        self._clock = clock + time.monotonic() - started  # evaluation is no part of the training throughput
        return metrics
