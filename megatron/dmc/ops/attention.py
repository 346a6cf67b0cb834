"""Training attention in O(S) memory, on stock flash attention.

The additive mask of column j, ``m[j] = log(1 - alpha[j+1])``, rides in the channel that the decision neuron has freed:
``q[D-1] = c`` and ``k[j][D-1] = m[j] * sqrt(D) / c``, so any causal attention kernel with scale ``1 / sqrt(D)`` adds
``m[j]`` to column j. Only the diagonal, a query's own slot, must stay unmasked. It is corrected by the row statistics
that the kernel returns: with d[t] the true diagonal score, the weight that the diagonal lost is

    extra[t] = d[t] + log(1 - exp(m[t]))
    lse'[t]  = logaddexp(lse[t], extra[t])
    o'[t]    = o[t] * exp(lse[t] - lse'[t]) + v[t] * exp(extra[t] - lse'[t])

Backward calls the stock kernel's backward with the final o' and lse'. Its ``delta = rowsum(do * o')`` and its
``p = exp(s - lse')`` are then right for every column, and what is missing is elementwise. No tensor is S x S.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megatron.dmc.ops import blocked
from megatron.dmc.ops.decisions import LOG_ZERO
from megatron.dmc.ops.packages import trouble_with


class Backend(NamedTuple):
    """A causal attention kernel: forward and backward with the row statistics exposed."""

    name: str
    forward: Callable[..., tuple]
    """(q [b, np, s, D], k, v [b, ng, s, D], scale=None) -> (o [b, np, s, D], lse fp32 [b, np, s], *rest). ``scale`` is
    the factor on the scores; None: 1 / sqrt(D)."""
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """(do, q, k, v, o, lse, *rest, scale=None) -> (dq, dk, dv)"""
    masks: bool = False
    """True: both take ``mask`` and ``window`` too, and backward returns the mask's gradient as well, as in
    :mod:`megatron.dmc.ops.blocked`."""


def _aten_flash_forward(q, k, v, scale=None):
    out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scale)
    return out[:8]  # o, lse, cum_seq_q, cum_seq_k, max_q, max_k, philox seed, philox offset


def _aten_flash_backward(do, q, k, v, o, lse, cum_q, cum_k, max_q, max_k, seed, offset, scale=None):
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        do, q, k, v, o, lse, cum_q, cum_k, max_q, max_k, 0.0, True, seed, offset, scale=scale
    )


def _efficient_forward(q, k, v, scale=None):
    g = q.size(1) // k.size(1)
    k, v = (x.repeat_interleave(g, dim=1) if g > 1 else x for x in (k, v))
    o, lse, seed, offset = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, None, True, 0.0, True, scale=scale
    )
    # The kernel pads the statistics to a multiple of 32 rows and wants them so in backward.
    return o, lse[..., : q.size(2)], lse, seed, offset


def _efficient_backward(do, q, k, v, o, lse, padded_lse, seed, offset, scale=None):
    b, ng, s, d = k.shape
    g = q.size(1) // ng
    k, v = (x.repeat_interleave(g, dim=1) if g > 1 else x for x in (k, v))
    padded_lse = padded_lse.clone()
    padded_lse[..., :s] = lse
    # The kernel takes the rows of `o` to be np * D apart, [b, s, np, D] in memory, and does not look.
    o = o.transpose(1, 2).contiguous().transpose(1, 2)
    dq, dk, dv, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        do, q, k, v, None, o, padded_lse, seed, offset, 0.0, [True, True, True, False], True, scale=scale
    )
    if g > 1:  # [b, np, s, D] -> [b, ng, g, s, D] -> [b, ng, s, D]
        dk, dv = (x.view(b, ng, g, s, d).sum(dim=2) for x in (dk, dv))
    return dq, dk, dv


def _flash_attn_forward(q, k, v, scale=None):
    from flash_attn.flash_attn_interface import _flash_attn_forward as kernel

    # [b, h, s, D] -> [b, s, h, D], views
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scale = 1.0 / math.sqrt(q.size(-1)) if scale is None else scale
    o, lse, _, rng = kernel(q, k, v, 0.0, scale, True, -1, -1, 0.0, None, False)
    return o.transpose(1, 2), lse, rng


def _flash_attn_backward(do, q, k, v, o, lse, rng, scale=None):
    from flash_attn.flash_attn_interface import _flash_attn_backward as kernel

    do, q, k, v, o = (x.transpose(1, 2) for x in (do, q, k, v, o))
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    scale = 1.0 / math.sqrt(q.size(-1)) if scale is None else scale
    deterministic = torch.are_deterministic_algorithms_enabled()  # as torch's own flash kernel does
    kernel(do, q, k, v, o, lse, dq, dk, dv, 0.0, scale, True, -1, -1, 0.0, None, deterministic, rng)
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


@functools.cache
def attention_backend(device_type: str, dtype: torch.dtype) -> Backend:
    """Attention kernel for a device type ("cpu", "cuda") and dtype. ``name`` is for the banner at start.

    Raises:
        ValueError: fp64 on CUDA, which no kernel takes.
    """
    if device_type == "cpu":
        return Backend("matrix products in blocks", blocked.forward, blocked.backward, masks=True)
    if dtype == torch.float64:
        raise ValueError("no attention kernel takes torch.float64 on CUDA; use fp32, or fp64 on the CPU")
    if dtype == torch.float32:
        return Backend("torch memory-efficient", _efficient_forward, _efficient_backward)
    if trouble_with("flash_attn") is None:  # its functions have had their present arguments since 2.7
        return Backend("flash-attn", _flash_attn_forward, _flash_attn_backward)
    return Backend("torch flash", _aten_flash_forward, _aten_flash_backward)


def mask_channel(head_dim: int) -> float:
    """Value c of the queries' last channel: a power of two near sqrt(D), exact in every format."""
    return 2.0 ** round(math.log2(math.sqrt(head_dim)))


def mask_unit(head_dim: int) -> float:
    """Factor sqrt(D) / c from a mask value to the keys' last channel."""
    return math.sqrt(head_dim) / mask_channel(head_dim)


def _last_contiguous(x: Tensor) -> Tensor:
    """Gradient with strides that the kernels take; ``sum().backward()`` sends one with strides of 0."""
    return x if x.stride(-1) == 1 and 0 not in x.stride() else x.contiguous()


def _add_over_group(total: Tensor, weight: Tensor, x: Tensor) -> None:
    """Add the sum over the group of weight [b, ng, g, s, 1] * x [b, ng, g, s, e] to total [b, ng, s, e]."""
    if x.size(2) == 1:
        total.addcmul_(weight.squeeze(2), x.squeeze(2))
    else:
        total += (weight * x).sum(dim=2)


class _DMCAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        b, heads, s, d = q.shape
        groups = k.size(1)
        shape = (b, groups, heads // groups, s)  # [b, ng, g, s]
        backend = attention_backend(q.device.type, q.dtype)
        o, lse, *rest = backend.forward(q, k, v)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        # The mask as the kernel saw it, rounded to the model's format. [b, ng, 1, s]
        mask = (k[..., -1].to(wide) / mask_unit(d)).unsqueeze(2)
        score = (q.view(*shape, d) * k.unsqueeze(2))[..., :-1].sum(-1, dtype=wide) / math.sqrt(d)
        lse = lse.view(shape)
        extra = score + torch.log(-torch.expm1(mask))  # -inf where nothing was lost
        lse_all = torch.logaddexp(lse, extra)
        weight = torch.exp(extra - lse_all)
        out = o.view(*shape, d).mul_(torch.exp(lse - lse_all).to(o.dtype).unsqueeze(-1))
        out.addcmul_(v.unsqueeze(2), weight.to(v.dtype).unsqueeze(-1))
        kept = torch.exp(score + mask - lse_all)
        out, lse_all = o, lse_all.reshape(b, heads, s)
        ctx.backend = backend
        ctx.save_for_backward(q, k, v, out, lse_all, weight, kept)
        ctx.rest = rest
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse, weight, kept = ctx.saved_tensors
        b, heads, s, d = q.shape
        groups = k.size(1)
        grouped = (b, groups, heads // groups, s, d)
        wide = weight.dtype
        grad = _last_contiguous(grad)
        dq, dk, dv = ctx.backend.backward(grad, q, k, v, out, lse, *ctx.rest)
        grad5 = grad.view(grouped)
        # How much the row's output changes when weight moves to the own slot: do . (v - o').  [b, ng, g, s]
        gain = (v.unsqueeze(2) - out.view(grouped)).mul_(grad5).sum(-1, dtype=wide)
        scaled = (weight * gain / math.sqrt(d)).to(q.dtype).unsqueeze(-1)
        dq.view(grouped).addcmul_(scaled, k.unsqueeze(2))
        # Channel D-1 of q and k is not part of the true diagonal score. Its gradient in k is the mask's: what the
        # kernel gave the masked diagonal (probability `kept`) is taken back, for the mask does not reach it.
        _add_over_group(dk[..., :-1], scaled, q.view(grouped)[..., :-1])
        dk[..., -1] -= (kept * gain).sum(dim=2) * (mask_channel(d) / math.sqrt(d))
        _add_over_group(dv, weight.to(v.dtype).unsqueeze(-1), grad5)
        return dq, dk, dv


def dmc_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention over all partial states, with the column mask of DMC and an unmasked diagonal.

    Args:
        q: [b, np, s, D], rotated; channel D-1 holds :func:`mask_channel`.
        k: [b, ng, s, D], pooled and rotated; channel D-1 holds ``m * mask_unit(D)``, m the column mask
            (``Decisions.log_keep``), at most 0 and at least LOG_ZERO.
        v: [b, ng, s, D], pooled.

    Returns:
        [b, np, s, D] in q's dtype. The gradient of k's last channel is the mask's, that of q's last channel is to be
        dropped (:func:`megatron.dmc.ops.rotate_and_split_neuron` does).
    """
    assert k.size(-1) == q.size(-1) and q.size(1) % k.size(1) == 0 and LOG_ZERO < 0
    return _DMCAttention.apply(q, k, v)


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain causal attention on the same kernels: q [b, np, s, D], k, v [b, ng, s, D] -> [b, np, s, D]."""
    return _PlainAttention.apply(q, k, v)


class _PlainAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        ctx.backend = attention_backend(q.device.type, q.dtype)
        o, lse, *ctx.rest = ctx.backend.forward(q, k, v)
        ctx.save_for_backward(q, k, v, o, lse)
        return o

    @staticmethod
    def backward(ctx, grad):
        q, k, v, o, lse = ctx.saved_tensors
        return ctx.backend.backward(_last_contiguous(grad), q, k, v, o, lse, *ctx.rest)
