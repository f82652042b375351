"""The merge itself: every stored tensor is read in blocks, changed in float32, cast once and written."""

import json
import math
import os
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from orpo_lite.merge.lora_edits import Dora, Edit
from orpo_lite.merge.safetensors_blocks import BLOCK_ELEMENTS, NAMES, Block, Source, Stored, blocks
from orpo_lite.merge.weight_map import Link

T = TypeVar("T")
THREADS = min(4, os.cpu_count() or 1)


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Let torch use one thread per operation while blocks are computed side by side.

    Torch splits every operation over all cores and waits for the slowest; on blocks that fit into the cache the
    waiting costs more than the work, above all on a busy machine.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def map_blocks(function: Callable[[Block], T], cuts: Iterable[Block]) -> Iterator[T]:
    """Apply a function to blocks on a few threads; yield the results in order."""
    pool = ThreadPoolExecutor(THREADS)
    pending: deque[Future[T]] = deque()
    try:
        for block in cuts:
            pending.append(pool.submit(function, block))
            if len(pending) > THREADS:
                yield pending.popleft().result()
        for each in pending:
            yield each.result()
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Job:
    """One tensor of the merged checkpoint.

    Attributes:
        key: its name in the checkpoint.
        source: where its weights come from.
        changes: (link, edit) in the order in which they apply.
        dtype: as it is written; None for a tensor that is only copied.
    """

    key: str
    source: Source
    changes: tuple[tuple[Link, Edit], ...]
    dtype: torch.dtype | None

    @property
    def written_dtype(self) -> str:
        """The name of the dtype in the safetensors header."""
        return NAMES[self.dtype] if self.dtype else self.source.stored_dtype  # type: ignore[union-attr]  # it is Stored

    @property
    def nbytes(self) -> int:
        if self.dtype is None:
            return self.source.nbytes  # type: ignore[union-attr]  # it is Stored
        return math.prod(self.source.shape) * self.dtype.itemsize

    def merged_blocks(self) -> Iterator[Tensor]:
        """Yield the merged weights in `dtype`, or the bytes to copy, block by block.

        Raises:
            RuntimeError: a weight that is not finite, or too large for the dtype.
        """
        if self.dtype is None:
            assert isinstance(self.source, Stored)
            yield from self.source.copied_blocks()
            return
        read = self.source.reader()

        def merge_block(block: Block) -> Tensor:
            weights = read(block)
            weights = weights if weights.dtype == torch.float64 else weights.float()
            for link, edit in self.changes:
                found = part(weights, block, link)
                if found is not None:
                    edit.apply(*found)
            return self.cast(weights)

        # DoRA's norms along columns need all rows
        whole = any(isinstance(edit, Dora) and not edit.along_rows for _, edit in self.changes)
        elements = math.prod(self.source.shape) if whole else BLOCK_ELEMENTS
        yield from map_blocks(merge_block, blocks(self.source.shape, elements))

    def cast(self, weights: Tensor) -> Tensor:
        """Round a block to the written dtype, refusing what it cannot hold."""
        assert self.dtype is not None
        if weights.numel() and (self.changes or self.dtype == torch.float16):
            low, high = torch.aminmax(weights)
            largest = max(-low.item(), high.item())
            if not largest <= torch.finfo(self.dtype).max:
                raise RuntimeError(
                    f"merging gives {largest:.3g} in {self.key}, which {self.dtype} cannot hold: try --dtype bfloat16; if it "
                    "is NaN or infinity, are base and adapter intact?"
                )
        return weights.to(self.dtype)


def part(weights: Tensor, block: Block, link: Link) -> tuple[Tensor, list[int]] | None:
    """Return what a block of a stored tensor is in the parameter: (view in its dimensions, first index of the view).

    None where block and link do not meet.
    """
    begin: dict[int, int] = dict(link.fixed)
    order: list[tuple[int, int]] = []
    for shared in link.shared:
        offset = block[shared.stored_dim].start if shared.stored_dim < len(block) else 0
        low = max(shared.stored_start, offset)
        high = min(shared.stored_start + shared.length, offset + weights.shape[shared.stored_dim])
        if low >= high:
            return None
        weights = weights.narrow(shared.stored_dim, low - offset, high - low)
        begin[shared.dim] = shared.start + low - shared.stored_start
        order.append((shared.dim, shared.stored_dim))
    weights = weights.permute([stored for _, stored in sorted(order)])
    for dim in sorted(dict(link.fixed)):
        weights = weights.unsqueeze(dim)
    return weights, [begin[dim] for dim in sorted(begin)]


def write_shards(folder: Path, shards: dict[str, list[Job]], advance: Callable[[int], None]) -> None:
    """Write the shards, and an index unless there is only the file that needs none.

    Args:
        shards: file name -> tensors in the order in which they lie.
        advance: called after every write with the number of bytes.
    """
    for name, jobs in shards.items():
        with (folder / name).open("wb") as file:
            file.write(safetensors_header(jobs))
            for job in jobs:
                for block in job.merged_blocks():
                    data = block.contiguous().reshape(-1).view(torch.uint8).numpy()
                    file.write(data)  # type: ignore[arg-type]  # numpy's stubs do not declare the buffer
                    advance(data.nbytes)
    if set(shards) != {"model.safetensors"}:
        every = {job.key: (name, job) for name, jobs in shards.items() for job in jobs}
        sizes = {
            "total_parameters": sum(math.prod(job.source.shape) for _, job in every.values()),
            "total_size": sum(job.nbytes for _, job in every.values()),
        }
        index = {"metadata": sizes, "weight_map": {key: every[key][0] for key in sorted(every)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), "utf-8")


def safetensors_header(jobs: list[Job]) -> bytes:
    """Return the start of a safetensors file: where each tensor lies in what follows."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for job in jobs:
        start, end = end, end + job.nbytes
        header[job.key] = {"dtype": job.written_dtype, "shape": list(job.source.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded
