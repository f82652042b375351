"""Held-out results by prompt length, by which answer is longer, and by source: where an average hides a difference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset

    from orpo_lite.recipe import DataSection, DataSource

FEWEST = 8
"""Pairs from which on prompts are split by their length."""


def breakdown(
    chosen: np.ndarray, rejected: np.ndarray, beta: float, pairs: Dataset, sources: list[str] | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Accuracy and margin of groups of pairs, each group of pairs split whole.

    Args:
        chosen: mean log-prob of each chosen completion, (N,).
        rejected: the same of the rejected ones.
        pairs: the tokenised pairs, in that order.
        sources: the name of each pair's source.

    Returns:
        Per grouping (prompt_tokens, longer_answer, source) a list of {"bucket", "pairs", "accuracy", "interval" (95%,
        Wilson), "margin" (mean reward margin)}; buckets without pairs are left out.
    """
    from orpo_lite.data import pair_lengths
    from orpo_lite.evaluate.held_out import wilson_interval

    counted = pair_lengths(pairs)
    longer = np.sign(counted["chosen"] - counted["rejected"])
    words = {1: "chosen longer", 0: "equally long", -1: "chosen shorter"}
    groups = {
        "prompt_tokens": by_length(counted["prompt"]),
        "longer_answer": [(word, longer == sign) for sign, word in words.items()],
    }
    if sources is not None:
        names = np.array(sources, dtype=object)
        groups["source"] = [
            (name, names == name) for name in sorted(set(sources), key=lambda n: (-sources.count(n), n))
        ]
    right, margin = chosen > rejected, beta * (chosen - rejected)

    def of(name: str, mask: np.ndarray) -> dict[str, Any]:
        count, hits = int(mask.sum()), int(right[mask].sum())
        return {"bucket": name, "pairs": count, "accuracy": hits / count, "interval": wilson_interval(hits, count),
                "margin": float(margin[mask].mean())}  # fmt: skip

    return {group: [of(name, mask) for name, mask in parts if mask.any()] for group, parts in groups.items()}


def by_length(tokens: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Quarters of the pairs by their prompt's tokens; equal lengths stay together."""
    if len(tokens) < FEWEST:
        return [("all", np.ones(len(tokens), dtype=bool))]
    edges = np.unique(np.quantile(tokens, (0.25, 0.5, 0.75), method="inverted_cdf")).tolist()
    edges = [edge for edge in edges if edge < tokens.max()]
    bounds = [(0, edges[0]), *zip(edges, edges[1:], strict=False), (edges[-1], None)] if edges else [(0, None)]
    found = []
    for low, high in bounds:
        name = f"up to {high}" if not low else f"{low + 1} and more" if high is None else f"{low + 1} to {high}"
        if low and high == low + 1:
            name = str(high)
        found.append(
            (name if edges else "all", (tokens > low) & (tokens <= (high or tokens.max())) | (tokens == 0) * (not low))
        )
    return found


def source_names(spec: DataSection, sources: list[DataSource], pairs: Dataset) -> list[str]:
    """Where each pair comes from: its row's `source` column where the data have one, else the path in the recipe."""
    from orpo_lite.data.lengths import numbers
    from orpo_lite.data.sources import local_files, open_source, shorten
    from orpo_lite.recipe.loading import resolve_path

    which, rows = numbers(pairs, "source"), numbers(pairs, "row")
    names = np.empty(len(pairs), dtype=object)
    for number, one in enumerate(sources):
        mine = np.flatnonzero(which == number)
        names[mine] = shorten(one.path)
        if not len(mine) or not local_files(resolve_path(one.path), one.split or spec.split):
            continue  # of hub data sets only the columns that matter are read
        places: dict[int, list[int]] = {}
        for place in mine.tolist():
            places.setdefault(int(rows[place]), []).append(place)
        start = 0
        for batch in open_source(one, spec.split, spec.columns, streaming=True).batches():
            for row in places.keys() & range(start, start + len(batch)):
                raw = batch[row - start]
                name = raw.get("source") if isinstance(raw, dict) else None
                if isinstance(name, str) and name.strip():
                    names[places[row]] = shorten(name.strip())
            start += len(batch)
    return names.tolist()
