"""Arguments and results of the ops over the cache that are more than a few tensors, as records.

T tokens of N sequences, Hq query heads, H KV heads, D head dimension. Tensors of heads may have any strides as long as
their last axis is contiguous; index tensors are contiguous.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Optional

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


NEURON_NONE, NEURON_ALL, NEURON_QUERY = range(3)
"""Heads whose channel D-1 takes no part in attention: none; all query and key heads; the first query head of every
group.
"""


class EvictParams(NamedTuple):
    """Arguments of :func:`megatron.dmc.kernels.append_evicting`: a step's tokens, and the decisions that came with
    them.
    """

    q: Tensor
    """[T, Hq, D], before the rotation, in the dtype of the cache."""
    k: Tensor
    v: Tensor
    """[T, H, D], likewise."""
    logits: Tensor
    """fp32 [T, H], contiguous: decision logits. Above 0, the token that the decision is about is marked."""
    cu_seqlens: Tensor
    """int32 [N + 1], index of each sequence's first token, then T."""
    rows: Tensor
    """int32 [N], each sequence's row of the cache, all different; below 0 for padding."""
    positions: Tensor
    """int32 [T], of each token in its sequence."""
    inv_freq: Tensor
    """fp32 [D / 2], inverse frequencies of the rotation (radians per token)."""
    about_self: bool
    """True: a token's logit is about itself. False: about the token before it; that of a sequence's first token is
    about none.
    """
    neuron: int
    """One of NEURON_NONE, NEURON_ALL and NEURON_QUERY."""
    partial: bool = True
    """False leaves out what only :func:`megatron.dmc.kernels.prefill_attention` needs."""


class Appended(NamedTuple):
    """Result of :func:`megatron.dmc.kernels.append` and :func:`~megatron.dmc.kernels.append_evicting`: what attention
    needs of a step's tokens.
    """

    q_rot: Tensor
    """[T, Hq, D], rotated queries, the decision neuron set to 0."""
    k_part: Tensor
    v_part: Tensor
    """[T, H, D], the state of each token's slot right after it, rotated at the token; for an evicting model the token
    itself. Empty without ``partial``.
    """
    slot_index: Tensor
    """int32 [T, H], the slot that each token went to; for an evicting model the number of kept slots that the token's
    query sees, or -1 for all tokens of a head that a GPU refused. Empty without ``partial``.
    """
    recent_before: Tensor
    """int32 [N, H, R], the sequences' rows of ``recent_table`` before the tokens; empty without ``partial``, and unless
    the model evicts.
    """


class PackedWeight(NamedTuple):
    """Weight of a linear layer of N outputs and K inputs in panels of 32 outputs, with its bias; see ``panels.py``. N
    is filled up to whole panels.
    """

    weight: Tensor
    """Numbers: [N / 32, K / pair, 32, pair], where a pair is two of bf16 or one of fp32. Codes: uint8, of 4 bits
    [N / 32, K / 8, 32, 4], input i + 4 in the upper half of the byte of input i; of 8 bits [N / 32, K / 4, 32, 4], of
    four inputs 0, 2, 1, 3, K filled up to a multiple of 32.
    """
    scales: Tensor
    """fp32, fp16 or bf16, of codes: [N / 32, K / group, 1 or 2, 32], scales and offsets; of 8 bits also [N / 32, 32].
    Of numbers empty, [0].
    """
    bias: Tensor
    """[N] of the activations' dtype, or empty."""
    inputs: int
    """K"""
    outputs: int
    """N, or N / 2 of a gated layer."""
    gated: bool
    """The first half of the outputs are gates of the second: every panel has 16 of each."""
    zero: int = 0
    """Code of 0: what a code stands for is ``scale (code - zero)``, plus its group's offset."""
    scaled: bool = False
    """Offsets are multiples of their scales."""

    @property
    def bits(self) -> int:
        """Bits of a code; 0 for numbers."""
        if self.scales.ndim == 1:
            return 0
        return 4 if self.weight.size(1) * 8 == self.inputs else 8

    @property
    def group(self) -> int:
        """Inputs that share a scale; 0 where all do."""
        return self.inputs // self.scales.size(1) if self.scales.ndim == 4 else 0

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.scales.nbytes + self.bias.nbytes


@dataclass(frozen=True, eq=False)
class BetweenAttention:
    """Weights of all that lies between the attention of one layer and that of the next. They are checked once: no
    tensor may be replaced or moved.
    """

    out: PackedWeight
    """[h, Hq D]"""
    mlp_norm: Tensor
    """[h]"""
    gate_up: PackedWeight
    """[2 F, h], gated."""
    down: PackedWeight
    """[h, F]"""
    next_norm: Tensor
    """[h], of the next layer's input."""
    qkv: PackedWeight
    """[(Hq + 2 H) D, h], the next layer's."""
    epsilon: float
    """Epsilon of both norms."""
    bound: dict[Any, bytes] = field(default_factory=dict)
    """Compiled library -> these weights in the form that it takes."""
