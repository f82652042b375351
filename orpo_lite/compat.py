"""Keep `python -m orpo_lite.compat.trl_orpo` working; its folder is orpo_lite/train/compat."""

from pathlib import Path

__path__ = [str(Path(__file__).parent / "train" / "compat")]
