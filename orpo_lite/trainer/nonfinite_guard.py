"""The check between loss and optimizer: a step that is not finite is stopped or left out before it is taken."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType, gather_object
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.training_args import OptimizerNames

from orpo_lite.trainer.health_warnings import Unchanged
from orpo_lite.trainer.nonfinite_report import (
    IN_A_ROW,
    IN_ALL,
    Finding,
    NonFinite,
    decoded_rows,
    largest,
    local,
    locate_pairs,
    not_finite,
    one_by_one,
    plain,
    preserved_rng,
    rows_as_given,
    trained,
)
from orpo_lite.trainer.objective import micro_batches
from orpo_lite.trainer.out_of_memory import ran_out

if TYPE_CHECKING:
    from orpo_lite.recipe import DataSection
    from orpo_lite.trainer.trainer import ORPOTrainer

logger = logging.getLogger(__name__)


class NonFiniteGuard(TrainerCallback):
    """Finds a loss or gradient that is not finite before optimizer.step, and stops or leaves the step out.

    The trainer calls `check_step` after the step's last backward pass: before clipping, since a NaN that is clipped is NaN
    everywhere. Where a callback changes gradients after that, a hook of the optimizer checks again. DeepSpeed and
    layer-wise optimizers step inside the backward pass: there only the loss is checked, before it.

    Raises:
        ValueError: `on_nonfinite` says skip where no step can be left out.
    """

    def __init__(self, trainer: Any):
        self.trainer: ORPOTrainer = trainer
        self.folder: Path | None = Path(trainer.args.output_dir or "outputs")
        """Where the rows of the first step that is not finite are written; None writes nothing."""
        self.data: DataSection | None = None
        """The run's data section, to read those rows again; without one they are those given to the trainer."""
        self.sources: list[str] = []
        """Paths that the training pairs' `source` column counts."""
        self.skipped: list[int] = []
        """Optimizer steps left out, from 1."""
        self.overflows = self.in_a_row = 0
        """Steps that fp16's loss scaling left out to find its scale; steps left out one after another."""
        self.file: Path | None = None
        """The file of rows that was written."""
        self.left_out = self.overflowed = self.checked = False
        """Whether the step in progress is left out, overflowed in fp16, was checked."""
        self.row_numbers: dict[int, list[int]] = {}
        optim = OptimizerNames(trainer.args.optim).value
        deepspeed = trainer.accelerator.distributed_type == DistributedType.DEEPSPEED
        self.inside_backward = deepspeed or "lomo" in optim or "layerwise" in optim
        if self.inside_backward and trainer.args.on_nonfinite == "skip":
            raise ValueError(
                "ORPOConfig.on_nonfinite: found skip, expected stop with DeepSpeed and with layer-wise optimizers, which "
                "change weights during the backward pass: no step can be left out"
            )

    def state(self) -> list[Any]:
        """Return the counts that a checkpoint keeps."""
        return [self.skipped, self.overflows, self.in_a_row]

    def restore(self, counts: list[Any]) -> None:
        """Take the counts of a checkpoint over."""
        self.skipped, self.overflows, self.in_a_row = counts

    def record(self) -> dict[str, Any]:
        """Return what run.json keeps: steps left out, overflows of fp16, and the name of the file of rows."""
        return {
            "skipped_steps": self.skipped,
            "overflow_steps": self.overflows,
            "nonfinite_rows": self.file.name if self.file else None,
        }

    # ---- events of training ----------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.in_a_row = 0
        self.unchanged = Unchanged(self.trainer.model)
        self.hook = None
        optimizer = kwargs.get("optimizer")
        if optimizer is not None and not self.inside_backward:
            self.hook = getattr(optimizer, "optimizer", optimizer).register_step_pre_hook(self._check_again)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the gradients of a left-out step away, so that no optimizer changes anything."""
        if not self.left_out:
            return
        if self.trainer.accelerator.scaler is not None:
            # the scaler must have looked at gradients, which are 0, before it steps; clipping has let it, where there is any
            with contextlib.suppress(RuntimeError):
                self.trainer.accelerator.unscale_gradients()
        for parameter in self.trainer.model.parameters():
            parameter.grad = None

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.left_out and not self.overflowed:
            self.unchanged.stepped(state.global_step + 1, self.trainer.health, learning_rate(self.trainer))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.hook is not None:
            self.hook.remove()
        self.unchanged.stepped(state.global_step, self.trainer.health, 0.0, last=True)
        self.check_weights()

    # ---- checks ----------------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Forget the step before."""
        self.left_out = self.overflowed = self.checked = False

    def check_loss(self, loss: Tensor) -> None:
        """Check a loss before its backward pass, where that takes the optimizer's step.

        Raises:
            NonFinite: it is not finite on some process.
        """
        if self.inside_backward and self.trainer.total((~torch.isfinite(loss.detach())).float()).item():
            step = self.trainer.step_in_progress
            assert step is not None
            step.losses.append(loss.detach())
            self._refuse(self._find())

    def _check_again(self, *_: Any) -> None:
        """Check before the optimizer's own step where callbacks may have changed gradients, or nobody has checked."""
        callbacks = self.trainer.callback_handler.callbacks
        others = any(
            type(one).on_pre_optimizer_step is not TrainerCallback.on_pre_optimizer_step
            for one in callbacks
            if one is not self
        )
        if self.trainer.step_in_progress is not None and (others or not self.checked):
            self.check_step(again=True)

    def check_step(self, again: bool = False) -> None:
        """Check losses and gradients of the step in progress, on all processes together.

        Raises:
            NonFinite: one is not finite, and on_nonfinite says stop, or too many steps were left out.
        """
        trainer, step = self.trainer, self.trainer.step_in_progress
        if self.left_out or self.inside_backward or (self.checked and not again):
            return
        assert step is not None
        self.checked = True
        bad_loss, bad_gradient, some, loss, chosen, rejected, pairs = self._figures()
        # gradients are scaled so that they overflow now and then, and the scaler leaves such a step out by itself
        scaler = trainer.accelerator.scaler
        if bad_loss or (bad_gradient and (scaler is None or again or scaler.get_scale() < 1)):
            finding = self._find()
            if trainer.args.on_nonfinite != "skip":
                self._refuse(finding)
            self._leave_out(finding, unscaled=again)
        elif not again:
            self.in_a_row = 0
            # counted here: fused optimizers leave the step out themselves, without a word to accelerate
            self.overflowed = bool(bad_gradient)
            self.overflows += self.overflowed
            if pairs and not bad_gradient:
                number, processes = trainer.state.global_step + 1, trainer.accelerator.num_processes
                trainer.health.step(number, loss / processes, chosen / pairs, (chosen - rejected) / pairs, not some)

    def _figures(self) -> list[float]:
        """Reduce all that is decided on in one wait for the device: every process decides alike."""
        trainer, step = self.trainer, self.trainer.step_in_progress
        assert step is not None
        device, zero = trainer.args.device, torch.zeros((), device=trainer.args.device)
        losses = torch.stack([loss.to(device, torch.float32) for loss in step.losses]).sum() if step.losses else zero
        peak = largest([p.grad for p in trainer.model.parameters() if p.grad is not None], device)
        names = ("logps/chosen", "logps/rejected", "pairs")
        sums = [trainer.sums.get(name, zero) - step.sums.get(name, zero) for name in names]
        figures = torch.stack([(~torch.isfinite(losses)).float(), (~torch.isfinite(peak)).float(),
                               (peak > 0).float(), losses, *(one.to(device, torch.float32) for one in sums)])  # fmt: skip
        return trainer.total(figures).tolist()

    def check_weights(self) -> None:
        """Check weights before they are written: an update of finite gradients may have overflowed, unseen so far.

        Raises:
            NonFinite: a trained weight is not finite.
        """
        trainer = self.trainer
        wrong = [name for name, p in trained(trainer.model).items() if not torch.isfinite(local(p)).all()]
        if trainer.total(torch.tensor(float(len(wrong)), device=trainer.args.device)).item():
            raise NonFinite(
                f"step {trainer.state.global_step}: trained weights are not finite after it "
                f"({', '.join(map(plain, wrong[:4]))}), though loss and gradients were: the update itself overflowed. These "
                f"weights are not written; try a lower training.learning_rate (it is {trainer.args.learning_rate:g})"
            )

    # ---- what is found, and what becomes of the step ---------------------------------------------------------------

    def _parts(self) -> list[list[dict[str, Any]]]:
        """Return the micro-batches of each item of the step, as they were computed."""
        step, cut = self.trainer.step_in_progress, self.trainer.micro_limit.cut
        assert step is not None
        return [[part for batch in micro_batches(item) for part in cut(batch)] for item in step.items]

    def _find(self) -> Finding:
        """Find all that can be said of the step in progress, on all processes together."""
        trainer, step = self.trainer, self.trainer.step_in_progress
        assert step is not None
        names, device, precision = trained(trainer.model), trainer.args.device, trainer.args.mixed_precision
        losses = [float(loss) for loss in step.losses]
        # sharded weights take all processes for a forward pass
        alone = not self.inside_backward and not any(isinstance(p, DTensor) for p in names.values())
        pairs: list[dict[str, Any]] = []
        for place, parts in enumerate(self._parts()):
            wrong = place < len(losses) and not math.isfinite(losses[place])
            for part in parts:
                found = locate_pairs(part, trainer.train_dataset, self.sources, self.row_numbers)
                if alone and (wrong or all(map(math.isfinite, losses))):
                    try:
                        with preserved_rng(device):
                            values = one_by_one(trainer, part, with_gradients=not wrong)
                        found = [one | own for one, own in zip(found, values, strict=True)]
                    except RuntimeError as error:
                        if not ran_out(error):
                            raise
                        alone = False
                pairs += [{"pass": place + 1} | one for one in found]
        if trainer.accelerator.num_processes > 1:
            losses, pairs, alone = gather_object(losses), gather_object(pairs), all(gather_object([alone]))
        return Finding(
            trainer.state.global_step + 1,
            losses,
            {n: [bad, p.numel()] for n, p in names.items() if p.grad is not None and (bad := not_finite(p.grad))},
            {n: [bad, p.numel()] for n, p in names.items() if (bad := not_finite(p))},
            float(largest([p.detach() for p in names.values()], device).nan_to_num(0.0)),
            pairs,
            alone,
            learning_rate(trainer),
            precision if precision != "no" else "float32",
        )

    def _write_rows(self, finding: Finding) -> str:
        """Write the rows of the run's first step that is not finite, and return where they are and what for."""
        if self.folder is None or self.file is not None:
            return ""
        trainer = self.trainer
        rows = [row for parts in self._parts() for part in parts for row in decoded_rows(part, trainer.tokenizer)]
        if trainer.accelerator.num_processes > 1:
            rows = gather_object(rows)
        rows = rows_as_given(finding.pairs, self.data, trainer.given_rows) or rows
        path = self.folder / f"nonfinite-step-{finding.step}.jsonl"
        try:
            if trainer.is_world_process_zero():
                path.parent.mkdir(parents=True, exist_ok=True)
                text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
                path.write_text(text, "utf-8")
        except OSError as error:
            return f"\n  its rows could not be written: {path}: {error.strerror or error}"
        self.file = path
        return f"\n  its {len(rows)} rows are in {path}, which any recipe trains on: data.train={path}"

    def _refuse(self, finding: Finding, why: str = "") -> None:
        written = self._write_rows(finding)
        raise NonFinite(f"{why}{finding.words()}\n  {finding.advice()}{written}")

    def _leave_out(self, finding: Finding, unscaled: bool) -> None:
        """Take no step: drop its gradients, and keep it out of the metrics. The schedule continues, as steps are counted."""
        trainer, step = self.trainer, self.trainer.step_in_progress
        assert step is not None
        self.skipped.append(finding.step)
        self.in_a_row += 1
        if self.in_a_row >= IN_A_ROW or len(self.skipped) >= IN_ALL:
            count = f"{self.in_a_row} steps one after another" if self.in_a_row >= IN_A_ROW else f"{IN_ALL} steps"
            self._refuse(
                finding, f"training.on_nonfinite=skip gives up after {count} that were not finite. The last is "
            )
        self.left_out = True
        for parameter in trainer.model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        if unscaled:  # the optimizer is about to step
            self.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control)
        trainer.sums = dict(step.sums)
        written = self._write_rows(finding)
        if trainer.is_world_process_zero():
            logger.warning(
                "left out (%d so far): %s\n  %s%s", len(self.skipped), finding.words(), finding.advice(), written
            )


def learning_rate(trainer: Any) -> float:
    """Return the learning rate of the step in progress; before training that of the arguments."""
    return float(trainer.args.learning_rate if trainer.optimizer is None else trainer.optimizer.param_groups[0]["lr"])
