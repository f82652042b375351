"""Blocks computed side by side: one thread a core, each with one thread of torch's own.

Torch splits every operation over all cores and waits for the slowest; on blocks that fit the cache the waiting costs
more than the work, above all on a busy machine.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from orpo_lite.merge.safetensors_blocks import Block, blocks

T = TypeVar("T")
COUNT = min(4, os.cpu_count() or 1)
POOL: list[ThreadPoolExecutor] = []


def start() -> None:
    """A pool for this process; a forked one has its parent's pool, but not the threads."""
    POOL[:] = [ThreadPoolExecutor(COUNT, "merge")]


start()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=start)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Let torch use one thread an operation meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def each_block(function: Callable[[Block], T], shape: tuple[int, ...]) -> Iterator[tuple[Block, T]]:
    """Apply a function to every block of a tensor of this shape; results in order, a few blocks in memory at a time."""
    every = list(blocks(shape))
    if len(every) == 1:
        yield every[0], function(every[0])
        return
    coming: deque[tuple[Block, Future[T]]] = deque()
    try:
        for block in every:
            coming.append((block, POOL[0].submit(function, block)))
            if len(coming) > COUNT:
                done, result = coming.popleft()
                yield done, result.result()
        while coming:
            done, result = coming.popleft()
            yield done, result.result()
    finally:
        for _, result in coming:
            result.cancel()
