"""Merge decisions: logits, hard and relaxed decisions, and importance, the weight of a token in its slot.

arXiv 2403.09636, section 3; the neuron, bias and epsilon as in the authors' release. All arithmetic in fp32 (fp64 when
given fp64), whatever the model computes in: a threshold in bf16 would move with the format.
"""

from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

# Finite stand-in for log(0): exp() of it is exactly 0 in every format, and no inf - inf can arise.
LOG_ZERO = -1.0e4


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def decision_logits(x: Tensor, bias: float, scale: float = 1.0) -> Tensor:
    """Logits of marking a token: ``scale * x - b``, DMC's ``key[D-1] - b`` (arXiv 2403.09636, section 3).

    Args:
        x: what the decision is read from (``DMCConfig.decision_source``), of any shape: for DMC the last channel of the
            keys before the rotation.
        bias: b.
        scale: factor on x.

    Returns:
        fp32 (fp64 for fp64) of the same shape.
    """
    return scale * _wide(x) - bias


def hard_decisions(logits: Tensor, first: bool = True) -> Tensor:
    """Hard decisions: True where the logit is positive.

    Args:
        logits: fp32 [b, ng, s].
        first: position 0 is the first token of its sequence and decides about nobody (under DMC it always appends).

    Returns:
        bool [b, ng, s].
    """
    merge = logits > 0
    if first:
        merge = merge.clone()
        merge[..., 0] = False
    return merge


def importance(query_neuron: Tensor, groups: int, bias: float, epsilon: float) -> Tensor:
    """Importance omega, the weight of a token in its slot's average: ``sigmoid(mean_g q[D-1] + b) + epsilon``.

    Args:
        query_neuron: [b, np, s], the last channel of the queries before the rotation.
        groups: ng, KV heads; np must be a multiple.
        bias: b.
        epsilon: least weight.

    Returns:
        fp32 [b, ng, s], in (epsilon, 1 + epsilon).
    """
    b, heads, s = query_neuron.shape
    # [b, np, s] -> [b, ng, g, s] -> [b, ng, s]
    mean = _wide(query_neuron).view(b, groups, heads // groups, s).mean(dim=2)
    return torch.sigmoid(mean + bias) + epsilon


class Decisions(NamedTuple):
    """Decisions of one layer, in training or with hard decisions. All tensors are [b, ng, s]."""

    alpha: Tensor
    """fp32, relaxed decision read at each token: in (0, 1) in training, 0 or 1 otherwise; 0 where it is about nobody.
    Under DMC, the weight of merging with the previous slot."""
    log_keep: Tensor
    """fp32, additive mask of column j for later queries, log(1 - alpha) of the decision about token j: alpha[j+1], 0 in
    the last column; about the token itself, alpha[j]."""
    merge: Tensor
    """bool, the hard decisions of inference."""


def make_decisions(
    logits: Tensor, temperature: float, noise: Optional[Tensor] = None, about_self: bool = False
) -> Decisions:
    """Decisions from logits: relaxed ones with ``noise`` (training), hard ones without.

    ``alpha = sigmoid((logit + noise) / temperature)`` with noise Logistic(0, 1), the difference of two Gumbels.
    ``log(1 - alpha)`` is computed as a log-sigmoid, never as the log of a difference.

    Args:
        logits: fp32 [b, ng, s].
        temperature: tau.
        noise: fp32 [b, ng, s], or None.
        about_self: a token's decision is about itself, not about the token before it.
    """
    first = 0 if about_self else 1  # the first decision that is about a token
    merge = hard_decisions(logits, first=not about_self)
    if noise is None:
        alpha = merge.to(logits.dtype)
        log_keep = alpha[..., first:] * LOG_ZERO
    else:
        z = (logits[..., first:] + noise[..., first:]) / temperature
        alpha = F.pad(torch.sigmoid(z), (first, 0))
        log_keep = F.logsigmoid(-z).clamp_min(LOG_ZERO)
    return Decisions(alpha, F.pad(log_keep, (0, first)), merge)


def kept_slots(decisions: Decisions) -> Tensor:
    """Tokens that are not marked, per sequence and head: fp32 [b, ng].

    Under DMC these are the slots in use after the last token; under DMS the slots that stay once the window has passed
    over all tokens, so that ``1 - kept / s`` is the evicted share of arXiv 2506.05345. The value counts hard decisions,
    as inference will; the gradient is that of the relaxed ones (straight-through).
    """
    soft = -decisions.alpha.sum(dim=-1)
    # x - x is exactly 0: the value stays an integer.
    return (~decisions.merge).sum(dim=-1).to(soft.dtype) + (soft - soft.detach())
