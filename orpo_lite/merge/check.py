"""The check of a merged model before it gets its name: against the adapter model, and against the one that was trained."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from orpo_lite.common.errors import RequestError
from orpo_lite.merge import verify
from orpo_lite.merge.base import Base
from orpo_lite.merge.plan import Plan, make_plan
from orpo_lite.model.precision import default_device
from orpo_lite.recipe import ModelSection

TOKENS = 16
"""Of each probe: short, since they run on the CPU."""
TEXTS = (
    "The capital of France is Paris, and the largest city of Germany is Berlin. Both lie on rivers, and both were",
    "To boil an egg, put it into boiling water for eight minutes, then cool it under cold water before you peel it.",
    "def mean(numbers):\n    total = 0\n    for number in numbers:\n        total += number\n    return total / len(numbers)\n",
)
"""Where a run left no training rows to probe with."""
ROOM = 256 << 20
MANY, SECONDS_A_WEIGHT = 3 * 10**9, 4e-8
"""Weights from which the check does not quantise the base on a processor unasked, and what one of them takes there."""


def probe_tokens(source: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, str]:
    """Token ids (B, T) to compare models on, and where they are from: training rows that run.json kept, else plain text."""
    rows: list[list[int]] = []
    if (source / "run.json").is_file():
        rows = json.loads((source / "run.json").read_text("utf-8")).get("probe", [])
    origin = "training rows" if rows else "sentences"
    rows = rows or [tokenizer(text)["input_ids"] for text in TEXTS]  # type: ignore[misc]
    length = min(TOKENS, *(len(row) for row in rows))
    return torch.tensor([row[:length] for row in rows]), f"{len(rows)} {origin} of {length} tokens"


def check_merged(
    plan: Plan,
    folder: Path,
    probe: tuple[Tensor, str],
    trained: tuple[ModelSection, torch.dtype] | None,
    source: Path,
    quantised: bool,
    asked: bool | None,
) -> list[str]:
    """Run merged and unmerged model layer by layer; the drift in sentences.

    Args:
        plan: what was merged.
        folder: the merged model.
        probe: from `probe_tokens`.
        trained: base and dtype of training, where those are other weights than the ones merged into.
        source: adapter folder.
        quantised: the merged model is in 4 bits.
        asked: None runs the check only where its largest layer fits into the merge's own memory.

    Raises:
        RuntimeError: the merged model is not the adapter model.
    """
    if asked is False:
        return ["outputs not compared with those of base and adapter (--no-verify)"]
    needed = verify.need(plan.adapter.model)
    largest = max(job.slot.nbytes for job in plan.jobs)
    if asked is None and needed > largest + ROOM:
        return [f"not verified: one layer takes {needed / 1e9:.1f} GB in float32; --verify runs it all the same"]
    tokens, origin = probe
    tokens = tokens.clamp(
        max=plan.config.get_text_config().vocab_size - 1
    )  # the tokenizer may know more than the model
    merged = Base(ModelSection(name_or_path=str(folder), quantization="none"), "quantized" if quantised else "original")
    try:
        expected = verify.run(plan.base, plan.adapter.model, tokens)
        plan.adapter.file.release()
        found = verify.run(merged, merged.model, tokens)
    except Exception as error:  # what a model does with weights that are not there is anyone's guess
        why = f"{type(plan.base.model).__name__} cannot be run from its files: {error}"
        if asked:
            raise RuntimeError(why) from error
        return [f"not verified: {why}"]
    drift = verify.compare(expected, found, tokens)
    notes = [f"against base and adapter unmerged, on {origin}: {drift}"]
    if not quantised and not drift.spread < (1e-3 if plan.dtype == torch.float32 else 0.1):
        raise RuntimeError(f"the merged model is not the adapter model ({notes[0]}); nothing was written")
    if trained is None:
        return notes
    weights = sum(math.prod(job.source.shape) for job in plan.jobs)
    if asked is None and weights > MANY and default_device().type == "cpu":
        minutes = weights * SECONDS_A_WEIGHT / 60
        return [
            *notes,
            f"not compared with the quantised base of training (some {minutes:.0f} minutes here): --verify does it",
        ]
    try:
        base = Base(trained[0], "quantized", trained[1])
        as_trained = verify.run(base, make_plan(source, base).adapter.model, tokens)
    except (RequestError, RuntimeError) as error:
        return [*notes, f"not compared with the quantised base of training: {error}"]
    return [*notes, f"against the quantised base and adapter of training: {verify.compare(as_trained, found, tokens)}"]
