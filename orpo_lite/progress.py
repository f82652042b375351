"""What a run shows and writes while it trains: one progress bar, metrics.jsonl, and the layers that checkpoint."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from orpo_lite.model.offload import HostMemory, check_count, checkpointing_layers, offload

logger = logging.getLogger(__name__)


class Bar(ProgressCallback):
    """transformers' bar with loss, margin, accuracy and tokens/s beside it, in place of a printed dict a log."""

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """No second bar: an evaluation ends in a line of its own."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        if "eval_rewards/accuracies" in logs:
            self.training_bar.write(
                f"step {state.global_step}: held-out loss {logs['eval_loss']:.4f}, margin "
                f"{logs['eval_rewards/margins']:.4f}, accuracy {logs['eval_rewards/accuracies']:.1%}"
            )
        elif "rewards/margins" in logs:
            counts = {"left out": logs.get("skipped_steps"), "overflows": logs.get("overflow_steps")}
            self.training_bar.set_postfix_str(
                f"loss {logs['loss']:.4f}, margin {logs['rewards/margins']:.4f}, accuracy "
                f"{logs['rewards/accuracies']:.0%}, {logs['tokens_per_second']:,.0f} tokens/s"
                + "".join(f", {count} {what}" for what, count in counts.items() if count)
            )


class MetricsFile(TrainerCallback):
    """metrics.jsonl: one line a log step; evaluation lines carry eval_ names.

    Args:
        path: the file; written anew unless `resumed`.
        resumed: whether training goes on from a checkpoint. The evaluation before training is in the file then.
    """

    def __init__(self, path: Path, resumed: bool):
        self.path, self.resumed = path, resumed
        self.evaluated: tuple[int, Any] | None = None
        if not resumed:
            path.unlink(missing_ok=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """On resume, lines past the checkpoint go: those steps are about to be repeated."""
        if state.is_world_process_zero and self.path.is_file():
            lines = self.path.read_text("utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= state.global_step]
            self.path.write_text("".join(kept), "utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.resumed and state.global_step == 0:
            return
        if logs and "eval_loss" in logs:
            logs.pop("eval_model_preparation_time", None)
            # the evaluation that ends a run often repeats the last one in training
            if self.evaluated == (state.global_step, logs["eval_loss"]):
                return
            self.evaluated = state.global_step, logs["eval_loss"]
        # the summary that ends a run is in run.json
        if state.is_world_process_zero and logs and "train_runtime" not in logs:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step} | logs) + "\n")


class CheckpointedLayers(TrainerCallback):
    """Recompute only the first layers in the backward pass, or keep what they save in the host's memory, or both.

    Args:
        count: layers that recompute their activations, the first ones; None for all. The others keep them.
        offload: send what those layers keep to the host's memory until their backward pass.
    """

    def __init__(self, count: int | None, offload: bool = False):
        self.count, self.offload = count, offload

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        layers = checkpointing_layers(model)
        check_count(self.count, len(layers))
        count = len(layers) if self.count is None else self.count
        for i, layer in enumerate(layers):
            layer.gradient_checkpointing = i < count
        if self.offload and args.device.type == "cuda":
            offload(layers[:count], HostMemory())
        elif self.offload:
            logger.warning("memory.offload_activations: the CPU's own memory holds the activations: nothing to offload")
