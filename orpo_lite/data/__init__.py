"""Preference data: rows of any shape in, tokenized pairs out, every row left out counted."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from orpo_lite.common.errors import RequestError
from orpo_lite.data.dropped_rows import DropReport, TooManyDropped
from orpo_lite.data.lengths import numbers, pair_lengths
from orpo_lite.data.quality import end_to_end, namer, without_numbers
from orpo_lite.data.repair import note_on_repeats, without_repeats
from orpo_lite.data.sources import open_source

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

    from orpo_lite.data.token_cache import Tokenized
    from orpo_lite.recipe import DataSection, DataSource

__all__ = ["DropReport", "Pairs", "TooManyDropped", "load_pairs", "pair_lengths"]

Shapes = dict[str, dict[str, Any]]
"""Per source: section, path, files, shape, rows read, pairs kept, weight."""


@dataclass
class Pairs:
    """Tokenized pairs, memory-mapped; columns as in `tokenize_rows`, where `source` counts the training sources."""

    train: datasets.Dataset
    eval: datasets.Dataset | None
    report: DropReport
    """Over all sources."""
    shapes: Shapes
    fingerprint: str
    """Hash of the content of all rows, and of how they are sampled and held out."""
    sources: list[Tokenized]
    """The training sources, before they are sampled and pairs held out."""


def load_pairs(spec: DataSection, tokenizer: PreTrainedTokenizerBase, *, field: str = "data.train") -> Pairs:
    """Read, convert, tokenize and split the data of a recipe.

    Args:
        field: name of the training pairs in errors.

    Raises:
        RequestError: data that cannot be found, read or understood; no chat template where one is needed.
        TooManyDropped: more than half of the training or of the held-out rows dropped, or none left; its report covers
            every source read.
    """
    shapes: Shapes = {}

    def read(sources: list[DataSource], name: str, limit: int | None) -> list[Tokenized]:
        return read_section(spec, sources, name, limit, tokenizer, shapes)

    train = read(spec.train, field, spec.max_rows)
    held_out = read(spec.eval or [], "data.eval", spec.max_eval_rows)
    report = DropReport.merge([done.report for done in train + held_out])
    for name, section in ((field, train), ("data.eval", held_out)):
        problem = DropReport.merge([done.report for done in section]).problem(name) if section else None
        if problem:
            raise TooManyDropped(problem, report, shapes, train)
    if spec.deduplicate:
        train, held_out = without_repeats(train), held_out and without_repeats(held_out)
        report = DropReport.merge([done.report for done in train + held_out])
        for one in train + held_out:
            shapes[one.label]["kept"] = one.report.kept
    else:
        report.notes += note_on_repeats(train, field)
    return assemble(spec, train, held_out, report, shapes)


def read_section(
    spec: DataSection,
    sources: list[DataSource],
    field: str,
    limit: int | None,
    tokenizer: PreTrainedTokenizerBase,
    shapes: Shapes,
) -> list[Tokenized]:
    """Tokenize each source, up to a limit of rows over all of them in their order, and describe it in `shapes`."""
    from orpo_lite.data.token_cache import TokenizeOptions, tokenize_source  # which imports torch

    options = TokenizeOptions(**dict(spec), strict=True)
    section = field.removeprefix("data.")
    done: list[Tokenized] = []
    for number, source in enumerate(sources):
        left = None if limit is None else limit - sum(one.report.rows for one in done)
        if left == 0:
            done[-1].report.notes.append(f"{field}: the row limit left {source.path} and the sources after it unread")
            break
        # a recipe's built-in held-out pairs keep their columns when the training pairs are a user's
        columns = None if field == "data.eval" and source.path.startswith("builtin:") else spec.columns
        opened = open_source(source, spec.split, columns, left, field)
        if any(shape["path"] == source.path for shape in shapes.values()):
            opened.label = f"{source.path} ({section} {number + 1})"
        one = tokenize_source(opened, tokenizer, options, number)
        done.append(one)
        shapes[opened.label] = {
            "section": section,
            "path": source.path,
            "files": opened.files,
            "shape": one.shape,
            "rows": one.report.rows,
            "kept": one.report.kept,
            "weight": source.weight,
        }
    return done


def assemble(
    spec: DataSection, train: list[Tokenized], held_out: list[Tokenized], report: DropReport, shapes: Shapes
) -> Pairs:
    """Sample sources by weight and hold pairs out."""
    random = np.random.default_rng(spec.seed)
    pool, indices = sample(train, [source.weight for source in spec.train], random)
    keys = numbers(pool, "key")[indices]
    held_rows = None
    if held_out and spec.eval:
        held_rows, chosen = sample(held_out, [source.weight for source in spec.eval], random)
        asked = numbers(held_rows, "key")[chosen]
        shared = np.flatnonzero(np.isin(asked, keys))
        if len(shared):
            held_name, name = namer(held_out), namer(train)
            two = [(held_name(int(chosen[n])), name(int(indices[np.argmax(keys == asked[n])]))) for n in shared[:3]]
            where = ", ".join(f"held-out {one} and {other} of training" for one, other in two)
            report.notes.append(
                f"{len(shared):,} of {len(chosen):,} held-out pairs have a prompt that is trained on as well: {where}"
            )
        held_rows = held_rows.select(chosen)
    elif spec.eval_fraction:
        out = hold_out(keys, spec.eval_fraction, spec.max_eval_rows, random)
        held_rows = pool.select(np.unique(indices[out]))
        indices = indices[~out]
    parts = [[done.digest for done in train], [done.digest for done in held_out], spec.seed, spec.eval_fraction,
             spec.max_eval_rows, [source.weight for source in spec.train], *["deduplicate"] * spec.deduplicate]  # fmt: skip
    return Pairs(
        without_numbers(pool.select(indices)),
        None if held_rows is None else without_numbers(held_rows),
        report,
        shapes,
        hashlib.sha256(repr(parts).encode()).hexdigest(),
        train,
    )


def sample(
    done: list[Tokenized], weights: list[float], random: np.random.Generator
) -> tuple[datasets.Dataset, np.ndarray]:
    """Return all sources end to end, and the rows that an epoch sees: weight 0.5 is a seeded half, 2 each row twice."""
    parts, start = [], 0
    for one, weight in zip(done, weights, strict=False):
        rows = len(one.rows)
        extra = random.permutation(rows)[: round((weight - int(weight)) * rows)] if weight % 1 else np.arange(0)
        if rows and not int(weight) and not len(extra):
            extra = np.arange(1)  # every source that is named is seen
        parts.append(start + np.sort(np.concatenate([np.tile(np.arange(rows), int(weight)), extra])))
        start += rows
    return end_to_end(done), np.concatenate(parts).astype(np.int64)


def hold_out(keys: np.ndarray, fraction: float, limit: int | None, random: np.random.Generator) -> np.ndarray:
    """Choose rows to hold out, whole prompts at a time, so that no prompt is on both sides.

    Args:
        keys: (N,) hash of each row's prompt.
        fraction: share of the rows, at least one row.
        limit: the most rows.
        random: decides which prompts.

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
    # in a seeded order of the prompts' hashes: a row added to the data moves no other row to the other side
    order = np.argsort(unique ^ random.integers(2**63, dtype=np.int64))
    chosen, taken = np.zeros(len(unique), bool), 0
    for place in order:
        if taken + sizes[place] <= wanted and taken + sizes[place] < len(keys):
            chosen[place] = True
            taken += sizes[place]
    if not taken:
        chosen[np.argmin(sizes)] = True
    return chosen[group]
