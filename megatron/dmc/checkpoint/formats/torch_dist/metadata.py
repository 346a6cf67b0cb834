"""``.metadata`` of a ``torch_dist`` checkpoint: a pickle, read without running or importing what it names.

Every object in the file becomes a record of what the file says of it. :func:`read_metadata` builds torch's own
``Metadata`` from these records, field by field, so that sizes are sizes and a file name leads nowhere else.
"""

import io
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron.dmc.checkpoint.pickled import StandIn

METADATA = ".metadata"

# Names are compared whole: a dotted one would reach into what a module imports.
_RECORDS = {
    "torch.distributed.checkpoint.metadata": "Metadata MetadataIndex StorageMeta TensorStorageMetadata "
    "BytesStorageMetadata ChunkStorageMetadata TensorProperties _MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.planner": "SavePlan WriteItem WriteItemType TensorWriteData",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo _StoragePrefix",
    "torch.serialization": "_get_layout",
    # pathlib is a package in Python 3.13 and its classes say so in a pickle.
    "pathlib": "PosixPath PurePosixPath",
    "pathlib._local": "PosixPath PurePosixPath",
}
_PLAIN = {
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): dict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
}
_DTYPES = "float32 float16 bfloat16 float64 int64 int32 int16 int8 uint8 bool float8_e4m3fn float8_e5m2".split()


class _Unpickler(pickle.Unpickler):
    """Makes a :class:`StandIn` for every class that a ``.metadata`` file may hold, and refuses all others."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        # Of this file alone: what the file writes into a class is gone with it.
        self._classes: dict[str, type] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        if module == "torch" and name in _DTYPES:
            return getattr(torch, name)
        if name in _RECORDS.get(module, "").split():
            return self._classes.setdefault(name, type(name, (StandIn,), {"name": name}))
        raise pickle.UnpicklingError(f"{module}.{name}")


def read_metadata(directory: Path) -> Metadata:
    """What a checkpoint's ``.metadata`` says of its tensors: name -> shape, dtype and chunks, chunk -> place.

    Raises:
        ValueError: the file is missing or damaged, would run code, or names a file outside the checkpoint.
    """
    path = directory / METADATA
    try:
        content = _Unpickler(io.BytesIO(path.read_bytes())).load()
        said = _state(content, "Metadata")
        entries = {_text(name): _entry(entry) for name, entry in said["state_dict_metadata"].items()}
        places = dict(_place(index, info) for index, info in said["storage_data"].items())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is refused: it would run code when it is read, or is damaged ({error})") from error
    except (EOFError, AttributeError, TypeError, ValueError, LookupError, ImportError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); copy it again") from error
    return Metadata(state_dict_metadata=entries, storage_data=places)


def _state(value: Any, name: str) -> Any:
    """What the file would have set on an object of this class."""
    if not isinstance(value, StandIn) or value.name != name:
        raise TypeError(f"{value!r:.80} is no {name}")
    return {} if value.state is None else value.state


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.80} is no name")
    return value


def _sizes(values: Iterable[Any]) -> torch.Size:
    return torch.Size([_size(value) for value in values])


def _size(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError(f"{value!r:.80} is no size")
    return value


def _entry(value: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if isinstance(value, StandIn) and value.name == "BytesStorageMetadata":
        return BytesStorageMetadata()
    said = _state(value, "TensorStorageMetadata")
    dtype, *_ = _state(said["properties"], "TensorProperties")
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{dtype!r:.80} is no dtype")
    chunks = []
    for chunk in said["chunks"]:
        box = _state(chunk, "ChunkStorageMetadata")
        chunks.append(ChunkStorageMetadata(offsets=_sizes(box["offsets"]), sizes=_sizes(box["sizes"])))
    return TensorStorageMetadata(TensorProperties(dtype=dtype), _sizes(said["size"]), chunks)


def _place(index: Any, info: Any) -> tuple[MetadataIndex, _StorageInfo]:
    """Name and offsets of a chunk, and where it lies."""
    key, said = _state(index, "MetadataIndex"), _state(info, "_StorageInfo")
    offset, hint = key.get("offset"), key.get("index")
    file = said["relative_path"]
    if isinstance(file, StandIn):
        file = "/".join(file.args)
    if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
        raise ValueError(f"{file!r:.80} is no file of the checkpoint")
    if said.get("transform_descriptors"):
        raise ValueError(f"its chunks are compressed ({said['transform_descriptors']!r:.80}), which is not supported")
    return (
        MetadataIndex(
            _text(key["fqn"]), None if offset is None else _sizes(offset), None if hint is None else _size(hint)
        ),
        _StorageInfo(file, _size(said["offset"]), _size(said["length"])),
    )
