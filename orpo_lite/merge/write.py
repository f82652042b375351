"""The merge itself: every stored tensor read in blocks, changed in float32, cast once and written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from orpo_lite.merge.lora_edits import Dora, Edit
from orpo_lite.merge.safetensors_blocks import NAMES, Block, ShardFile, Slot, Source, Stored, blocks
from orpo_lite.merge.weight_map import Link
from orpo_lite.merge.workers import each_block


@dataclass(frozen=True)
class Job:
    """One tensor of the merged checkpoint.

    Attributes:
        key: its name in the checkpoint.
        source: where its weights come from.
        changes: (link, edit) in the order in which they apply.
        dtype: as it is written; None for what is only copied.
    """

    key: str
    source: Source
    changes: tuple[tuple[Link, Edit], ...]
    dtype: torch.dtype | None

    @property
    def slot(self) -> Slot:
        if self.dtype is None:
            assert isinstance(self.source, Stored)
            return Slot(self.key, self.source.stored_dtype, self.source.shape, self.source.nbytes)
        shape = self.source.shape
        return Slot(self.key, NAMES[self.dtype], shape, math.prod(shape) * self.dtype.itemsize)

    @property
    def slots(self) -> list[Slot]:
        """Everything that is written for it, in order."""
        return [self.slot]

    def parts(self) -> Iterator[Tensor]:
        """The merged weights in `dtype`, block by block.

        Raises:
            RuntimeError: a weight that is not finite, or too large for the dtype.
        """
        read = self.source.reader()
        self.measure_norms(read)

        def merged(block: Block) -> Tensor:
            weights = exact(read(block))
            self.change(weights, first(block, weights.dim()))
            return self.cast(weights)

        for _, weights in each_block(merged, self.source.shape):
            yield weights

    def change(self, weights: Tensor, start: list[int]) -> None:
        """Apply every change to a block in place."""
        for link, edit in self.changes:
            found = part(weights, start, link)
            if found is not None:
                edit.apply(*found)

    def measure_norms(self, read: Callable[[Block], Tensor]) -> None:
        """DoRA's norms over rows need all of them before the first one can be written."""
        for link, edit in self.changes:
            if isinstance(edit, Dora) and not edit.along_rows:
                edit.squares = None
                for block in blocks(self.source.shape):
                    weights = exact(read(block))
                    found = part(weights, first(block, weights.dim()), link)
                    if found is not None:
                        edit.measure(*found)

    def cast(self, weights: Tensor) -> Tensor:
        assert self.dtype is not None
        if self.changes or self.dtype == torch.float16:
            low, high = torch.aminmax(weights) if weights.numel() else (torch.zeros(()), torch.zeros(()))
            largest = max(-low.item(), high.item())
            if not largest <= torch.finfo(self.dtype).max:
                raise RuntimeError(
                    f"merging makes NaN or infinity in {self.key}: are base and adapter sound?"
                    if not math.isfinite(largest)
                    else f"merging makes {largest:.3g} in {self.key}, more than {str(self.dtype).removeprefix('torch.')} "
                    "can hold: try --dtype bfloat16"
                )
        return weights.to(self.dtype)


def exact(weights: Tensor) -> Tensor:
    """In float32, or float64 where they come so."""
    return weights if weights.dtype == torch.float64 else weights.float()


def first(block: Block, dims: int) -> list[int]:
    """First index of a block in every dimension."""
    return [p.start for p in block] + [0] * (dims - len(block))


def part(weights: Tensor, start: list[int], link: Link) -> tuple[Tensor, list[int]] | None:
    """What a block of a stored tensor is in the parameter: (view with the parameter's dimensions, its first index).

    None where the block and the link do not meet.
    """
    begin: dict[int, int] = dict(link.fixed)
    order: list[tuple[int, int]] = []
    for shared in link.shared:
        offset, size = start[shared.stored_dim], weights.shape[shared.stored_dim]
        low = max(shared.stored_start, offset)
        high = min(shared.stored_start + shared.length, offset + size)
        if low >= high:
            return None
        weights = weights.narrow(shared.stored_dim, low - offset, high - low)
        begin[shared.dim] = shared.start + low - shared.stored_start
        order.append((shared.dim, shared.stored_dim))
    weights = weights.permute([stored for _, stored in sorted(order)])
    for dim in sorted(dict(link.fixed)):
        weights = weights.unsqueeze(dim)
    return weights, [begin[dim] for dim in sorted(begin)]


def write_shards(
    folder: Path, shards: dict[str, list[Job]], advance: Callable[[int], None], release: Callable[[], None]
) -> None:
    """Write the shards, and their index where it is not the one file that needs none.

    Args:
        shards: file name -> tensors in the order in which they lie.
        advance: told of every write how many bytes it was.
        release: called after every changed tensor, to give back what its changes held.
    """
    for name, jobs in shards.items():
        with ShardFile(folder / name, [slot for job in jobs for slot in job.slots], advance) as file:
            for job in jobs:
                if job.dtype is None:
                    assert isinstance(job.source, Stored)
                    file.copy(job.source)
                else:
                    for weights in job.parts():
                        file.add(weights)
                    release()
    if set(shards) != {"model.safetensors"}:
        places = {slot.key: name for name, jobs in shards.items() for job in jobs for slot in job.slots}
        sizes = {
            "total_parameters": sum(math.prod(job.source.shape) for jobs in shards.values() for job in jobs),
            "total_size": sum(slot.nbytes for jobs in shards.values() for job in jobs for slot in job.slots),
        }
        index = {"metadata": sizes, "weight_map": dict(sorted(places.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), "utf-8")
