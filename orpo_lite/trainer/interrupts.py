"""Stop requests by signal: the first stops the run cleanly after its step, the second at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

TORCHRUN = "TORCHELASTIC_RUN_ID"
ECHO_SECONDS = 2.0
"""torchrun forwards a signal that its workers have already had from the terminal: that is no second request."""


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
                say(f"\n{name}: stopping after this step, with a checkpoint; send it again to stop at once")
        elif TORCHRUN not in os.environ or time.monotonic() - self._since > ECHO_SECONDS:
            raise Stopped(number, f"stopped at once by a second {signal.Signals(number).name}")


def say(text: str) -> None:
    """Print from a signal handler, which may have interrupted a print."""
    try:
        print(text, file=sys.stderr, flush=True)
    except RuntimeError:
        os.write(2, f"{text}\n".encode())
