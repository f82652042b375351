"""ORPOTrainer: transformers.Trainer with the ORPO loss, TRL's constructor, and means over whole optimizer steps."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from accelerate.utils import DistributedType, send_to_device
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader, IterableDataset
from transformers.trainer_utils import EvalLoopOutput
from transformers.training_args import OptimizerNames

from orpo_lite.common.console import peak_memory_bytes
from orpo_lite.common.errors import RequestError
from orpo_lite.data.collate import PackedCollator, PaddedCollator, from_trl
from orpo_lite.data.step_batches import step_loader
from orpo_lite.data.token_cache import DropReport, TokenizeOptions, check_same_stream, tokenize_rows
from orpo_lite.model import keep_4bit_differentiable
from orpo_lite.model.activation_offload import CheckpointedLayers
from orpo_lite.model.inspection import outside_text, routers, unwrap
from orpo_lite.objective.layout import choose_layout, disable_dropout
from orpo_lite.objective.metrics import finish_metrics, pair_metrics
from orpo_lite.objective.packed_attention import plain_attention
from orpo_lite.trainer.checkpointing import CheckpointedTrainer
from orpo_lite.trainer.config import ORPOConfig
from orpo_lite.trainer.deepspeed import EvaluationEngine, prepare_to_train, ready_to_evaluate
from orpo_lite.trainer.distributed import accumulating, check_data_parallel, complete, reshard, zero_stage
from orpo_lite.trainer.generate import log_answers
from orpo_lite.trainer.model_setup import (
    adapt,
    check_tokenized,
    decoder_start,
    load_by_name,
    pad_token,
    tokenizer_of,
)
from orpo_lite.trainer.nonfinite_guard import learning_rate
from orpo_lite.trainer.objective import (
    Objective,
    StepInProgress,
    count_step,
    micro_batches,
    prediction_rows,
    unwrapped,
)
from orpo_lite.trainer.optimizer import optimizer_for
from orpo_lite.trainer.out_of_memory import Limit, ran_out, reason, smaller, stuck, too_large
from orpo_lite.trainer.trackers import check_trackers
from orpo_lite.trainer.transformers_contract import warn_if_untested
from orpo_lite.trainer.trl_names import TrlNames, TrlRows, stored_metrics, with_columns, with_trl_columns

logger = logging.getLogger(__name__)


def untokenized(rows: Any) -> bool:
    """Tell whether rows are still to be tokenized."""
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


class ORPOTrainer(TrlNames, CheckpointedTrainer):
    """Trains a model, usually a PEFT one, with ORPO (arXiv 2403.07691).

    Takes what trl.experimental.orpo.ORPOTrainer takes, so that a script written for it runs with the import changed.
    Loss, gradients and metrics equal TRL's on the same batch in float32 (logits/* aside, which here average
    completion rows only), and stay finite where TRL's do not. With `args.nll_mean == "window"`, the default, the NLL
    is normalized by its labels and the odds-ratio term by its pairs over the whole optimizer step on all processes:
    batch 8 x 1, 4 x 2 and 1 x 8 give the same gradients.

    Args:
        model: a model, a PeftModel, or the name or path of one.
        args: an ORPOConfig.
        data_collator: replaces our collator; it is given tokenized pairs, by our names and by TRL's, with the other columns
            of the data, and may return batches of TRL's form.
        train_dataset: rows with prompt (or none), chosen, rejected as text or messages; or pairs tokenized already. A
            streaming one (of `datasets` or torch) is read once to disk, as far as `args.max_steps` needs, which must be set.
        eval_dataset: the same, or a dict of several. A streaming one is read once to disk, to its end.
        processing_class: the tokenizer; left out, the model's own.
        peft_config: adapter to train; quantized models are prepared for it.
        The rest as in transformers.Trainer.

    Raises:
        ValueError: no data set, an adapter both in `model` and in `peft_config`, or a kind of adapter that the
            loss cannot be computed through.
        RequestError: more than half of the rows cannot be used; a stream without `max_steps`.
    """

    _tag_names = ["orpo", "orpo-lite"]
    collator: PaddedCollator | PackedCollator
    predictions: Any = None
    """Predictions of the last evaluation: one row per pair, with the columns `metrics.COLUMNS`."""
    step_in_progress: StepInProgress | None = None
    engine_to_evaluate: EvaluationEngine | None = None
    given_rows: Any = None
    """The training rows as they were given, where they were not tokenized yet."""

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
        warn_if_untested()
        args = args or ORPOConfig(output_dir="outputs")
        check_arguments(args, train_dataset, eval_dataset, preprocess_logits_for_metrics)
        if type(data_collator).__name__ == "DPODataCollatorWithPadding":
            logger.warning("TRL's data collator is not needed: ours takes its place")
            data_collator = None
        torch.manual_seed(args.seed)  # a new adapter's weights are random
        self._peft_config, self.stored, self._own_collator = peft_config, stored_metrics(), data_collator is not None
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
        self._tokenize_options = tokenize_options(args, encoder_decoder)
        with args.main_process_first(desc="tokenizing"):
            streamed = isinstance(train_dataset, IterableDataset)
            if train_dataset is not None:
                self.given_rows = train_dataset if untokenized(train_dataset) else None
                train_dataset = self._tokenized(train_dataset, "train", pairs_needed(args) if streamed else None)
            if isinstance(eval_dataset, dict):
                eval_dataset = {k: self._tokenized(d, k) for k, d in eval_dataset.items()}
            elif eval_dataset is not None:
                eval_dataset = self._tokenized(eval_dataset, "eval")
        train_dataset, eval_dataset = with_trl_columns(train_dataset), with_trl_columns(eval_dataset)
        if streamed:
            check_same_stream(train_dataset, "train", args.world_size)  # type: ignore[arg-type]  # it is tokenized by now

        if args.ddp_find_unused_parameters is None and model is not None:
            # a search of the graph in every pass, for what only experts and parts beside the language model can be
            base = unwrap(model)
            args.ddp_find_unused_parameters = bool(routers(base) or outside_text(base))
        self.accumulation_steps = args.gradient_accumulation_steps
        if args.tokens_per_batch or args.world_size > 1:
            # one item of the loader is an optimizer step: transformers must not count micro-batches itself
            args.per_device_train_batch_size *= args.gradient_accumulation_steps
            args.gradient_accumulation_steps = 1
        super().__init__(
            model=model,
            args=args,
            # replaced below: our collator depends on the layout, which depends on the model
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
        if self.layout.name == "padded":
            start = decoder_start(self.model.config) if encoder_decoder else None
            self.collator = PaddedCollator(pad_token(args, tokenizer), args.nll_scope, start)
        else:
            self.collator = PackedCollator(args.nll_scope, share=self.layout.name == "shared")
        if data_collator is None:
            self.data_collator = self.collator
        check_data_parallel(self.accelerator)
        if not self.is_deepspeed_enabled:
            # the loss is normalized over the step: nobody may divide it again
            self.accelerator.gradient_accumulation_steps = 1
        self.objective = Objective(args, self.model.config, None, self.accelerator.num_processes)
        if self.objective.router_loss and not self.objective.router_coefficient:
            logger.warning("output_router_logits is on, but router_aux_loss_coef is 0: the router's loss has no effect")
        exact = 1e-3 if args.mixed_precision == "no" else 0.2
        if complete(self.model) and not self.is_fsdp_enabled and zero_stage(self.accelerator) != 3:
            self.objective.find_head(self.model, args.device, exact)
        else:  # no process holds the model whole: its head is examined once all of them run it
            self.objective.find_at_first = lambda model: self.objective.find_head(model, args.device, exact)
        if args.gradient_checkpointing and (args.checkpointed_layers is not None or args.offload_activations):
            self.add_callback(CheckpointedLayers(args.checkpointed_layers, args.offload_activations))
        self.micro_limit, self.eval_limit = Limit(by_tokens=bool(args.tokens_per_batch)), Limit(by_tokens=False)
        if isinstance(self.model, PeftModel) and train_dataset is not None:
            self.health.check_learning_rate(args.learning_rate)
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(self._tag_names)

    def _ready(self, model: Any, args: ORPOConfig) -> Any:
        """Attach the adapter, switch dropout off, and let gradients pass 4-bit layers."""
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

    def _tokenized(self, rows: Any, name: str, enough: int | None = None) -> Dataset:
        if isinstance(rows, Dataset) and "chosen_ids" in rows.column_names:
            check_tokenized(rows, name)
            return rows
        pairs, report = tokenize_rows(rows, self.tokenizer, self._tokenize_options, name, enough)
        self.drop_reports[name] = report
        logger.log(logging.WARNING if report.counts or report.truncated else logging.INFO, "%s: %s", name, report)
        return with_columns(pairs, rows) if self._own_collator and isinstance(rows, Dataset) else pairs

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return batches of held-out pairs; rows that are not tokenized yet are tokenized as the others were."""
        if untokenized(eval_dataset):
            eval_dataset = self._tokenized(eval_dataset, "eval")
        return super().get_eval_dataloader(eval_dataset)  # type: ignore[arg-type]

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """Return the same for `predict`."""
        if untokenized(test_dataset):
            test_dataset = self._tokenized(test_dataset, "test")
        return super().get_test_dataloader(test_dataset)  # type: ignore[arg-type]

    def unwrapped(self, model: Any = None) -> Any:
        """Return the transformers or PEFT model, without what DDP or DeepSpeed puts around it."""
        return unwrapped(self.model if model is None else model)

    # ---- the loss --------------------------------------------------------------------------------------------------

    def orpo_loss(self, model: nn.Module, inputs: dict[str, Any], totals: Tensor | None) -> tuple[Tensor, dict]:
        """Compute loss and sums of a batch, see `Objective.loss`; in training the sums count for the next log."""
        batches = micro_batches(self._to_device(inputs))
        loss, sums = self.objective.loss(model, batches, totals)
        if model.training:
            self._add(sums)
        return loss, sums

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Compute the ORPO loss of a batch of `get_train_dataloader()`, or of TRL's collator.

        With `num_items_in_batch` (NLL labels, pairs and micro-batches of the whole optimizer step, as `get_batch_samples`
        counts them) the batch's share of the step's loss; without, the loss of the batch on its own.
        """
        loss, sums = self.orpo_loss(model, inputs, num_items_in_batch)
        return (loss, finish_metrics(sums)) if return_outputs else loss

    def _to_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Move a batch to the device, one of TRL's form in ours."""

        def ours(one: dict[str, Any]) -> dict[str, Any]:
            return one if "label_rows" in one else from_trl(one, self.collator)

        if "micro_batches" in batch:
            batch = batch | {"micro_batches": [ours(one) for one in batch["micro_batches"]]}
        else:
            batch = ours(batch)
        moved: Any = send_to_device(batch, self.args.device)
        return moved

    def _add(self, sums: dict[str, Tensor]) -> None:
        self.sums = {**self.sums, **{key: self.sums.get(key, 0) + value for key, value in sums.items()}}

    # ---- whole optimizer steps -------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Return micro-batches; with `tokens_per_batch` or several processes whole optimizer steps of them."""
        args = self.args
        if not args.tokens_per_batch and args.world_size == 1:
            return super().get_train_dataloader()
        layout, own = self.layout.name, self.collator
        return step_loader(self.train_dataset, args, layout, self.data_collator, own, self.accumulation_steps)

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | None]:
        """Return the items of one optimizer step, and what they hold on all processes, see `count_step`."""
        items, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        items = [self._to_device(item) for item in items]
        if not items:
            return items, None
        self.step_in_progress = StepInProgress(items, dict(self.sums), self.args.device)
        self.guard.begin_step()
        totals = count_step([micro for item in items for micro in micro_batches(item)])
        return items, self.total(totals.to(device))

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Run forward and backward of an item of the step; after its last, check what the optimizer will see.

        This replaces transformers' own method as a whole, so that no version of it divides the loss. Where memory runs out,
        the optimizer step begins again in smaller micro-batches: the same pairs, gradients and metrics.

        Raises:
            OutOfMemory: a single pair does not fit, or the step cannot begin again.
            NonFinite: see `NonFiniteGuard`.
        """
        step = self.step_in_progress
        place = step.index_of(inputs) if step else None
        if step is None or place is None:  # a script's own step
            return self._forward_backward(model, inputs, num_items_in_batch)
        step.save_rng()
        items = [inputs]
        while True:
            try:
                losses = [self._forward_backward(model, item, num_items_in_batch) for item in items]
                break
            except RuntimeError as error:
                if not ran_out(error):
                    raise
                why = reason(error)
            # past the except clause, since the error's traceback holds the graph
            self._shrink_micro_batches(self.micro_limit, "step", why)
            model.zero_grad()
            self.sums = dict(step.sums)
            step.losses.clear()
            step.restore_rng()
            items = step.items[: place + 1]
        for loss in losses:
            self._add({"loss": loss})
        step.losses += losses
        if place == len(step.items) - 1:
            self.guard.check_step()
        return losses[-1]

    def _forward_backward(self, model: nn.Module, item: dict[str, Any], totals: Tensor | None) -> Tensor:
        """Run the passes of an item, gradients synchronized on the last only; returns its loss, a scalar."""
        parts = [part for batch in micro_batches(item) for part in self.micro_limit.cut(batch)]
        loss = torch.zeros((), device=self.args.device)
        for part in parts[:-1]:
            with accumulating(self.accelerator, model):
                loss += self._pass(model, part, totals)
        return loss + self._pass(model, parts[-1], totals)

    def _pass(self, model: nn.Module, batch: dict[str, Any], totals: Tensor | None) -> Tensor:
        """Run one forward and one backward pass."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):  # schedule-free optimizers
            self.optimizer.train()  # type: ignore[union-attr]
        self.totals_of_step = totals
        try:
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, batch, num_items_in_batch=totals)
        finally:
            self.totals_of_step = None
        self.guard.check_loss(loss)
        often = self.args.torch_empty_cache_steps
        if often is not None and self.state.global_step % often == 0:
            clear_device_cache()
        options: dict[str, Any] = {}
        if "lomo" in OptimizerNames(self.args.optim).value:
            options["learning_rate"] = learning_rate(self)
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            options["scale_wrt_gas"] = False
        self.accelerator.backward(loss, **options)
        return loss.detach()

    def _shrink_micro_batches(self, limit: Limit, passes: str, why: str) -> None:
        """Lower a limit below the batch that did not fit, and free what it left behind."""
        batch, step = self.objective.last_batch, self.state.global_step + (passes == "step")
        what = f"step {step}" if passes == "step" else f"the {passes} at step {step}"
        optim = OptimizerNames(self.args.optim).value
        if self.accelerator.distributed_type != DistributedType.NO:
            raise stuck(what, batch, "in distributed training, where the processes wait for one another", why)
        if passes == "step" and ("lomo" in optim or "layerwise" in optim):
            raise stuck(what, batch, f"with {optim}, which changes weights during the backward pass", why)
        if len(batch["pair_rows"]) < 2:
            raise too_large(what, batch, self.train_dataset if passes == "step" else None, why)
        limit.halve(batch, step)
        logger.warning("%s", smaller(what, limit, why))
        clear_device_cache(garbage_collection=True)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return transformers' estimate, over all micro-batches of a step."""
        return sum(super(ORPOTrainer, self).floating_point_ops(batch) for batch in micro_batches(inputs))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.args.loraplus_lr_ratio:
            self.optimizer = optimizer_for(self.model, self.args, self.args.loraplus_lr_ratio)
            return self.optimizer
        return super().create_optimizer(*([] if model is None else [model]))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        prepare_to_train(self)
        try:
            return super().train(*args, **kwargs)
        finally:
            plain_attention(unwrap(self.unwrapped()))

    # ---- evaluation ------------------------------------------------------------------------------------------------

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss, one row per pair with the columns `COLUMNS`, and zeros for labels; in parts where memory runs out."""
        inputs = self._to_device(inputs)
        while True:
            try:
                found = []
                with torch.no_grad():
                    for part in self.eval_limit.cut(inputs):
                        found.append(self.objective.statistics(model, part))
                break
            except RuntimeError as error:
                if not ran_out(error):
                    raise
                why = reason(error)
            found.clear()
            self._shrink_micro_batches(self.eval_limit, "evaluation", why)
        loss, rows = prediction_rows(found, self.args)
        return loss, rows, torch.zeros(len(rows), device=rows.device)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Count every held-out pair once, whatever the batches and processes."""
        output = super().evaluation_loop(dataloader, description, False, ignore_keys, metric_key_prefix)
        if self.args.generate_during_eval:
            plain_attention(unwrap(self.unwrapped()))
            self.answers = log_answers(self, dataloader.dataset)
        self.predictions = output.predictions
        metrics = pair_metrics(torch.as_tensor(output.predictions), self.args)
        if self.objective.router_loss:
            metrics["loss"] += self.objective.router_coefficient * metrics["aux_loss"]
        else:
            del metrics["aux_loss"]
        assert output.metrics is not None
        output.metrics.update({f"{metric_key_prefix}_{key}": value for key, value in metrics.items()})
        self.health.check_predictions(output.predictions, dataloader.dataset, self.state.global_step)
        return output

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        started, clock = time.monotonic(), self.clock
        with ready_to_evaluate(self):
            metrics = super().evaluate(*args, **kwargs)  # of several data sets: this method again, for each
        reshard(self.model)
        if not self.is_in_train:
            plain_attention(unwrap(self.unwrapped()))
        self.clock = clock + time.monotonic() - started  # evaluation is no part of the training throughput
        return metrics

    # ---- logs ------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last log: exact means over all pairs of the steps that were taken, on all processes."""
        if "loss" in logs:
            self._log_means(logs)
        elif "train_loss" in logs:
            self._log_summary(logs)
        super().log(logs, start_time)

    def _log_means(self, logs: dict[str, float]) -> None:
        totals, self.sums = self.totals(), {}
        steps = self._steps_taken(self.logged_at)
        self.logged_at = self.state.global_step
        if "loss" in totals:
            loss = totals.pop("loss") / self.args.world_size
            self.session_loss += loss
            logs["loss"] = loss / max(steps, 1)
        if steps == 0:
            del logs["loss"]  # 0, which transformers would log, is no loss of anything
        if self.guard.left_out:
            logs.pop("grad_norm", None)
        if "pairs" in totals:
            seconds, self.clock = time.monotonic() - self.clock, time.monotonic()
            logs |= finish_metrics(totals)
            logs["tokens_per_second"] = totals["tokens"] / seconds
            logs["pairs_per_second"] = totals["pairs"] / seconds
            logs["peak_memory_gb"] = peak_memory_bytes(self.args.device) / 1e9
        logs |= {"skipped_steps": len(self.guard.skipped)} if self.guard.skipped else {}
        logs |= {"overflow_steps": self.guard.overflows} if self.guard.overflows else {}

    def _log_summary(self, logs: dict[str, float]) -> None:
        """Set the mean loss over the steps that this session has taken."""
        steps = self._steps_taken(self.began_at)
        loss = self.session_loss + self.totals().get("loss", 0.0) / self.args.world_size
        if steps:
            logs["train_loss"] = loss / steps
        elif self.guard.skipped:
            del logs["train_loss"]

    def _steps_taken(self, since: int) -> int:
        """Count optimizer steps since another, without those left out."""
        now = self.state.global_step
        return now - since - sum(since < one <= now for one in self.guard.skipped)

    def health_record(self) -> dict[str, Any]:
        """Return what run.json keeps: warnings, steps left out, overflows of fp16, and the file of rows not finite."""
        return {"warnings": self.health.warnings, **self.guard.record()}


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


def tokenize_options(args: ORPOConfig, encoder_decoder: bool) -> TokenizeOptions:
    """Return how rows are tokenized, by the arguments."""
    return TokenizeOptions(
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
