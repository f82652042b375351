"""ORPO (Odds Ratio Preference Optimization, arXiv 2403.07691) with QLoRA on one consumer GPU.

Public names load lazily: `import orpo_lite` imports neither torch nor transformers.
"""

import logging
from typing import TYPE_CHECKING

from orpo_lite.common import lazy_names

if TYPE_CHECKING:
    from orpo_lite.objective.loss import orpo_loss
    from orpo_lite.recipe import Recipe
    from orpo_lite.trainer.config import ORPOConfig
    from orpo_lite.trainer.trainer import ORPOTrainer

__version__ = "0.1.0"
__all__ = ["ORPOConfig", "ORPOTrainer", "Recipe", "orpo_loss"]

# on CPUs with AVX512_BF16 bitsandbytes asks for a kernel from the hub, which has no gradient: nothing to train with
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# checkpoints that are less than a second apart have the order of their steps in any case
logging.getLogger("transformers.trainer_utils").addFilter(lambda record: "mtime" not in str(record.msg))

__getattr__ = lazy_names(
    __name__,
    {
        "ORPOConfig": "orpo_lite.trainer.config",
        "ORPOTrainer": "orpo_lite.trainer.trainer",
        "Recipe": "orpo_lite.recipe",
        "orpo_loss": "orpo_lite.objective.loss",
    },
)
