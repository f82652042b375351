"""Checkpoints inside transformers' Trainer: whole or not at all, checked, and enough to go on bit for bit."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import EarlyStoppingCallback
from transformers.trainer_callback import ExportableState

from orpo_lite import zero_states
from orpo_lite.checkpoints import ASIDE, MANIFEST, clean, damage, manifest, newest_good, place, prune, seal
from orpo_lite.engines import gathered, sharded
from orpo_lite.errors import RequestError
from orpo_lite.model import save_adapter
from orpo_lite.model.files import check_torch_files
from orpo_lite.savepoints import SavePoints
from orpo_lite.signals import Stopped, StopRequest
from orpo_lite.watching.trainer import WatchingTrainer
from orpo_lite.writing import check_mounted, disk_of, disk_trouble

logger = logging.getLogger(__name__)

RUNNING = "running.json"
"""Of a checkpoint: what has been summed since the last log, which transformers' own checkpoints lose."""
NEEDED = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth")
VERSIONS = ("torch", "transformers", "peft", "accelerate")


class SavingTrainer(WatchingTrainer):
    """A WatchingTrainer whose checkpoints are written aside, synced, sealed by a manifest and renamed.

    A resumed run ends with the same weights, bit for bit on the same machine and versions, as one that never stopped,
    and has logged the same lines. A signal stops it at the end of a step, with a checkpoint. A checkpoint that cannot
    be written, as on a full disk, is said and training goes on; those before it stay.
    """

    stopping: StopRequest
    _disk: int
    """The file system that checkpoints go to."""
    _aside: Path | None = None
    _resumed: Path | None = None
    _ended = False
    """The checkpoint gone on from is that of a run's last step."""
    _clock: float
    ends = False
    """Whether training ends at this step by itself: at its last step, or by a callback such as early stopping."""
    train_seconds = 0.0
    """Of training, those before a resume among them; evaluations that fall due in it too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stopping = StopRequest()
        self._train_started = time.monotonic()
        if self.args.early_stopping_patience:
            self.add_callback(EarlyStoppingCallback(self.args.early_stopping_patience))
        self.add_callback(SavePoints(self))

    @property
    def checkpoint_folder(self) -> Path:
        return Path(super()._get_output_dir(None))

    # ---- writing ---------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        # transformers asks here where a checkpoint goes
        return str(self._aside) if self._aside is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.check_weights()
        folder, state = Path(super()._get_output_dir(trial)), self.state
        final = folder / f"checkpoint-{state.global_step}"
        aside = folder / f".{final.name}{ASIDE}"
        before, running = state.best_model_checkpoint, self._running_sums()
        parts = (
            lambda: self._make(aside / final.name),
            lambda: self._write(model, trial, aside, final, running),
            lambda: self._write_states(aside / final.name),
            lambda: self._seal(aside / final.name, final),
        )
        if wrong := next(filter(None, map(self._together, parts)), None):
            shutil.rmtree(aside, ignore_errors=True)
            state.best_model_checkpoint = before
            left = [path.name for path in folder.glob("checkpoint-*") if (path / MANIFEST).is_file()]
            logger.warning(
                "%s could not be written (%s): training goes on; %s. Make room in %s, or mount it again, before the next one",
                final.name,
                wrong,
                f"{', '.join(sorted(left))} stays" if left else "there is no other checkpoint",
                folder,
            )
            return
        if self.args.should_save:
            best = Path(state.best_model_checkpoint) if state.best_model_checkpoint else None
            try:
                prune(folder, self.args.save_total_limit, best)
            except OSError as error:  # the next save tries again
                logger.warning("older checkpoints in %s could not be deleted (%s)", folder, error.strerror)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """transformers' own, without its pickle of the arguments: nothing reads it, and a token may be in it."""
        super()._save(output_dir, state_dict)
        (Path(output_dir or str(self.args.output_dir)) / "training_args.bin").unlink(missing_ok=True)

    def _make(self, folder: Path) -> None:
        if self.args.should_save:
            check_mounted(folder, self._disk)
            shutil.rmtree(folder.parent, ignore_errors=True)
            folder.mkdir(parents=True)

    def _write(self, model: Any, trial: Any, aside: Path, final: Path, running: dict[str, Any]) -> None:
        state, best = self.state, self.state.best_global_step
        if best == state.global_step:
            state.best_model_checkpoint = str(final)
        # without one, transformers does not look for the best checkpoint in the folder aside
        self._aside, state.best_global_step = aside, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._aside, state.best_global_step = None, best
        if self.args.should_save:
            checkpoint = aside / final.name
            state.save_to_json(str(checkpoint / "trainer_state.json"))
            (checkpoint / RUNNING).write_text(json.dumps(running), "utf-8")
            for unread in (checkpoint / "training_args.bin", *checkpoint.glob("zero_to_*.py")):
                unread.unlink(missing_ok=True)  # transformers' pickle beside FSDP's shards, DeepSpeed's scripts

    def _write_states(self, written: Path) -> None:
        # of adapters, whose states are small
        if self.is_deepspeed_enabled and isinstance(self.unwrapped(), PeftModel) and not self.args.save_only_model:
            zero_states.write(self.deepspeed, written / zero_states.WHOLE, self.args.should_save)

    def _seal(self, written: Path, final: Path) -> None:
        if self.args.should_save:
            seal(written, {"format": 1, "step": self.state.global_step, **self._circumstances()})
            place(written, final)
            written.parent.rmdir()

    def _together(self, work: Any) -> str | None:
        """Do a part of saving on all processes; what went wrong with the disk, on any of them."""
        wrong = None
        try:
            work()
        except Exception as error:
            wrong = disk_trouble(error)
            if wrong is None:
                raise
        if self.args.world_size == 1:
            return wrong
        failed = int(self._total(torch.tensor(int(wrong is not None), device=self.args.device)))
        return wrong or ("another process failed" if failed else None)

    def _circumstances(self) -> dict[str, Any]:
        """What a checkpoint can only be gone on with."""
        args = self.args
        pairs = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        versions = {name: importlib.metadata.version(name) for name in VERSIONS}
        return {"processes": args.world_size, "pairs_per_step": pairs, "versions": versions}

    def _running_sums(self) -> dict[str, Any]:
        """What is summed since the last log: the mean over processes of the loss, sums of the metrics."""
        names, processes = list(self._sums), self.args.world_size
        loss = self._tr_loss
        assert isinstance(loss, torch.Tensor)
        loss = float(self._total(loss.double()) / processes if processes > 1 else loss)
        sums = {}
        if names:
            values = self._total(torch.stack([self._sums[name].double() for name in names])).tolist()
            # by their types, since float32 sums go on in float32 or end in other bits
            types = [str(self._sums[name].dtype).removeprefix("torch.") for name in names]
            sums = {name: [value, kind] for name, value, kind in zip(names, values, types, strict=True)}
        now = time.monotonic()
        return {
            "loss": loss,
            "sums": sums,
            "logged_at_step": self._globalstep_last_logged,
            "seconds_since_log": now - self._clock,
            "seconds": self.train_seconds + now - self._train_started,
            "watched": [self.skipped, self.overflows, self._in_a_row, self.alarms.said],
            "ended": self.ends,
        }

    def whole_weights(self) -> dict[str, torch.Tensor] | None:
        """What is trained, gathered for the process that saves; None where the model itself holds it whole.

        All processes call it together.
        """
        if not sharded(self.model) and not self.is_deepspeed_enabled:
            return None
        return gathered(self.model, keep=self.args.should_save)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """transformers' own; of sharded models the adapter alone is gathered, and never the base."""
        weights = self.whole_weights()
        if weights is None:
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(output_dir or str(self.args.output_dir))
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            save_adapter(self.unwrapped(), folder, weights)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(str(folder))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    # ---- going on --------------------------------------------------------------------------------------------------

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
