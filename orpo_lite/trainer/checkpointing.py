"""CheckpointedTrainer: checkpoints that are complete or do not count, and training that resumes from them bit for bit."""

import json
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor
from transformers import EarlyStoppingCallback, Trainer
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import rotate_checkpoints

from orpo_lite.common.errors import RequestError
from orpo_lite.common.files import disk_trouble
from orpo_lite.trainer import checkpoint_folder as folders
from orpo_lite.trainer.config import ORPOConfig
from orpo_lite.trainer.health import HealthWarnings, NonFiniteGuard
from orpo_lite.trainer.interruptions import SavePoints, Stopped, StopRequest

logger = logging.getLogger(__name__)

RUNNING = "running.json"
"""File of a checkpoint: what was summed since the last log, which transformers' own checkpoints lose."""


class CheckpointedTrainer(Trainer):
    """transformers.Trainer that saves and resumes exactly.

    Checkpoints are written aside, synced, sealed by a manifest and renamed; one that cannot be written, as on a full
    disk, is reported and training continues. A resumed run ends with the same weights, bit for bit on the same machine and
    versions, as one that never stopped, and has logged the same lines. A signal stops it after a step, with a checkpoint.
    """

    args: ORPOConfig
    model: Any
    sums: dict[str, Tensor]
    """Sums of the loss and the metrics since the last log; scalars."""
    logged_at = began_at = 0
    """Optimizer steps done at the last log, and when this session began."""
    session_loss = 0.0
    """Sum of the steps' losses that this session has logged, mean over the processes."""
    clock = train_seconds = 0.0
    """When the metrics were logged last, evaluations since then added; seconds of training, those before a resume included."""
    ended = False
    """True once the run has taken its last step, also where it resumes from the checkpoint of that step."""
    resumed_from: Path | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sums = {}
        self.health = HealthWarnings(self.is_world_process_zero())
        self.guard = NonFiniteGuard(self)
        self.stopping = StopRequest()
        self.train_started = self.clock = time.monotonic()
        self.add_callback(self.guard)
        if self.args.early_stopping_patience:
            self.add_callback(EarlyStoppingCallback(self.args.early_stopping_patience))
        self.add_callback(SavePoints(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as transformers does, from a verified checkpoint, stopped by signals at a step's end.

        Args:
            resume_from_checkpoint: a checkpoint, or True for the newest good one in `args.output_dir`.

        Raises:
            RequestError: the checkpoint is damaged, holds no optimizer state, or belongs to steps of another number of pairs.
            Stopped: a signal stopped the training.
        """
        if self.args.should_save:
            self.checkpoint_folder.mkdir(parents=True, exist_ok=True)
            folders.clean(self.checkpoint_folder)
        self.resumed_from = self._verified(resume_from_checkpoint) if resume_from_checkpoint else None
        self.stopping, self.ended, self.train_seconds, self.session_loss = StopRequest(), False, 0.0, 0.0
        self.train_started = self.clock = time.monotonic()
        self.save_limit = self.args.save_total_limit
        # the callbacks' counters are restored below, without the control, which may say stop
        self.args.restore_callback_states_from_checkpoint = False
        try:
            with self.stopping.listen():
                outcome = super().train(str(self.resumed_from) if self.resumed_from else None, *args, **kwargs)
        finally:
            self.args.save_total_limit = self.save_limit
        self.train_seconds += time.monotonic() - self.train_started
        if self.stopping.number is not None:
            raise Stopped(self.stopping.number, f"stopped at step {self.state.global_step}")
        return outcome._replace(training_loss=outcome.metrics.get("train_loss", outcome.training_loss))

    def begin(self) -> None:
        """Set what a session counts to its start, or to what was running when the checkpoint was written."""
        # transformers would delete the newest checkpoint at the end where the limit is 1, and a stopped run resumes from it
        self.args.save_total_limit = None
        self.sums, self.logged_at, self.began_at = {}, self.state.global_step, self.state.global_step
        if self.resumed_from is not None:
            self._restore_callbacks()
            self._restore_running(self.resumed_from)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Return the items of one optimizer step; none where the run has taken its last step."""
        if self.is_in_train and (self.ended or self.state.global_step >= self.state.max_steps):
            # transformers looks for the end only after a step
            self.ended = self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _load_best_model(self) -> None:
        """Load the best checkpoint, unless it is damaged or a signal has stopped the run, whose weights stay as they are."""
        best = Path(str(self.state.best_model_checkpoint))
        wrong = folders.damage(best) if (best / folders.MANIFEST).is_file() else None
        if wrong:
            logger.warning("the best checkpoint is damaged (%s: %s): the adapter is that of the last step", best, wrong)
            self.state.best_model_checkpoint = None
        elif self.stopping.number is None:
            super()._load_best_model()

    @property
    def checkpoint_folder(self) -> Path:
        return Path(str(self.args.output_dir))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint aside and give it its name once it is complete, on all processes together."""
        self.guard.check_weights()
        folder, state = self.checkpoint_folder, self.state
        name = f"checkpoint-{state.global_step}"
        aside = folder / f".{name}{folders.ASIDE}"
        before, running = state.best_model_checkpoint, self._running_state()
        wrong = (
            self._on_every_process(lambda: self._make_staging_folder(aside))
            or self._on_every_process(lambda: self._write(model, trial, aside, folder / name, running))
            or self._on_every_process(lambda: self._seal(aside, folder / name))
        )
        if wrong:
            shutil.rmtree(aside, ignore_errors=True)
            state.best_model_checkpoint = before
            left = sorted(path.name for path in folder.glob("checkpoint-*") if (path / folders.MANIFEST).is_file())
            logger.warning(
                "%s could not be written (%s): training continues; %s. Make room in %s, or mount it again, before the next one",
                name, wrong, f"{', '.join(left)} stays" if left else "there is no other checkpoint", folder,
            )  # fmt: skip
        elif self.args.should_save:
            # by their times: a run that resumed before a damaged checkpoint writes fewer steps than that one has
            rotate_checkpoints(str(folder), self.save_limit, state.best_model_checkpoint, use_mtime=True)

    def _make_staging_folder(self, aside: Path) -> None:
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()  # alone: on a drive that is gone its parents are gone, and would be made on the mount point

    def _write(self, model: Any, trial: Any, aside: Path, final: Path, running: dict[str, Any]) -> None:
        args, state = self.args, self.state
        best, kept = state.best_global_step, (args.output_dir, args.push_to_hub)
        if best == state.global_step:
            state.best_model_checkpoint = str(final)
        # transformers writes into args.output_dir, and must neither look for the best checkpoint there nor publish this one
        args.output_dir, args.push_to_hub, state.best_global_step = str(aside), False, None  # type: ignore[assignment]
        try:
            super()._save_checkpoint(model, trial)
        finally:
            (args.output_dir, args.push_to_hub), state.best_global_step = kept, best
        if args.should_save:
            checkpoint = aside / final.name
            state.save_to_json(str(checkpoint / "trainer_state.json"))
            (checkpoint / RUNNING).write_text(json.dumps(running), "utf-8")

    def _seal(self, aside: Path, final: Path) -> None:
        if self.args.should_save:
            facts = {"format": 1, "step": self.state.global_step, "processes": self.args.world_size}
            pairs = self.get_total_train_batch_size(self.args)
            folders.seal(aside / final.name, facts | {"pairs_per_step": pairs})
            folders.place(aside / final.name, final)
            aside.rmdir()

    def _on_every_process(self, work: Callable[[], None]) -> str | None:
        """Do a part of saving on all processes; return what went wrong with the disk on any of them."""
        wrong = None
        try:
            work()
        except Exception as error:
            wrong = disk_trouble(error)
            if wrong is None:
                raise
        failed = self.args.world_size > 1 and self.total(torch.tensor(wrong is not None, device=self.args.device).int())
        return wrong or ("another process failed" if failed else None)

    def _running_state(self) -> dict[str, Any]:
        """Return what is summed since the last log: the mean over processes of the loss, sums of the metrics."""
        totals, now = self.totals(), time.monotonic()
        # with their types, since float32 sums continue in float32 or end in other bits
        types = {name: str(value.dtype).removeprefix("torch.") for name, value in self.sums.items()}
        return {
            "loss": totals.get("loss", 0.0) / self.args.world_size,
            "sums": {name: [value, types[name]] for name, value in totals.items() if name != "loss"},
            "logged_at_step": self.logged_at,
            "seconds_since_log": now - self.clock,
            "seconds": self.train_seconds + now - self.train_started,
            "watched": [self.guard.overflows, self.health.warnings],
        }

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as transformers does, without its pickle of the arguments: a token may be in it."""
        super().save_model(output_dir, _internal_call=True)
        if self.args.should_save:
            (Path(output_dir or str(self.args.output_dir)) / "training_args.bin").unlink(missing_ok=True)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def unwrapped(self) -> Any:
        """Return the transformers or PEFT model, without what DDP puts around it."""
        return extract_model_from_parallel(self.model)

    def total(self, values: Tensor) -> Tensor:
        """Sum over the processes."""
        total = self.accelerator.reduce(values, "sum")
        assert isinstance(total, Tensor)
        return total

    def totals(self) -> dict[str, float]:
        """Return `sums` over all processes."""
        if not self.sums:
            return {}
        values = self.total(torch.stack([value.double() for value in self.sums.values()])).tolist()
        return dict(zip(self.sums, values, strict=True))

    def _verified(self, asked: str | bool) -> Path:
        """Return the checkpoint to resume from, once it is known to be complete and to belong here."""
        if asked is True:
            found, lines = folders.newest_good(self.checkpoint_folder)
            for line in lines:
                logger.warning("damaged, so not resumed from: %s", line)
            if found is None:
                raise RequestError(
                    f"resume_from_checkpoint: {self.checkpoint_folder} holds no good checkpoint; start without it"
                )
        else:
            found = Path(str(asked))
            if not found.is_dir():
                raise RequestError(f"resume_from_checkpoint: there is no checkpoint folder {found}")
            if wrong := folders.damage(found):
                raise RequestError(f"{found}: {wrong}; resume from another checkpoint")
        if not (found / "optimizer.pt").exists():
            raise RequestError(
                f"{found}: holds no optimizer state (training.save_only_model), so training cannot resume from it"
            )
        before, now = folders.manifest(found)["pairs_per_step"], self.get_total_train_batch_size(self.args)
        if before != now:
            raise RequestError(
                f"{found}: was written with {before} pairs an optimizer step, here it is {now}: set batch size, accumulation "
                "and processes to the same product"
            )
        return found

    def _restore_callbacks(self) -> None:
        """Restore counters of callbacks that keep any, such as early stopping's; not the control, which may say stop."""
        kept: Any = self.state.stateful_callbacks
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                stored = kept.setdefault(type(callback).__name__, callback.state())
                stored = stored[-1] if isinstance(stored, list) else stored
                for key, value in stored.get("attributes", {}).items():
                    if hasattr(callback, key):
                        setattr(callback, key, value)
        kept.setdefault(type(self.control).__name__, self.control.state())

    def _restore_running(self, checkpoint: Path) -> None:
        """Restore sums and counts that were running when the checkpoint was written."""
        best = self.checkpoint_folder / f"checkpoint-{self.state.best_global_step}"
        if best.is_dir():  # the run folder may have been moved
            self.state.best_model_checkpoint = str(best)
        running = json.loads((checkpoint / RUNNING).read_text("utf-8"))
        # the summary that ends a run counts this session's steps only
        self.session_loss = -running["loss"]
        sums = running["sums"] | {"loss": [running["loss"] * self.args.world_size, "float32"]}
        first = self.args.process_index == 0  # these are sums of all processes, which the next log adds up again
        self.sums = {
            key: torch.tensor(value if first else 0, dtype=getattr(torch, kind), device=self.args.device)
            for key, (value, kind) in sums.items()
        }
        self.logged_at = running["logged_at_step"]
        watched = running["watched"]  # of older checkpoints four values, two of which have no meaning anymore
        self.guard.overflows, self.health.warnings = watched[1::2] if len(watched) == 4 else watched
        self.clock = time.monotonic() - running["seconds_since_log"]
        self.train_seconds = running["seconds"]
        stops = [one for one in self.callback_handler.callbacks if isinstance(one, EarlyStoppingCallback)]
        self.ended = any(one.early_stopping_patience_counter >= one.early_stopping_patience for one in stops)
