"""Experiment trackers of transformers' `report_to`: missing packages are found before training; tables of answers."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)

from orpo_lite.common.errors import RequestError
from orpo_lite.common.text import inline, markdown_table, nearest

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


class SameRun(TrainerCallback):
    """Sends what is logged after training to the same trackio run.

    transformers ends trackio's run with training; the last evaluation and its answers come after that.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and "trackio" in args.report_to and args.run_name is None:
            from trackio import context_vars  # pyright: ignore[reportMissingImports]

            run = context_vars.current_run.get()
            args.run_name = run.name if run is not None else None


def log_table(trainer: Any, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Send a table of texts and numbers to the trackers that take tables, at the trainer's present step.

    TensorBoard gets it as text, trackio and W&B as their own tables; only the first process sends it.
    """
    if not trainer.is_world_process_zero() or not rows:
        return
    step = trainer.state.global_step
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            writer = callback.tb_writer
            if writer is None:  # closed when training ended
                from torch.utils.tensorboard import SummaryWriter

                writer = SummaryWriter(log_dir=callback.logging_dir)
            cells = [[inline(str(cell)) for cell in row] for row in rows]
            writer.add_text(name, markdown_table(cells, columns), step)
            writer.flush()
            if writer is not callback.tb_writer:
                writer.close()
        elif isinstance(callback, TrackioCallback):
            import pandas
            import trackio  # pyright: ignore[reportMissingImports]
            from trackio import context_vars  # pyright: ignore[reportMissingImports]

            if context_vars.current_run.get() is None:
                callback.setup(trainer.args, trainer.state, trainer.model)
            frame = pandas.DataFrame([list(row) for row in rows], columns=list(columns))  # type: ignore[arg-type]
            trackio.log({name: trackio.Table(dataframe=frame), "train/global_step": step})
        elif isinstance(callback, WandbCallback):
            import wandb  # pyright: ignore[reportMissingImports]

            wandb.log(
                {name: wandb.Table(columns=list(columns), data=[list(row) for row in rows]), "train/global_step": step}
            )


def end(trainer: Any) -> None:
    """Finish trackio's run, which an evaluation after training has started again."""
    if trainer.is_world_process_zero() and any(
        isinstance(one, TrackioCallback) for one in trainer.callback_handler.callbacks
    ):
        import trackio  # pyright: ignore[reportMissingImports]
        from trackio import context_vars  # pyright: ignore[reportMissingImports]

        if context_vars.current_run.get() is not None:
            trackio.finish()


def sample_rows(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Return columns and rows of a run's answers before and after training."""
    columns = ["prompt", "before", "after", "before: mean log-prob", "after: mean log-prob"]
    rows = [
        [old["prompt"], old["answer"], new["answer"], old.get("logp"), new.get("logp")]
        for old, new in zip(before, after, strict=False)
    ]
    return columns, rows
