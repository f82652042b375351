"""The contract with transformers.Trainer: which versions it was tested on, and all that is used of it beyond its public API.

Everything below is held by tests/trainer/test_transformers_contract.py, which fails by name where a version breaks it:

- `_save_checkpoint(model, trial)` writes `args.output_dir/checkpoint-N` through `save_model`, and is called where
  `control.should_save` is set. Overridden, to write it aside first.
- `_load_best_model()` is called at the end where `args.load_best_model_at_end` is set. Overridden, to check it first.
- For each optimizer step, in this order: `get_batch_samples`, `training_step` for each item it returned, clipping,
  `on_pre_optimizer_step`, `optimizer.step`, `on_optimizer_step`, `on_step_end`, `log`, `evaluate`, `_save_checkpoint`.
- No item and `control.should_training_stop` from `get_batch_samples` end training without another step.
- Nobody divides the loss by the number of accumulation steps but `training_step`, which ORPOTrainer replaces as a whole.
"""

from __future__ import annotations

import logging

import transformers
from packaging.version import Version

logger = logging.getLogger(__name__)

LOWEST, HIGHEST = "5.2", "5.23"
"""Versions of transformers between which everything is tested, patch releases included."""
PRIVATE = {"_save_checkpoint": ("model", "trial"), "_load_best_model": ()}
"""Private methods of transformers.Trainer that are overridden, and their parameters. No private attribute is read."""


def warn_if_untested(version: str = transformers.__version__) -> None:
    """Log one line where transformers is older or newer than what was tested."""
    release = Version(version).release[:2]
    if not Version(LOWEST).release <= release <= Version(HIGHEST).release:
        words = "transformers %s is outside the tested range %s to %s: check that the loss falls as before, or install another"
        logger.warning(words, version, LOWEST, HIGHEST)
