"""Memory that runs out in the middle of a run: smaller micro-batches for the same optimizer step, or words that help."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from orpo_lite.data.collate import pair_tokens, select_pairs
from orpo_lite.data.lengths import numbers
from orpo_lite.data.step_batches import micro_batches

SAVERS = (
    "let more layers checkpoint (memory.checkpointing=all), keep what they save in the host's memory "
    "(memory.offload_activations=true), quantise the base (model.quantization=nf4), or lower data.max_length"
)
"""What still helps where a micro-batch cannot get smaller."""


class OutOfMemory(torch.OutOfMemoryError):
    """Memory ran out, and nothing that a run may do by itself helps; the message says what a user can do."""


def ran_out(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on whatever device."""
    words = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        # page-locked memory of the host, and what CUDA's libraries take for themselves
        and (
            should_reduce_batch_size(error) or "error: out of memory" in words or "cublas_status_alloc_failed" in words
        )
    )


def reason(error: BaseException) -> str:
    """The sentences of torch's message that hold numbers, without its advice."""
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
        # from None: the traceback would go on holding what fills the memory
        raise OutOfMemory(f"memory ran out while {doing}: {advice} ({reason(error)})") from None


@dataclass
class Limit:
    """How large a batch may be, by what did not fit so far.

    Args:
        by_tokens: whether batches are measured in tokens, else in pairs. Pairs keep their order then.
    """

    by_tokens: bool
    most: int | None = None
    """Tokens or pairs of a batch at most, where it holds more than one pair; None while all have fitted."""
    met: list[dict[str, int]] = field(default_factory=list)
    """Each time that memory ran out: optimizer step, tokens and pairs that did not fit, and `most` from then on."""

    def cut(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """The batch in parts within the limit; each knows, as `whole`, the labels and pairs of all of it."""
        count = len(batch["pair_rows"]) if "pair_rows" in batch else 0
        if self.most is None or count < 2:
            return [batch]
        if self.by_tokens:
            costs = np.array(pair_tokens(batch))
            parts = [part for part in micro_batches(costs, self.most, padded="segments" not in batch) if part]
        else:
            parts = [list(range(i, min(i + self.most, count))) for i in range(0, count, self.most)]
        if len(parts) == 1:
            return [batch]
        whole = torch.stack([(batch["nll_pair"] >= 0).sum(), torch.tensor(count, device=batch["nll_pair"].device)])
        return [select_pairs(batch, part) | {"whole": batch.get("whole", whole)} for part in parts]

    def halve(self, batch: dict[str, Any], step: int) -> None:
        """Half of what did not fit is the most from now on; the batch has more than one pair."""
        tokens, pairs = sum(pair_tokens(batch)), len(batch["pair_rows"])
        self.most = max(1, tokens // 2 if self.by_tokens else (pairs + 1) // 2)
        self.met.append({"step": step, "tokens": tokens, "pairs": pairs, "most": self.most})


@dataclass
class Window:
    """An optimizer step under way, and what it takes to begin it again.

    Args:
        items: what the loader gave for the step, each one forward and backward pass or several.
        sums: metrics summed since the last log, before the step.
    """

    items: list[dict[str, Any]]
    sums: dict[str, Tensor]
    device: torch.device

    def __post_init__(self) -> None:
        self.sums = dict(self.sums)
        self.told = torch.zeros((), device=self.device)
        """Loss of the passes that are done, as transformers was told it."""
        self.random: Tensor | None = None
        self.device_random: Tensor | None = None

    def begin(self) -> None:
        """Remember the random state at the step's first pass: a resumed run loads its own only after the step's batches."""
        if self.random is None:
            self.random = torch.get_rng_state()
            if self.device.type != "cpu":
                self.device_random = torch.get_device_module(self.device).get_rng_state()

    def place(self, item: dict[str, Any]) -> int | None:
        """Which of the items this is."""
        return next((i for i, one in enumerate(self.items) if one is item), None)

    def rewind_random(self) -> None:
        """Dropout draws in the step done again what it would have drawn."""
        assert self.random is not None
        torch.set_rng_state(self.random)
        if self.device_random is not None:
            torch.get_device_module(self.device).set_rng_state(self.device_random)


def smaller(what: str, limit: Limit, why: str) -> str:
    """What did not fit, and how the run goes on."""
    last = limit.met[-1]
    unit = f"{limit.most:,} tokens" if limit.by_tokens else f"{limit.most} pair{'s' * (limit.most != 1)}"
    return (
        f"out of memory in {what}, with {last['tokens']:,} tokens in {last['pairs']} pairs at once ({why}): done again, and from "
        f"now on, with at most {unit} at once. No pair is lost or repeated, and means are over the same pairs as before"
    )


def too_large(what: str, batch: dict[str, Any], pairs: Any, why: str) -> OutOfMemory:
    """The error for a pair that does not fit alone."""
    tokens = sum(pair_tokens(batch))
    return OutOfMemory(
        f"memory ran out in {what} with a single pair of {tokens:,} tokens, {where(batch, pairs)}: a micro-batch cannot get "
        f"smaller. Leave the pair out, or {SAVERS} ({why})"
    )


def stuck(what: str, batch: dict[str, Any], cause: str, why: str) -> OutOfMemory:
    """The error where a step cannot begin again."""
    return OutOfMemory(
        f"memory ran out in {what} with {sum(pair_tokens(batch)):,} tokens in {len(batch['pair_rows'])} pairs at once; a step is "
        f"not done again in smaller micro-batches {cause}: set a smaller orpo.tokens_per_batch (or "
        f"training.per_device_train_batch_size with more accumulation, and per_device_eval_batch_size), or {SAVERS} ({why})"
    )


def where(batch: dict[str, Any], pairs: Any) -> str:
    """The only pair of a batch, by its place in a tokenised data set and its row in the source."""
    row = int(batch["pair_rows"][0])
    if pairs is None or row < 0 or "row" not in getattr(pairs, "column_names", ()):
        return "whose place in the data is not known"
    found = np.flatnonzero(numbers(pairs, "row") == row)
    places = " or ".join(str(place) for place in found[:3])
    return f"number {places} of the tokenised pairs (row {row} of its source)"
