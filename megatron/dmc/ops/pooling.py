"""Windowed pooling of keys and values, before RoPE.

After token t the slot holds the importance-weighted mean of its segment's last W tokens. With relaxed decisions the
weight of token t-d is ``omega[t-d] * alpha[t-d+1] * ... * alpha[t]``; with hard ones this is the segment itself.

For a window the coefficients form a band, and the pooling is a banded matrix product in blocks of rows: batched
matmuls, on CPU and tensor cores alike. The coefficients are normalised in fp32 before they are rounded to the model's
format. Without a window the same recurrence is run in blocks with a carried state.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 64  # rows per block: the band adds W-1 columns to each, and 64 x 75 is what small matmuls like


def _block_rows(window: int) -> int:
    """At least W-1, so that a block's window reaches back into one block only."""
    return _ROWS * max(1, -(-(window - 1) // _ROWS))


def _shift_right(x: Tensor, d: int) -> Tensor:
    """x[..., t] -> x[..., t-d], zeros in front. [..., s]"""
    return F.pad(x, (d, 0))[..., : x.size(-1)] if d else x


def _products(alpha: Tensor, window: int) -> Tensor:
    """P[..., t, d] = alpha[t] * alpha[t-1] * ... * alpha[t-d+1] (d factors). [..., s] -> [W, ..., s]"""
    out = torch.zeros(window, *alpha.shape, dtype=alpha.dtype, device=alpha.device)
    out[0] = 1
    for d in range(1, min(window, alpha.size(-1) + 1)):
        torch.mul(out[d - 1][..., d - 1 :], alpha[..., : alpha.size(-1) - d + 1], out=out[d][..., d - 1 :])
    return out


class _BandCoefficients(torch.autograd.Function):
    """(alpha, omega) [b, h, s] -> normalised coefficients [W, b, h, s]; entry [d, ..., t] weighs token t-d."""

    @staticmethod
    def forward(ctx, alpha, omega, window):
        c = _products(alpha, window)
        for d in range(window):
            c[d] *= _shift_right(omega, d)
        denominator = c.sum(dim=0)
        c /= denominator
        ctx.window = window
        ctx.save_for_backward(alpha, omega, c, denominator)
        return c

    @staticmethod
    def backward(ctx, grad):
        alpha, omega, coefficients, denominator = ctx.saved_tensors
        window, s = ctx.window, alpha.size(-1)
        # Through the normalisation: h[d] = (grad[d] - sum_e grad[e] a[e]) / denominator.
        h = (grad - (grad * coefficients).sum(dim=0)) / denominator
        products = _products(alpha, window)
        d_omega = torch.zeros_like(omega)
        d_alpha = torch.zeros_like(alpha)
        for d in range(min(window, s)):
            d_omega[..., : s - d] += (h[d] * products[d])[..., d:]
        # Through the products, without dividing by alpha (it may be 0): Horner over the factors from the oldest on.
        # tail[e] = sum over d > e of h[d] omega[t-d] * product of alpha[t-e'] for e < e' < d.
        tail = torch.zeros_like(alpha)
        for e in range(min(window, s) - 2, -1, -1):
            tail = h[e + 1] * _shift_right(omega, e + 1) + _shift_right(alpha, e + 1) * tail
            d_alpha[..., : s - e] += (products[e] * tail)[..., e:]
        return d_alpha, d_omega, None


class _BandMatmul(torch.autograd.Function):
    """out[t] = sum_d a[d, t] x[t-d], as blocks of 64 rows times 64+W-1 columns (more rows for W > 65).

    a: [W, n, s] coefficients, x: [n, s, e]; n = b * h. Returns [n, s, e].
    """

    @staticmethod
    def _blocks(a: Tensor, blocks: int, dtype: torch.dtype) -> Tensor:
        """[W, n, s] -> [n * blocks, 64, 64 + W - 1]; row r holds a[W-1..0] at columns r..r+W-1."""
        window, n, s = a.shape
        rows = _block_rows(window)
        band = torch.zeros(n, blocks * rows, rows + window, dtype=dtype, device=a.device)
        band[:, :s, :window] = a.flip(0).permute(1, 2, 0)
        # Rows one longer than the matrix: reading them back with the matrix' own length skews each by its number.
        flat = band.view(n * blocks, rows * (rows + window))[:, : rows * (rows + window - 1)]
        return flat.view(n * blocks, rows, rows + window - 1)

    @staticmethod
    def _windows(x: Tensor, blocks: int, window: int) -> Tensor:
        """[n, s, e] -> [n * blocks, 64 + W - 1, e]: each block's rows and the W-1 before them, zeros outside."""
        n, s, e = x.shape
        rows = _block_rows(window)
        padded = F.pad(x, (0, 0, window - 1, blocks * rows - s))
        return padded.unfold(1, rows + window - 1, rows).transpose(2, 3).reshape(n * blocks, rows + window - 1, e)

    @staticmethod
    def forward(ctx, a, x):
        window, (n, s, e) = a.size(0), x.shape
        rows = _block_rows(window)
        blocks = -(-s // rows)
        matrix = _BandMatmul._blocks(a, blocks, x.dtype)
        out = torch.bmm(matrix, _BandMatmul._windows(x, blocks, window))
        ctx.save_for_backward(a, x)
        return out.view(n, blocks * rows, e)[:, :s]

    @staticmethod
    def backward(ctx, grad):
        a, x = ctx.saved_tensors
        window, (n, s, e) = a.size(0), x.shape
        rows = _block_rows(window)
        blocks = -(-s // rows)
        columns = rows + window - 1
        grad = F.pad(grad, (0, 0, 0, blocks * rows - s)).reshape(n * blocks, rows, e)
        # d a: the band of grad x^T, read out by the same skew.
        full = torch.bmm(grad, _BandMatmul._windows(x, blocks, window).transpose(1, 2))
        band = F.pad(full.view(n * blocks, rows * columns), (0, rows)).view(n, blocks * rows, columns + 1)
        d_a = band[:, :s, :window].permute(2, 0, 1).flip(0).to(a.dtype)
        # d x: transposed product; the W-1 leading columns of a block belong to the block before.
        d_windows = torch.bmm(_BandMatmul._blocks(a, blocks, x.dtype).transpose(1, 2), grad).view(n, blocks, columns, e)
        d_x = d_windows[:, :, window - 1 :].reshape(n, blocks, rows, e)
        d_x[:, :-1, rows - window + 1 :] += d_windows[:, 1:, : window - 1]
        return d_a, d_x.reshape(n, blocks * rows, e)[:, :s]


def _pool_unbounded(x: Tensor, alpha: Tensor, omega: Tensor) -> Tensor:
    """The same without a window: N[t] = alpha[t] N[t-1] + omega[t] x[t], M likewise, out = N / M.

    x: fp32 [n, s, e]; alpha, omega: fp32 [n, s]. Rows of a block come from a triangular matrix of products; the state
    is carried from block to block, s / 64 steps.
    """
    n, s, e = x.shape
    blocks = -(-s // _ROWS)
    pad = blocks * _ROWS - s
    # One more channel carries the denominator.
    weighted = torch.cat((x * omega[..., None], omega[..., None]), dim=-1)
    weighted = F.pad(weighted, (0, 0, 0, pad)).view(n, blocks, _ROWS, e + 1)
    a = F.pad(alpha, (0, pad)).view(n, blocks, _ROWS)
    # L[t, s] = alpha[s+1] ... alpha[t] for s <= t, built row by row.
    eye = torch.eye(_ROWS, dtype=x.dtype, device=x.device)
    row = eye[0].expand(n, blocks, _ROWS)
    lower = [row]
    for t in range(1, _ROWS):
        row = row * a[:, :, t : t + 1] + eye[t]
        lower.append(row)
    local = torch.matmul(torch.stack(lower, dim=2), weighted)
    from_start = torch.cumprod(a, dim=2) if not a.requires_grad else _cumulative_product(a)
    states, state = [], torch.zeros(n, e + 1, dtype=x.dtype, device=x.device)
    for i in range(blocks):
        states.append(state)
        state = local[:, i, -1] + from_start[:, i, -1:] * state
    full = local + from_start[..., None] * torch.stack(states, dim=1)[:, :, None]
    full = full.view(n, blocks * _ROWS, e + 1)[:, :s]
    return full[..., :e] / full[..., e:]


def _cumulative_product(a: Tensor) -> Tensor:
    """cumprod over the last axis; torch's own gradient looks for zeros on the host, which stalls a GPU."""
    out = [a[..., 0]]
    for t in range(1, a.size(-1)):
        out.append(out[-1] * a[..., t])
    return torch.stack(out, dim=-1)


def pool(k: Tensor, v: Tensor, alpha: Tensor, omega: Tensor, window: Optional[int]) -> tuple[Tensor, Tensor]:
    """State of the open slot after every token.

    Args:
        k, v: [b, ng, s, D], before RoPE, any strides.
        alpha: fp32 [b, ng, s], 0 at the first position.
        omega: fp32 [b, ng, s].
        window: W, or None for the whole segment.

    Returns:
        pooled k and v, [b, ng, s, D] in the input dtype.
    """
    b, h, s, d = k.shape
    # [b, ng, s, D] x 2 -> [b * ng, s, 2D]: one product pools both.
    kv = torch.cat((k, v), dim=-1).view(b * h, s, 2 * d)
    if window is None:
        wide = kv if kv.dtype == torch.float64 else kv.float()
        pooled = _pool_unbounded(wide, alpha.reshape(b * h, s), omega.reshape(b * h, s)).to(k.dtype)
    elif window == 1:
        pooled = kv
    else:
        coefficients = _BandCoefficients.apply(alpha, omega, window)
        pooled = _BandMatmul.apply(coefficients.view(window, b * h, s), kv)
    pooled = pooled.view(b, h, s, 2 * d)
    return pooled[..., :d], pooled[..., d:]
