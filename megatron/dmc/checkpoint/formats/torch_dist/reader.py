"""``torch_dist`` checkpoints read tensor by tensor, in one process and in bounded memory.

Every chunk of a tensor is a ``torch.save`` file inside a ``.distcp`` file; ``.metadata`` says which chunk lies where.
Chunks may be cut in any way.
"""

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Optional

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from megatron.dmc.checkpoint.formats.torch_dist.metadata import read_metadata
from megatron.dmc.checkpoint.pickled import TensorFinder, is_whole
from megatron.dmc.checkpoint.tensors import FileTensor, Grid, Lazy


@dataclass(frozen=True)
class _Stored:
    """A chunk as ``.metadata`` describes it."""

    name: str
    path: Path
    info: _StorageInfo
    shape: tuple[int, ...]
    dtype: torch.dtype

    def find(self, find: TensorFinder) -> FileTensor:
        """Place of the data in the file. Raises ``ValueError`` when something else lies there."""
        found = find(self.path, self.info.offset, self.info.length)
        nbytes = math.prod(self.shape) * self.dtype.itemsize
        if not isinstance(found, FileTensor) or found.dtype != self.dtype or found.nbytes != nbytes:
            raise ValueError(
                f"{self.name} in {self.path}: .metadata says {self.dtype} {list(self.shape)} and the file holds "
                f"{found}; the checkpoint is damaged"
            )
        return found


class _Chunk(Lazy):
    """A stored chunk, or one layer of a stacked one. Its place in the file is looked up when it is read."""

    def __init__(self, stored: _Stored, find: TensorFinder, layer: Optional[int] = None) -> None:
        self._stored, self._find, self._layer = stored, find, layer
        self.shape = stored.shape if layer is None else stored.shape[1:]
        self.dtype, self.name = stored.dtype, f"{stored.name} in {stored.path}"

    @cached_property
    def _data(self) -> FileTensor:
        found = self._stored.find(self._find)
        offset = found.offset + (self._layer or 0) * self.nbytes
        return FileTensor(found.path, offset, self.shape, self.dtype, self._stored.name)

    def read_into(self, out: Tensor, start: int) -> None:
        self._data.read_into(out, start)


class DistReader:
    """The tensors of one ``torch_dist`` checkpoint directory.

    Raises:
        ValueError: ``.metadata`` is missing, damaged, or would run code.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self._find = directory, TensorFinder()
        self.metadata: Metadata = read_metadata(directory)
        self._chunks: dict[str, list[tuple[MetadataIndex, _StorageInfo]]] = defaultdict(list)
        for index, info in self.metadata.storage_data.items():
            self._chunks[index.fqn].append((index, info))

    def tensors(
        self, prefixes: Sequence[str] = ("embedding.", "decoder.", "output_layer.")
    ) -> dict[str, TensorStorageMetadata]:
        """Name -> shape and dtype of the model's tensors, without those of the optimizer."""
        return {
            name: entry
            for name, entry in self.metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and name.startswith(tuple(prefixes))
        }

    def damaged_files(self, names: Iterable[str]) -> set[str]:
        """Files in which a chunk of one of these tensors is not what ``torch.save`` wrote, by the CRC-32 that its zip
        format keeps for every record. Reads these chunks alone, which is a fraction of a checkpoint with its optimizer.
        """
        chunks = [info for name in names for _, info in self._chunks[name]]
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            whole = pool.map(
                lambda info: is_whole(self.directory / info.relative_path, info.offset, info.length), chunks
            )
            return {info.relative_path for info, ok in zip(chunks, whole) if not ok}

    def place(self, name: str) -> tuple[Path, int, int]:
        """File, offset and length of an object that is no tensor."""
        if len(self._chunks[name]) != 1:
            raise ValueError(f"{name} in {self.directory} has {len(self._chunks[name])} parts, not one; it is damaged")
        _, info = self._chunks[name][0]
        return self.directory / info.relative_path, info.offset, info.length

    def get(self, name: str, layer: Optional[int] = None) -> Lazy:
        """A tensor; with ``layer`` one entry of its first dimension."""
        entry = self.metadata.state_dict_metadata[name]
        dtype, sizes = entry.properties.dtype, {tuple(c.offsets): tuple(c.sizes) for c in entry.chunks}
        boxes: list[tuple[tuple[int, ...], Lazy]] = []
        for index, info in self._chunks[name]:
            offsets = tuple(index.offset or (0,) * len(entry.size))
            if offsets not in sizes:
                raise ValueError(f"{name} in {self.directory} has no chunk at {offsets}; its .metadata is damaged")
            stored = _Stored(name, self.directory / info.relative_path, info, sizes[offsets], dtype)
            if layer is None:
                boxes.append((offsets, _Chunk(stored, self._find)))
            elif offsets[0] <= layer < offsets[0] + stored.shape[0]:
                boxes.append((offsets[1:], _Chunk(stored, self._find, layer - offsets[0])))
        if layer is None:
            return Grid(tuple(entry.size), dtype, boxes, name)
        return Grid(tuple(entry.size)[1:], dtype, boxes, f"{name} of layer {layer}")
