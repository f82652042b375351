"""Running out of memory in the middle of a run: smaller micro-batches for the same optimizer step, or a clear error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size

from orpo_lite.data.collate import pair_tokens, select_pairs
from orpo_lite.data.lengths import numbers
from orpo_lite.data.step_batches import micro_batches

SAVERS = (
    "checkpoint more layers (memory.checkpointing=all), keep their saved inputs in host memory "
    "(memory.offload_activations=true), quantize the base (model.quantization=nf4), or lower data.max_length"
)
"""Settings that save memory where a micro-batch cannot get smaller."""


class OutOfMemory(torch.OutOfMemoryError):
    """Memory ran out, and the run cannot help itself; the message says what a user can do."""


def ran_out(error: BaseException) -> bool:
    """Return True for an exception which says that memory ran out, on whatever device."""
    if not isinstance(error, RuntimeError):
        return False
    words = str(error).lower()
    # the latter two: page-locked memory of the host, and what CUDA's libraries allocate themselves
    return (
        isinstance(error, torch.OutOfMemoryError)
        or should_reduce_batch_size(error)
        or "error: out of memory" in words
        or "cublas_status_alloc_failed" in words
    )


def reason(error: BaseException) -> str:
    """Return the sentences of torch's message that hold numbers, without its advice."""
    return ". ".join(str(error).split(". ")[:3]).rstrip(". ") or type(error).__name__


@contextlib.contextmanager
def named(doing: str, advice: str = SAVERS) -> Iterator[None]:
    """Say what a run was doing when its memory ran out, and what to do.

    Raises:
        OutOfMemory: memory ran out inside.
    """
    try:
        yield
    except OutOfMemory:
        raise
    except RuntimeError as error:
        if not ran_out(error):
            raise
        # from None: the traceback would keep alive what fills the memory
        raise OutOfMemory(f"memory ran out while {doing}: {advice} ({reason(error)})") from None


@dataclass
class Limit:
    """Largest batch that may be computed at once, by the batches that did not fit so far.

    Args:
        by_tokens: measure batches in tokens; else in pairs, which then keep their order.
    """

    by_tokens: bool
    max_size: int | None = None
    """Largest number of tokens or pairs of a batch of several pairs; None while everything has fitted."""
    ooms: list[dict[str, int]] = field(default_factory=list)
    """Each time that memory ran out: optimizer step, tokens and pairs that did not fit, and the limit from then on."""

    def cut(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """Split a batch into parts within the limit; each carries, as `whole`, the labels and pairs of the batch."""
        count = len(batch["pair_rows"]) if "pair_rows" in batch else 0
        if self.max_size is None or count < 2:
            return [batch]
        if self.by_tokens:
            costs = np.array(pair_tokens(batch))
            parts = [part for part in micro_batches(costs, self.max_size, padded="segments" not in batch) if part]
        else:
            parts = [list(range(i, min(i + self.max_size, count))) for i in range(0, count, self.max_size)]
        if len(parts) == 1:
            return [batch]
        whole = torch.stack([(batch["nll_pair"] >= 0).sum(), torch.tensor(count, device=batch["nll_pair"].device)])
        return [select_pairs(batch, part) | {"whole": batch.get("whole", whole)} for part in parts]

    def halve(self, batch: dict[str, Any], step: int) -> None:
        """Lower the limit to half of a batch of several pairs that did not fit."""
        tokens, pairs = sum(pair_tokens(batch)), len(batch["pair_rows"])
        self.max_size = max(1, tokens // 2 if self.by_tokens else (pairs + 1) // 2)
        self.ooms.append({"step": step, "tokens": tokens, "pairs": pairs, "most": self.max_size})


def smaller(what: str, limit: Limit, why: str) -> str:
    """Say what did not fit, and how the run continues."""
    last, size = limit.ooms[-1], limit.max_size
    unit = f"{size:,} tokens" if limit.by_tokens else f"{size} pair{'s' * (size != 1)}"
    return (
        f"out of memory in {what}, with {last['tokens']:,} tokens in {last['pairs']} pairs at once ({why}): repeated, and "
        f"continued, with at most {unit} at once. No pair is lost or trained on twice, and means are over the same pairs"
    )


def too_large(what: str, batch: dict[str, Any], pairs: Any, why: str) -> OutOfMemory:
    """Make the error for a pair that does not fit alone."""
    tokens = sum(pair_tokens(batch))
    return OutOfMemory(
        f"memory ran out in {what} with a single pair of {tokens:,} tokens, {where(batch, pairs)}: a micro-batch cannot get "
        f"smaller. Remove the pair, or {SAVERS} ({why})"
    )


def stuck(what: str, batch: dict[str, Any], cause: str, why: str) -> OutOfMemory:
    """Make the error for a step that cannot be repeated."""
    return OutOfMemory(
        f"memory ran out in {what} with {sum(pair_tokens(batch)):,} tokens in {len(batch['pair_rows'])} pairs at once; a step is "
        f"not repeated in smaller micro-batches {cause}: set a smaller orpo.tokens_per_batch (or "
        f"training.per_device_train_batch_size with more accumulation, and per_device_eval_batch_size), or {SAVERS} ({why})"
    )


def where(batch: dict[str, Any], pairs: Any) -> str:
    """Locate the only pair of a batch, by its number in the tokenized data set and its row in the source."""
    row = int(batch["pair_rows"][0])
    if pairs is None or row < 0 or "row" not in getattr(pairs, "column_names", ()):
        return "whose place in the data is unknown"
    found = np.flatnonzero(numbers(pairs, "row") == row)
    places = " or ".join(str(place) for place in found[:3])
    return f"number {places} of the tokenized pairs (row {row} of its source)"
