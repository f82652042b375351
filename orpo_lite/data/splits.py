"""Which tokenised rows are trained on and which are held out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from orpo_lite.common.errors import RequestError

if TYPE_CHECKING:
    import datasets

    from orpo_lite.data.token_cache import Tokenized


def sample(
    done: list[Tokenized], weights: list[float], random: np.random.Generator
) -> tuple[datasets.Dataset, np.ndarray]:
    """All sources end to end, and the rows of them that an epoch sees: weight 0.5 a seeded half, 2 each row twice."""
    import datasets

    parts, start = [], 0
    for one, weight in zip(done, weights, strict=False):
        rows = len(one.rows)
        extra = random.permutation(rows)[: round((weight - int(weight)) * rows)] if weight % 1 else np.arange(0)
        if rows and not int(weight) and not len(extra):
            extra = np.arange(1)  # a source that is named is seen
        parts.append(start + np.sort(np.concatenate([np.tile(np.arange(rows), int(weight)), extra])))
        start += rows
    rows = datasets.concatenate_datasets([one.rows for one in done]) if len(done) > 1 else done[0].rows
    return rows, np.concatenate(parts).astype(np.int64)


def prompt_keys(rows: datasets.Dataset) -> np.ndarray:
    """Hash of each row's prompt, (N,) int64."""
    return rows.data.column("key").to_numpy()


def hold_out(keys: np.ndarray, fraction: float, limit: int | None, random: np.random.Generator) -> np.ndarray:
    """Choose rows to hold out, whole prompts at a time, so that no prompt is on both sides.

    Args:
        keys: (N,) hash of each row's prompt.
        fraction: share of the rows, at least one row.
        limit: rows at most.

    Returns:
        (N,) bool, true where held out.

    Raises:
        RequestError: all rows share one prompt, so that nothing could be trained on.
    """
    unique, group, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    if len(unique) < 2:
        raise RequestError(
            f"data.eval_fraction is {fraction}, but {'the only row' if len(keys) == 1 else 'all rows'} kept "
            "would have to be held out, since there is one prompt only: set data.eval_fraction=0 or name data.eval"
        )
    wanted = min(max(1, round(fraction * len(keys))), limit or len(keys))
    # by a seeded order of the prompts' hashes: a row added to the data moves no other row across
    order = np.argsort(unique ^ random.integers(2**63, dtype=np.int64))
    chosen, taken = np.zeros(len(unique), bool), 0
    for place in order:
        if taken + sizes[place] <= wanted and taken + sizes[place] < len(keys):
            chosen[place] = True
            taken += sizes[place]
            if taken == wanted:
                break
    if not taken:
        chosen[np.argmin(sizes)] = True
    return chosen[group]
