"""Tensors of safetensors files read in blocks, so that a checkpoint of any size passes through little memory."""

import json
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from orpo_lite.common.errors import RequestError
from orpo_lite.model.untrusted_files import check_safetensors

BLOCK_ELEMENTS = 1 << 20
"""Weights computed at once. 4 MB in float32 stay in the cache, and below the size at which the C library maps new pages
for every block: four times as fast as blocks of 32 MB."""
COPY_BYTES = 64 << 20
DTYPES: dict[str, torch.dtype] = safetensors.torch._TYPES
"""Dtypes by their names in safetensors' headers."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}

Block = tuple[slice, ...]
"""Rows of a tensor, or rows of one matrix where a stack of matrices is too large for one block. Contiguous in the file."""
Read = Callable[[Block], Tensor]


def blocks(shape: tuple[int, ...], elements: int = BLOCK_ELEMENTS) -> Iterator[Block]:
    """Cut a tensor into blocks of about `elements` elements, in the order in which they lie."""
    if len(shape) == 0 or math.prod(shape) <= elements:
        yield (slice(0, shape[0]),) if shape else ()
        return
    inner = math.prod(shape[1:])
    if inner > elements and len(shape) > 2:
        for i in range(shape[0]):
            yield from ((slice(i, i + 1), *rest) for rest in blocks(shape[1:], elements))
        return
    # never a single row, which matrix libraries sum in another order
    step, start = max(2, elements // inner), 0
    while start < shape[0]:
        stop = start + step if shape[0] - start - step > 1 else shape[0]
        yield (slice(start, stop),)
        start = stop


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file."""

    key: str
    file: Path
    stored_dtype: str
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""
    nbytes: int

    @property
    def dtype(self) -> torch.dtype:
        if self.stored_dtype not in DTYPES:
            raise ValueError(f"{self.file}: {self.key} is stored as {self.stored_dtype}, which cannot be read here")
        return DTYPES[self.stored_dtype]

    def reader(self) -> Read:
        return self.read

    def read(self, block: Block = ()) -> Tensor:
        """Read a block, by default the whole tensor."""
        shape, start, stride = list(self.shape), 0, self.nbytes
        for dim, part in enumerate(block):
            stride //= self.shape[dim] or 1
            start += part.start * stride
            shape[dim] = part.stop - part.start
        count = math.prod(shape) * self.dtype.itemsize
        return self.read_bytes(start, count).view(self.dtype).view(shape)

    def read_bytes(self, start: int, count: int) -> Tensor:
        """Read some bytes of the tensor as they are stored.

        Raises:
            OSError: the file ends before the bytes do.
        """
        data = torch.empty(count, dtype=torch.uint8)
        with self.file.open("rb") as file:
            file.seek(self.start + start)
            if file.readinto(data.numpy()) < count:  # type: ignore[arg-type]  # numpy's stubs do not declare the buffer
                raise OSError(f"{self.file}: ends in the middle of {self.key}; copy or download it again")
        return data

    def copied_blocks(self) -> Iterator[Tensor]:
        """Read the tensor's bytes one block after the other."""
        for start in range(0, self.nbytes, COPY_BYTES):
            yield self.read_bytes(start, min(COPY_BYTES, self.nbytes - start))


@dataclass(frozen=True)
class Computed:
    """A tensor that is computed from what is stored."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    reader: Callable[[], Read]
    """Returns a function that reads a block as a new tensor. It keeps what all blocks share (scales, new rows), so drop
    it after the last block."""


Source = Stored | Computed


def resized(source: Source, rows: int) -> Computed:
    """Give an embedding, output head or its bias another number of rows.

    New rows are what orpo_lite.model.base.resize_embeddings makes them: the mean of the others, 0 in a bias.
    """
    held, shape = source.shape[0], (rows, *source.shape[1:])

    def reader() -> Read:
        read = source.reader()
        if rows <= held:
            return read
        whole = read((slice(0, held),))
        new = torch.zeros((), dtype=whole.dtype)
        if len(shape) > 1:
            # some columns at a time: the whole matrix in float32 would be the largest thing in memory
            new = torch.cat([part.float().mean(0) for part in whole.split(256, dim=1)]).to(whole.dtype)
        del whole

        def read_rows(block: Block) -> Tensor:
            start, stop = block[0].start, block[0].stop
            more = new.expand(max(0, stop - max(start, held)), *shape[1:])
            return torch.cat([read((slice(start, min(stop, held)),)), more]) if start < held else more.clone()

        return read_rows

    return Computed(source.key, shape, source.dtype, reader)


def rounded(source: Source, dtype: torch.dtype) -> Computed:
    """Read weights as training did, in a dtype coarser than the stored one."""

    def reader() -> Read:
        read = source.reader()
        return lambda block: read(block).to(dtype)

    return Computed(source.key, source.shape, source.dtype, reader)


def stored_tensors(files: list[Path]) -> dict[str, Stored]:
    """List every tensor of these files by key, in the order in which they lie.

    Raises:
        RequestError: a file is not complete, or two files hold the same key.
    """
    found: dict[str, Stored] = {}
    for file in files:
        check_safetensors(file)
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            header = json.loads(handle.read(length))
        header.pop("__metadata__", None)
        for key, facts in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
            begin, end = facts["data_offsets"]
            if key in found:
                raise RequestError(f"{key} is in {found[key].file} and again in {file}: download the model again")
            found[key] = Stored(key, file, facts["dtype"], tuple(facts["shape"]), 8 + length + begin, end - begin)
    return found
