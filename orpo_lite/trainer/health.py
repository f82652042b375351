"""Numbers of a run that are not finite, which stop it before a step is taken, or suspicious, of which it warns."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainerCallback

from orpo_lite.data.collate import pair_tokens, select_pairs
from orpo_lite.data.lengths import answer_tokens, numbers
from orpo_lite.trainer.objective import micro_batches

if TYPE_CHECKING:
    from orpo_lite.trainer.trainer import ORPOTrainer

logger = logging.getLogger(__name__)

WARNINGS: dict[str, str] = yaml.safe_load(Path(__file__).with_name("health_warnings.yaml").read_text("utf-8"))
LOW_LORA_LEARNING_RATE = 1e-5
SHOWN = 8
"""Number of pairs and tensors that a message lists."""


class HealthWarnings:
    """The warnings of a run so far; every process keeps them, and one logs them."""

    def __init__(self, log: bool = True):
        self.log = log
        self.warnings: list[dict[str, Any]] = []
        """One entry per warning: its kind, the optimizer step from 1 (0: before training), the message."""

    def warn(self, kind: str, step: int, **figures: Any) -> None:
        """Log a warning of WARNINGS with its figures, unless one of its kind has been logged, and keep it."""
        if any(one["kind"] == kind for one in self.warnings):
            return
        words = WARNINGS[kind].format(step=step, **figures)
        self.warnings.append({"kind": kind, "step": step, "message": words})
        if self.log:
            logger.warning("%s", words)


class NonFinite(FloatingPointError):
    """A loss or gradient that is NaN or infinite, found before the optimizer step."""


class NonFiniteGuard(TrainerCallback):
    """Finds a loss or gradient that is not finite before optimizer.step, and stops the run.

    The trainer calls `check_step` after the step's last backward pass: before clipping, since a NaN that is clipped is NaN
    everywhere.
    """

    def __init__(self, trainer: Any):
        self.trainer: ORPOTrainer = trainer
        self.sources: list[str] = []
        """Paths that the training pairs' `source` column counts."""
        self.overflows = 0
        """Steps that fp16's loss scaling left out to find its scale."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.check_weights()

    def check_step(self) -> None:
        """Check losses and gradients of the step in progress, on all processes together.

        Raises:
            NonFinite: one is not finite; the message names the step, its rows and tensors.
        """
        trainer = self.trainer
        bad_loss, bad_gradient, some = self._figures()
        # gradients are scaled so that they overflow now and then, and the scaler leaves such a step out by itself
        scaler = trainer.accelerator.scaler
        if bad_loss or (bad_gradient and (scaler is None or scaler.get_scale() < 1)):
            raise NonFinite(describe_step(trainer, locate_pairs(trainer, self.sources)))
        # counted here: fused optimizers leave the step out themselves, without a word to accelerate
        self.overflows += bool(bad_gradient)
        if not some:
            trainer.health.warn("zero gradient", trainer.state.global_step + 1)

    def _figures(self) -> list[float]:
        """Reduce all that is decided on in one wait for the device: every process decides alike."""
        trainer, step = self.trainer, self.trainer.step_in_progress
        assert step is not None
        device, zero = trainer.args.device, torch.zeros((), device=trainer.args.device)
        losses = torch.stack([loss.to(device, torch.float32) for loss in step.losses]).sum() if step.losses else zero
        peak = largest([p.grad for p in trainer.model.parameters() if p.grad is not None], device)
        figures = [(~torch.isfinite(losses)).float(), (~torch.isfinite(peak)).float(), (peak != 0).float()]
        return trainer.total(torch.stack(figures)).tolist()

    def check_weights(self) -> None:
        """Check weights before they are written: an update of finite gradients may have overflowed, unseen so far.

        Raises:
            NonFinite: a trained weight is not finite.
        """
        trainer = self.trainer
        wrong = not_finite(trained(trainer.model))
        if trainer.total(torch.tensor(float(bool(wrong)), device=trainer.args.device)).item():
            raise NonFinite(
                f"step {trainer.state.global_step}: trained weights are not finite after it ({wrong}), though loss and "
                "gradients were: the update itself overflowed. These weights are not written; try a lower "
                f"training.learning_rate (it is {trainer.args.learning_rate:g})"
            )


def locate_pairs(trainer: Any, sources: list[str]) -> list[dict[str, Any]]:
    """Find where the pairs of the step in progress come from, on all processes.

    Args:
        sources: paths that the pairs' `source` column counts.

    Returns:
        For each pair its row, source, number in the tokenized pairs (None: unknown) and tokens; of an item whose loss is
        not finite also the loss of each pair alone.
    """
    step, found = trainer.step_in_progress, []
    losses = [float(loss) for loss in step.losses]
    devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad(), trainer.compute_loss_context_manager():
        for index, item in enumerate(step.items):
            wrong = index < len(losses) and not math.isfinite(losses[index])
            for batch in micro_batches(item):
                pairs = located(batch, trainer.train_dataset, sources)
                for place, pair in enumerate(pairs if wrong else []):
                    pair["loss"] = float(trainer.objective.loss(trainer.model, [select_pairs(batch, [place])])[0])
                found += pairs
    return gather_object(found) if trainer.accelerator.num_processes > 1 else found


def located(batch: dict[str, Any], dataset: Any, sources: list[str]) -> list[dict[str, Any]]:
    """Find where a batch's pairs come from, see `locate_pairs`."""
    places = []
    rows = numbers(dataset, "row") if "row" in getattr(dataset, "column_names", ()) else np.empty(0)
    for place, (row, tokens) in enumerate(zip(batch["pair_rows"].tolist(), pair_tokens(batch), strict=False)):
        found = {"row": row, "source": None, "number": None, "tokens": tokens}
        chosen = batch["label_ids"][batch["chosen_pair"] == place].tolist()
        for number in np.flatnonzero(rows == row).tolist():
            # sources and their weights repeat row numbers: the tokens tell which it was
            pair = dataset[number]
            if [pair["chosen_ids"][token] for token in answer_tokens(pair, "chosen", first=1)] == chosen:
                source = pair.get("source", len(sources))
                found |= {"number": number, "source": sources[source] if source < len(sources) else None}
                break
        places.append(found)
    return places


def describe_step(trainer: Any, pairs: list[dict[str, Any]]) -> str:
    """Say which numbers of the step in progress are not finite, through which rows, and what to try."""
    losses, weights = [float(loss) for loss in trainer.step_in_progress.losses], trained(trainer.model)
    loss = sum(gather_object(losses) if trainer.accelerator.num_processes > 1 else losses)
    found = f"the loss is {loss:.4g}" + (", but gradients are not finite" if math.isfinite(loss) else "")
    lines = [
        f"step {trainer.state.global_step + 1}: {found}. It was found before the optimizer step, which was not taken"
    ]
    if bad := not_finite({name: p.grad for name, p in weights.items() if p.grad is not None}):
        lines.append(f"gradients: {bad}")
    if bad := not_finite(weights):
        lines.append(f"trained weights, thrown out by the steps before: {bad}")
    lines.append(f"pairs of the step: {listed(pairs)}")
    if culprits := [pair for pair in pairs if not math.isfinite(pair.get("loss", 0.0))]:
        lines.append(f"not finite when computed alone: {listed(culprits)}")
    precise = (
        "" if trainer.args.mixed_precision == "no" else "model.dtype=float32 (or bfloat16, where it was float16), "
    )
    lines.append(
        f"look at the rows; try {precise}a lower training.learning_rate (it was {learning_rate(trainer):.3g} here) and more "
        "training.warmup_steps; if the very first step fails, look at the base model's weights"
    )
    return "\n  ".join(lines)


def listed(pairs: list[dict[str, Any]]) -> str:
    """List pairs by row, source, number and tokens."""
    words = []
    for pair in pairs[:SHOWN]:
        place = f"row {pair['row']}" if pair["row"] >= 0 else "an unknown row"
        if pair["source"]:
            place += f" of {pair['source']}"
        if pair["number"] is not None:
            place += f" (number {pair['number']} of the tokenized pairs, {pair['tokens']:,} tokens)"
        words.append(place)
    return "; ".join(words) + (f"; and {len(pairs) - SHOWN} more" if len(pairs) > SHOWN else "")


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Return trained parameters by name, without what PEFT puts around it."""
    named = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return {name.removeprefix("base_model.model.").replace(".default.", "."): p for name, p in named}


def largest(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Return the largest absolute value over tensors, a float32 scalar on `device`; NaN or inf where one holds such a value.

    It is the norm of order inf, since that of order 2 overflows where all values are finite.
    """
    if not tensors:
        return torch.zeros((), device=device)
    return torch.nn.utils.get_total_norm(tensors, math.inf).to(device, torch.float32)


def not_finite(tensors: dict[str, Tensor]) -> str:
    """Name the tensors that hold values that are not finite, and count those."""
    counts = {name: int((~torch.isfinite(one)).sum()) for name, one in tensors.items()}
    bad = {name: count for name, count in counts.items() if count}
    if not bad:
        return ""
    whole = sum(tensors[name].numel() for name in bad)
    first = ", ".join(f"{name} ({count:,} of {tensors[name].numel():,})" for name, count in list(bad.items())[:SHOWN])
    more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    return f"{sum(bad.values()):,} of {whole:,} values not finite in {len(bad)} tensors: {first}{more}"


def learning_rate(trainer: Any) -> float:
    """Return the learning rate of the step in progress; before training that of the arguments."""
    return float(trainer.args.learning_rate if trainer.optimizer is None else trainer.optimizer.param_groups[0]["lr"])
