"""Transforms: which rows of which Hugging Face tensors a Megatron parameter has.

A transform lists a parameter's rows from the first to the last. Both directions of conversion (:mod:`views`) and the
shape of the parameter follow from that list.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, Optional

from megatron.dmc.config import ModelConfig


class Piece(NamedTuple):
    """Rows ``start`` ... ``stop - 1`` of one Hugging Face tensor, which lie together in a parameter."""

    tensor: Optional[int]
    """Index of the tensor; None: rows of zeros, which belong to no tensor."""
    start: int
    stop: int


class Transform(ABC):
    """Rule of how some Hugging Face tensors make up one parameter."""

    stacked: int = 1
    """Matrices one below the other, each of which tensor parallelism cuts on its own."""

    @abstractmethod
    def pieces(self, model: ModelConfig, rows: Sequence[int]) -> list[Piece]:
        """All rows of the parameter in order; those of one tensor come in the tensor's own order.

        Args:
            rows: number of rows of each Hugging Face tensor.
        """

    def units(self, model: ModelConfig) -> Optional[int]:
        """Number of things that tensor parallelism must not cut through; None: any row or column may be a border."""
        return None


class Direct(Transform):
    """One tensor, unchanged."""

    def pieces(self, model: ModelConfig, rows: Sequence[int]) -> list[Piece]:
        return [Piece(0, 0, rows[0])]


class QKV(Transform):
    """Queries, keys and values fused by KV head: [ng * g * D], [ng * D], [ng * D] -> [ng, (g + 2) * D]."""

    def pieces(self, model: ModelConfig, rows: Sequence[int]) -> list[Piece]:
        sizes = [n // model.kv_heads for n in rows]
        heads = range(model.kv_heads)
        return [Piece(i, head * size, (head + 1) * size) for head in heads for i, size in enumerate(sizes)]

    def units(self, model: ModelConfig) -> Optional[int]:
        return model.kv_heads


class GatedMLP(Transform):
    """Gate above up: [F], [F] -> [2 * F]."""

    stacked = 2

    def pieces(self, model: ModelConfig, rows: Sequence[int]) -> list[Piece]:
        return [Piece(i, 0, n) for i, n in enumerate(rows)]

    def units(self, model: ModelConfig) -> Optional[int]:
        return model.ffn_hidden_size


class Vocabulary(Transform):
    """One row per token, and rows of zeros up to ``padded_vocab_size``."""

    def pieces(self, model: ModelConfig, rows: Sequence[int]) -> list[Piece]:
        padding = model.padded_vocab_size - rows[0]
        return [Piece(0, 0, rows[0]), *([Piece(None, 0, padding)] if padding else [])]
