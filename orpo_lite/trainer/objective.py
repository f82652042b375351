"""The ORPO loss of a batch inside transformers' Trainer: means over whole optimizer steps, in training and evaluation."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch
from accelerate.utils import DistributedType, extract_model_from_parallel
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput
from transformers.training_args import OptimizerNames

from orpo_lite.data.collate import PackedCollator, PaddedCollator, from_trl
from orpo_lite.model import autocast
from orpo_lite.model.inspection import unwrap
from orpo_lite.objective.head import HeadTransform, LabelRows, head_transform, score_labels, score_logits
from orpo_lite.objective.loss import PairStatistics, configured_loss, pair_statistics
from orpo_lite.objective.metrics import finish_metrics, metric_sums, pair_metrics
from orpo_lite.objective.packed_attention import packed_attention, plain_attention
from orpo_lite.trainer.config import ORPOConfig
from orpo_lite.trainer.distributed import accumulating, frozen_linear, recomputable
from orpo_lite.trainer.generate import log_answers
from orpo_lite.trainer.out_of_memory import Limit, Window, ran_out, reason, smaller, stuck, too_large

logger = logging.getLogger(__name__)

MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "decoder_input_ids")


class Objective:
    """The ORPO loss of batches on a model, without a Trainer: the training loop and the memory plan both call it.

    A plan builds it as `Objective(settings, model.config, head)` and calls `loss(model, [batch], count_step([batch]))`
    for a training step of one micro-batch, and `statistics(model, batch)` for a batch of an evaluation.

    Args:
        settings: an ORPOConfig, or anything with its `beta`, `nll_mean` and `head_chunk`; read at each call.
        config: the model's configuration, which says whether its routers have a loss of their own.
        head: how the output head is scored without whole logits; None keeps whole logits. See `find_head`.
        processes: number of processes over which the engine averages gradients.
    """

    def __init__(self, settings: Any, config: Any, head: HeadTransform | None = None, processes: int = 1) -> None:
        self.settings, self.head, self.processes = settings, head, processes
        text = config.get_text_config(decoder=True)
        self.router_loss = bool(getattr(text, "output_router_logits", False))
        self.router_coefficient: float = (
            getattr(text, "router_aux_loss_coef", None) or getattr(text, "aux_loss_coef", None) or 0.0
        )
        self.last_batch: dict[str, Any] = {}
        """The batch whose forward pass was begun last."""

    def find_head(self, model: nn.Module, device: torch.device, exact: float) -> None:
        """Find how the model's head is scored without whole logits, by a forward pass.

        Every process calls it where they share the head's weights.

        Args:
            model: the model as it is called, inside any engine's wrapper.
            device: where the inputs of that pass go.
            exact: largest difference between logits that still counts as none.
        """
        plain = unwrapped(model)
        with autocast(plain):
            self.head = head_transform(plain, device, exact, model)
        layer = plain.get_output_embeddings()
        if self.head is not None and not frozen_linear(layer) and not recomputable(layer):
            logger.warning(
                "the output head is sharded on its own and trained, quantised or adapted: whole logits are kept, since its weights "
                "are not available to compute them again in the backward pass"
            )
            self.head = None

    def statistics(self, model: nn.Module, batch: dict[str, Any]) -> tuple[PairStatistics, Tensor | None]:
        """Run the forward pass of a batch and reduce it to its pairs.

        Returns:
            One entry per pair, and the routers' auxiliary loss (a scalar) where they have one.
        """
        self.last_batch = batch
        inputs: dict[str, Any] = {key: batch[key] for key in MODEL_INPUTS if key in batch}
        if self.router_loss:
            inputs["output_router_logits"] = True
        target = LabelRows(batch["label_rows"], batch["label_ids"])
        plain = unwrapped(model)
        with contextlib.ExitStack() as stack:
            if "segments" in batch:
                inputs["orpo_segments"] = batch["segments"]
                stack.enter_context(packed_attention(unwrap(plain)))
            if self.head is not None:
                stack.enter_context(score_labels(plain, target, self.head, self.settings.head_chunk))
            output = model(**inputs, use_cache=False)
        if self.head is None:
            logps, means = score_logits(output.logits, target)
        else:
            logps, means = output.logits.float(), target.means
            assert means is not None
        pairs = len(batch["pair_rows"])
        stats = pair_statistics(logps, means, batch["chosen_pair"], batch["rejected_pair"], batch["nll_pair"], pairs)
        return stats, output.aux_loss if self.router_loss else None

    def loss(
        self, model: nn.Module, batches: list[dict[str, Any]], totals: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of micro-batches, to be added up over the optimizer step.

        Args:
            batches: micro-batches on the model's device.
            totals: NLL labels, pairs and micro-batches of the whole optimizer step on all processes, see `count_step`;
                the result is then the batches' share of the step's loss. Without it, their loss on their own.

        Returns:
            The loss, a float32 scalar with its graph, and the sums that `metrics.finish_metrics` makes means of.
        """
        scale: Any = 1.0
        if totals is None:
            whole = batches[0]["whole"] if "whole" in batches[0] else count_labels(batches)
            means = [at_least_one(whole)] * len(batches)
        else:
            # engines average gradients over processes, while the shares of a step are to be summed: undone here, once
            scale = self.processes
            if self.settings.nll_mean == "window":
                means = [list(totals[:2])] * len(batches)
            else:  # each micro-batch counts the same, those that only fill up count nothing
                scale = scale / totals[2]
                means = [at_least_one(one["whole"] if "whole" in one else count_labels([one])) for one in batches]
        loss, sums = torch.zeros((), device=batches[0]["input_ids"].device), {}
        for batch, (labels, pairs) in zip(batches, means, strict=True):
            stats, aux = self.statistics(model, batch)
            loss = loss + configured_loss(stats, self.settings, labels, pairs) * scale
            if aux is not None:
                share = len(batch["pair_rows"]) / pairs * scale
                loss = loss + self.router_coefficient * aux.to(loss.device) * share
            part = metric_sums(stats, aux, self.settings.beta, batch["attention_mask"])
            sums = {key: sums.get(key, 0) + value for key, value in part.items()}
        return loss, sums


def unwrapped(model: Any) -> Any:
    """Return the transformers or PEFT model inside an engine's wrapper."""
    return extract_model_from_parallel(model)


class ObjectiveTrainer(Trainer):
    """transformers.Trainer with the ORPO loss; ORPOTrainer gives it model, data and batches."""

    args: ORPOConfig
    model: Any
    collator: PaddedCollator | PackedCollator
    objective: Objective
    head_known = True
    """Whether `objective.head` was found; a model that no process holds whole is looked at once all of them run it."""
    answers: list[dict[str, str]]
    predictions: Any = None
    """Of the last evaluation: a row a pair, see `metrics.COLUMNS`."""
    micro_limit: Limit
    """How large a micro-batch of training may be, by what did not fit so far."""
    eval_limit: Limit
    _sums: dict[str, Tensor]
    _window: Window | None = None

    def unwrapped(self, model: Any = None) -> Any:
        """The transformers or PEFT model, without what DDP or DeepSpeed puts around it."""
        return unwrapped(self.model if model is None else model)

    def _ours(self, batch: dict[str, Any]) -> dict[str, Any]:
        def mine(one: dict[str, Any]) -> dict[str, Any]:
            return one if "label_rows" in one else from_trl(one, self.collator)

        if "micro_batches" in batch:
            return self._prepare_inputs(batch | {"micro_batches": [mine(one) for one in batch["micro_batches"]]})
        return self._prepare_inputs(mine(batch))

    def find_head(self, model: nn.Module) -> None:
        """Find how the head of the model, as it is called, is scored; run by all processes where they share its weights."""
        self.head_known = True
        self.objective.find_head(model, self.args.device, 1e-3 if self.args.mixed_precision == "no" else 0.2)

    def pair_statistics(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[PairStatistics, Tensor | None]:
        """Forward pass of a batch, reduced to its pairs; and the router's auxiliary loss where there is one."""
        if not self.head_known:
            self.find_head(model)
        return self.objective.statistics(model, batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """ORPO loss of a batch of `get_train_dataloader()`, or of TRL's collator.

        With `num_items_in_batch` (NLL labels, pairs and micro-batches of the whole optimizer step, as `get_batch_samples`
        counts them) the batch's share of the step's loss; without, the loss of the batch on its own.
        """
        batches = micro_batches(self._ours(inputs))
        if not self.head_known:
            self.find_head(model)
        loss, sums = self.objective.loss(model, batches, num_items_in_batch)
        if model.training:
            self._sums = {key: self._sums.get(key, 0) + value for key, value in sums.items()}
        return (loss, finish_metrics(sums)) if return_outputs else loss

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | None]:
        """The micro-batches of one optimizer step, and what they hold on all processes, see `count_step`."""
        items, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = [self._ours(batch) for batch in items]
        if not batches:
            return batches, None
        self._window = Window(batches, self._sums, self.args.device)
        totals = count_step([micro for batch in batches for micro in micro_batches(batch)])
        return batches, self._total(totals.to(device))

    def _total(self, values: Tensor) -> Tensor:
        """Sum over the processes."""
        total = self.accelerator.reduce(values, "sum")
        assert isinstance(total, Tensor)
        return total

    # ---- passes, and what becomes of them where memory runs out ----------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of a micro-batch, or of all of a step's, gradients synchronised on the last only.

        Where memory runs out, the optimizer step begins again in smaller micro-batches: the same pairs, gradients and
        metrics.

        Raises:
            OutOfMemory: a single pair does not fit, or the step cannot begin again.
        """
        window = self._window
        place = window.index_of(inputs) if window else None
        if window:
            window.save_rng()
        items, told = [inputs], torch.zeros((), device=self.args.device)
        while True:
            try:
                loss = sum((self._forward_backward(model, item, num_items_in_batch) for item in items), -told)
                if window:
                    window.reported_loss += loss
                return loss
            except RuntimeError as error:
                if window is None or place is None or not ran_out(error):
                    raise
                why = reason(error)
            # past the except clause, since the error's traceback holds the graph
            self._take_less(self.micro_limit, "step", why)
            model.zero_grad()
            self._sums = dict(window.sums)
            window.restore_rng()
            # with dropout, earlier passes have another loss when done again: the difference goes into this one's
            items, told = window.items[: place + 1], window.reported_loss.clone()

    def _forward_backward(self, model: nn.Module, item: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        parts = [part for batch in micro_batches(item) for part in self.micro_limit.cut(batch)]
        loss = torch.zeros((), device=self.args.device)
        for part in parts[:-1]:
            with accumulating(self.accelerator, model):
                loss += super().training_step(model, part, num_items_in_batch)
        return loss + super().training_step(model, parts[-1], num_items_in_batch)

    def _take_less(self, limit: Limit, passes: str, why: str) -> None:
        """Lower a limit below the batch that did not fit, and free what it left behind."""
        batch, step = self.objective.last_batch, self.state.global_step + (passes == "step")
        what, optim = (
            f"the {passes} at step {step}" if passes != "step" else f"step {step}",
            OptimizerNames(self.args.optim).value,
        )
        if self.accelerator.distributed_type != DistributedType.NO:
            raise stuck(what, batch, "in distributed training, where the processes wait for one another", why)
        if passes == "step" and ("lomo" in optim or "layerwise" in optim):
            raise stuck(what, batch, f"with {optim}, which changes weights during the backward pass", why)
        if len(batch["pair_rows"]) < 2:
            raise too_large(what, batch, self.train_dataset if passes == "step" else None, why)
        limit.halve(batch, step)
        logger.warning("%s", smaller(what, limit, why))
        clear_device_cache(garbage_collection=True)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, one row a pair with the columns `COLUMNS`, and zeros for labels; in parts where memory runs out."""
        inputs = self._ours(inputs)
        while True:
            try:
                found = []
                with torch.no_grad():
                    for part in self.eval_limit.cut(inputs):
                        found.append(self.pair_statistics(model, part))
                break
            except RuntimeError as error:
                if not ran_out(error):
                    raise
                why = reason(error)
            found.clear()
            self._take_less(self.eval_limit, "evaluation", why)
        stats = PairStatistics(*map(torch.cat, zip(*(part for part, _ in found), strict=True)))
        loss = configured_loss(stats, self.args, stats.nll_count.sum(), len(stats.nll_count))
        aux = [part.nll_sum.new_zeros(()) if aux is None else aux.float() for part, aux in found]
        aux_column = torch.cat([one.expand(len(part.nll_sum)) for one, (part, _) in zip(aux, found, strict=True)])
        columns = (stats.chosen_logits, stats.rejected_logits, stats.chosen_logps, stats.rejected_logps,
                   stats.nll_sum, stats.nll_count, aux_column)  # fmt: skip
        return loss, torch.stack(columns, 1), torch.zeros(len(stats.nll_sum), device=loss.device)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Every held-out pair counts once, whatever the batches and processes."""
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
        return output


def micro_batches(inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """An item of the training loader as micro-batches: a whole step's, or itself."""
    return inputs.get("micro_batches", [inputs])


def count_labels(batches: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """NLL labels and pairs of some micro-batches."""
    labels = torch.stack([(batch["nll_pair"] >= 0).sum() for batch in batches]).sum()
    return labels, torch.tensor(sum(len(batch["pair_rows"]) for batch in batches), device=labels.device)


def count_step(batches: list[dict[str, Any]]) -> Tensor:
    """NLL labels, pairs, and micro-batches that hold any, of an optimizer step; (3,) int64."""
    labels, pairs = count_labels(batches)
    return torch.stack([labels, pairs, pairs.new_tensor(sum(len(batch["pair_rows"]) > 0 for batch in batches))])


def at_least_one(counts: tuple[Tensor, Tensor] | Tensor) -> list[Tensor]:
    """Return counts to divide by: a micro-batch that only fills up holds none."""
    return [count.clamp(min=1) for count in counts]
