"""Prefill with hard decisions in plain PyTorch: compress, then attend.

All tokens decide, segments are pooled, and query t attends to the final states of the slots before its own and to the
partial state of its own slot. The work falls by the compression ratio; the result is that of feeding tokens one by one.
"""

import math
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from megatron.dmc.ops.decisions import decision_logits, hard_decisions, importance
from megatron.dmc.ops.pooling import pool
from megatron.dmc.ops.rotary import rotate_and_split_neuron


class Compressed(NamedTuple):
    """Tokens of a sequence after compression; n is the largest number of slots of any head."""

    slot: Tensor
    """int64 [b, ng, s], the slot that each token went to."""
    lengths: Tensor
    """int64 [b, ng], slots in use."""
    k_slots: Tensor
    v_slots: Tensor
    """[b, ng, n, D], final states, rotated at their newest token; zeros beyond ``lengths``."""
    k_own: Tensor
    v_own: Tensor
    """[b, ng, s, D], the state of each token's own slot right after it."""
    q: Tensor
    """[b, np, s, D], rotated queries, neuron out."""


def compress(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    decision_bias: float,
    epsilon: float,
    window: Optional[int],
) -> Compressed:
    """Decide, pool and rotate a whole sequence.

    Args:
        q: [b, np, s, D], before the rotation.
        k, v: [b, ng, s, D], before the rotation.
        cos, sin: fp32 [s, D/2] at the tokens' positions.
        decision_bias: b; epsilon: least weight of a token; window: W, or None for the whole segment.
    """
    b, ng, s, d = k.shape
    merge = hard_decisions(decision_logits(k[..., -1], decision_bias))
    q, neuron = rotate_and_split_neuron(q, cos, sin, 0.0)
    omega = importance(neuron, ng, decision_bias, epsilon)
    k_own, v_own = pool(k, v, merge.to(omega.dtype), omega, window)
    k_own, _ = rotate_and_split_neuron(k_own, cos, sin, 0.0)
    slot = (~merge).cumsum(dim=-1) - 1
    lengths = slot[..., -1] + 1
    # The newest token of each slot has its final state.
    last = torch.ones_like(merge)
    last[..., :-1] = ~merge[..., 1:]
    n = int(lengths.max())
    k_slots, v_slots = (x.new_zeros(b, ng, n, d) for x in (k_own, v_own))
    where = slot.masked_fill(~last, n)  # tokens that are not their slot's newest go to a column that is cut off
    index = where[..., None].expand(b, ng, s, d)
    k_slots = torch.cat((k_slots, k_slots[:, :, :1]), dim=2).scatter_(2, index, k_own)[:, :, :n]
    v_slots = torch.cat((v_slots, v_slots[:, :, :1]), dim=2).scatter_(2, index, v_own)[:, :, :n]
    return Compressed(slot, lengths, k_slots, v_slots, k_own, v_own, q)


def prefill_attention(c: Compressed) -> Tensor:
    """Attention of query t to slots [0, slot[t]) and its own slot's partial state, with scores in fp32 (fp64 for fp64).

    Returns:
        [b, np, s, D] in q's dtype.
    """
    b, heads, s, d = c.q.shape
    ng = c.k_own.size(1)
    # [b, np, s, D] -> [b, ng, g, s, D]
    q = c.q.view(b, ng, heads // ng, s, d)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = torch.matmul(q, c.k_slots.unsqueeze(2).transpose(-1, -2)).to(wide) / math.sqrt(d)
    n = c.k_slots.size(2)
    closed = torch.arange(n, device=q.device) < c.slot[..., None]  # [b, ng, s, n]
    scores = scores.masked_fill(~closed.unsqueeze(2), float("-inf"))
    own = (q * c.k_own.unsqueeze(2)).sum(-1, keepdim=True, dtype=wide) / math.sqrt(d)
    p = torch.softmax(torch.cat((scores, own), dim=-1), dim=-1).to(q.dtype)
    out = torch.matmul(p[..., :n], c.v_slots.unsqueeze(2)) + p[..., n:] * c.v_own.unsqueeze(2)
    return out.view(b, heads, s, d)
