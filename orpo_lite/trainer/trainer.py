"""ORPOTrainer: transformers.Trainer with the ORPO loss, TRL's constructor, and means over whole optimizer steps."""

import contextlib
import functools
import logging
import time
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from orpo_lite.common.console import peak_memory_bytes, progress
from orpo_lite.data.collate import collator_of, from_trl
from orpo_lite.data.step_batches import step_loader
from orpo_lite.data.token_cache import DropReport, tokenize_rows
from orpo_lite.model import autocast
from orpo_lite.model.activation_offload import CheckpointedLayers
from orpo_lite.model.inspection import outside_text, routers, unwrap
from orpo_lite.model.precision import Place
from orpo_lite.model.tokenizer import check_variables
from orpo_lite.objective.kernels import fuse
from orpo_lite.objective.layout import choose_layout
from orpo_lite.objective.metrics import finish_metrics, pair_metrics
from orpo_lite.objective.packed_attention import plain_attention
from orpo_lite.trainer import setup
from orpo_lite.trainer.checkpointing import CheckpointedTrainer
from orpo_lite.trainer.config import ORPOConfig
from orpo_lite.trainer.generate import log_answers
from orpo_lite.trainer.health import LOW_LORA_LEARNING_RATE
from orpo_lite.trainer.interruptions import Limit, retried
from orpo_lite.trainer.objective import StepInProgress, count_step, micro_batches, prediction_rows
from orpo_lite.trainer.trl_names import TrlNames, collated, with_columns

logger = logging.getLogger(__name__)


class ORPOTrainer(TrlNames, CheckpointedTrainer):
    """Trains a model, usually a PEFT one, with ORPO (arXiv 2403.07691).

    Takes what trl.experimental.orpo.ORPOTrainer takes, so that a script written for it runs with the import changed. Loss,
    gradients and metrics equal TRL's on the same batch in float32 (logits/* aside, which here average completion rows only),
    and stay finite where TRL's do not. With `args.nll_mean == "window"`, the default, the NLL is normalized by its labels and
    the odds-ratio term by its pairs over the whole optimizer step on all processes.

    Args:
        model: a model, a PeftModel, or the name or path of one.
        args: an ORPOConfig.
        data_collator: replaces our collator; it is given tokenized pairs, by our names and by TRL's, with the other columns
            of the data, and may return batches of TRL's form.
        train_dataset: rows with prompt (or none), chosen, rejected as text or messages; or pairs tokenized already.
        eval_dataset: the same, or a dict of several.
        processing_class: the tokenizer; left out, the model's own.
        peft_config: adapter to train; quantized models are prepared for it.
        The rest as in transformers.Trainer.

    Raises:
        ValueError: no data set, an encoder-decoder, an adapter both in `model` and in `peft_config`, or a kind of adapter that the
            loss cannot be computed through.
        RequestError: more than half of the rows cannot be used, or a stream instead of a table.
    """

    _tag_names = ["orpo", "orpo-lite"]
    predictions: Any = None
    """Predictions of the last evaluation: one row per pair, with the columns `metrics.COLUMNS`."""
    step_in_progress: StepInProgress | None = None
    evaluated: Any = staticmethod(lambda pairs: None)
    """Shows how many pairs an evaluation has computed."""

    def __init__(
        self,
        model: Any = None,
        args: ORPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Any = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        preprocess_logits_for_metrics: Any = None,
        peft_config: PeftConfig | None = None,
        compute_metrics: Any = None,
    ):
        args = args or ORPOConfig(output_dir="outputs")
        setup.check_arguments(args, train_dataset, eval_dataset, preprocess_logits_for_metrics)
        torch.manual_seed(args.seed)  # a new adapter's weights are random
        self._peft_config, self._own_collator = peft_config, data_collator is not None
        model = setup.prepare_model(model, args, peft_config)
        if processing_class is None:
            if model is None:
                raise ValueError("ORPOTrainer: with model_init, give a processing_class")
            processing_class = setup.tokenizer_of(model, args)
        tokenizer = self.tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self.answers: list[dict[str, str]] = []  # of the last evaluation, with generate_during_eval
        self.drop_reports: dict[str, DropReport] = {}
        self._tokenize_options = setup.tokenize_options(args)
        check_variables(tokenizer, self._tokenize_options.template_kwargs, "template_kwargs")
        train_dataset = self._tokenized(train_dataset, "train")
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: self._tokenized(rows, name) for name, rows in eval_dataset.items()}
        else:
            eval_dataset = self._tokenized(eval_dataset, "eval")

        if args.ddp_find_unused_parameters is None and model is not None:
            # a search of the graph in every pass, for what only experts and parts beside the language model can be
            args.ddp_find_unused_parameters = bool(routers(unwrap(model)) or outside_text(unwrap(model)))
        self.accumulation_steps = args.gradient_accumulation_steps
        if args.tokens_per_batch or args.world_size > 1:
            # one item of the loader is an optimizer step: transformers must not count micro-batches itself
            args.per_device_train_batch_size *= args.gradient_accumulation_steps
            args.gradient_accumulation_steps = 1
        super().__init__(
            model=model,
            args=args,
            # replaced below: our collator depends on the layout, which depends on the model
            data_collator=functools.partial(collated, data_collator) if data_collator else list,  # type: ignore[arg-type]
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.kernels = fuse(self.model, args)
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        self.layout = choose_layout(unwrap(self.model), args.layout, Place.of(args.device, dtype))
        # any id will do as padding, since labels and masks come from lengths
        pads = (args.padding_value, tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        pad = next(token for token in pads if token is not None)
        self.collator = collator_of(self.layout.name, args.nll_scope, pad)
        if data_collator is None:
            self.data_collator = self.collator
        # the loss is normalized over the step: nobody may divide it again
        self.accelerator.gradient_accumulation_steps = 1
        self.objective = setup.make_objective(self)
        if args.gradient_checkpointing and (args.checkpointed_layers is not None or args.offload_activations):
            self.add_callback(CheckpointedLayers(args.checkpointed_layers, args.offload_activations))
        self.micro_limit, self.eval_limit = Limit(), Limit()
        if isinstance(self.model, PeftModel) and train_dataset is not None:
            if args.learning_rate < LOW_LORA_LEARNING_RATE:
                self.health.warn("low learning rate", 0, rate=args.learning_rate)
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(self._tag_names)

    def call_model_init(self, trial: Any = None) -> Any:
        model = setup.prepare_model(super().call_model_init(trial), self.args, self._peft_config)
        self.kernels = fuse(model, self.args)
        return model

    # ---- the pairs -------------------------------------------------------------------------------------------------

    def _tokenized(self, rows: Any, name: str) -> Any:
        """Tokenize rows as the constructor's are; None and tokenized pairs stay."""
        if not setup.untokenized(rows):
            return rows
        pairs, report = tokenize_rows(rows, self.tokenizer, self._tokenize_options, name)
        self.drop_reports[name] = report
        cut = report.prompt_cut + report.completion_cut
        logger.log(logging.WARNING if report.drops or cut else logging.INFO, "%s: %s", name, report)
        return with_columns(pairs, rows) if self._own_collator else pairs

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return batches of held-out pairs; rows that are not tokenized yet are tokenized as the others were."""
        return super().get_eval_dataloader(self._tokenized(eval_dataset, "eval"))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """Return the same for `predict`."""
        return super().get_test_dataloader(self._tokenized(test_dataset, "test"))

    # ---- the loss --------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Compute the ORPO loss of a batch of `get_train_dataloader()`, or of TRL's collator.

        With `num_items_in_batch` (NLL labels, pairs and micro-batches of the whole optimizer step, as `get_batch_samples`
        counts them) the batch's share of the step's loss; without, the loss of the batch on its own. In training its sums
        count for the next log.
        """
        loss, sums = self.objective.loss(model, micro_batches(self._to_device(inputs)), num_items_in_batch)
        if model.training:
            self._add(sums)
        return (loss, finish_metrics(sums)) if return_outputs else loss

    def _to_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Move a batch to the device, one of TRL's form in ours."""
        ours = [one if "label_rows" in one else from_trl(one, self.collator) for one in micro_batches(batch)]
        batch = batch | {"micro_batches": ours} if "micro_batches" in batch else ours[0]
        return cast(Any, send_to_device(batch, self.args.device))

    def _add(self, sums: dict[str, Tensor]) -> None:
        self.sums = {**self.sums, **{key: self.sums.get(key, 0) + value for key, value in sums.items()}}

    # ---- whole optimizer steps -------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Return micro-batches; with `tokens_per_batch` or several processes whole optimizer steps of them."""
        args, layout, own = self.args, self.layout.name, self.collator
        if not args.tokens_per_batch and args.world_size == 1:
            return super().get_train_dataloader()
        return step_loader(self.train_dataset, args, layout, self.data_collator, own, self.accumulation_steps)

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | None]:
        """Return the items of one optimizer step, and what they hold on all processes, see `count_step`."""
        items, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        items = [self._to_device(item) for item in items]
        if not items:
            return items, None
        self.step_in_progress = StepInProgress(items, dict(self.sums))
        totals = count_step([micro for item in items for micro in micro_batches(item)])
        return items, self.total(totals.to(device))

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Run forward and backward of an item of the step; after its last, check what the optimizer will see.

        This replaces transformers' own method as a whole, so that no version of it divides the loss. Where memory runs out,
        the optimizer step begins again in smaller micro-batches: the same pairs and, without dropout, gradients and metrics.

        Raises:
            OutOfMemory: a single pair does not fit, or the step cannot begin again.
            NonFinite: see `NonFiniteGuard`.
        """
        step = self.step_in_progress
        place = next((i for i, item in enumerate(step.items) if item is inputs), None) if step else None
        if step is None or place is None:  # a script's own step
            return self._forward_backward(model, inputs, num_items_in_batch)
        items = [inputs]

        def begin_again(why: str) -> None:
            self._shrink(self.micro_limit, why)
            model.zero_grad()
            self.sums = dict(step.sums)
            step.losses.clear()
            items[:] = step.items[: place + 1]

        def passes() -> list[Tensor]:
            return [self._forward_backward(model, item, num_items_in_batch) for item in items]

        losses = retried(passes, begin_again)
        for loss in losses:
            self._add({"loss": loss})
        step.losses += losses
        if len(step.losses) == len(step.items):
            self.guard.check_step()
        return losses[-1]

    def _forward_backward(self, model: nn.Module, item: dict[str, Any], totals: Tensor | None) -> Tensor:
        """Run the passes of an item, gradients synchronized on the last only; returns its loss, a scalar."""
        parts = [part for batch in micro_batches(item) for part in self.micro_limit.cut(batch)]
        loss = torch.zeros((), device=self.args.device)
        for part in parts[:-1]:
            with self.accelerator.no_sync(model):
                loss += self._pass(model, part, totals)
        return loss + self._pass(model, parts[-1], totals)

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> contextlib.AbstractContextManager:
        """Autocast a base held in 16 bits where accelerate does not: its norms and adapter may be float32."""
        return contextlib.nullcontext() if self.args.bf16 or self.args.fp16 else autocast(self.unwrapped())

    def _pass(self, model: nn.Module, batch: dict[str, Any], totals: Tensor | None) -> Tensor:
        """Run one forward and one backward pass."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):  # schedule-free optimizers
            self.optimizer.train()  # type: ignore[union-attr]
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, batch, num_items_in_batch=totals)
        often = self.args.torch_empty_cache_steps
        if often is not None and self.state.global_step % often == 0:
            clear_device_cache()
        self.accelerator.backward(loss)
        return loss.detach()

    def _shrink(self, limit: Limit, why: str) -> None:
        """Lower a limit below the batch that did not fit, and free what it left behind."""
        training = limit is self.micro_limit
        step, pairs = self.state.global_step + training, self.train_dataset if training else None
        what = "the evaluation at " * (not training) + f"step {step}"
        limit.shrink(self.objective.last_batch, what, step, why, pairs, self.args.world_size)
        clear_device_cache(garbage_collection=True)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return transformers' estimate, over all micro-batches of a step."""
        return sum(super(ORPOTrainer, self).floating_point_ops(batch) for batch in micro_batches(inputs))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.args.loraplus_lr_ratio:
            self.optimizer = setup.loraplus_optimizer(self.model, self.args, self.args.loraplus_lr_ratio)
        return super().create_optimizer(*([] if model is None else [model]))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self.args.world_size > 1:
            # an evaluation before training leaves this mark, on which transformers 5.23 takes the model for one that DDP
            # wraps already: the processes would train apart
            self.model._is_accelerate_prepared = False
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

        def passes() -> list:
            with torch.no_grad(), self.compute_loss_context_manager():
                return [self.objective.statistics(model, part) for part in self.eval_limit.cut(inputs)]

        found = retried(passes, lambda why: self._shrink(self.eval_limit, why))
        loss, rows = prediction_rows(found, self.args)
        self.evaluated(len(rows) * self.args.world_size)
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
        with progress("evaluating held-out pairs", len(dataloader.dataset)) as self.evaluated:
            output: Any = super().evaluation_loop(dataloader, description, False, ignore_keys, metric_key_prefix)
        if self.args.generate_during_eval:
            plain_attention(unwrap(self.unwrapped()))
            self.answers = log_answers(self, dataloader.dataset)
        self.predictions = output.predictions
        metrics = pair_metrics(torch.as_tensor(output.predictions), self.args)
        if self.objective.router_loss:
            metrics["loss"] += self.objective.router_coefficient * metrics["aux_loss"]
        else:
            del metrics["aux_loss"]
        output.metrics.update({f"{metric_key_prefix}_{key}": value for key, value in metrics.items()})
        return output

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        started, clock = time.monotonic(), self.clock
        metrics = super().evaluate(*args, **kwargs)  # of several data sets: this method again, for each
        if not self.is_in_train:
            plain_attention(unwrap(self.unwrapped()))
        self.clock = clock + time.monotonic() - started  # evaluation is no part of the training throughput
        return metrics

    # ---- logs ------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last log: exact means over all pairs of the steps, on all processes."""
        if "loss" in logs:
            totals, self.sums = self.totals(), {}
            steps = self.state.global_step - self.logged_at
            self.logged_at = self.state.global_step
            if "loss" in totals:
                loss = totals.pop("loss") / self.args.world_size
                self.session_loss += loss
                logs["loss"] = loss / max(steps, 1)
            logs |= self._means(totals) if "pairs" in totals else {}
            logs |= {"overflow_steps": self.guard.overflows} if self.guard.overflows else {}
        elif "train_loss" in logs:  # the mean over the steps that this session has taken
            steps = self.state.global_step - self.began_at
            loss = self.session_loss + self.totals().get("loss", 0.0) / self.args.world_size
            if steps:
                logs["train_loss"] = loss / steps
        super().log(logs, start_time)

    def _means(self, totals: dict[str, float]) -> dict[str, float]:
        """Return the metrics of sums since the last log, with throughput and memory."""
        seconds, self.clock = time.monotonic() - self.clock, time.monotonic()
        return finish_metrics(totals) | {
            "tokens_per_second": totals["tokens"] / seconds,
            "pairs_per_second": totals["pairs"] / seconds,
            "peak_memory_gb": peak_memory_bytes(self.args.device) / 1e9,
        }
