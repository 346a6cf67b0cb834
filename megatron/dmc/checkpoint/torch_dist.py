"""``torch_dist`` checkpoints read and written tensor by tensor, in one process, without Megatron and in bounded memory.

The format is that of ``torch.distributed.checkpoint`` as megatron-core 0.16.1 uses it: layers are stacked in a first
dimension, every chunk is a ``torch.save`` file inside a ``.distcp`` file, ``.metadata`` says which chunk lies where.
Chunks may be cut in any way: whoever loads takes the parts that it needs.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron.dmc.checkpoint.direct import DirectFile
from megatron.dmc.checkpoint.pickled import TensorFinder
from megatron.dmc.checkpoint.tensors import Behind, Buffers, FileTensor, Lazy

LAYERS = "decoder.layers."
CHUNK_BYTES = 64 << 20
"""No chunk is larger: it is held in memory when it is written."""
SHARDS = 8
"""Tensors are cut as tensor parallelism of this size cuts them, so that no rank reads what it does not need."""
FILE_BYTES = 4 << 30
_SMALL = 1 << 20


class _MetadataUnpickler(pickle.Unpickler):
    """Builds the classes of a checkpoint's ``.metadata`` and nothing else."""

    # Names are compared whole: a dotted one would reach into what a module imports.
    _ALLOWED = {
        "torch.distributed.checkpoint.metadata": {
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
        "torch": {
            "Size",
            "float32",
            "float16",
            "bfloat16",
            "float64",
            "int64",
            "int32",
            "int16",
            "int8",
            "uint8",
            "bool",
        },
        "torch.serialization": {"_get_layout"},
        "pathlib": {"PosixPath", "PurePosixPath"},
        "collections": {"OrderedDict"},
        "builtins": {"set", "frozenset"},
    }

    def find_class(self, module: str, name: str) -> Any:
        if name in self._ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


class _Chunk(Lazy):
    """One stored chunk of a stacked or plain tensor; the place of its data in the file is looked up when it is read."""

    def __init__(
        self, path: Path, info: _StorageInfo, shape: Sequence[int], dtype: torch.dtype, name: str, find: TensorFinder
    ) -> None:
        self.path, self.info, self.shape, self.dtype, self._find = path, info, tuple(shape), dtype, find
        self.name = f"{name} in {path}"

    @cached_property
    def _data(self) -> FileTensor:
        found = self._find(self.path, self.info.offset, self.info.length)
        if not isinstance(found, FileTensor) or found.dtype != self.dtype or found.nbytes != self.nbytes:
            raise ValueError(
                f"{self.name}: .metadata says {self.dtype} {list(self.shape)} and the file holds {found}; the "
                "checkpoint is damaged"
            )
        return found

    def read_into(self, out: Tensor, start: int) -> None:
        data = self._data
        FileTensor(data.path, data.offset, self.shape, self.dtype, self.name).read_into(out, start)

    def layer(self, index: int) -> Lazy:
        """One entry of the first dimension."""
        return _ChunkLayer(self, index)


class _ChunkLayer(Lazy):
    def __init__(self, chunk: _Chunk, index: int) -> None:
        self.chunk, self.index = chunk, index
        self.shape, self.dtype, self.name = chunk.shape[1:], chunk.dtype, chunk.name

    def read_into(self, out: Tensor, start: int) -> None:
        data = self.chunk._data
        FileTensor(data.path, data.offset + self.index * self.nbytes, self.shape, self.dtype, self.name).read_into(
            out, start
        )


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


class DistReader:
    """The tensors of one ``torch_dist`` checkpoint directory.

    Raises:
        ValueError: ``.metadata`` is missing, damaged, or would run code.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self._find = directory, TensorFinder()
        path = directory / ".metadata"
        try:
            content = path.read_bytes()
            self.metadata: Metadata = _MetadataUnpickler(io.BytesIO(content)).load()
            self._chunks: dict[str, list[tuple[MetadataIndex, _StorageInfo]]] = defaultdict(list)
            for index, info in self.metadata.storage_data.items():
                self._chunks[index.fqn].append((index, info))
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{path} is refused: it would run code when it is read, or is damaged ({error})"
            ) from error
        except (EOFError, AttributeError, TypeError, ValueError, IndexError, ImportError) as error:
            raise ValueError(f"{path} is damaged ({error}); copy it again") from error

    def tensors(
        self, prefixes: Sequence[str] = ("embedding.", "decoder.", "output_layer.")
    ) -> dict[str, TensorStorageMetadata]:
        """Name -> shape and dtype of the model's tensors, without those of the optimizer."""
        return {
            name: entry
            for name, entry in self.metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and name.startswith(tuple(prefixes))
        }

    def get(self, name: str, layer: Optional[int] = None) -> Lazy:
        """A tensor; with ``layer`` one entry of its first dimension."""
        entry = self.metadata.state_dict_metadata[name]
        sizes = {tuple(c.offsets): tuple(c.sizes) for c in entry.chunks}
        boxes: list[tuple[tuple[int, ...], Lazy]] = []
        for index, info in self._chunks[name]:
            offsets = tuple(index.offset or (0,) * len(entry.size))
            chunk = _Chunk(
                self.directory / info.relative_path, info, sizes[offsets], entry.properties.dtype, name, self._find
            )
            if layer is None:
                boxes.append((offsets, chunk))
            elif offsets[0] <= layer < offsets[0] + chunk.shape[0]:
                boxes.append((offsets[1:], chunk.layer(layer - offsets[0])))
        shape = tuple(entry.size) if layer is None else tuple(entry.size)[1:]
        return Grid(shape, entry.properties.dtype, boxes, name if layer is None else f"{name} of layer {layer}")


class DistWriter:
    """Writes a ``torch_dist`` checkpoint that any tensor- and pipeline-parallel layout loads.

    A context: what is left of it after an error is not a checkpoint. Memory: a few chunks (``CHUNK_BYTES``) of each
    size.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._entries: dict[str, TensorStorageMetadata] = {}
        self._storage: dict[MetadataIndex, _StorageInfo] = {}
        self._files = 0
        self._file: Optional[DirectFile] = None
        self._behind, self._blocks, self._pieces = Behind(), Buffers(), Buffers()

    def __enter__(self) -> DistWriter:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            self._behind.finish()
            if kind is None:
                self._finish()
        finally:
            if self._file is not None:
                self._file.close(complete=False)

    def write(
        self,
        name: str,
        tensor: Lazy,
        *,
        layer: Optional[tuple[int, int]] = None,
        split: Optional[int] = None,
        parts: int = 1,
    ) -> Iterator[Tensor]:
        """Write one tensor, or one layer of a stacked one. Yields every block after it was read, for checks and
        progress.

        Args:
            layer: (number, how many).
            split: the dimension that tensor parallelism cuts.
            parts: fused matrices below each other (gate and up: 2), each of which is cut.
        """
        shape = tensor.shape if layer is None else (layer[1], *tensor.shape)
        if name not in self._entries:
            properties = TensorProperties(dtype=tensor.dtype)
            self._entries[name] = TensorStorageMetadata(properties=properties, size=torch.Size(shape), chunks=[])
        entry = self._entries[name]
        if tuple(entry.size) != shape or entry.properties.dtype != tensor.dtype:
            raise ValueError(
                f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}; the layers before it have "
                f"{entry.properties.dtype} {list(entry.size[1:])}"
            )
        for row, block in self._row_blocks(tensor, split, parts):
            yield block
            for column, piece in self._column_pieces(block, split):
                offsets = (row,) if column is None else (row, column)
                if layer is not None:
                    offsets, piece = (layer[0], *offsets), piece[None]
                self._behind(self._append, name, entry, offsets, piece)

    def _row_blocks(self, tensor: Lazy, split: Optional[int], parts: int) -> Iterator[tuple[int, Tensor]]:
        rows = tensor.shape[0]
        count = parts * SHARDS if split == 0 and rows % (parts * SHARDS) == 0 and tensor.nbytes > _SMALL else parts
        edges = [rows * i // count for i in range(count + 1)]
        step = max(1, CHUNK_BYTES // max(tensor.row_bytes, 1))
        for a, b in zip(edges, edges[1:], strict=False):
            for start in range(a, b, step):
                yield start, tensor.read(start, min(start + step, b), self._blocks)

    def _column_pieces(self, block: Tensor, split: Optional[int]) -> Iterator[tuple[Optional[int], Tensor]]:
        n = SHARDS if split == 1 and block.shape[-1] % SHARDS == 0 and block.nbytes > _SMALL else 1
        if n == 1:
            yield None if block.dim() == 1 else 0, block
            return
        width = block.shape[1] // n
        for i in range(n):
            piece = self._pieces.get((block.shape[0], width), block.dtype)
            yield i * width, piece.copy_(block[:, i * width : (i + 1) * width])

    def _append(self, name: str, entry: TensorStorageMetadata, offsets: tuple[int, ...], piece: Tensor) -> None:
        if self._file is None or self._file.tell() >= FILE_BYTES:
            self._close_file()
            self._file = DirectFile(self.directory / f"__0_{self._files}.distcp")
            self._files += 1
        start = self._file.tell()
        try:
            torch.save(piece, self._file)
        except RuntimeError as error:
            # What torch says when it closes the file that could not be written hides why.
            if isinstance(error.__context__, OSError):
                raise OSError(error.__context__.errno, error.__context__.strerror, self._file.name) from error
            raise
        entry.chunks.append(ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(piece.shape)))
        index = MetadataIndex(name, torch.Size(offsets), len(entry.chunks) - 1)
        self._storage[index] = _StorageInfo(Path(self._file.name).name, start, self._file.tell() - start)

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _finish(self) -> None:
        """Write what says where everything is. A directory without it is not a checkpoint."""
        self._close_file()
        content = {
            "sharded_backend": "torch_dist",
            "sharded_backend_version": 1,
            "common_backend": "torch",
            "common_backend_version": 1,
        }
        # What Megatron saves beside the tensors; no optimizer here.
        torch.save(
            {"content_metadata": {"distrib_optim_sharding_type": "fully_reshardable"}}, self.directory / "common.pt"
        )
        (self.directory / "metadata.json").write_text(json.dumps(content))
        metadata = Metadata(state_dict_metadata=dict(self._entries), storage_data=self._storage)
        with open(self.directory / ".metadata", "wb") as file:
            pickle.dump(metadata, file)
            file.flush()
            os.fsync(file.fileno())
