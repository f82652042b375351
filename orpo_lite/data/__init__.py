"""Preference data: rows in any shape in, tokenised pairs out, every row left out counted."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orpo_lite.data.dropped_rows import DropReport, TooManyDropped
from orpo_lite.data.lengths import pair_lengths

if TYPE_CHECKING:
    import datasets
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from orpo_lite.data.preview import command
    from orpo_lite.data.sources import Source
    from orpo_lite.data.token_cache import Tokenized, TokenizeOptions
    from orpo_lite.recipe import DataSection, DataSource

__all__ = ["DropReport", "Pairs", "TooManyDropped", "command", "lengths", "load_pairs"]


@dataclass
class Pairs:
    """Tokenised pairs, memory-mapped; columns as in `tokenize.tokenize_rows`, `source` counting training sources."""

    train: datasets.Dataset
    eval: datasets.Dataset | None
    report: DropReport
    """Over all sources."""
    shapes: dict[str, dict[str, Any]]
    """Per source: section, path, files, shape, rows read, pairs kept, whether from the cache."""
    fingerprint: str
    """Hash of the content of all rows, and of how they are sampled and held out."""

    @property
    def lengths(self) -> dict[str, np.ndarray]:
        """Tokens of the training pairs, see `lengths`."""
        return pair_lengths(self.train)


def load_pairs(
    spec: DataSection, tokenizer: PreTrainedTokenizerBase, *, encoder_decoder: bool = False, field: str = "data.train"
) -> Pairs:
    """Read, convert, tokenise and split the data of a recipe.

    Args:
        field: what errors call the training pairs.

    Raises:
        RequestError: data that cannot be found, read or understood; no chat template where one is needed.
        TooManyDropped: more than half of the training or of the held-out rows dropped, or none left; its report covers
            every source read.
    """
    from orpo_lite.data.token_cache import TokenizeOptions

    options = TokenizeOptions(
        max_length=spec.max_length,
        max_prompt_length=spec.max_prompt_length,
        max_completion_length=spec.max_completion_length,
        overlong=spec.overlong,
        completion_end=spec.completion_end,
        apply_template=spec.apply_template,
        template_kwargs=spec.template_kwargs,
        encoder_decoder=encoder_decoder,
        num_proc=spec.num_proc,
        strict=True,
    )
    shapes: dict[str, dict[str, Any]] = {}
    train = read_section(spec, spec.train, field, spec.max_rows, tokenizer, options, shapes)
    held = (
        read_section(spec, spec.eval, "data.eval", spec.max_eval_rows, tokenizer, options, shapes) if spec.eval else []
    )
    reports = [done.report for done in train], [done.report for done in held]
    report = DropReport.merge(reports[0] + reports[1])
    for name, section in zip((field, "data.eval"), reports, strict=True):
        if section:
            try:
                DropReport.merge(section).check(name)
            except TooManyDropped as error:
                error.report, error.shapes = report, shapes
                raise
    return assemble(spec, train, held, report, shapes)


def read_section(
    spec: DataSection,
    sources: list[DataSource],
    field: str,
    limit: int | None,
    tokenizer: PreTrainedTokenizerBase,
    options: TokenizeOptions,
    shapes: dict[str, dict[str, Any]],
) -> list[Tokenized]:
    """Tokenise each source; `limit` is over all of them in their order."""
    from orpo_lite.data.sources import open_source
    from orpo_lite.data.token_cache import tokenize_source

    done: list[Tokenized] = []
    section = field.removeprefix("data.")
    for number, source in enumerate(sources):
        left = None if limit is None else limit - sum(one.report.rows for one in done)
        if left == 0:
            done[-1].report.notes.append(f"{field}: the row limit left {source.path} and what follows unread")
            break
        # a recipe's built-in held-out pairs stay as they are when the training pairs are a user's
        columns = None if field == "data.eval" and source.path.startswith("builtin:") else spec.columns
        opened: Source = open_source(source, spec.split, columns, left, field)
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
            "cached": one.report.cached,
        }
    return done


def assemble(
    spec: DataSection,
    train: list[Tokenized],
    held: list[Tokenized],
    report: DropReport,
    shapes: dict[str, dict[str, Any]],
) -> Pairs:
    """Sample sources by weight and hold pairs out."""
    import numpy as np

    from orpo_lite.data.splits import hold_out, prompt_keys, sample

    random = np.random.default_rng(spec.seed)
    pool, indices = sample(train, [source.weight for source in spec.train], random)
    keys = prompt_keys(pool)[indices]
    held_rows = None
    if held and spec.eval:
        held_rows, chosen = sample(held, [source.weight for source in spec.eval], random)
        shared = int(np.isin(prompt_keys(held_rows)[chosen], keys).sum())
        if shared:
            report.notes.append(
                f"{shared:,} of {len(chosen):,} held-out pairs have a prompt that is trained on as well"
            )
        held_rows = held_rows.select(chosen)
    elif spec.eval_fraction:
        out = hold_out(keys, spec.eval_fraction, spec.max_eval_rows, random)
        held_rows = pool.select(np.unique(indices[out]))
        indices = indices[~out]
    parts = [[done.digest for done in train], [done.digest for done in held], spec.seed, spec.eval_fraction,
             spec.max_eval_rows, [source.weight for source in spec.train]]  # fmt: skip
    return Pairs(
        pool.select(indices).remove_columns("key"),
        None if held_rows is None else held_rows.remove_columns("key"),
        report,
        shapes,
        hashlib.sha256(repr(parts).encode()).hexdigest(),
    )


def __getattr__(name: str) -> Any:
    if name != "command":
        raise AttributeError(f"module 'orpo_lite.data' has no attribute {name!r}")
    from orpo_lite.data.preview import command

    return command
