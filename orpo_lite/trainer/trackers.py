"""Experiment trackers that transformers' `report_to` knows: found missing before training, and given tables of answers."""

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
from orpo_lite.common.markdown import inline
from orpo_lite.common.markdown import table as markdown_table
from orpo_lite.common.text import nearest

NEEDS: dict[str, tuple[tuple[str, ...], str]] = {
    "azure_ml": (("azureml",), "azureml-core"),
    "clearml": (("clearml",), "clearml"),
    "codecarbon": (("codecarbon",), "codecarbon"),
    "comet_ml": (("comet_ml",), "comet_ml"),
    "dagshub": (("dagshub",), "dagshub mlflow"),
    "dvclive": (("dvclive",), "dvclive"),
    "flyte": (("flytekit",), "flytekit"),
    "kubeflow": (("kubeflow",), "kubeflow"),
    "mlflow": (("mlflow",), "mlflow"),
    "neptune": (("neptune",), "neptune"),
    "swanlab": (("swanlab",), "swanlab"),
    "tensorboard": (("tensorboard", "tensorboardX"), "tensorboard"),
    "trackio": (("trackio",), "trackio"),
    "wandb": (("wandb",), "wandb"),
}
"""Modules, any of which a tracker works with, and what to install."""


def check_trackers(report_to: Any) -> None:
    """Find a tracker missing before anything is spent.

    Args:
        report_to: as in TrainingArguments: a name or several; "all" and "none" need nothing.

    Raises:
        RequestError: one that transformers does not know, or whose package is not installed; with the pip command.
    """
    for name in [report_to] if isinstance(report_to, str) else report_to or []:
        if name in ("all", "none"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise RequestError(
                f"report_to: found {name!r}{nearest(str(name), INTEGRATION_TO_CALLBACK)}, expected none, all, or some of {known}"
            )
        modules, packages = NEEDS.get(name, ((), ""))
        if modules and not any(importlib.util.find_spec(module) for module in modules):
            raise RequestError(
                f"report_to: {name} is asked for, and its package is not installed: pip install {packages}, or leave it out"
            )


class SameRun(TrainerCallback):
    """Lets what is logged after training go to the run that was logged to while it lasted.

    transformers ends trackio's run with training; a run folder's last evaluation and its answers come after that.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and "trackio" in args.report_to and args.run_name is None:
            from trackio import context_vars  # pyright: ignore[reportMissingImports]

            run = context_vars.current_run.get()
            args.run_name = run.name if run is not None else None


def log_table(trainer: Any, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Send a table to the trackers that take tables: TensorBoard as text, trackio and W&B as their own.

    On the first process only. Cells are texts and numbers, at the trainer's present step.
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
    """Send what waits to trackio, whose run an evaluation after training has begun again."""
    if trainer.is_world_process_zero() and any(
        isinstance(one, TrackioCallback) for one in trainer.callback_handler.callbacks
    ):
        import trackio  # pyright: ignore[reportMissingImports]
        from trackio import context_vars  # pyright: ignore[reportMissingImports]

        if context_vars.current_run.get() is not None:
            trackio.finish()


def sample_rows(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of a run's answers before and after training."""
    columns = ["prompt", "before", "after", "before: mean log-prob", "after: mean log-prob"]
    rows = [
        [old["prompt"], old["answer"], new["answer"], old.get("logp"), new.get("logp")]
        for old, new in zip(before, after, strict=False)
    ]
    return columns, rows
