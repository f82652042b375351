"""Output of a run while it trains: figures beside its bar, metrics.jsonl, and the experiment trackers of `report_to`."""

import contextlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from orpo_lite.common.console import console
from orpo_lite.common.errors import RequestError
from orpo_lite.common.files import write_atomically

logger = logging.getLogger(__name__)


class Figures(TrainerCallback):
    """Steps, loss, accuracy, margin and tokens/s for the bar of the training, and a line for each evaluation."""

    def __init__(self, update: Callable[..., None]):
        self.update = update

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.update(total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.update(completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if "eval_rewards/accuracies" in logs:
            console.print(
                f"step {state.global_step}: held-out loss {logs['eval_loss']:.4f}, margin "
                f"{logs['eval_rewards/margins']:.4f}, accuracy {logs['eval_rewards/accuracies']:.1%}"
            )
        elif "rewards/margins" in logs:
            overflows = logs.get("overflow_steps")
            figures = [
                f"loss {logs['loss']:.4f}",
                f"accuracy {logs['rewards/accuracies']:.0%}",
                *([f"{overflows} overflows"] if overflows else []),
                f"margin {logs['rewards/margins']:.4f}",
                f"{logs['tokens_per_second']:,.0f} tokens/s",
            ]
            self.update(figures=figures)


class MetricsFile(TrainerCallback):
    """metrics.jsonl: one line per log step, evaluation lines with eval_ names; written as a whole at each log.

    Args:
        path: the file.
        resumed: training resumes from a checkpoint, and the evaluation before training is already in the file.
    """

    def __init__(self, path: Path, resumed: bool):
        self.path, self.resumed = path, resumed
        self.before: list[dict[str, Any]] = []
        """Logs of step 0, which neither `train` nor a checkpoint keeps."""
        self.failed = False
        for line in path.read_bytes().splitlines() if resumed and path.is_file() else ():
            with contextlib.suppress(ValueError, AttributeError):  # half a line of an older version's run
                logs = json.loads(line)
                self.before += [logs] if logs.get("step") == 0 else []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Write the file anew; with a full disk or a missing drive it stays as it is, and training continues."""
        if state.global_step == 0:
            if self.resumed:
                return
            self.before += state.log_history[-1:]
        if not state.is_world_process_zero:
            return
        try:
            write_atomically(self.path, "".join(f"{json.dumps(line)}\n" for line in self._lines(state)))
            self.failed = False
        except OSError as error:
            if not self.failed:
                logger.warning("%s cannot be written (%s): its lines are kept until it can", self.path, error.strerror)
            self.failed = True

    def _lines(self, state: Any) -> list[dict[str, Any]]:
        """Return the lines so far, without the summary of a run, which is in run.json, and repeated evaluations."""
        lines, evaluated = [], None
        for logs in [*self.before, *(one for one in state.log_history if one["step"] > 0)]:
            last, evaluated = evaluated, (logs["step"], logs["eval_loss"]) if "eval_loss" in logs else evaluated
            if "train_runtime" not in logs and not ("eval_loss" in logs and last == evaluated):
                left_out = ("step", "eval_model_preparation_time")
                kept = {name: value for name, value in logs.items() if name not in left_out}
                lines.append({"step": logs["step"]} | kept)
        return lines


def check_trackers(report_to: Any) -> None:
    """Refuse a tracker that would fail only after loading the model.

    Raises:
        RequestError: a name that transformers does not know, or a package that is not installed, with what to install.
    """
    if report_to in ("all", ["all"], ["none"]):
        return
    try:
        for callback in get_reporting_integration_callbacks(report_to):
            callback()
    except (RuntimeError, ImportError, ValueError) as error:  # which lists the names, or says what to install
        raise RequestError(f"report_to: found {report_to}: {error}") from error
