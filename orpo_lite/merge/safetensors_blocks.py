"""Safetensors files read and written in blocks, so that a checkpoint of any size passes through little memory."""

from __future__ import annotations

import json
import math
import mmap
import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from orpo_lite.common.errors import RequestError
from orpo_lite.model.untrusted_files import check_safetensors

BLOCK_ELEMENTS = 1 << 20
"""Weights computed at once. 4 MB in float32 stay in the cache, and below the size at which the C library maps new pages
for every block: four times as fast as blocks of 32 MB."""
COPY_BYTES = 64 << 20
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Dtypes by their names in safetensors' headers."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}

Block = tuple[slice, ...]
"""Rows of a tensor, or rows of one matrix where a stack of matrices is too large for one block. Contiguous in the file."""


class Source(Protocol):
    """A tensor that is read in blocks: as stored, or computed from what is stored."""

    @property
    def key(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def reader(self) -> Callable[[Block], Tensor]:
        """Return a function that reads a block as a new tensor.

        It keeps what all blocks share (scales, new rows), so drop it after the last block.
        """
        ...


@dataclass(frozen=True)
class Derived:
    """A tensor computed from another one; key, shape and dtype are the other's unless a subclass says otherwise."""

    source: Source

    @property
    def key(self) -> str:
        return self.source.key

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype


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
    # whole groups of 64 weights that share a 4-bit scale; never a single row, which matrix libraries sum in another order
    whole = max(2, 64 // math.gcd(inner, 64))
    step = max(whole, elements // inner // whole * whole)
    start = 0
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

    def reader(self) -> Callable[[Block], Tensor]:
        return self.read

    def read(self, block: Block = ()) -> Tensor:
        """Read a block, by default the whole tensor.

        Raises:
            OSError: the file ends before the block does.
        """
        shape, start, stride = list(self.shape), self.start, self.nbytes
        for dim, part in enumerate(block):
            stride //= self.shape[dim] or 1
            start += part.start * stride
            shape[dim] = part.stop - part.start
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=self.dtype)
        data = torch.empty(count * self.dtype.itemsize, dtype=torch.uint8)
        with self.file.open("rb", buffering=0) as file:
            file.seek(start)
            view, done = memoryview(data.numpy()), 0  # type: ignore[arg-type]  # numpy's stubs do not declare the buffer
            while done < len(view):
                read = file.readinto(view[done : done + COPY_BYTES])
                if not read:
                    raise OSError(f"{self.file}: ends in the middle of {self.key}; copy or download it again")
                done += read
        return data.view(self.dtype).view(shape)


@dataclass(frozen=True)
class Resized(Derived):
    """An embedding, output head or its bias with another number of rows.

    New rows are what orpo_lite.model.base.grow_embeddings makes them: the mean of the others, 0 in a bias.
    """

    rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, *self.source.shape[1:])

    def reader(self) -> Callable[[Block], Tensor]:
        read, held = self.source.reader(), self.source.shape[0]
        if self.rows <= held:
            return read
        new = torch.zeros((), dtype=self.dtype)
        if len(self.shape) > 1:
            # some columns at a time: the whole matrix in float32 would be the largest thing in memory
            columns = read((slice(0, held),)).split(256, dim=1)
            new = torch.cat([part.float().mean(0) for part in columns]).to(self.dtype)

        def rows(block: Block) -> Tensor:
            start, stop = block[0].start, block[0].stop
            more = new.expand(max(0, stop - max(start, held)), *self.shape[1:])
            return torch.cat([read((slice(start, min(stop, held)),)), more]) if start < held else more.clone()

        return rows


@dataclass(frozen=True)
class Cast(Derived):
    """A weight as training read it, in a dtype coarser than the stored one."""

    target: torch.dtype

    @property
    def dtype(self) -> torch.dtype:
        return self.target

    def reader(self) -> Callable[[Block], Tensor]:
        read = self.source.reader()
        return lambda block: read(block).to(self.target)


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


class Mapped:
    """A safetensors file's tensors as views of its memory map: read when used, dropped again by `release`."""

    def __init__(self, file: Path):
        held = stored_tensors([file])
        with file.open("rb") as handle:
            self.map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        self.tensors: dict[str, Tensor] = {}
        for key, stored in held.items():
            if math.prod(stored.shape) == 0 or stored.start % stored.dtype.itemsize:
                self.tensors[key] = stored.read()  # torch needs aligned data
                continue
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The given buffer is not writable")
                flat = torch.frombuffer(
                    self.map, dtype=stored.dtype, count=math.prod(stored.shape), offset=stored.start
                )
            self.tensors[key] = flat.view(stored.shape)

    def release(self) -> None:
        """Give the pages read so far back to the system."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True)
class Slot:
    """A tensor to be written."""

    key: str
    dtype: str
    """Name in safetensors' headers."""
    shape: tuple[int, ...]
    nbytes: int


@dataclass
class ShardFile:
    """A safetensors file written tensor by tensor, in the order of its header; a context manager."""

    path: Path
    slots: list[Slot]
    advance: Callable[[int], None] = field(default=lambda count: None)
    """Called with the number of bytes after each write."""

    def __enter__(self) -> ShardFile:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        place = 0
        for slot in self.slots:
            end = place + slot.nbytes
            header[slot.key] = {"dtype": slot.dtype, "shape": list(slot.shape), "data_offsets": [place, end]}
            place = end
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self.file = self.path.open("wb", buffering=0)
        self._write(memoryview(struct.pack("<Q", len(encoded)) + encoded))
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def add(self, tensor: Tensor) -> None:
        """Append a block of the tensor whose turn it is, in its written dtype."""
        data = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        self._write(data)
        self.advance(len(data))

    def copy(self, stored: Stored) -> None:
        """Append a stored tensor byte by byte.

        Raises:
            OSError: the stored file ends before the tensor does.
        """
        with stored.file.open("rb", buffering=0) as source:
            source.seek(stored.start)
            left = stored.nbytes
            while left:
                data = source.read(min(left, COPY_BYTES))
                if not data:
                    raise OSError(f"{stored.file}: ends in the middle of {stored.key}; copy or download it again")
                self._write(memoryview(data))
                left -= len(data)
                self.advance(len(data))

    def _write(self, data: memoryview) -> None:
        while data:
            data = data[self.file.write(data) :]
