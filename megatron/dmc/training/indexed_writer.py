"""Writes Megatron's indexed datasets with the sidecar that training checks, all at once or not at all."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from megatron.dmc.training.data import Sidecar
from megatron.dmc.training.tokenizer import Tokenizer

SUFFIXES = (".bin", ".idx", ".json")


class IndexedWriter:
    """``data.bin``, ``data.idx`` and ``data.json`` in a directory; :func:`publish` gives them their names.

    Args:
        directory: an empty one, on the disk where the dataset is to lie.
        tokenizer: that made the ids; what it is goes into the sidecar.
        eod_appended, bos_prepended: what was done to every document; for the sidecar.
    """

    def __init__(
        self, directory: Path, tokenizer: Tokenizer, *, eod_appended: bool, bos_prepended: bool = False
    ) -> None:
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        self.paths = [directory / f"data{suffix}" for suffix in SUFFIXES]
        self.dtype = DType.optimal_dtype(tokenizer.vocab_size)
        """Numpy type of a token."""
        self.documents = self.tokens = 0
        self._tokenizer, self._policy = tokenizer, dict(eod_appended=eod_appended, bos_prepended=bos_prepended)
        self._builder = IndexedDatasetBuilder(str(self.paths[0]), dtype=self.dtype)

    def add(self, ids: Any) -> None:
        """One document: a sequence or array of token ids."""
        self._builder.add_document(ids, [len(ids)])
        self.documents, self.tokens = self.documents + 1, self.tokens + len(ids)

    def close(self) -> None:
        """Write the index and the sidecar. Raises ``ValueError`` when there is no document."""
        if not self.documents:
            raise ValueError("no documents")
        binary, index, sidecar = self.paths
        self._builder.finalize(str(index))
        tokenizer = self._tokenizer
        Sidecar(
            tokenizer=str(tokenizer.path),
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            eod_id=tokenizer.eod_id,
            dtype=self.dtype.__name__,
            documents=self.documents,
            tokens=self.tokens,
            bin_bytes=binary.stat().st_size,
            idx_bytes=index.stat().st_size,
            idx_sha256=hashlib.sha256(index.read_bytes()).hexdigest(),
            **self._policy,
        ).write(sidecar)


def publish(directory: Path, prefix: str | Path) -> None:
    """Move ``directory``'s three files to ``prefix.*``; the sidecar, which declares the other two complete, last."""
    Path(f"{prefix}.json").unlink(missing_ok=True)  # an old one must never stand beside new data
    for suffix in SUFFIXES:
        path = directory / f"data{suffix}"
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(path, f"{prefix}{suffix}")
