"""Attention over the paged compressed cache, as one call for a layer: whoever owns the projections (the engine's own
model, another server's) hands over queries, keys and values.
"""

import math
from typing import Optional, Protocol

import torch
from torch import Tensor

from megatron.dmc import kernels
from megatron.dmc.inference.methods import StepTokens, method_of
from megatron.dmc.inference.weights import ModelInfo
from megatron.dmc.kernels.state import CacheState
from megatron.dmc.ops import attention_factor, rotary_frequencies


class Step(Protocol):
    """Tokens of a step and the sequences that they belong to: T tokens of n sequences, those with one token first."""

    positions: Tensor
    """int32 [T], of each token in its sequence."""
    cu_seqlens: Tensor
    """int32 [n + 1], index of each sequence's first token, then T."""
    rows: Tensor
    """int32 [n], each sequence's row of the cache; below 0 for padding."""
    decoding: int
    """Number of sequences at the front that have one token each; those behind them may have any number."""


class CompressedAttention:
    """Attention of a model's layers by its compression method. Holds no weights and no state of sequences."""

    def __init__(self, info: ModelInfo, device: torch.device) -> None:
        c = info.model
        self.method = method_of(info)
        self.inv_freq = rotary_frequencies(c.head_dim, c.rotary_base, c.rope_scaling, device=device)
        # YaRN's factor is on rotated queries and keys alike.
        self.scale = attention_factor(c.rope_scaling) ** 2 / math.sqrt(c.head_dim)

    def __call__(
        self,
        state: CacheState,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        step: Step,
        decisions: Optional[Tensor] = None,
    ) -> Tensor:
        """Append a step's tokens to one layer's cache, and attend.

        Args:
            q: [T, Hq, D], before the rotation.
            k, v: [T, H, D], likewise.
            decisions: [T, H or 1] of an adapter, where the model has them.

        Returns:
            [T, Hq, D]
        """
        d, chunks = step.decoding, step.decoding < step.rows.numel()
        where = (step.cu_seqlens, step.rows, step.positions, self.inv_freq)
        done = self.method.append(state, layer, StepTokens(q, k, v, *where, decisions, partial=chunks))
        parts = []
        if d:
            parts.append(kernels.decode_attention(state, layer, done.q_rot[:d], step.rows[:d], self.scale))
        if chunks:
            done = kernels.Appended(*(x[d:] for x in done))
            bounds = step.cu_seqlens[d:] - d  # a decoding sequence has one token
            parts.append(kernels.prefill_attention(state, layer, done, bounds, step.rows[d:], self.scale))
        return parts[0] if len(parts) == 1 else torch.cat(parts)
