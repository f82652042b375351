"""Keep `python -m orpo_lite.compat.trl_orpo` working; the code is in orpo_lite/train/trl_orpo.py."""

from pathlib import Path

__path__ = [str(Path(__file__).parent / "train")]
