"""What interrupts training: memory that runs out, answered by smaller micro-batches, signals that ask to stop, and the clock that asks to save."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import DistributedType
from accelerate.utils.memory import should_reduce_batch_size
from transformers import TrainerCallback

from orpo_lite.common.text import counted
from orpo_lite.data.collate import pair_tokens, select_pairs
from orpo_lite.data.step_batches import micro_batches
from orpo_lite.trainer.health import listed, located

if TYPE_CHECKING:
    from orpo_lite.trainer.checkpointing import CheckpointedTrainer

logger = logging.getLogger(__name__)

SAVERS = (
    "checkpoint more layers (memory.checkpointing=all), keep their saved inputs in host memory "
    "(memory.offload_activations=true), quantize the base (model.quantization=nf4), or lower data.max_length"
)
"""Settings that save memory where a micro-batch cannot get smaller."""
TORCHRUN = "TORCHELASTIC_RUN_ID"
ECHO_SECONDS = 2.0
"""torchrun forwards a signal that its workers have already had from the terminal: that is no second request."""


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
    except RuntimeError as error:
        if isinstance(error, OutOfMemory) or not ran_out(error):
            raise
        # from None: the traceback would keep alive what fills the memory
        raise OutOfMemory(f"memory ran out while {doing}: {advice} ({reason(error)})") from None


def obstacle_to_smaller_batches(trainer: Any) -> str:
    """Say why a pass cannot be repeated with smaller micro-batches; empty where it can."""
    several = trainer.accelerator.distributed_type != DistributedType.NO
    return "in distributed training, where the processes wait for one another" * several


def retried(passes: Callable[[], Any], begin_again: Callable[[str], None]) -> Any:
    """Return what some passes return; each time that memory runs out, call `begin_again` with the reason and repeat them."""
    while True:
        try:
            return passes()
        except RuntimeError as error:
            if not ran_out(error):
                raise
            why = reason(error)
        begin_again(why)  # past the except clause, since the error's traceback holds the graph


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

    def shrink(self, batch: dict[str, Any], passes: str, step: int, why: str, pairs: Any, obstacle: str) -> None:
        """Lower the limit to half of a batch that did not fit.

        Args:
            passes: step or evaluation.
            step: optimizer step.
            why: torch's reason.
            pairs: the tokenized pairs, to name one that does not fit alone.
            obstacle: why the passes cannot be repeated; empty where they can.

        Raises:
            OutOfMemory: it is a single pair, or there is an obstacle.
        """
        tokens, count = sum(pair_tokens(batch)), len(batch["pair_rows"])
        what = f"step {step}" if passes == "step" else f"the {passes} at step {step}"
        if obstacle:
            raise OutOfMemory(
                f"memory ran out in {what} with {tokens:,} tokens in {count} pairs at once; a step is not repeated in smaller "
                f"micro-batches {obstacle}: set a smaller orpo.tokens_per_batch (or training.per_device_train_batch_size with "
                f"more accumulation, and per_device_eval_batch_size), or {SAVERS} ({why})"
            )
        if count < 2:
            raise OutOfMemory(
                f"memory ran out in {what} with a single pair of {tokens:,} tokens, {listed(located(batch, pairs, []))}: a "
                f"micro-batch cannot get smaller. Remove the pair, or {SAVERS} ({why})"
            )
        self.max_size = max(1, tokens // 2 if self.by_tokens else (count + 1) // 2)
        self.ooms.append({"step": step, "tokens": tokens, "pairs": count, "most": self.max_size})
        unit = counted(self.max_size, "token" if self.by_tokens else "pair")
        logger.warning(
            "out of memory in %s, with %s tokens in %d pairs at once (%s): repeated, and continued, with at most %s at once. "
            "No pair is lost or trained on twice, and means are over the same pairs",
            what, f"{tokens:,}", count, why, unit,
        )  # fmt: skip


class Stopped(KeyboardInterrupt):
    """Training was stopped by a signal, at a step's end and with a checkpoint, or at once.

    A KeyboardInterrupt, so that a notebook does not run its later cells on an unfinished model.
    """

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.number = number
        """The signal's number; a command ends with status 128 + number."""


class StopRequest:
    """Remembers which signal, if any, has asked the run to stop."""

    def __init__(self) -> None:
        self.number: int | None = None
        """The signal that asked, or None."""
        self._since = 0.0

    @contextlib.contextmanager
    def listen(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM inside; only the main thread can, in others nothing changes.

        An ignored signal stays ignored, as a shell's background job ignores the terminal's Ctrl-C.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        heard = [one for one in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(one) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._handle) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number, self._since = number, time.monotonic()
            if os.environ.get("RANK", "0") == "0":
                name = signal.Signals(number).name
                # no print, which the signal may have interrupted
                os.write(
                    2,
                    f"\n{name}: stopping after this step, with a checkpoint; send it again to stop at once\n".encode(),
                )
        elif TORCHRUN not in os.environ or time.monotonic() - self._since > ECHO_SECONDS:
            raise Stopped(number, f"stopped at once by a second {signal.Signals(number).name}")


class SavePoints(TrainerCallback):
    """When to save: also by the clock, and when a signal has asked to stop; after the evaluation that is due."""

    def __init__(self, trainer: Any):
        self.trainer: CheckpointedTrainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved_at, self.saved_step, self.deferred, self.stops = time.monotonic(), -1, False, False
        self.trainer.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ends_epoch = float(state.epoch).is_integer() or control.should_training_stop
        asked, due = self._agreed(args)
        control.should_save |= asked or due
        control.should_training_stop |= asked
        self.stops = asked and not ends_epoch
        if control.should_save and ends_epoch:
            # the epoch's own evaluation and logs come first: a resumed run would never make them
            control.should_save, self.deferred = False, True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.is_in_train and self._agreed(args)[0]:
            control.should_save = control.should_training_stop = True
            self.stops = not float(state.epoch or 0).is_integer()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.ended:
            control.should_log = control.should_evaluate = control.should_save = False
        elif self.stops:
            control.should_log = control.should_evaluate = False
            control.should_save = self.saved_step != state.global_step
        elif self.deferred:
            control.should_save, self.deferred = True, False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved_at, self.saved_step = time.monotonic(), state.global_step

    def _agreed(self, args: Any) -> tuple[bool, bool]:
        """Return whether to stop, and whether the clock says to save, alike on all processes."""
        asked = self.trainer.stopping.number is not None
        minutes = args.save_minutes
        due = minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes
        if args.world_size > 1:
            asked, due = (self.trainer.total(torch.tensor([asked, due], device=args.device).int()) > 0).tolist()
            if asked and self.trainer.stopping.number is None:
                self.trainer.stopping.number = 15
        return asked, due
