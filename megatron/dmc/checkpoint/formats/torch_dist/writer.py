"""``torch_dist`` checkpoints written tensor by tensor, in one process and in bounded memory."""

import json
import os
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Optional, Self

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron.dmc.checkpoint.direct import DirectFile
from megatron.dmc.checkpoint.tensors import BackgroundWriter, Buffers, Lazy

CHUNK_BYTES = 64 << 20
"""No chunk is larger: it is held in memory when it is written."""
SHARDS = 8
"""Tensors are cut as tensor parallelism of this size cuts them, so that no rank reads what it does not need."""
FILE_BYTES = 4 << 30
_SMALL = 1 << 20


class DistWriter:
    """Writes a ``torch_dist`` checkpoint that any tensor- and pipeline-parallel layout loads.

    A context: what is left of it after an error is not a checkpoint. Memory: a few chunks (``CHUNK_BYTES``) of each
    size.

    Args:
        directory: an empty directory.
        common: what Megatron is to find beside the tensors, such as ``args``: plain values and a ``Namespace`` of them.
    """

    def __init__(self, directory: Path, common: Optional[Mapping[str, Any]] = None) -> None:
        self.directory, self._common = directory, dict(common or {})
        self.crc32: dict[str, str] = {}
        """CRC-32 of each file of tensors, by name; all of them when the context is left."""
        self._entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._storage: dict[MetadataIndex, _StorageInfo] = {}
        self._files = 0
        self._file: Optional[DirectFile] = None
        self._background, self._blocks, self._pieces = BackgroundWriter(), Buffers(), Buffers()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            self._background.finish()
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
                self._background(self._append, name, entry, offsets, piece)

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

    def write_object(self, name: str, value: Any) -> None:
        """Write an object that is no tensor, as megatron-core's ``ShardedObject`` of this unique key."""
        self._background(self._append_object, name, value)

    def _append_object(self, name: str, value: Any) -> None:
        self._entries[name] = BytesStorageMetadata()
        self._storage[MetadataIndex(name)] = self._save([value])

    def _append(self, name: str, entry: TensorStorageMetadata, offsets: tuple[int, ...], piece: Tensor) -> None:
        entry.chunks.append(ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(piece.shape)))
        index = MetadataIndex(name, torch.Size(offsets), len(entry.chunks) - 1)
        self._storage[index] = self._save(piece)

    def _save(self, value: Any) -> _StorageInfo:
        """Append to the current file; returns where it lies."""
        if self._file is None or self._file.tell() >= FILE_BYTES:
            self._close_file()
            self._file = DirectFile(self.directory / f"__0_{self._files}.distcp")
            self._files += 1
        start = self._file.tell()
        try:
            torch.save(value, self._file)
        except RuntimeError as error:
            # What torch says when it closes the file that could not be written hides why.
            if isinstance(error.__context__, OSError):
                raise OSError(error.__context__.errno, error.__context__.strerror, self._file.name) from error
            raise
        return _StorageInfo(Path(self._file.name).name, start, self._file.tell() - start)

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self.crc32[Path(self._file.name).name] = self._file.crc32
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
        said = {"content_metadata": {"distrib_optim_sharding_type": "fully_reshardable"}}
        torch.save({**self._common, **said}, self.directory / "common.pt")
        (self.directory / "metadata.json").write_text(json.dumps(content))
        metadata = Metadata(state_dict_metadata=dict(self._entries), storage_data=self._storage)
        with open(self.directory / ".metadata", "wb") as file:
            pickle.dump(metadata, file)
            file.flush()
            os.fsync(file.fileno())
