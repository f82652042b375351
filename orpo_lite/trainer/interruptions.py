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

import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers import TrainerCallback

from orpo_lite.data.collate import pair_tokens, select_pairs
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
    """Most tokens that several pairs may hold to be computed at once, by the batches that did not fit so far."""

    tokens: int | None = None
    """None while everything has fitted."""
    ooms: list[dict[str, int]] = field(default_factory=list)
    """Each time that memory ran out: optimizer step, tokens and pairs that did not fit, and the limit from then on."""

    def cut(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """Split a batch into parts within the limit, its pairs in their order; each carries, as `whole`, the labels and pairs
        of the batch."""
        count = len(batch["pair_rows"]) if "pair_rows" in batch else 0
        if self.tokens is None or count < 2:
            return [batch]
        parts, room = [], 0
        for pair, tokens in enumerate(pair_tokens(batch)):
            if not parts or tokens > room:
                parts.append([])
                room = self.tokens
            parts[-1].append(pair)
            room -= tokens
        if len(parts) == 1:
            return [batch]
        whole = torch.stack([(batch["nll_pair"] >= 0).sum(), torch.tensor(count, device=batch["nll_pair"].device)])
        return [select_pairs(batch, part) | {"whole": batch.get("whole", whole)} for part in parts]

    def shrink(self, batch: dict[str, Any], what: str, step: int, why: str, pairs: Any, processes: int) -> None:
        """Lower the limit to half of a batch that did not fit.

        Args:
            what: the pass that ran out, in words.
            step: optimizer step.
            why: torch's reason.
            pairs: the tokenized pairs, to name one that does not fit alone.
            processes: number of processes, which wait for one another, so that several cannot repeat a pass.

        Raises:
            OutOfMemory: it is a single pair, or there are several processes.
        """
        tokens, count = sum(pair_tokens(batch)), len(batch["pair_rows"])
        if processes > 1:
            raise OutOfMemory(
                f"memory ran out in {what} with {tokens:,} tokens in {count} pairs at once; a step is not repeated in smaller "
                "micro-batches in distributed training, where the processes wait for one another: set a smaller "
                "orpo.tokens_per_batch (or training.per_device_train_batch_size with more accumulation, and "
                f"per_device_eval_batch_size), or {SAVERS} ({why})"
            )
        if count < 2:
            raise OutOfMemory(
                f"memory ran out in {what} with a single pair of {tokens:,} tokens, {listed(located(batch, pairs, []))}: a "
                f"micro-batch cannot get smaller. Remove the pair, or {SAVERS} ({why})"
            )
        self.tokens = tokens // 2
        self.ooms.append({"step": step, "tokens": tokens, "pairs": count, "most": self.tokens})
        logger.warning(
            "out of memory in %s, with %s tokens in %d pairs at once (%s): repeated, and continued, with at most %s tokens at "
            "once. No pair is lost or trained on twice, and means are over the same pairs",
            what, f"{tokens:,}", count, why, f"{self.tokens:,}",
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
