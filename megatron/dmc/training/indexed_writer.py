"""Megatron's indexed datasets on disk: the sidecar that describes one, and the writer of all its files.

A dataset is ``P.bin`` and ``P.idx``, as Megatron has them, and ``P.json``, the :class:`Sidecar` that training checks.
"""

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Self

from megatron.dmc.checkpoint.fields import read_json
from megatron.dmc.checkpoint.staging import sync
from megatron.dmc.config import build
from megatron.dmc.config.checks import not_negative, one_line, one_of, require
from megatron.dmc.training.tokenizer import Tokenizer

_FORMAT = "megatron.dmc.indexed_dataset"
_FORMAT_VERSION = 1
_BYTES = {"uint8": 1, "int8": 1, "uint16": 2, "int16": 2, "int32": 4, "int64": 8}
"""Size of a token, by the names of numpy's integer types that an index may have."""
SUFFIXES = (".bin", ".idx", ".json")


@dataclass(frozen=True)
class Sidecar:
    """Description of a dataset, ``P.json``. It is written last: without it ``P.bin`` and ``P.idx`` are incomplete."""

    tokenizer: str
    """Path of the tokenizer; for messages only."""
    tokenizer_fingerprint: str
    vocab_size: int
    eod_id: int
    eod_appended: bool
    """True when every document ends with EOD."""
    bos_prepended: Optional[bool]
    """True when every document begins with BOS, False when none is known to. None (null) where it was not recorded:
    training then warns that it could not be checked."""
    dtype: str
    """Numpy name of a token's type in ``.bin``."""
    documents: int
    tokens: int
    """Tokens over all documents, the added EOD and BOS included."""
    bin_bytes: int
    idx_bytes: int
    idx_sha256: str
    """Hash of ``.idx``, the documents' lengths, which a cached sample index depends on besides the run's settings."""
    described: bool = False
    """True when other software made the files: that this tokenizer made their ids is what the user has said."""

    @classmethod
    def read(cls, prefix: str | Path) -> Self:
        """Read ``prefix.json``. Raises ``ValueError`` when it is missing, damaged or of another version."""
        path = Path(f"{prefix}.json")
        if not path.is_file():
            raise ValueError(
                f"dataset {prefix} has no {path.name}: if other software made it, such as Megatron-LM, run dmc data "
                f"describe {prefix} --tokenizer PATH; if dmc data preprocess did not finish, run that again"
            )
        try:
            content = read_json(path)
            if (content.pop("format", None), content.pop("format_version", None)) != (_FORMAT, _FORMAT_VERSION):
                raise ValueError("another format or version")
            sidecar = build(cls, {"bos_prepended": None, **content})
            sidecar.check()
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path} is not a version {_FORMAT_VERSION} dataset description ({one_line(error)}); "
                "run dmc data preprocess again"
            ) from error
        return sidecar

    @classmethod
    def of(cls, binary: Path, index: Path, tokenizer: Tokenizer, **more: Any) -> Self:
        """Description of two files that are complete. more: fields that do not follow from them and the tokenizer."""
        with index.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(
            tokenizer=str(tokenizer.path),
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            eod_id=tokenizer.eod_id,
            bin_bytes=binary.stat().st_size,
            idx_bytes=index.stat().st_size,
            idx_sha256=sha256,
            **more,
        )

    def check(self) -> None:
        """Raise ``ValueError`` for numbers that do not fit each other."""
        not_negative(self, "vocab_size", "eod_id", "documents", "tokens", "bin_bytes", "idx_bytes")
        one_of(self, "dtype", *_BYTES)
        require(
            self.tokens * _BYTES[self.dtype] == self.bin_bytes,
            f"{self.tokens} tokens of type {self.dtype} do not have {self.bin_bytes} bytes (bin_bytes)",
        )
        require(self.eod_id < self.vocab_size, f"eod_id {self.eod_id} is not below vocab_size {self.vocab_size}")

    def write(self, path: str | Path) -> None:
        """Write as JSON to ``path``."""
        content = {"format": _FORMAT, "format_version": _FORMAT_VERSION, **dataclasses.asdict(self)}
        Path(path).write_text(json.dumps(content, indent=2) + "\n")


class IndexedWriter:
    """``data.bin``, ``data.idx`` and ``data.json`` in a directory; :func:`publish` gives them their names.

    Args:
        directory: empty directory on the disk of the dataset.
        tokenizer: tokenizer that made the ids; the sidecar records it.
        eod_appended, bos_prepended: policy for every document; the sidecar records it.
    """

    def __init__(self, directory: Path, tokenizer: Tokenizer, *, eod_appended: bool, bos_prepended: bool) -> None:
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        self.paths = [directory / f"data{suffix}" for suffix in SUFFIXES]
        self.dtype = DType.optimal_dtype(tokenizer.vocab_size)
        """Numpy type of a token."""
        self.documents = self.tokens = 0
        self._tokenizer, self._policy = tokenizer, dict(eod_appended=eod_appended, bos_prepended=bos_prepended)
        self._builder = IndexedDatasetBuilder(str(self.paths[0]), dtype=self.dtype)

    def add(self, ids: Any) -> None:
        """Add one document, a sequence or array of token ids."""
        self._builder.add_document(ids, [len(ids)])
        self.documents, self.tokens = self.documents + 1, self.tokens + len(ids)

    def close(self) -> None:
        """Write the index and the sidecar. Raises ``ValueError`` when there is no document."""
        if not self.documents:
            raise ValueError("no documents")
        binary, index, sidecar = self.paths
        self._builder.finalize(str(index))
        counted = {"dtype": self.dtype.__name__, "documents": self.documents, "tokens": self.tokens}
        Sidecar.of(binary, index, self._tokenizer, **counted, **self._policy).write(sidecar)


def publish(directory: Path, prefix: str | Path) -> None:
    """Move ``directory``'s three files to ``prefix.*``; the sidecar, which declares the other two complete, last."""
    Path(f"{prefix}.json").unlink(missing_ok=True)  # an old one must never stand beside new data
    for suffix in SUFFIXES:
        path = directory / f"data{suffix}"
        sync(path)
        os.replace(path, f"{prefix}{suffix}")
