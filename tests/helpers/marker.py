"""A harmless pickle that leaves a mark where it is run, and checkpoints and caches that hold it."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megatron.dmc.checkpoint.manifest import read_manifest


class Marker:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def plant(checkpoint: Path, place: str, mark: Path) -> Path:
    """Put a :class:`Marker` into one place of a checkpoint, whose checksums are then taken anew, as anybody could.

    Args:
        place: metadata (``.metadata``), common (``common.pt``), chunk (of the embedding), or bytes: an object that
            ``.metadata`` gives the embedding's name.
    """
    manifest = read_manifest(checkpoint)
    if place == "metadata":
        (checkpoint / ".metadata").write_bytes(pickle.dumps(Marker(mark)))
    elif place == "common":
        torch.save({"content_metadata": {}, "args": Marker(mark)}, checkpoint / "common.pt")
    else:
        _plant_chunk(checkpoint, place, mark)
    manifest.write(checkpoint, {} if manifest.crc32 else None)
    return checkpoint


def _plant_chunk(checkpoint: Path, place: str, mark: Path) -> None:
    metadata: Metadata = pickle.loads((checkpoint / ".metadata").read_bytes())  # the test's own
    name = "embedding.word_embeddings.weight"
    index, info = next((i, s) for i, s in metadata.storage_data.items() if i.fqn == name)
    path = checkpoint / info.relative_path
    torch.save(Marker(mark), checkpoint / "marker.pt")
    content = (checkpoint / "marker.pt").read_bytes()
    (checkpoint / "marker.pt").unlink()
    info.offset, info.length = path.stat().st_size, len(content)
    with path.open("ab") as file:
        file.write(content)
    if place == "bytes":
        entry = BytesStorageMetadata()
        entry.size = metadata.state_dict_metadata[name].size  # megatron-core compares it
        metadata.state_dict_metadata[name] = entry
        for other in [i for i in metadata.storage_data if i.fqn == name]:
            del metadata.storage_data[other]
        metadata.storage_data[type(index)(name)] = info
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
