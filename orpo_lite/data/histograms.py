"""Lengths of pairs as counts, small enough to be kept with a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orpo_lite.data import Pairs

BINS = 60
"""At most."""


def length_histograms(pairs: Pairs) -> dict[str, Any]:
    """Tokens of prompts, chosen and rejected answers of the training ("train") and held-out pairs ("eval").

    Returns:
        By split and part: `width` of a bin in tokens, `counts` of the bins from 0 on, median, p95 and max. A split without rows is
        left out.
    """
    splits = {"train": pairs.train, "eval": pairs.eval}
    return {name: histograms(rows) for name, rows in splits.items() if rows is not None and len(rows)}


def histograms(rows: Any) -> dict[str, Any]:
    """As `length_histograms` of one split, all parts with bins of the same width."""
    import numpy as np

    from orpo_lite.data import pair_lengths

    counted = {name: tokens for name, tokens in pair_lengths(rows).items() if name != "total"}
    longest = max(int(tokens.max()) for tokens in counted.values())
    width = next(w for power in range(9) for w in (10**power, 2 * 10**power, 5 * 10**power) if longest // w < BINS)
    found = {}
    for name, tokens in counted.items():
        middle, high = np.percentile(tokens, [50, 95]).tolist()
        counts = np.bincount(tokens // width).tolist()
        found[name] = {"width": width, "counts": counts, "median": middle, "p95": high, "max": int(tokens.max())}
    return found
