"""Arguments and results of the ops over the cache that are more than a few tensors, as records.

T tokens of N sequences, Hq query heads, H KV heads, D head dimension. Tensors of heads may have any strides as long as
their last axis is contiguous; index tensors are contiguous.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

from torch import Tensor


class AppendParams(NamedTuple):
    """Arguments of :func:`megatron.dmc.kernels.append`: a step's tokens, and the model's rule of merging."""

    q: Tensor
    """[T, Hq, D], before the rotation, in the dtype of the cache."""
    k: Tensor
    v: Tensor
    """[T, H, D], likewise."""
    cu_seqlens: Tensor
    """int32 [N + 1], index of each sequence's first token, then T."""
    rows: Tensor
    """int32 [N], each sequence's row of the cache, all different; below 0 for padding."""
    positions: Tensor
    """int32 [T], of each token in its sequence."""
    inv_freq: Tensor
    """fp32 [D / 2], inverse frequencies of the rotation (radians per token)."""
    bias: float
    """b: a token merges when its key's decision neuron is above it. Also added to the queries' neurons."""
    epsilon: float
    """Least weight of a token in its slot's mean."""
    window: Optional[int]
    """W, the newest tokens of a slot that its mean is over; None for all of them."""
    compress: bool = True
    """False for a plain model: every token opens a slot, and no channel is taken out."""
    partial: bool = True
    """False leaves out what only :func:`megatron.dmc.kernels.prefill_attention` needs."""


class Appended(NamedTuple):
    """Result of :func:`megatron.dmc.kernels.append`: what attention needs of a step's tokens."""

    q_rot: Tensor
    """[T, Hq, D], rotated queries, the decision neuron set to 0."""
    k_part: Tensor
    v_part: Tensor
    """[T, H, D], the state of each token's slot right after it, rotated at the token; empty without ``partial``."""
    slot_index: Tensor
    """int32 [T, H], the slot that each token went to; empty without ``partial``."""
