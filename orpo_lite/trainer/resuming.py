"""Training that goes on from a checkpoint, after it was looked at: to the same weights and logs as if it had never stopped."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback
from transformers.trainer_callback import ExportableState

from orpo_lite.common.errors import RequestError
from orpo_lite.common.files import disk_of
from orpo_lite.model.untrusted_files import check_torch_files
from orpo_lite.trainer import zero_states
from orpo_lite.trainer.checkpoint_folder import MANIFEST, clean, damage, manifest, newest_good
from orpo_lite.trainer.checkpointing import RUNNING, SavingTrainer
from orpo_lite.trainer.interrupts import Stopped, StopRequest
from orpo_lite.trainer.savepoints import SavePoints

logger = logging.getLogger(__name__)

NEEDED = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth")


class ResumingTrainer(SavingTrainer):
    """A resumed run ends with the same weights, bit for bit on the same machine and versions, as one that never stopped,
    and has logged the same lines. A signal stops it at the end of a step, with a checkpoint.
    """

    _resumed: Path | None = None
    _ended = False
    """The checkpoint gone on from is that of a run's last step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stopping = StopRequest()
        self._train_started = time.monotonic()
        if self.args.early_stopping_patience:
            self.add_callback(EarlyStoppingCallback(self.args.early_stopping_patience))
        self.add_callback(SavePoints(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' train, from a checked checkpoint, stopped by signals at a step's end.

        Args:
            resume_from_checkpoint: a checkpoint, or True for the newest good one in `args.output_dir`.

        Raises:
            RequestError: the checkpoint is damaged, or belongs to steps of another number of pairs.
            Stopped: a signal stopped the training.
        """
        if self.args.should_save:
            clean(self.checkpoint_folder)
        self._resumed = self._checked(resume_from_checkpoint) if resume_from_checkpoint else None
        self.stopping, self._ended, self.train_seconds = StopRequest(), False, 0.0
        self._train_started, self._disk = time.monotonic(), disk_of(self.checkpoint_folder)
        with self.stopping.listen():
            outcome = super().train(str(self._resumed) if self._resumed else None, *args, **kwargs)
        self.train_seconds += time.monotonic() - self._train_started
        if self.stopping.number is not None:
            raise Stopped(self.stopping.number, f"stopped at step {self.state.global_step}")
        return outcome

    def _checked(self, asked: str | bool) -> Path:
        if asked is True:
            found, lines = newest_good(self.checkpoint_folder)
            for line in lines:
                logger.warning("damaged, so not gone on with: %s", line)
            if found is None:
                raise RequestError(
                    f"resume_from_checkpoint: {self.checkpoint_folder} holds no good checkpoint; start without it"
                )
        else:
            found = Path(str(asked))
            if not found.is_dir():
                raise RequestError(f"resume_from_checkpoint: there is no checkpoint folder {found}")
            if not (found / MANIFEST).is_file() and (found / NEEDED[0]).is_file():
                return self._foreign(found)
            if wrong := damage(found):
                raise RequestError(f"{found}: {wrong}; go on from another checkpoint")
        check_torch_files(found)
        facts, here = manifest(found), self._circumstances()
        self._check_states(found)
        if facts["pairs_per_step"] != here["pairs_per_step"]:
            raise RequestError(
                f"{found}: was written with {facts['pairs_per_step']} pairs an optimizer step, here it is "
                f"{here['pairs_per_step']}: set batch size, accumulation and processes to the same product"
            )
        if self.is_deepspeed_enabled:
            zero_states.check(found, here["processes"])
            if self.args.load_best_model_at_end:
                best = json.loads((found / "trainer_state.json").read_text("utf-8")).get("best_global_step")
                what = " (the best so far, which load_best_model_at_end loads in the end)"
                zero_states.check(self.checkpoint_folder / f"checkpoint-{best}", here["processes"], what)
        if facts["processes"] != here["processes"]:
            logger.warning(
                "%s was written by %d processes, here %s: the same pairs in each step, but random states start anew",
                found.name, facts["processes"], here["processes"],
            )  # fmt: skip
        for name, version in here["versions"].items():
            if facts["versions"].get(name) != version:
                logger.warning(
                    "%s was written with %s %s, here is %s: the result may differ in the last bits",
                    found.name, name, facts["versions"].get(name), version,
                )  # fmt: skip
        return found

    def _check_states(self, checkpoint: Path) -> None:
        """Raise RequestError where a checkpoint lacks the optimizer's states, or has them as another engine writes them."""
        kinds = {"DeepSpeed": ("global_step*",), "FSDP2": ("optimizer_0", "optimizer.bin"), "one process or DDP": ("optimizer.pt", "optimizer.bin")}  # fmt: skip
        there = [kind for kind, names in kinds.items() if any(any(checkpoint.glob(name)) for name in names)]
        here = "DeepSpeed" if self.is_deepspeed_enabled else "FSDP2" if self.is_fsdp_enabled else "one process or DDP"
        if not there:
            raise RequestError(
                f"{checkpoint}: holds no optimizer state (training.save_only_model), so training cannot go on from it"
            )
        if here not in there:
            remedy = ", with any number of processes, one too" if there[0] == "FSDP2" else ""
            raise RequestError(
                f"{checkpoint}: its optimizer states are those of {there[0]}, and here is {here}: start it with the launcher "
                f"file of {there[0]} to go on{remedy}"
            )

    def _foreign(self, checkpoint: Path) -> Path:
        """A checkpoint that plain transformers or TRL has written: nothing says whether it is whole."""
        missing = [name for name in NEEDED if not (checkpoint / name).is_file()]
        if missing and self.args.world_size == 1:
            raise RequestError(
                f"{checkpoint}: {', '.join(missing)} missing, so training cannot go on exactly; take another checkpoint"
            )
        check_torch_files(checkpoint)
        logger.warning("%s has no %s: it cannot be checked for damage", checkpoint, MANIFEST)
        return checkpoint

    def _load_callback_state(self) -> None:
        """Counters of callbacks that keep any, such as early stopping's; not the control, which may say stop."""
        kept: Any = self.state.stateful_callbacks
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                stored = kept.setdefault(type(callback).__name__, callback.state())
                stored = stored[-1] if isinstance(stored, list) else stored
                for key, value in stored.get("attributes", {}).items():
                    if hasattr(callback, key):
                        setattr(callback, key, value)
        kept.setdefault(type(self.control).__name__, self.control.state())

    def _go_on(self) -> None:
        """After transformers has set everything to nought: what was running when the checkpoint was written."""
        assert self._resumed is not None
        best = self.checkpoint_folder / f"checkpoint-{self.state.best_global_step}"
        if best.is_dir():  # the run folder may have been moved
            self.state.best_model_checkpoint = str(best)
        if not (self._resumed / RUNNING).is_file():
            return
        running = json.loads((self._resumed / RUNNING).read_text("utf-8"))
        first = self.args.process_index == 0
        self._tr_loss += running["loss"]
        # the summary that ends a run counts this session's steps only
        self._total_loss_scalar -= running["loss"]
        self._globalstep_last_logged = running["logged_at_step"]
        if first:  # sums of all processes, which the next log adds up again
            self._sums = {
                key: torch.tensor(value, dtype=getattr(torch, kind), device=self.args.device)
                for key, (value, kind) in running["sums"].items()
            }
        self._logged_at = running["logged_at_step"]
        self.skipped, self.overflows, self._in_a_row, self.alarms.said = running["watched"]
        self._clock = time.monotonic() - running["seconds_since_log"]
        self.train_seconds = running["seconds"]
        # a signal may have come while the evaluation ran that early stopping ended the run by
        stops = [one for one in self.callback_handler.callbacks if isinstance(one, EarlyStoppingCallback)]
        early = any(one.early_stopping_patience_counter >= one.early_stopping_patience for one in stops)
        state = json.loads((self._resumed / "trainer_state.json").read_text("utf-8"))
        # one that took all the steps it was to take goes on where there are to be more now
        self._ended = early or running["ended"] and state["global_step"] < state["max_steps"]

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        if self._ended or self.state.global_step >= self.state.max_steps:
            # transformers would take another step: it looks for the end only after one
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        # with a limit of 1, transformers deletes the newest checkpoint here, which a stopped run goes on from
        limit, load = self.args.save_total_limit, self.args.load_best_model_at_end
        best = self.state.best_model_checkpoint
        self.args.save_total_limit = None
        if load and best is not None and (Path(best) / MANIFEST).is_file() and (wrong := damage(Path(best))):
            logger.warning("the best checkpoint is damaged (%s: %s): the adapter is that of the last step", best, wrong)
            self.args.load_best_model_at_end, self.state.best_model_checkpoint = False, None
        if self.stopping.number is not None:
            self.args.load_best_model_at_end = False
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit, self.args.load_best_model_at_end = limit, load
