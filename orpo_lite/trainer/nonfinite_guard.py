"""Between the loss and the optimizer: every step's loss and gradients are looked at, once, before it is taken."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType, gather_object
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.trainer_utils import EvalLoopOutput
from transformers.training_args import OptimizerNames

from orpo_lite.objective.loss import configured_loss
from orpo_lite.trainer.health_warnings import Alarms
from orpo_lite.trainer.nonfinite_callback import Eyes
from orpo_lite.trainer.nonfinite_report import (
    IN_A_ROW,
    IN_ALL,
    Finding,
    NonFinite,
    kept_random,
    largest,
    listed,
    local,
    not_finite,
    one_by_one,
    pair_places,
    plain,
    trained,
)
from orpo_lite.trainer.objective import ObjectiveTrainer, micro_batches
from orpo_lite.trainer.out_of_memory import ran_out
from orpo_lite.trainer.reproducer import Reproducer

if TYPE_CHECKING:
    from orpo_lite.recipe import Recipe

logger = logging.getLogger(__name__)


class WatchingTrainer(ObjectiveTrainer):
    """Finds a loss or gradient that is not finite before optimizer.step, and stops or leaves the step out.

    What the optimizer sees has been looked at after clipping's place in transformers' loop and before its effect
    (`_clip_grad_norm`, or `_get_grad_norm` with max_grad_norm 0): NaN clipped would be NaN everywhere. Where a callback
    works on gradients after that, a hook of the optimizer looks again. DeepSpeed and layer-wise optimizers step inside of
    the backward pass: there the loss alone is looked at, before it.
    """

    recipe: Recipe | None = None
    """Of the run, for the reproducer; without one it cannot be replayed by command."""
    sources: list[str]
    """What the training pairs' `source` column counts."""
    reproducer_folder: Path | None
    """Where the first step that is not finite is written; None writes nothing."""
    alarms: Alarms
    skipped: list[int]
    """Optimizer steps left out, from 1."""
    overflows: int = 0
    """Steps that fp16's loss scaling left out, as it does to find its scale."""
    reproducer: Path | None = None
    """The file written."""
    _inside = False
    """Whether optimizer steps are taken inside of the backward pass."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.sources, self.skipped, self._row_numbers = [], [], {}
        self._in_a_row = self._logged_at = self._began_at = 0
        self.reproducer_folder = Path(self.args.output_dir or "outputs")
        self.alarms = Alarms(self.is_world_process_zero())
        optim = OptimizerNames(self.args.optim).value
        self._inside = (
            self.accelerator.distributed_type == DistributedType.DEEPSPEED or "lomo" in optim or "layerwise" in optim
        )
        if self._inside and self.args.on_nonfinite == "skip":
            raise ValueError(
                "ORPOConfig.on_nonfinite: found skip, expected stop with DeepSpeed and with layer-wise optimizers, which "
                "change weights during the backward pass: no step can be left out"
            )
        if isinstance(self.model, PeftModel) and self.train_dataset is not None:
            self.alarms.learning_rate(self.args.learning_rate)
        self.add_callback(Eyes(self))

    # ---- a step's numbers ------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list, Tensor | None]:
        batches, totals = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._passes: list[Tensor] = []
        self._totals, self._left_out, self._looked, self._overflowed = totals, False, False, False
        told = getattr(self, "_tr_loss", None)  # a dry run has no sum of losses
        self._told_before = None if told is None else told.clone()
        return batches, totals

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._window is not None:  # a step of training, and not of a script of its own
            self._passes.append(loss)
        return loss

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        result = super().compute_loss(model, inputs, return_outputs, **kwargs)
        if self._inside and model.training:
            loss = result[0] if return_outputs else result
            if self._total((~torch.isfinite(loss.detach())).float()).item():
                self._passes.append(loss.detach())
                self._refuse(self._find())
        return result

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return None if self.look() else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return None if self.look() else super()._get_grad_norm(model, grad_norm)

    def look(self, again: bool = False) -> bool:
        """Whether the step at hand is to be left out.

        Raises:
            NonFinite: a loss or gradient is not finite, and on_nonfinite says stop, or too many steps were left out.
        """
        if self._left_out or self._inside or (self._looked and not again):
            return self._left_out
        self._looked = True
        assert self._window is not None
        device = self.args.device
        losses = torch.stack([loss.to(device, torch.float32) for loss in self._passes]).sum()
        added = losses
        if self._told_before is not None and not self.args.logging_nan_inf_filter:
            added = self._tr_loss - self._told_before  # what a subclass told transformers in our place
        peak = largest([p.grad for p in self.model.parameters() if p.grad is not None], device)
        before = self._window.sums
        zero = torch.zeros((), device=device)
        sums = [self._sums.get(k, zero) - before.get(k, zero) for k in ("logps/chosen", "logps/rejected", "pairs")]
        # one reduction and one wait for the device a step: all that is decided on, on every process alike
        figures = torch.stack([(~torch.isfinite(losses + added)).float(), (~torch.isfinite(peak)).float(),
                               (peak > 0).float(), losses, *(one.to(device, torch.float32) for one in sums)])  # fmt: skip
        bad_loss, bad_gradient, some, loss, chosen, rejected, pairs = self._total(figures).tolist()
        # gradients are scaled so that they overflow now and then, and the scaler leaves such a step out by itself
        scaler = self.accelerator.scaler
        if bad_loss or (bad_gradient and (scaler is None or again or scaler.get_scale() < 1)):
            finding = self._find()
            if self.args.on_nonfinite != "skip":
                self._refuse(finding)
            self._leave_out(finding, unscaled=again)
        elif not again:
            self._in_a_row = 0
            # counted here: accelerate does not hear of it from fused optimizers, which leave the step out themselves
            self._overflowed = bool(bad_gradient)
            self.overflows += self._overflowed
            if pairs and not bad_gradient:
                self.alarms.step(
                    self.state.global_step + 1,
                    loss / self.accelerator.num_processes,
                    chosen / pairs,
                    (chosen - rejected) / pairs,
                    not some,
                )
        return self._left_out

    def pairs_loss(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Loss of a batch on its own, and nothing counted."""
        stats, aux = self.pair_statistics(model, batch)
        loss = configured_loss(stats, self.args, stats.nll_count.sum(), len(batch["pair_rows"]))
        return loss if aux is None else loss + self.objective.router_coefficient * aux.to(loss.device)

    def parts(self) -> list[list[dict[str, Any]]]:
        """The step's passes as they were computed: micro-batches of each item of the loader."""
        assert self._window is not None
        cut = self.micro_limit.cut
        return [[part for batch in micro_batches(item) for part in cut(batch)] for item in self._window.items]

    def _find(self) -> Finding:
        """All that can be said of the step at hand, on all processes together."""
        names, device = trained(self.model), self.args.device
        losses = [float(loss) for loss in self._passes]
        schedule = self.args.learning_rate if self.lr_scheduler is None else self._get_learning_rate()
        mine = Finding(
            self.state.global_step + 1,
            losses,
            {n: [bad, p.numel()] for n, p in names.items() if p.grad is not None and (bad := not_finite(p.grad))},
            {n: [bad, p.numel()] for n, p in names.items() if (bad := not_finite(p))},
            float(largest([p.detach() for p in names.values()], device).nan_to_num(0.0)),
            learning_rate=float(schedule),
            precision=self.args.mixed_precision if self.args.mixed_precision != "no" else "float32",
        )
        # sharded weights take all processes for a forward pass
        mine.sharded = any(isinstance(p, DTensor) for p in self.model.parameters())
        mine.alone = not self._inside and not mine.sharded
        for place, parts in enumerate(self.parts()):
            wrong = place < len(losses) and not math.isfinite(losses[place])
            for part in parts:
                found = pair_places(part, self.train_dataset, self.sources, self._row_numbers)
                if mine.alone and (wrong or all(map(math.isfinite, losses))):
                    try:
                        with kept_random(device):
                            values = one_by_one(self, part, with_gradients=not wrong)
                        found = [one | own for one, own in zip(found, values, strict=True)]
                    except RuntimeError as error:
                        if not ran_out(error):
                            raise
                        mine.alone = False
                mine.pairs += [{"pass": place + 1} | one for one in found]
        if self.accelerator.num_processes == 1:
            return mine
        return Finding.merge([Finding(**one) for one in gather_object([mine.as_dict()])])

    # ---- what becomes of the step ----------------------------------------------------------------------------------

    def _keep(self, finding: Finding) -> str:
        """Write the run's first reproducer, and say where and how to use it."""
        if self.reproducer_folder is None or self.reproducer is not None:
            return ""
        path = self.reproducer_folder / f"reproduce-step-{finding.step}.zip"
        try:
            made = Reproducer.of(self, finding)
            if made is not None and self.is_world_process_zero():
                made.write(path)
        except OSError as error:
            return f"\n  the step could not be saved for a bug report: {path}: {error.strerror or error}"
        if made is None:
            return "\n  the step cannot be saved for a bug report: ZeRO-3 has no process that holds the weights"
        self.reproducer = path
        replay = (
            f"`python -m orpo_lite.train --reproduce {path}` does it again"
            if self.recipe
            else "it was made by a script, so that there is no recipe for `orpo_lite.train --reproduce` to go by"
        )
        return (
            f"\n  the step is saved in {path}: {replay}. Look into it before you give it to anybody: it holds the adapter, the "
            f"recipe, and the texts of {len(finding.pairs)} pairs"
        )

    def _refuse(self, finding: Finding, why: str = "") -> None:
        saved = self._keep(finding)
        raise NonFinite(f"{why}{finding.words()}\n  {finding.advice()}{saved}")

    def _leave_out(self, finding: Finding, unscaled: bool) -> None:
        """No step: gradients dropped, and nothing of it in the metrics. The schedule goes on, as steps are counted."""
        self.skipped.append(finding.step)
        self._in_a_row += 1
        if self._in_a_row >= IN_A_ROW or len(self.skipped) >= IN_ALL:
            count = f"{self._in_a_row} steps one after another" if self._in_a_row >= IN_A_ROW else f"{IN_ALL} steps"
            self._refuse(
                finding, f"training.on_nonfinite=skip gives up after {count} that were not finite. The last is "
            )
        self._left_out = True
        if self.accelerator.scaler is not None and not unscaled:
            # the scaler wants to have looked at gradients before it steps; at 0 they tell it of no overflow
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.zero_()
            self.accelerator.unscale_gradients()
        for parameter in self.model.parameters():
            parameter.grad = None
        if self._told_before is not None:
            self._tr_loss.copy_(self._told_before)
        assert self._window is not None
        self._sums = dict(self._window.sums)
        saved = self._keep(finding)
        if self.is_world_process_zero():
            logger.warning(
                "left out (%d so far): %s\n  %s%s", len(self.skipped), finding.words(), finding.advice(), saved
            )

    def check_weights(self) -> None:
        """Before weights are written: an update of finite gradients may have thrown them out, and no step looks at it yet."""
        wrong = [name for name, p in trained(self.model).items() if not torch.isfinite(local(p)).all()]
        if self._total(torch.tensor(float(len(wrong)), device=self.args.device)).item():
            raise NonFinite(
                f"step {self.state.global_step}: trained weights are not finite after it ({', '.join(map(plain, wrong[:4]))}), "
                "though loss and gradients were: the update itself overflowed. These weights are not written; try a lower "
                f"training.learning_rate (it is {self.args.learning_rate:g})"
            )

    # ---- metrics ---------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Means are over the steps that were taken; counts of those that were not, once there are any."""
        step = self.state.global_step
        for name, since in (("loss", self._logged_at), ("train_loss", self._began_at)):
            left_out = sum(since < one <= step for one in self.skipped)
            if name in logs and left_out:
                taken = step - since - left_out
                if taken:
                    logs[name] *= (step - since) / taken
                else:
                    del logs[name]  # 0, which transformers would log, is no loss of anything
        if "learning_rate" in logs:
            self._logged_at = step
            logs |= {"skipped_steps": len(self.skipped)} if self.skipped else {}
            logs |= {"overflow_steps": self.overflows} if self.overflows else {}
        super().log(logs, start_time)

    def watched(self) -> dict[str, Any]:
        """What run.json keeps: warnings, steps left out, overflows of fp16, and the reproducer's name."""
        return {
            "warnings": self.alarms.said,
            "skipped_steps": self.skipped,
            "overflow_steps": self.overflows,
            "reproducer": self.reproducer.name if self.reproducer else None,
        }

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        rows = torch.as_tensor(output.predictions)
        wrong = (~torch.isfinite(rows)).any(1).nonzero().flatten().tolist()
        if wrong and self.is_world_process_zero():
            pairs = [
                {"row": int(row.get("row", -1)), "source": None, "number": number, "tokens": tokens}
                for number in wrong
                if (row := dataloader.dataset[number]) and (tokens := len(row["chosen_ids"]) + len(row["rejected_ids"]))
            ]
            words = (
                f"held-out pairs at step {self.state.global_step}: the log-probs of {len(wrong)} of {len(rows)} are not finite, "
                f"and so is the mean: {listed(pairs)}. Look at these rows, and try model.dtype=float32; training goes on"
            )
            if any(one["kind"] == "held-out loss" for one in self.alarms.said):
                logger.warning("%s", words)
            self.alarms.say("held-out loss", self.state.global_step, words)
        return output
