"""Files that ``torch.save`` wrote, without running what is in them and without reading their tensors.

``torch.load(weights_only=True)`` rebuilds tensors and plain containers and refuses every other class; under a
fake-tensor mode it also leaves the data where it is and notes each storage's place in the file.
"""

import io
import os
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO, Optional, Self

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron.dmc.checkpoint.tensors import FileTensor, Lazy

_DAMAGED = (RuntimeError, EOFError, LookupError, AttributeError, TypeError, ValueError, AssertionError, struct.error)
"""Errors that readers raise for a damaged file."""
_FORCE, _FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


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


class StandIn:
    """Substitute for an object whose class is neither imported nor run; keeps what the file says of it.

    Attributes:
        name: "module.name" of the class or function that the file names.
        args: what the file would have called it with.
        state: what the file would have set on the object, e.g. the values of an ``argparse.Namespace``.
    """

    name = ""

    def __new__(cls, *args: Any) -> Self:
        self = super().__new__(cls)
        self.args, self.state = args, None
        return self

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(map(repr, self.args))})"


def _stand_ins(file: io.BufferedReader, allow: Callable[[str], bool]) -> list[tuple[type, str]]:
    """Make a class for every name in the file that ``torch.load`` does not know and ``allow`` takes."""
    needed = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    file.seek(0)
    if odd := [name for name in needed if not allow(name)]:
        raise UnpicklingError(", ".join(odd[:5]) + (", ..." if odd[5:] else ""))
    return [(type("StandIn", (StandIn,), {"name": name}), name) for name in needed]


def cause(error: BaseException) -> str:
    """What a reader's exception says, on one line and without what torch advises to switch off."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    found = re.search(r"Unsupported (?:global|class|operand)[^\n]*", text)
    return found.group() if found else " ".join(text.split())[:300]


def load_lazily(
    path: Path, *, offset: int = 0, length: int | None = None, allow: Optional[Callable[[str], bool]] = None
) -> Any:
    """Read the object in a ``torch.save`` file, or in a part of a file, with a :class:`Lazy` in place of every tensor.

    Args:
        path: a file in PyTorch's zip format (every version since 1.6).
        offset, length: of the part, in bytes; None: up to the end.
        allow: says of a "module.name" that is no tensor or plain container whether a :class:`StandIn` may take its
            place; the thing itself is never imported. None: nothing but tensors and plain containers is accepted.

    Raises:
        ValueError: the file is missing, truncated, in the older format, or holds anything but tensors, plain containers
            and what is allowed; with the file's name.
    """
    try:
        with open(path, "rb") as file:
            size = (file.seek(0, io.SEEK_END) - offset) if length is None else length
            part = io.BufferedReader(_FilePart(file, offset, size))
            if part.peek(2)[:2] != b"PK":
                raise ValueError(
                    f"{path} is not a file of torch.save's zip format (or is cut off); save it again with "
                    "PyTorch 1.6 or newer, or copy it again"
                )
            content = _load(part, path, allow)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    return _replace(content, path, offset, "")


@contextmanager
def weights_only() -> Iterator[None]:
    """Let every ``torch.load`` of this process, whoever calls it, take tensors and plain containers and nothing else.

    PyTorch's environment variable wins over the argument of the call, and over the variable with which some containers
    switch the check off. What other code has declared safe, as megatron-core does when it is imported, is forgotten for
    a while: what a file may hold must not depend on what was imported before.
    """
    declared = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(declared)
        del os.environ[_FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _load(part: io.BufferedReader, path: Path, allow: Optional[Callable[[str], bool]]) -> Any:
    try:
        with weights_only():
            stand_ins: list[Any] = [] if allow is None else _stand_ins(part, allow)
            with torch.serialization.safe_globals(stand_ins), FakeTensorMode():
                return torch.load(part, weights_only=True)
    except UnpicklingError as error:
        raise ValueError(f"{path} is refused: it would run code when it is read ({cause(error)})") from error
    except _DAMAGED as error:
        raise ValueError(f"{path} cannot be read: {cause(error)}; copy it again") from error


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


def is_whole(path: Path, offset: int, length: int) -> bool:
    """True where this part of the file is a ``torch.save`` file whose records have the CRC-32 that it gives them."""
    try:
        with (
            open(path, "rb") as file,
            zipfile.ZipFile(io.BufferedReader(_FilePart(file, offset, length), 1 << 20)) as archive,
        ):
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile, zipfile.LargeZipFile, *_DAMAGED):
        return False


class TensorFinder:
    """Finds the data of files, or parts of files, that are each one ``torch.save(tensor)``, as in ``torch_dist``
    checkpoints.

    They come in thousands, with a few dozen different pickles. Each of these goes through :func:`load_lazily` once; in
    what has the same pickle, bit by bit, only the place of the storage is looked up, which is ten times as fast.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[bytes, bytes], tuple[str, int, FileTensor]] = {}

    def __call__(self, path: Path, offset: int, length: int) -> Any:
        """Tensor in this part of the file. Returns and raises what :func:`load_lazily` does."""
        found = self._place(path, offset, length)
        if found is None:
            return load_lazily(path, offset=offset, length=length)
        key, begins = found
        if key not in self._known:
            tensor = load_lazily(path, offset=offset, length=length)
            if not isinstance(tensor, FileTensor):
                return tensor
            at = tensor.offset - offset
            # The storage's record is the one that the data lies in.
            name = max((name for name, (begin, _) in begins.items() if begin <= at), key=lambda n: begins[n][0])
            self._known[key] = name, at - begins[name][0], tensor
        name, inside, like = self._known[key]
        begin, size = begins.get(name, (0, 0))
        if inside + like.nbytes > size:
            return load_lazily(path, offset=offset, length=length)
        return FileTensor(path, offset + begin + inside, like.shape, like.dtype, "")

    @staticmethod
    def _place(
        path: Path, offset: int, length: int
    ) -> Optional[tuple[tuple[bytes, bytes], dict[str, tuple[int, int]]]]:
        """(pickle, byte order), and where each record's bytes begin and how many there are;
        None: no file as expected.
        """
        try:
            with (
                open(path, "rb") as file,
                zipfile.ZipFile(io.BufferedReader(_FilePart(file, offset, length))) as archive,
            ):
                records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
                key = archive.read(records["data.pkl"]), archive.read(records["byteorder"])
                begins = {}
                for name, info in records.items():
                    if name.startswith("data/") and info.compress_type == zipfile.ZIP_STORED:
                        file.seek(offset + info.header_offset)
                        # Local file header: 30 bytes, of which the last four are the lengths of the name and the
                        # padding.
                        lengths = struct.unpack("<26x2H", file.read(30))
                        begins[name] = info.header_offset + 30 + sum(lengths), info.file_size
                return key, begins
        except (OSError, zipfile.BadZipFile, zipfile.LargeZipFile, *_DAMAGED):
            return None
