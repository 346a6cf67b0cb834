"""Files that ``torch.save`` wrote, without running what is in them and without reading their tensors.

``torch.load(weights_only=True)`` rebuilds tensors and plain containers and refuses every other class; under a fake-tensor
mode it also leaves the data where it is and notes each storage's place in the file.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron.dmc.checkpoint.tensors import FileTensor, Lazy


class _FilePart(io.RawIOBase):
    """Bytes ``start`` ... ``start + length - 1`` of a file, as a file."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence] + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        self._file.seek(self._start + self._at)
        n = self._file.readinto(view)  # type: ignore[attr-defined]
        self._at += n
        return n


def _message(error: BaseException) -> str:
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    found = re.search(r"Unsupported (?:global|class|operand)[^\n]*", text)
    return found.group() if found else " ".join(text.split())[:300]


def load_lazily(path: Path, *, offset: int = 0, length: int | None = None, allow: Sequence[Any] = ()) -> Any:
    """The object in a ``torch.save`` file, or in a part of a file, with a :class:`Lazy` in place of every tensor.

    Args:
        path: a file in PyTorch's zip format (every version since 1.6).
        offset, length: of the part, in bytes; None: up to the end.
        allow: classes, or (class, "module.name") pairs, for ``torch.serialization.safe_globals``.

    Raises:
        ValueError: the file is missing, truncated, in the older format, or holds anything but tensors, plain containers and
            what is allowed; with the file's name.
    """
    try:
        with open(path, "rb") as file:
            size = (file.seek(0, io.SEEK_END) - offset) if length is None else length
            part = io.BufferedReader(_FilePart(file, offset, size))
            if part.peek(2)[:2] != b"PK":
                raise ValueError(f"{path} is not a file of torch.save's zip format (or is cut off); save it again with "
                                 "PyTorch 1.6 or newer, or copy it again")  # fmt: skip
            with torch.serialization.safe_globals(list(allow)), FakeTensorMode():
                content = torch.load(part, weights_only=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnpicklingError as error:
        raise ValueError(f"{path} is refused: it would run code when it is read ({_message(error)})") from error
    except (RuntimeError, EOFError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {_message(error)}; copy it again") from error
    return _replace(content, path, offset, "")


def _replace(value: Any, path: Path, offset: int, name: str) -> Any:
    if isinstance(value, Tensor):
        return _file_tensor(value, path, offset, name)
    if isinstance(value, dict):
        return {k: _replace(v, path, offset, f"{name}.{k}" if name else str(k)) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replace(v, path, offset, f"{name}.{i}") for i, v in enumerate(value)]
    return value


def _file_tensor(fake: Tensor, path: Path, offset: int, name: str) -> Lazy | Tensor:
    storage = fake.untyped_storage()
    at = getattr(storage, "_checkpoint_offset", None)
    if at is None or not fake.is_contiguous() or not fake.dim():
        # Nothing that a model is made of; kept so that an error can name it.
        return torch.empty(fake.shape, dtype=fake.dtype, device="meta")
    return FileTensor(path, offset + at + fake.storage_offset() * fake.itemsize, fake.shape, fake.dtype, name)
