"""A dataset of random ids, for measuring (and testing) training where no text and no tokenizer are at hand."""

import hashlib
from pathlib import Path

import numpy as np
import torch

from megatron.dmc.training.data import Sidecar
from megatron.dmc.training.tokenizer import Tokenizer


class RandomIds(Tokenizer):
    """Stands in for a tokenizer whose text nobody reads."""

    path, bos_id, adds_bos, eod_id, fingerprint = "random", None, False, 0, "0" * 64

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text):
        raise AssertionError("there is no text")

    def decode(self, ids):
        raise AssertionError("there is no text")


def write_random_dataset(prefix: Path, tokens: int, vocab_size: int) -> None:
    """One document of uniformly random ids at ``prefix``."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    data, index = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    builder = IndexedDatasetBuilder(str(data), dtype=np.uint16)
    builder.add_document(torch.randint(vocab_size, (tokens,)), [tokens])
    builder.finalize(str(index))
    Sidecar(
        tokenizer="random",
        tokenizer_fingerprint=RandomIds.fingerprint,
        vocab_size=vocab_size,
        eod_id=0,
        eod_appended=False,
        bos_prepended=False,
        dtype="uint16",
        documents=1,
        tokens=tokens,
        bin_bytes=data.stat().st_size,
        idx_bytes=index.stat().st_size,
        idx_sha256=hashlib.sha256(index.read_bytes()).hexdigest(),
    ).write(f"{prefix}.json")
