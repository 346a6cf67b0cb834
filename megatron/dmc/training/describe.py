"""Description of an indexed dataset that other software wrote, after a look at every token id.

Megatron-LM's ``tools/preprocess_data.py`` and megatron-core's ``IndexedDatasetBuilder`` write ``P.bin`` and ``P.idx``;
training asks for ``P.json`` too. ``P.idx`` (``megatron/core/datasets/indexed_dataset.py``, 0.16.1) is, little-endian:

    "MMIDIDX\\0\\0", version 1 (8 bytes), code of the ids' type (1), sequences s (8), document ends d (8),
    s lengths (int32), s byte offsets into P.bin (int64), d indices of sequences (int64, from 0 to s),
    and in multimodal datasets alone the mode of every sequence (int8)
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy

from megatron.dmc.training.indexed_writer import Sidecar
from megatron.dmc.training.tokenizer import Tokenizer, load_tokenizer

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\0\0"
_TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
_BLOCK = 1 << 20
"""Ids, or sequences, that are looked at in one go."""


@dataclass
class DescribeConfig:
    """Dataset and tokenizer of a description."""

    prefix: str = field(metadata={"flags": ("prefix",), "metavar": "PREFIX"})
    """Prefix of the dataset: PREFIX.bin and PREFIX.idx, as Megatron-LM wrote them. PREFIX.json is made."""
    tokenizer: str = field(metadata={"metavar": "PATH"})
    """Sentencepiece .model file or Hugging Face directory of the tokenizer that made the ids."""
    overwrite: bool = field(default=False, metadata={"action": "store_true"})
    """Replace an existing PREFIX.json."""


@dataclass(frozen=True)
class Index:
    """What a ``.idx`` file says; its arrays stay in the file."""

    path: Path
    dtype: numpy.dtype
    sequences: int
    document_ends: int

    def _array(self, dtype: str, count: int, offset: int) -> numpy.ndarray:
        return numpy.memmap(self.path, dtype=dtype, mode="r", shape=(count,), offset=offset)

    @property
    def lengths(self) -> numpy.ndarray:
        """Ids of every sequence, int32 [sequences]."""
        return self._array("<i4", self.sequences, _HEADER.size)

    @property
    def pointers(self) -> numpy.ndarray:
        """First byte of every sequence, int64 [sequences]."""
        return self._array("<i8", self.sequences, _HEADER.size + 4 * self.sequences)

    @property
    def documents(self) -> numpy.ndarray:
        """Index of the sequence that every document begins with, and the number of sequences, int64 [documents + 1]."""
        return self._array("<i8", self.document_ends, _HEADER.size + 12 * self.sequences)


def read_index(path: Path) -> Index:
    """Header of a ``.idx`` file.

    Raises:
        ValueError: it is missing, of another format, multimodal, or not as long as its header says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_HEADER.size)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if len(head) < _HEADER.size or not head.startswith(_MAGIC):
        older = ", but one of the older TNTIDX kind: make it anew with Megatron-LM" if head[:6] == b"TNTIDX" else ""
        raise ValueError(f"{path} is no index of Megatron's indexed datasets{older}")
    _, version, code, sequences, ends = _HEADER.unpack(head)
    if version != 1 or code not in _TYPES:
        raise ValueError(f"{path} has version {version} and type {code}; expected version 1 and types 1 to 8")
    if _TYPES[code].startswith("float"):
        raise ValueError(f"{path}: the ids are of type {_TYPES[code]}; training needs integers")
    expected = _HEADER.size + 12 * sequences + 8 * ends
    if size == expected + sequences and sequences:
        raise ValueError(f"{path} is multimodal (it has a mode for every sequence), which training does not support")
    if size != expected:
        raise ValueError(f"{path} has {size} bytes and its header says {expected}; it is damaged: copy it again")
    if not sequences or ends < 2:
        raise ValueError(f"{path} holds no documents")
    return Index(path, numpy.dtype(_TYPES[code]).newbyteorder("<"), sequences, ends)


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, min(start + _BLOCK, count)) for start in range(0, count, _BLOCK))


def _check_index(index: Index, bin_bytes: int) -> int:
    """Number of ids. Raises ``ValueError`` unless the sequences lie one after the other and fill the file."""
    at, width = 0, index.dtype.itemsize
    for block in _blocks(index.sequences):
        lengths = numpy.array(index.lengths[block], numpy.int64)
        ends = at + numpy.cumsum(lengths) * width
        odd = (lengths < 0) | (index.pointers[block] != ends - lengths * width)
        if odd.any():
            number = block.start + int(odd.argmax())
            raise ValueError(f"{index.path}: sequence {number} does not begin where the one before it ends")
        at = int(ends[-1])
    if at != bin_bytes:
        raise ValueError(
            f"{index.path} describes {at} bytes and {index.path.with_suffix('.bin')} has {bin_bytes}: one of them is "
            "damaged, or of another dataset; copy both again"
        )
    before = 0
    for block in _blocks(index.document_ends):
        ends = numpy.concatenate([[before], index.documents[block]])
        if (numpy.diff(ends) < 0).any():
            raise ValueError(f"{index.path}: its documents are not in order; it is damaged")
        before = int(ends[-1])
    if int(index.documents[0]) or before != index.sequences:
        raise ValueError(f"{index.path}: its documents end at sequence {before} of {index.sequences}; it is damaged")
    return at // width


def _check_ids(index: Index, path: Path, vocab_size: int, advance: Any) -> None:
    """Raise ``ValueError`` for an id that the tokenizer does not have, naming its place."""
    at = 0
    with path.open("rb") as file:
        while len(ids := numpy.fromfile(file, index.dtype, _BLOCK)):
            odd = (ids < 0) | (ids >= vocab_size)
            if odd.any():
                place = at + int(odd.argmax())
                document = _document_of(index, place)
                raise ValueError(
                    f"{path}: id {int(ids[odd.argmax()])}, number {place} of all and in document {document}, is not "
                    f"one of the tokenizer's {vocab_size}; name the tokenizer that made this data"
                )
            at += len(ids)
            advance(ids.nbytes)


def _document_of(index: Index, place: int) -> int:
    sequence = int(numpy.searchsorted(index.pointers, place * index.dtype.itemsize, side="right")) - 1
    return int(numpy.searchsorted(index.documents, sequence, side="right")) - 1


def _count_ends(index: Index, path: Path, bos: Optional[int], eod: int) -> tuple[int, int, int]:
    """Documents, and how many of them begin with BOS and end with EOD."""
    total = begin = end = 0
    for block in _blocks(index.document_ends - 1):
        # Mapped anew for every block: what was looked at is let go.
        ids = numpy.memmap(path, dtype=index.dtype, mode="r")
        edges = numpy.array(index.documents[block.start : block.stop + 1])
        edges = edges[numpy.concatenate([[True], numpy.diff(edges) > 0])]  # a document may have no sequence
        first, last = edges[:-1], edges[1:] - 1
        starts = index.pointers[first] // index.dtype.itemsize
        ends = index.pointers[last] // index.dtype.itemsize + index.lengths[last]
        starts, ends = starts[ends > starts], ends[ends > starts]
        total += len(starts)
        begin += 0 if bos is None else int((ids[starts] == bos).sum())
        end += int((ids[ends - 1] == eod).sum())
    return total, begin, end


def describe(config: DescribeConfig) -> str:
    """Check a dataset and write its sidecar, in memory that does not grow with it. Returns what was found, as text.

    Raises:
        ValueError: the dataset is damaged, of a kind that training cannot read, or holds an id that the tokenizer does
            not have; or it has a sidecar already and ``overwrite`` is False.
    """
    from tqdm import tqdm

    prefix = config.prefix
    binary, index_path, sidecar = (Path(f"{prefix}{suffix}") for suffix in (".bin", ".idx", ".json"))
    for path in (binary, index_path):
        if not path.is_file():
            hint = "; give the prefix, without .bin or .idx" if prefix.endswith((".bin", ".idx")) else ""
            raise ValueError(f"{path} does not exist{hint}")
    if sidecar.exists() and not config.overwrite:
        raise ValueError(f"{sidecar} exists already; add --overwrite to describe the dataset anew")
    tokenizer = load_tokenizer(config.tokenizer)
    index, size = read_index(index_path), binary.stat().st_size
    tokens = _check_index(index, size)
    with tqdm(total=size, unit="B", unit_scale=True, desc="checking ids", mininterval=0.5, disable=None) as bar:
        _check_ids(index, binary, tokenizer.vocab_size, bar.update)
    documents, begin, end = _count_ends(index, binary, tokenizer.bos_id, tokenizer.eod_id)
    found = Sidecar.of(
        binary,
        index_path,
        tokenizer,
        eod_appended=end == documents,
        bos_prepended={0: False, documents: True}.get(begin),
        dtype=index.dtype.name,
        documents=documents,
        tokens=tokens,
        described=True,
    )
    temporary = sidecar.with_name(f".{sidecar.name}.{os.getpid()}")
    found.write(temporary)
    os.replace(temporary, sidecar)
    return _report(found, tokenizer, begin, end, _first_text(index, binary, tokenizer))


def _first_text(index: Index, binary: Path, tokenizer: Tokenizer) -> str:
    with binary.open("rb") as file:
        ids = numpy.fromfile(file, index.dtype, min(24, int(index.lengths[0])))
    return tokenizer.decode(ids.tolist())


def _report(found: Sidecar, tokenizer: Tokenizer, begin: int, end: int, text: str) -> str:
    lines = [
        f"{found.documents:,} documents, {found.tokens:,} tokens ({found.dtype}), all ids below {found.vocab_size}",
        f"documents that end with EOD ({found.eod_id}): {end:,}; that begin with BOS ({tokenizer.bos_id}): {begin:,}",
        f"the first document begins: {text!r}",
    ]
    if not end:
        lines.append(
            "warning: no document ends with this tokenizer's EOD; look at the text above: another tokenizer may have "
            "made the ids, or they were made without --append-eod"
        )
    return "\n".join(lines)
