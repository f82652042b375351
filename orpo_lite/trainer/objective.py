"""The ORPO loss of micro-batches as means over whole optimizer steps; nothing here needs a Trainer."""

import contextlib
import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from orpo_lite.model.inspection import unwrap
from orpo_lite.objective.head import HeadTransform, LabelRows, score_labels, score_logits
from orpo_lite.objective.loss import PairStatistics, configured_loss, pair_statistics
from orpo_lite.objective.metrics import metric_sums
from orpo_lite.objective.one_call import Attention, pair_calls
from orpo_lite.objective.packed_attention import own_attention, packed_attention

logger = logging.getLogger(__name__)

MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


class Objective:
    """The ORPO loss of batches on a model, without a Trainer: the training loop and the memory plan both call it.

    Args:
        settings: an ORPOConfig, or anything with its `beta`, `nll_mean` and `head_chunk`; read at each call.
        config: the model's configuration, which says whether its routers have a loss of their own.
        head: how the output head is scored without whole logits; None keeps whole logits.
        processes: number of processes over which the engine averages gradients.
    """

    attention = Attention("", "")
    """From `choose_layout`; until it is set, the model's own function, two calls a pair."""

    def __init__(self, settings: Any, config: Any, head: HeadTransform | None = None, processes: int = 1) -> None:
        self.settings, self.head, self.processes = settings, head, processes
        text = config.get_text_config(decoder=True)
        self.router_loss = bool(getattr(text, "output_router_logits", False))
        self.router_coefficient: float = (
            getattr(text, "router_aux_loss_coef", None) or getattr(text, "aux_loss_coef", None) or 0.0
        )
        self.last_batch: dict[str, Any] = {}
        """The batch whose forward pass was begun last."""

    def statistics(self, model: nn.Module, batch: dict[str, Any]) -> tuple[PairStatistics, Tensor | None]:
        """Run the forward pass of a batch; return one entry per pair, and the routers' loss (a scalar) where they have one."""
        self.last_batch = batch
        inputs: dict[str, Any] = {key: batch[key] for key in MODEL_INPUTS if key in batch}
        if self.router_loss:
            inputs["output_router_logits"] = True
        target = LabelRows(batch["label_rows"], batch["label_ids"])
        plain: Any = extract_model_from_parallel(model)
        with contextlib.ExitStack() as stack:
            if "segments" in batch:
                inputs["orpo_segments"] = pair_calls(batch, self.attention.run)
                stack.enter_context(packed_attention(unwrap(plain), self.attention.repeats))
            elif self.attention.repeats:
                own_attention(unwrap(plain), True)
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
            totals: from `count_step`, of the whole optimizer step on all processes: the result is then the batches' share
                of the step's loss; without it, their loss on their own.

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


@dataclass
class StepInProgress:
    """An optimizer step that is being taken, and what it takes to begin it again.

    Args:
        items: what the loader gave for the step; each is one forward and backward pass, or several.
        sums: what was summed since the last log, before the step.
    """

    items: list[dict[str, Any]]
    sums: dict[str, Tensor]
    losses: list[Tensor] = field(default_factory=list)
    """Loss of each item that is done: its share of the step's."""


def prediction_rows(parts: list[tuple[PairStatistics, Tensor | None]], settings: Any) -> tuple[Tensor, Tensor]:
    """Return the loss of a batch's parts, and their statistics as rows, (pairs, len(metrics.COLUMNS)) float32."""
    stats = PairStatistics(*map(torch.cat, zip(*(part for part, _ in parts), strict=True)))
    loss = configured_loss(stats, settings, stats.nll_count.sum(), len(stats.nll_count))
    aux = [part.nll_sum.new_zeros(()) if aux is None else aux.float() for part, aux in parts]
    aux_column = torch.cat([one.expand(len(part.nll_sum)) for one, (part, _) in zip(aux, parts, strict=True)])
    columns = (stats.chosen_logits, stats.rejected_logits, stats.chosen_logps, stats.rejected_logps,
               stats.nll_sum, stats.nll_count, aux_column)  # fmt: skip
    return loss, torch.stack(columns, 1)


def micro_batches(inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """Return an item of the training loader as micro-batches: a whole step's, or itself."""
    return inputs.get("micro_batches", [inputs])


def count_labels(batches: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Count NLL labels and pairs of some micro-batches; two int64 scalars."""
    labels = torch.stack([(batch["nll_pair"] >= 0).sum() for batch in batches]).sum()
    return labels, torch.tensor(sum(len(batch["pair_rows"]) for batch in batches), device=labels.device)


def count_step(batches: list[dict[str, Any]]) -> Tensor:
    """Count NLL labels, pairs, and micro-batches that hold any, of an optimizer step; (3,) int64."""
    labels, pairs = count_labels(batches)
    return torch.stack([labels, pairs, pairs.new_tensor(sum(len(batch["pair_rows"]) > 0 for batch in batches))])


def at_least_one(counts: tuple[Tensor, Tensor] | Tensor) -> list[Tensor]:
    """Return counts to divide by: a micro-batch that only fills up holds none."""
    return [count.clamp(min=1) for count in counts]
