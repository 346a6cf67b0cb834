"""Windowed pooling of keys and values, before RoPE.

After token t the slot holds the importance-weighted mean of its segment's last W tokens. With relaxed decisions the
weight of token t-d is ``omega[t-d] * alpha[t-d+1] * ... * alpha[t]``; with hard ones this is the segment itself.

For a window the coefficients form a band, and the pooling is a banded matrix product in blocks of rows: batched
matmuls over overlapping windows that are never copied, on CPU and tensor cores alike. The coefficients are normalised
in fp32 before they are rounded to the model's format. Without a window the same recurrence is run in blocks with a
carried state.
"""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 64  # of a block of the unbounded pooling: its triangular matrix is built row by row


def _block_rows(window: int) -> int:
    """Rows of a band block, which has W-1 more columns: a power of two near the window's, so that few are zeros.

    For W = 12 the blocks are 32 x 43. On CPU 16 and 64 rows both take longer.
    """
    return max(32, 1 << (window - 1).bit_length())


def _shift_right(x: Tensor, d: int) -> Tensor:
    """Shift x [..., s] by d tokens to the right, zeros in front."""
    return F.pad(x, (d, 0))[..., : x.size(-1)] if d else x


def _products(alpha: Tensor, window: int) -> Tensor:
    """Products of d alphas, ``P[d][..., t] = alpha[t] * alpha[t-1] * ... * alpha[t-d+1]``: [..., s] -> [W, ..., s]."""
    out = torch.zeros(window, *alpha.shape, dtype=alpha.dtype, device=alpha.device)
    out[0] = 1
    for d in range(1, min(window, alpha.size(-1) + 1)):
        torch.mul(out[d - 1][..., d - 1 :], alpha[..., : alpha.size(-1) - d + 1], out=out[d][..., d - 1 :])
    return out


class _BandCoefficients(torch.autograd.Function):
    """Normalised coefficients [W, b, h, s] from alpha, omega [b, h, s]; entry [d, ..., t] weighs token t-d."""

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


def _skewed(entries: Tensor, rows: int, window: int) -> Tensor:
    """Band matrices of entries: [m, W] -> [m / rows, rows, rows + W - 1]; row r has its W entries from column r on.

    Rows are written one longer than the matrix is wide; read back with its own width, each is skewed by its number.
    """
    band = entries.new_empty(entries.size(0), rows + window)
    band[:, :window] = entries
    band[:, window:] = 0
    shape = (entries.size(0) // rows, rows, rows + window - 1)
    return band.as_strided(shape, (rows * (rows + window), rows + window - 1, 1))


def _overlapping(x: Tensor, rows: int, window: int) -> Tensor:
    """View of windows that overlap by W - 1 rows: [m + W - 1, e] -> [m / rows, rows + W - 1, e]."""
    blocks = (x.size(0) - window + 1) // rows
    return x.as_strided((blocks, rows + window - 1, x.size(1)), (rows * x.size(1), x.size(1), 1))


class _PoolWindow(torch.autograd.Function):
    """Product with a band matrix, out[t] = sum_d a[d, t] x[t-d], as blocks of rows times their windows.

    All heads and sequences lie one after the other in one long run of m rows: a window that reaches back into another
    head meets coefficients that are zero there.
    """

    @staticmethod
    def forward(ctx, k, v, coefficients, window):
        b, h, s, d = k.shape
        rows, n = _block_rows(window), b * h * s
        m = -(-n // rows) * rows
        x = _PoolWindow._joined(k, v, window - 1, m - n)  # [W - 1 + m, 2D]
        entries = F.pad(coefficients.view(window, n), (0, m - n)).to(k.dtype).flip(0).t()  # oldest token first
        out = torch.bmm(_skewed(entries, rows, window), _overlapping(x, rows, window))
        ctx.window = window
        ctx.save_for_backward(x, coefficients)
        out = out.view(m, 2 * d)[:n].view(b, h, s, 2 * d)
        return out[..., :d], out[..., d:]

    @staticmethod
    def backward(ctx, grad_k, grad_v):
        x, coefficients = ctx.saved_tensors
        b, h, s, d = grad_k.shape
        window, n = ctx.window, b * h * s
        rows = _block_rows(window)
        m = x.size(0) - window + 1
        grad = _PoolWindow._joined(grad_k, grad_v, 0, m - n + window - 1)  # [m + W - 1, 2D]
        # d a: the band of grad x^T, read out by the same skew.
        full = torch.bmm(grad[:m].view(m // rows, rows, 2 * d), _overlapping(x, rows, window).transpose(1, 2))
        band = full.as_strided((m // rows, rows, window), (rows * (rows + window - 1), rows + window, 1))
        d_a = band.reshape(m, window)[:n].t().flip(0).to(coefficients.dtype)
        # d x[t] = sum_d a[d, t+d] grad[t+d]: the same product with the band's columns, diagonals of [W, m].
        padded = coefficients.new_zeros(window * (m + 1))
        padded[: window * m].view(window, m)[:, :n] = coefficients.view(window, n)
        entries = padded.as_strided((m, window), (1, m + 1)).to(x.dtype)
        d_x = torch.bmm(_skewed(entries, rows, window), _overlapping(grad, rows, window))
        d_x = d_x.view(m, 2 * d)[:n].view(b, h, s, 2 * d)
        return d_x[..., :d], d_x[..., d:], d_a.reshape(coefficients.shape), None

    @staticmethod
    def _joined(k: Tensor, v: Tensor, before: int, after: int) -> Tensor:
        """Keys and values side by side, which one product pools: [b, h, s, D] x 2 -> [before + b*h*s + after, 2D], with
        zeros before and after.
        """
        b, h, s, d = k.shape
        n = b * h * s
        out = k.new_empty(before + n + after, 2 * d)
        out[:before] = 0
        out[before + n :] = 0
        middle = out[before : before + n].view(b, h, s, 2 * d)
        middle[..., :d] = k
        middle[..., d:] = v
        return out


def _pool_unbounded(x: Tensor, alpha: Tensor, omega: Tensor) -> Tensor:
    """Pooling without a window: N[t] = alpha[t] N[t-1] + omega[t] x[t], M likewise without x, out = N / M.

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
    """Cumulative product over the last axis; the gradient of torch's own looks for zeros on the host, which stalls a
    GPU.
    """
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
    if window == 1:
        return k, v
    if window is not None:
        return _PoolWindow.apply(k, v, _BandCoefficients.apply(alpha, omega, window), window)
    # [b, ng, s, D] x 2 -> [b * ng, s, 2D]
    kv = torch.cat((k, v), dim=-1).view(b * h, s, 2 * d)
    wide = kv if kv.dtype == torch.float64 else kv.float()
    pooled = _pool_unbounded(wide, alpha.reshape(b * h, s), omega.reshape(b * h, s)).to(k.dtype)
    pooled = pooled.view(b, h, s, 2 * d)
    return pooled[..., :d], pooled[..., d:]
