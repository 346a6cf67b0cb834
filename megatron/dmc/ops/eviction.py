"""Training attention of DMS (arXiv 2506.05345) in O(S) memory: a column is masked only for queries beyond a window.

Decisions are as in DMC, but a marked token is evicted instead of merged. The ``window`` queries after it still see it,
whatever was decided; query t sees an older token j with the additive mask ``m[j] = log(1 - alpha)``. The two parts of a
row are two attentions over disjoint columns:

- near, ages 0...window: a band, in blocks of rows, by plain matrix products;
- far, j <= t - window - 1: the stock causal kernel with the queries moved up by ``window + 1``, the mask in a channel
  (see :mod:`megatron.dmc.ops.attention`): the one that the decision neuron has freed, or, where all channels of keys
  are in use, one of eight that the far part gets in addition. Kernels take head dimensions in multiples of eight.

The row statistics of both parts combine them. Backward calls the stock kernel's backward with the final output and
statistics, which makes its ``delta`` and probabilities those of the whole row.
"""

import math
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.dmc.ops.attention import attention_backend, mask_channel, mask_unit

EXTRA = 8
"""Channels that are added to the far part's heads to take a mask: as few as kernels allow."""


def _rows(window: int) -> int:
    """Rows of a block of the band: at least the window, so that a block's columns are its own and its predecessor's."""
    return max(64, 1 << (window - 1).bit_length())


def _blocks(x: Tensor, rows: int) -> Tensor:
    """Blocks of rows, zeros behind the last: [..., s, D] -> [..., blocks, rows, D]."""
    x = F.pad(x, (0, 0, 0, -x.size(-2) % rows))
    return x.unflatten(-2, (-1, rows))


def _columns(x: Tensor, rows: int, window: int) -> Tensor:
    """Rows of each block after the ``window`` before them: [..., s, D] -> [..., blocks, window + rows, D], zeros in
    front.
    """
    own = _blocks(x, rows)
    before = F.pad(own[..., :-1, rows - window :, :], (0, 0, 0, 0, 1, 0))
    return torch.cat((before, own), dim=-2)


def _fold(x: Tensor, window: int, s: int) -> Tensor:
    """Transpose of :func:`_columns`, which sums what overlaps: [..., blocks, window + rows, D] -> [..., s, D]."""
    own = x[..., window:, :].clone()
    own[..., :-1, own.size(-2) - window :, :] += x[..., 1:, :window, :]
    return own.flatten(-3, -2)[..., :s, :]


def _band(s: int, rows: int, window: int, device: torch.device) -> Tensor:
    """Mask of ages 0...window, of tokens that exist: bool [blocks, rows, window + rows]."""
    block = torch.arange(-(-s // rows), device=device)[:, None, None] * rows
    row = torch.arange(rows, device=device)[:, None]
    column = torch.arange(window + rows, device=device) - window
    age = row - column
    return (age >= 0) & (age <= window) & (block + column >= 0)


def _far(q: Tensor, k: Tensor, v: Tensor, mask: Optional[Tensor], window: int) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous queries, keys and values of the far part: [b, heads, s - window - 1, D], D + EXTRA with a ``mask``.

    The mask takes two channels, the second for what the first one's format rounds off.
    """
    d, far = q.size(-1), q.size(2) - window - 1
    q, k, v = q[:, :, window + 1 :], k[:, :, :far], v[:, :, :far]
    if mask is None:
        return q.contiguous(), k.contiguous(), v.contiguous()
    q, k, v = (F.pad(x, (0, EXTRA)) for x in (q, k, v))
    value = mask[:, :, :far] * mask_unit(d)
    q[..., d : d + 2] = mask_channel(d)
    k[..., d] = value
    k[..., d + 1] = value - k[..., d]
    return q, k, v


class _EvictingAttention(torch.autograd.Function):
    @staticmethod
    def _near(q: Tensor, k: Tensor, window: int, channels: int) -> tuple[Tensor, Tensor]:
        """Scores of the band in fp32, -inf outside, and the keys' blocks. Of the last axis only the first ``channels``
        count: the far part's mask is left out.
        """
        s, d, rows, groups = q.size(2), q.size(3), _rows(window), k.size(1)
        # [b, np, s, D] -> [b, ng, g, blocks, rows, D]; [b, ng, s, D] -> [b, ng, 1, blocks, columns, D]
        queries = _blocks(q.unflatten(1, (groups, -1)), rows)
        keys = _columns(k, rows, window).unsqueeze(2)
        scores = queries[..., :channels] @ keys[..., :channels].transpose(-1, -2)
        scores = scores.to(torch.float64 if q.dtype == torch.float64 else torch.float32) / math.sqrt(d)
        return scores.masked_fill_(~_band(s, rows, window, q.device), float("-inf")), keys

    @staticmethod
    def forward(ctx, q, k, v, mask, window):
        (b, heads, s, d), groups, rows = q.shape, k.size(1), _rows(window)
        shape = (b, groups, heads // groups, s)
        scores, _ = _EvictingAttention._near(q, k, window, d - (mask is None))
        lse = scores.logsumexp(dim=-1).flatten(-2)[..., :s].reshape(b, heads, s)
        far = max(0, s - window - 1)
        ctx.backend, ctx.rest = attention_backend(q.device.type, q.dtype), []
        if far:
            out, far_lse, *ctx.rest = ctx.backend.forward(*_far(q, k, v, mask, window), scale=1 / math.sqrt(d))
            lse = torch.cat(
                (lse[..., : window + 1], torch.logaddexp(lse[..., window + 1 :], far_lse.to(lse.dtype))), dim=-1
            )
        p = torch.exp(scores - _blocks(lse.view(*shape, 1), rows))
        total = (
            (p.to(v.dtype) @ _columns(v, rows, window).unsqueeze(2)).flatten(-3, -2)[..., :s, :].reshape(b, heads, s, d)
        )
        if far:
            weight = torch.exp(far_lse.to(lse.dtype) - lse[..., window + 1 :]).unsqueeze(-1)
            total[:, :, window + 1 :] += (out[..., :d] * weight).to(total.dtype)
        ctx.window = window
        ctx.save_for_backward(q, k, v, mask, total, lse)
        return total

    @staticmethod
    def backward(ctx, grad):
        q, k, v, mask, out, lse = ctx.saved_tensors
        (b, heads, s, d), groups, window, rows = q.shape, k.size(1), ctx.window, _rows(ctx.window)
        shape = (b, groups, heads // groups, s)
        scores, keys = _EvictingAttention._near(q, k, window, d - (mask is None))
        values = _columns(v, rows, window).unsqueeze(2)
        # Rows behind the end have no gradient, and lse 0 there: exp(0 - 0), times nothing.
        p = torch.exp(scores - _blocks(lse.view(*shape, 1), rows))
        do = _blocks(grad.reshape(*shape, d), rows)
        delta = _blocks((grad * out).sum(dim=-1, dtype=p.dtype).view(*shape, 1), rows)
        ds = (p * ((do @ values.transpose(-1, -2)).to(p.dtype) - delta) / math.sqrt(d)).to(q.dtype)
        dq = (ds @ keys).flatten(-3, -2)[..., :s, :].reshape(q.shape)
        dk = _fold((ds.transpose(-1, -2) @ _blocks(q.view(*shape, d), rows)).sum(dim=2), window, s)
        dv = _fold((p.to(v.dtype).transpose(-1, -2) @ do).sum(dim=2), window, s)
        if mask is None:
            dq[..., -1], dk[..., -1] = 0, 0
        dmask = None if mask is None else torch.zeros_like(mask)
        far = max(0, s - window - 1)
        if far:
            late, early = slice(window + 1, None), slice(None, far)
            extra = 0 if mask is None else EXTRA
            parts = ctx.backend.backward(
                F.pad(grad[:, :, late], (0, extra)).contiguous(),
                *_far(q, k, v, mask, window),
                F.pad(out[:, :, late], (0, extra)).contiguous(),
                (lse.to(torch.float32) if q.dtype != torch.float64 else lse)[:, :, late].contiguous(),
                *ctx.rest,
                scale=1 / math.sqrt(d),
            )
            for whole, part, where in zip((dq, dk, dv), parts, (late, early, early), strict=True):
                whole[:, :, where] += part[..., :d]
            if dmask is not None:
                dmask[:, :, early] = parts[1][..., d] * mask_unit(d)
        return dq, dk, dv, dmask, None


def evicting_attention(q: Tensor, k: Tensor, v: Tensor, window: int, mask: Optional[Tensor] = None) -> Tensor:
    """Causal attention whose columns are masked for queries more than ``window`` tokens later.

    Args:
        q: [b, np, s, D], rotated; without ``mask``, channel D-1 holds :func:`megatron.dmc.ops.attention.mask_channel`.
        k: [b, ng, s, D], rotated; without ``mask``, channel D-1 holds ``m * mask_unit(D)``, m the column mask
            (``Decisions.log_keep``).
        v: [b, ng, s, D].
        window: DMS window, the queries after a token that see it whatever was decided; at least 1.
        mask: [b, ng, s], the column mask m, where all D channels of q and k are in attention. None: it rides in D-1.

    Returns:
        [b, np, s, D] in q's dtype. Without ``mask``, the gradient of k's last channel is the mask's, and that of q's
        last channel is to be dropped.
    """
    assert k.size(-1) == q.size(-1) and q.size(1) % k.size(1) == 0 and window >= 1
    return _EvictingAttention.apply(q, k, v, mask, window)


def held_slots(merge: Tensor, window: int, about_self: bool = False) -> Tensor:
    """Slots that a cache holds after the last token: int64 [b, ng]. The latest ``window + 1`` tokens are among them,
    whatever was decided.

    Args:
        merge: hard decisions by the token that they are read from, bool [b, ng, s] (``Decisions.merge``).
        window: DMS window.
        about_self: a token's decision is about itself, not about the token before it.
    """
    s = merge.size(-1)
    marked = merge if about_self else merge[..., 1:]
    return s - marked[..., : max(0, s - window - 1)].sum(dim=-1)
