"""Tensors that stay in their files until they are read, rows at a time, and the views that conversion needs of them.

A converter of 70B models must never hold a model, or a shard. So every format's reader gives :class:`Lazy` tensors, a
mapping composes them (row slices, concatenations, columns), and a writer reads the result in blocks.
"""

import math
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

BLOCK_BYTES = 32 << 20
"""Bytes that a writer takes at a time: large enough for a disk, small against memory."""


class Buffers:
    """Memory that is used again, in turn: a fresh page costs more than reading what goes into it.

    A tensor is valid until :meth:`get` was called ``DEPTH`` more times for as many bytes.
    """

    DEPTH = 4

    def __init__(self) -> None:
        self._found: dict[int, list[Tensor]] = {}

    def get(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Tensor with a storage of exactly its size: ``torch.save`` writes the whole storage."""
        nbytes = dtype.itemsize * math.prod(shape)
        ring = self._found.setdefault(nbytes, [])
        if len(ring) < self.DEPTH:
            ring.append(torch.empty(nbytes, dtype=torch.uint8))
        else:
            ring.append(ring.pop(0))
        return ring[-1].view(dtype).view(tuple(shape))


class BackgroundWriter:
    """Runs calls one after the other in a thread, while the caller reads what comes next.

    At most two wait, so that with the one that runs and the one that is being read no more than ``Buffers.DEPTH`` are
    alive.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._waiting: deque[Future] = deque()

    def __call__(self, function: Callable, *args: object) -> None:
        """Raises what an earlier call has raised."""
        while len(self._waiting) >= Buffers.DEPTH - 2:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(function, *args))

    def finish(self) -> None:
        """Wait for all. Raises what one of them has raised."""
        try:
            while self._waiting:
                self._waiting.popleft().result()
        finally:
            self._pool.shutdown(cancel_futures=True)


class Lazy(ABC):
    """A tensor of known shape and dtype whose rows are read on demand.

    Attributes:
        shape: of the whole tensor; at least one dimension.
        dtype: of its elements.
        name: as an error names it, with its file where there is one.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    name: str

    @abstractmethod
    def read_into(self, out: Tensor, start: int) -> None:
        """Fill ``out`` [n, *shape[1:]], contiguous and of this dtype, with rows ``start`` ... ``start + n - 1``."""

    def read(self, start: int = 0, stop: int | None = None, buffers: Buffers | None = None) -> Tensor:
        """Rows ``start`` ... ``stop - 1``, [stop - start, *shape[1:]]; with ``buffers`` in memory that they own."""
        stop = self.shape[0] if stop is None else stop
        assert 0 <= start <= stop <= self.shape[0], f"rows {start}:{stop} of {self.name} {self.shape}"
        out = (buffers.get if buffers else torch.empty)((stop - start, *self.shape[1:]), dtype=self.dtype)
        if out.numel():
            self.read_into(out, start)
        return out

    @property
    def row_bytes(self) -> int:
        return self.nbytes // self.shape[0] if self.shape[0] else 0

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)

    def blocks(self, block_bytes: int = BLOCK_BYTES, buffers: Buffers | None = None) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) over the whole tensor, each of at most ``block_bytes`` but at least a row."""
        rows = max(1, block_bytes // max(self.row_bytes, 1))
        for start in range(0, self.shape[0], rows):
            yield start, self.read(start, min(start + rows, self.shape[0]), buffers)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name}, {list(self.shape)}, {self.dtype})"


class FileTensor(Lazy):
    """Row-major bytes at ``offset`` of a file: of safetensors, and of the storages inside torch's zip files.

    Read with ``pread``, not by mapping: pages of a mapping would count as this process' memory until it is closed.
    """

    def __init__(self, path: Path, offset: int, shape: Sequence[int], dtype: torch.dtype, name: str) -> None:
        self.path, self.offset, self.shape, self.dtype = path, offset, tuple(shape), dtype
        self.name = f"{name} in {path}"

    def read_into(self, out: Tensor, start: int) -> None:
        view = memoryview(out.view(torch.uint8).reshape(-1).numpy())
        position = self.offset + start * self.row_bytes
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(position)
                done = 0
                while done < len(view):
                    n = file.readinto(view[done:])
                    if not n:
                        raise ValueError(
                            f"{self.name}: the file ends at byte {position + done}, {len(view) - done} bytes "
                            "before the tensor does; it is truncated: copy it again"
                        )
                    done += n
        except OSError as error:
            raise ValueError(f"{self.name} cannot be read: {os.strerror(error.errno or 0)}") from error


class Rows(Lazy):
    """Rows ``start`` ... ``stop - 1`` of another tensor."""

    def __init__(self, base: Lazy, start: int, stop: int) -> None:
        assert 0 <= start <= stop <= base.shape[0], f"rows {start}:{stop} of {base}"
        self.base, self.start = base, start
        self.shape, self.dtype, self.name = (stop - start, *base.shape[1:]), base.dtype, base.name

    def read_into(self, out: Tensor, start: int) -> None:
        self.base.read_into(out, self.start + start)


class Concat(Lazy):
    """Tensors one below the other (dimension 0)."""

    def __init__(self, parts: Sequence[Lazy], name: str | None = None) -> None:
        first = parts[0]
        for part in parts:
            if part.shape[1:] != first.shape[1:] or part.dtype != first.dtype:
                raise ValueError(
                    f"{part.name} is {part.dtype} {list(part.shape)} and {first.name} {first.dtype} "
                    f"{list(first.shape)}; they belong to one tensor"
                )
        self.parts = list(parts)
        self.shape = (sum(p.shape[0] for p in parts), *first.shape[1:])
        self.dtype, self.name = first.dtype, name or first.name

    def read_into(self, out: Tensor, start: int) -> None:
        stop, at = start + out.shape[0], 0
        for part in self.parts:
            a, b = max(start, at), min(stop, at + part.shape[0])
            if a < b:
                part.read_into(out[a - start : b - start], a - at)
            at += part.shape[0]


class Grid(Lazy):
    """A vector or matrix from boxes: (offsets, tensor). Together they must cover it, without overlap."""

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, boxes: list[tuple[tuple[int, ...], Lazy]], name: str
    ) -> None:
        self.shape, self.dtype, self.boxes, self.name = tuple(shape), dtype, sorted(boxes, key=lambda b: b[0]), name
        covered = sum(box.nbytes for _, box in boxes)
        if covered != self.nbytes:
            raise ValueError(f"{name}: the checkpoint's chunks hold {covered} bytes of {self.nbytes}; it is damaged")

    def read_into(self, out: Tensor, start: int) -> None:
        stop = start + out.shape[0]
        for offsets, box in self.boxes:
            a, b = max(start, offsets[0]), min(stop, offsets[0] + box.shape[0])
            if a >= b:
                continue
            rows = out[a - start : b - start]
            if box.shape[1:] == self.shape[1:]:
                box.read_into(rows, a - offsets[0])
            else:
                rows[:, offsets[1] : offsets[1] + box.shape[1]] = box.read(a - offsets[0], b - offsets[0])


class Zeros(Lazy):
    """Rows of padding."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.shape, self.dtype, self.name = tuple(shape), dtype, "padding"

    def read_into(self, out: Tensor, start: int) -> None:
        out.zero_()


def equal(a: Lazy, b: Lazy) -> bool:
    """Compare shape, dtype and every bit of two tensors, block by block."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    for start, block in a.blocks():
        if not same_bits(block, b.read(start, start + block.shape[0])):
            return False
    return True


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Compare bits: a NaN equals itself."""
    return a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def has_only_finite(block: Tensor) -> bool:
    """True without NaN and infinity. A sum finds them at memory speed; one that overflowed is checked again, slowly."""
    if not block.is_floating_point():
        return True
    return bool(torch.isfinite(block.sum())) or bool(torch.isfinite(block).all())
