"""Files that ``torch.save`` wrote, without running what is in them and without reading their tensors.

``torch.load(weights_only=True)`` rebuilds tensors and plain containers and refuses every other class; under a fake-tensor
mode it also leaves the data where it is and notes each storage's place in the file. Here are also Megatron's files of this
kind, one at a time; :mod:`legacy` puts them together.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO, Optional

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron.dmc.checkpoint.tensors import FileTensor, Lazy

# What Megatron's files hold beside tensors and plain containers: arguments and the enums in them, Transformer Engine's extra
# state (a BytesIO before its version 1.14), numpy's random state.
_MEGATRON_PACKAGES = ("megatron.", "transformer_engine.")
_MEGATRON_OTHERS = {
    "argparse.Namespace", "types.SimpleNamespace", "_io.BytesIO", "builtins.bytes", "builtins.frozenset", "signal.Signals",
    "builtins.getattr",  # members of enums, as Python 3.11 pickles them
    "pathlib.Path", "pathlib.PosixPath", "pathlib.PurePath", "pathlib.PurePosixPath", "datetime.timedelta",
    "numpy.ndarray", "numpy.dtype", "numpy.core.multiarray._reconstruct", "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct", "numpy._core.multiarray.scalar",
}  # fmt: skip


def megatron_objects(name: str) -> bool:
    """``allow`` of :func:`load_lazily` for what Megatron-LM saves."""
    return name in _MEGATRON_OTHERS or name.startswith(_MEGATRON_PACKAGES)


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
    """In place of an object whose class is neither imported nor run: keeps what the file says of it, and does nothing.

    Attributes:
        name: "module.name" of the class or function that the file names.
        args: what the file would have called it with.
        state: what the file would have set on the object, e.g. the values of an ``argparse.Namespace``.
    """

    name = ""

    def __new__(cls, *args: Any) -> StandIn:
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
    """A class of its own for every name in the file that ``torch.load`` does not know and ``allow`` takes."""
    needed = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    file.seek(0)
    if odd := [name for name in needed if not allow(name)]:
        raise UnpicklingError(", ".join(odd[:5]) + (", ..." if odd[5:] else ""))
    return [(type("StandIn", (StandIn,), {"name": name}), name) for name in needed]


def _message(error: BaseException) -> str:
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    found = re.search(r"Unsupported (?:global|class|operand)[^\n]*", text)
    return found.group() if found else " ".join(text.split())[:300]


def load_lazily(path: Path, *, offset: int = 0, length: int | None = None,
                allow: Optional[Callable[[str], bool]] = None) -> Any:  # fmt: skip
    """The object in a ``torch.save`` file, or in a part of a file, with a :class:`Lazy` in place of every tensor.

    Args:
        path: a file in PyTorch's zip format (every version since 1.6).
        offset, length: of the part, in bytes; None: up to the end.
        allow: says of a "module.name" that is no tensor or plain container whether a :class:`StandIn` may take its place; the
            thing itself is never imported. None: nothing but tensors and plain containers is accepted.

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
            content = _load(part, path, allow)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    return _replace(content, path, offset, "")


@contextmanager
def _nothing_allowed() -> Iterator[None]:
    """Without the classes that other code of this process has declared safe, as megatron-core does when it is imported:
    what a file may hold must not depend on what was imported before."""
    declared = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(declared)


def _load(part: io.BufferedReader, path: Path, allow: Optional[Callable[[str], bool]]) -> Any:
    try:
        with _nothing_allowed():
            stand_ins: list[Any] = [] if allow is None else _stand_ins(part, allow)
            with torch.serialization.safe_globals(stand_ins), FakeTensorMode():
                return torch.load(part, weights_only=True)
    except UnpicklingError as error:
        raise ValueError(f"{path} is refused: it would run code when it is read ({_message(error)})") from error
    except (RuntimeError, EOFError, LookupError, AttributeError, TypeError, ValueError, AssertionError, struct.error) as error:
        raise ValueError(f"{path} cannot be read: {_message(error)}; copy it again") from error


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


def wrong(what: object, found: str, expected: str) -> ValueError:
    """An error that says what is where and what should be."""
    return ValueError(f"{what} {found}; expected {expected}")


@dataclass
class RankFile:
    """One ``model_optim_rng.pt``: its model chunks, local name -> tensor, without extra state and ``module.`` prefixes."""

    path: Path
    args: dict[str, Any]
    iteration: int
    chunks: list[dict[str, Lazy]]

    @property
    def layout(self) -> tuple[int, int, int]:
        """Tensor, pipeline and virtual pipeline parallel size."""
        tensor, pipeline, virtual = (int_arg(self.args, f"{x}_model_parallel_size", 1) for x in
                                     ("tensor", "pipeline", "virtual_pipeline"))  # fmt: skip
        return tensor, pipeline, virtual


def int_arg(args: dict[str, Any], name: str, default: int) -> int:
    """``args[name]`` when it is a whole number, else ``default``."""
    value = args.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else default


def read_rank_file(path: Path) -> RankFile:
    """Open one file of Megatron's. Raises ``ValueError``: see :func:`load_lazily`; or it is no such file, or of another version."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; copy it again")
    content = load_lazily(path, allow=megatron_objects)
    found = content.get("args") if isinstance(content, dict) else None
    args = found.state if isinstance(found, StandIn) else found
    if not isinstance(args, dict):
        keys = f"a dict of {sorted(map(str, content))[:8]}" if isinstance(content, dict) else type(content).__name__
        raise wrong(path, f"holds {keys}", "a dict with args, the arguments of the run that saved it, and model")
    if odd := [name for name, value in args.items() if isinstance(value, Tensor) or not isinstance(name, str)]:
        raise wrong(path, f"args.{odd[0]} is a tensor", "plain values")
    if content.get("checkpoint_version") != 3.0:
        raise wrong(f"{path}: checkpoint_version", f"is {content.get('checkpoint_version')!r}",
                    "3.0 (older ones order the attention heads differently)")  # fmt: skip
    file = RankFile(path, args, int_arg(content, "iteration", 0), [])
    virtual = file.layout[2]
    keys = ["model"] if virtual == 1 else [f"model{i}" for i in range(virtual)]
    models = sorted(str(k) for k in content if re.fullmatch(r"model\d*", str(k)))
    if models != sorted(keys):
        raise wrong(path, f"holds {', '.join(models) or 'no model'}",
                    f"{', '.join(keys)} (args.virtual_pipeline_model_parallel_size is {virtual})")  # fmt: skip
    file.chunks = [_read_chunk(content[key], path, key) for key in keys]
    return file


def _read_chunk(state: Any, path: Path, key: str) -> dict[str, Lazy]:
    if not isinstance(state, dict) or any(isinstance(value, dict) for value in state.values()):
        raise wrong(f"{path}: {key}", "is no flat state dict", "Megatron Core's names (decoder.layers.0.mlp.linear_fc1.weight); "
                    "older models must go through tools/checkpoint of Megatron-LM first")  # fmt: skip
    result: dict[str, Lazy] = {}
    for full, tensor in state.items():
        name = re.sub(r"^(module\.)+", "", str(full))
        if "_extra_state" in name or name.endswith(".inv_freq"):
            continue
        if not isinstance(tensor, Lazy):
            raise wrong(f"{full} in {path}", f"is {tensor!r}", "a dense tensor")
        tensor.name = f"{name} in {path}"
        result[name] = tensor
    return result
