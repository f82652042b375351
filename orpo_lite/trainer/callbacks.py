"""Output of a run while it trains: one progress bar, metrics.jsonl, and the experiment trackers of `report_to`."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, TrackioCallback
from transformers.trainer_callback import ProgressCallback

from orpo_lite.common.errors import RequestError
from orpo_lite.common.files import append_line, check_mounted, disk_of, write_atomically
from orpo_lite.common.text import nearest

logger = logging.getLogger(__name__)


class Bar(ProgressCallback):
    """transformers' bar with loss, margin, accuracy and tokens/s beside it, instead of a printed dict per log."""

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show no second bar: an evaluation ends in its own line."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        if "eval_rewards/accuracies" in logs:
            self.training_bar.write(
                f"step {state.global_step}: held-out loss {logs['eval_loss']:.4f}, margin "
                f"{logs['eval_rewards/margins']:.4f}, accuracy {logs['eval_rewards/accuracies']:.1%}"
            )
        elif "rewards/margins" in logs:
            counts = {"skipped": logs.get("skipped_steps"), "overflows": logs.get("overflow_steps")}
            self.training_bar.set_postfix_str(
                f"loss {logs['loss']:.4f}, margin {logs['rewards/margins']:.4f}, accuracy "
                f"{logs['rewards/accuracies']:.0%}, {logs['tokens_per_second']:,.0f} tokens/s"
                + "".join(f", {count} {what}" for what, count in counts.items() if count)
            )


class MetricsFile(TrainerCallback):
    """metrics.jsonl: one line per log step; evaluation lines carry eval_ names.

    Args:
        path: the file; overwritten unless `resumed`.
        resumed: training resumes from a checkpoint, and the evaluation before training is already in the file.
    """

    def __init__(self, path: Path, resumed: bool):
        self.path, self.resumed, self.disk = path, resumed, disk_of(path.parent)
        self.evaluated: tuple[Any, Any] | None = None
        self.waiting: list[str] = []
        if not resumed:
            path.unlink(missing_ok=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep only the lines up to the checkpoint, by its own history: later steps are about to be repeated."""
        if not state.is_world_process_zero or not self.resumed:
            return
        lines = [json.dumps({"step": 0} | logs) for logs in self._before_training()]
        for logs in state.log_history:
            if self._counts(logs):
                lines.append(json.dumps({"step": logs["step"]} | {k: v for k, v in logs.items() if k != "step"}))
        write_atomically(self.path, "".join(f"{line}\n" for line in lines))

    def _before_training(self) -> list[dict[str, Any]]:
        """Read the lines of step 0, which no checkpoint knows of."""
        found = []
        for line in self.path.read_bytes().splitlines() if self.path.is_file() else ():
            with contextlib.suppress(ValueError, AttributeError):  # half a line of a run that was killed
                logs = json.loads(line)
                found += [logs] if logs.get("step") == 0 else []
        return found

    def _counts(self, logs: dict[str, Any]) -> bool:
        """Return False for the summary of the whole run, which is in run.json, and for a repeated evaluation."""
        if "train_runtime" in logs:
            return False
        if "eval_loss" in logs:
            logs.pop("eval_model_preparation_time", None)
            last, self.evaluated = self.evaluated, (logs.get("step"), logs["eval_loss"])
            return last != self.evaluated
        return True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.resumed and state.global_step == 0:
            return
        if state.is_world_process_zero and logs and self._counts({"step": state.global_step} | logs):
            logs.pop("eval_model_preparation_time", None)
            self.waiting.append(json.dumps({"step": state.global_step} | logs))
            self._write()

    def _write(self) -> None:
        """Append the waiting lines; with a full disk or a missing drive they keep waiting, and training continues."""
        try:
            check_mounted(self.path.parent, self.disk)
            append_line(self.path, "\n".join(self.waiting))
        except OSError as error:
            if len(self.waiting) == 1:
                logger.warning("%s cannot be written (%s): its lines are kept until it can", self.path, error.strerror)
            return
        self.waiting.clear()


# ---- experiment trackers -----------------------------------------------------------------------------------------------

MODULES = {"azure_ml": ("azureml",), "flyte": ("flytekit",), "tensorboard": ("tensorboard", "tensorboardX")}
"""Modules, any of which a tracker works with, where they are not called as the tracker is."""
PACKAGES = {"azure_ml": "azureml-core", "dagshub": "dagshub mlflow", "flyte": "flytekit"}
"""What to install for it, where that is not called as the tracker is."""


def check_trackers(report_to: Any) -> None:
    """Refuse a tracker that would fail only after loading the model.

    Args:
        report_to: as in TrainingArguments: a name or several; "all" and "none" need nothing.

    Raises:
        RequestError: a name that transformers does not know, or a package that is not installed, with the pip command.
    """
    for name in [report_to] if isinstance(report_to, str) else report_to or []:
        if name in ("all", "none"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise RequestError(
                f"report_to: found {name!r}{nearest(str(name), INTEGRATION_TO_CALLBACK)}, expected none, all, or some of {known}"
            )
        if not any(importlib.util.find_spec(module) for module in MODULES.get(name, (name,))):
            packages = PACKAGES.get(name, name)
            raise RequestError(
                f"report_to: {name} is asked for, but its package is not installed: pip install {packages}, or remove it"
            )


def end_trackers(trainer: Any) -> None:
    """Finish trackio's run, which an evaluation after training has started again."""
    if trainer.is_world_process_zero() and any(
        isinstance(one, TrackioCallback) for one in trainer.callback_handler.callbacks
    ):
        import trackio  # pyright: ignore[reportMissingImports]
        from trackio import context_vars  # pyright: ignore[reportMissingImports]

        if context_vars.current_run.get() is not None:
            trackio.finish()
