"""Training attention of DMS (arXiv 2506.05345) in O(S) memory: a column is masked only for queries beyond a window.

Decisions are as in DMC, but a marked token is evicted instead of merged. The ``window`` queries after it still see it,
whatever was decided; query t sees an older token j with the additive mask ``m[j] = log(1 - alpha)``. On CPUs
:mod:`megatron.dmc.ops.blocked` computes just that. Stock kernels know a causal mask alone; for them the columns of a
row are those of three attentions:

- near, ages 0...window, in blocks of ``window`` rows: the columns of the row's own block up to itself; and of the block
  before, those from its own place in the block on, which is causal once queries and keys are in reverse order. Both are
  one call on a batch of blocks;
- far, j <= t - window - 1: all rows with the queries moved up by ``window + 1``, the mask in a channel (see
  :mod:`megatron.dmc.ops.attention`): the one that the decision neuron has freed, or, where all channels of keys are in
  use, one of eight that the far part gets in addition. Kernels take head dimensions in multiples of eight.

The row statistics of the parts combine them. Backward calls the stock kernel's backward with the final output and
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


def _pairs(x: Tensor, rows: int, keys: bool = False) -> Tensor:
    """Near part as a batch of causal problems: every block of rows beside itself, then, in reverse order, every block
    but the first beside its predecessor.

    Args:
        x: queries or what belongs to them, with ``keys`` keys or values: [b, heads, s, D].
        rows: of a block; zeros follow the last token.

    Returns:
        [b * (2 * blocks - 1), heads, rows, D].
    """
    x = F.pad(x, (0, 0, 0, -x.size(2) % rows)).unflatten(2, (-1, rows))
    before = x[:, :, :-1] if keys else x[:, :, 1:]
    return torch.cat((x, before.flip(3)), dim=2).transpose(1, 2).flatten(0, 1).contiguous()


def _unpair(x: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Undo :func:`_pairs`: [b * (2 * blocks - 1), heads, rows, ...] -> [b, heads, blocks * rows, ...] of the blocks
    beside themselves, and [b, heads, (blocks - 1) * rows, ...] of those beside their predecessors.
    """
    x = x.unflatten(0, (b, -1)).transpose(1, 2)
    blocks = (x.size(2) + 1) // 2
    return x[:, :, :blocks].flatten(2, 3), x[:, :, blocks:].flip(3).flatten(2, 3)


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
    def forward(ctx, q, k, v, mask, window):
        b, _, s, d = q.shape
        rows, scale = min(window, s), 1 / math.sqrt(d)
        backend = attention_backend(q.device.type, q.dtype)
        near = q if mask is not None else _without_mask(q)
        ctx.backend, ctx.window = backend, window
        if backend.masks:
            whole, total = backend.forward(near, k, v, mask=_mask_of(k, mask), window=window)
            ctx.save_for_backward(q, k, v, mask, whole, total)
            return whole
        pairs = _pairs(near, rows), _pairs(k, rows, keys=True), _pairs(v, rows, keys=True)
        out, lse, *ctx.rest = backend.forward(*pairs, scale=scale)
        # (first row, output, row statistics) of each part
        near_parts = zip((0, rows), _unpair(out, b), _unpair(lse, b), strict=True)
        parts = [(start, *(x[:, :, : s - start] for x in part)) for start, *part in near_parts]
        ctx.far_rest = []
        if s > window + 1:
            out, lse, *ctx.far_rest = backend.forward(*_far(q, k, v, mask, window), scale=scale)
            parts.append((window + 1, out[..., :d], lse))
        total = parts[0][2].clone()
        for start, _, lse in parts[1:]:
            total[:, :, start:] = torch.logaddexp(total[:, :, start:], lse)
        whole = torch.zeros_like(q, memory_format=torch.contiguous_format)
        for start, out, lse in parts:
            share = torch.exp(lse - total[:, :, start:]).to(q.dtype)
            whole[:, :, start:].addcmul_(out, share.unsqueeze(-1))
        ctx.save_for_backward(q, k, v, mask, whole, total)
        return whole

    @staticmethod
    def backward(ctx, grad):
        q, k, v, mask, out, lse = ctx.saved_tensors
        (b, _, s, d), window, backend = q.shape, ctx.window, ctx.backend
        rows, scale = min(window, s), 1 / math.sqrt(d)
        near = q if mask is not None else _without_mask(q)
        if backend.masks:
            dq, dk, dv, dmask = backend.backward(grad, near, k, v, out, lse, mask=_mask_of(k, mask), window=window)
            if mask is None:
                dk[..., -1] = dmask / mask_unit(d)
            return dq, dk, dv, None if mask is None else dmask, None
        found = backend.backward(
            _pairs(grad, rows),
            _pairs(near, rows),
            _pairs(k, rows, keys=True),
            _pairs(v, rows, keys=True),
            _pairs(out, rows),
            _pairs(lse.unsqueeze(-1), rows).squeeze(-1),  # rows behind the end have no gradient
            *ctx.rest,
            scale=scale,
        )
        gradients = []
        for start, part in zip((rows, 0, 0), found, strict=True):  # the second blocks' queries are not the first ones
            own, before = _unpair(part, b)
            own, before = own[:, :, :s], before[:, :, : s - start]
            own[:, :, start : start + before.size(2)] += before
            gradients.append(own)
        dq, dk, dv = gradients
        if mask is None:
            dq[..., -1], dk[..., -1] = 0, 0
        dmask = None if mask is None else torch.zeros_like(mask)
        if s > window + 1:
            late, early = slice(window + 1, None), slice(None, s - window - 1)
            extra = 0 if mask is None else EXTRA
            parts = backend.backward(
                F.pad(grad[:, :, late], (0, extra)).contiguous(),
                *_far(q, k, v, mask, window),
                F.pad(out[:, :, late], (0, extra)).contiguous(),
                lse[:, :, late].contiguous(),
                *ctx.far_rest,
                scale=scale,
            )
            for whole, part, where in zip(gradients, parts, (late, early, early), strict=True):
                whole[:, :, where] += part[..., :d]
            if dmask is not None:
                dmask[:, :, early] = parts[1][..., d] * mask_unit(d)
        return dq, dk, dv, dmask, None


def _without_mask(q: Tensor) -> Tensor:
    """Queries that do not see the mask in the keys' last channel."""
    return torch.cat((q[..., :-1], torch.zeros_like(q[..., :1])), dim=-1)


def _mask_of(k: Tensor, mask: Optional[Tensor]) -> Tensor:
    """Column mask, [b, ng, s]: ``mask``, or where it rides in the last channel of the keys, what is there."""
    return k[..., -1] / mask_unit(k.size(-1)) if mask is None else mask


def evicting_attention(q: Tensor, k: Tensor, v: Tensor, window: int, mask: Optional[Tensor] = None) -> Tensor:
    """Causal attention whose columns are masked for queries more than ``window`` tokens later.

    Args:
        q: [b, np, rows, D], those of the last tokens, rotated; without ``mask``, channel D-1 holds
            :func:`megatron.dmc.ops.attention.mask_channel`.
        k: [b, ng, s, D], rotated; without ``mask``, channel D-1 holds ``m * mask_unit(D)``, m the column mask
            (``Decisions.log_keep``).
        v: [b, ng, s, D].
        window: DMS window, the queries after a token that see it whatever was decided; at least 1.
        mask: [b, ng, s], the column mask m, where all D channels of q and k are in attention. None: it rides in D-1.

    Returns:
        [b, np, rows, D] in q's dtype. Without ``mask``, the gradient of k's last channel is the mask's, and that of q's
        last channel is to be dropped.
    """
    assert k.size(-1) == q.size(-1) and q.size(1) % k.size(1) == 0 and window >= 1
    missing = k.size(2) - q.size(2)
    if missing and not attention_backend(q.device.type, q.dtype).masks:  # stock kernels take rows for all columns
        return _EvictingAttention.apply(F.pad(q, (0, 0, missing, 0)), k, v, mask, window)[:, :, missing:]
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
