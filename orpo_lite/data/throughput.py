"""How far the reading of data has come, on screen: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

LINE_SECONDS = 10.0
"""Between lines where no bar can be drawn: a notebook, a log file. Whatever is done sooner prints none."""


class Throughput:
    """Counts what is done, with its rate and, for rows, that of their tokens.

    Args:
        what: for the beginning of the line.
        unit: rows, or bytes, which are shown as MB.
        total: of the unit, as far as known.
    """

    def __init__(self, what: str, unit: str, total: int | None = None):
        self.what, self.unit, self.total = what, unit, total
        self.done, self.tokens = 0, 0
        self.started = self.told = time.monotonic()
        self.bar: Any = None

    def __enter__(self) -> Throughput:
        from datasets.utils import tqdm

        if sys.stderr.isatty():
            scaled = {"unit_scale": True, "unit_divisor": 1000} if self.unit == "bytes" else {}
            unit = "B" if self.unit == "bytes" else f" {self.unit}"
            self.bar = tqdm(desc=self.what, unit=unit, total=self.total, leave=False, **scaled)
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def add(self, count: int, tokens: int = 0) -> None:
        """So many more are done."""
        self.done, self.tokens = self.done + count, self.tokens + tokens
        now = time.monotonic()
        if self.bar is not None:
            if self.tokens:
                self.bar.set_postfix_str(f"{self.tokens / max(now - self.started, 1e-3):,.0f} tokens/s", refresh=False)
            self.bar.update(count)
        elif now - self.told >= LINE_SECONDS:
            self.told = now
            print(self, file=sys.stderr, flush=True)

    def __str__(self) -> str:
        seconds = max(time.monotonic() - self.started, 1e-3)
        scale, unit = (1e6, "MB") if self.unit == "bytes" else (1, self.unit)
        share = f" of about {self.total / scale:,.0f}" if self.total and self.total >= self.done else ""
        tokens = f", {self.tokens / seconds:,.0f} tokens/s" if self.tokens else ""
        return (
            f"{self.what}: {self.done / scale:,.0f}{share} {unit}, {self.done / scale / seconds:,.0f} {unit}/s{tokens}"
        )
