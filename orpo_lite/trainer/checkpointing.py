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

from orpo_lite.common.files import check_mounted, disk_trouble
from orpo_lite.model import save_adapter
from orpo_lite.trainer import zero_states
from orpo_lite.trainer.checkpoint_folder import ASIDE, MANIFEST, place, prune, seal
from orpo_lite.trainer.distributed import gathered, sharded
from orpo_lite.trainer.nonfinite_guard import WatchingTrainer

logger = logging.getLogger(__name__)

RUNNING = "running.json"
"""Of a checkpoint: what has been summed since the last log, which transformers' own checkpoints lose."""
VERSIONS = ("torch", "transformers", "peft", "accelerate")


class SavingTrainer(WatchingTrainer):
    """A WatchingTrainer whose checkpoints are written aside, synced, sealed by a manifest and renamed.

    One that cannot be written, as on a full disk, is said and training goes on; those before it stay.
    """

    _disk: int
    """The file system that checkpoints go to."""
    _aside: Path | None = None
    _clock: float
    _train_started: float
    ends = False
    """Whether training ends at this step by itself: at its last step, or by a callback such as early stopping."""
    train_seconds = 0.0
    """Of training, those before a resume among them; evaluations that fall due in it too."""

    @property
    def checkpoint_folder(self) -> Path:
        return Path(super()._get_output_dir(None))

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
