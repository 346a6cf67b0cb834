"""Dense reference that the tests of ``megatron.dmc.ops`` share, and a check of it against the definition.

It follows arXiv 2403.09636, section 3: S x S matrices, plain autograd, nothing but the decision arithmetic of DMC in
any dtype. It imports nothing from the code that is tested against it.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

EPSILON = 2.0**-7


def reference_tables(dim: int, length: int, dtype: torch.dtype, device="cpu", base: float = 1e4) -> tuple[Tensor, ...]:
    """cos, sin [s, D/2]; the angles in fp32, as models take them."""
    inv = torch.tensor([base ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.float32, device=device)
    angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * inv
    return angle.cos().to(dtype), angle.sin().to(dtype)


def reference_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotation; the last channel is zero before and after."""
    keep = torch.ones(x.size(-1), dtype=x.dtype, device=x.device)
    keep[-1] = 0
    x = x * keep
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1) * keep


def reference_decisions(logits: Tensor, temperature: float, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """alpha [b, ng, s] and the additive mask of each column, log(1 - alpha of the next token)."""
    first = torch.arange(logits.size(-1), device=logits.device) == 0
    if noise is None:
        alpha = ((logits > 0) & ~first).to(logits.dtype)
        log_keep = torch.where(alpha > 0, -math.inf, 0.0)
    else:
        z = (logits + noise) / temperature
        alpha = torch.where(first, 0.0, z.sigmoid())
        log_keep = torch.where(first, 0.0, torch.nn.functional.logsigmoid(-z))
    return alpha, torch.cat((log_keep[..., 1:], torch.zeros_like(log_keep[..., :1])), dim=-1)


def reference_coefficients(alpha: Tensor, omega: Tensor, window: int | None) -> Tensor:
    """[b, ng, s, s]: weight of token j in the state after token t, rows sum to 1."""
    s = alpha.size(-1)
    eye = torch.eye(s, dtype=alpha.dtype, device=alpha.device)
    row, rows = torch.zeros_like(alpha), []
    for t in range(s):
        row = alpha[..., t, None] * row + omega[..., t, None] * eye[t]
        rows.append(row)
    out = torch.stack(rows, dim=-2)
    if window is not None:
        out = out * torch.ones(s, s, dtype=out.dtype, device=out.device).triu(1 - window)
    return out / out.sum(dim=-1, keepdim=True)


def reference_layer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: float,
    window: int | None,
    temperature: float = 0.1,
    noise: Tensor | None = None,
    decide_in: torch.dtype | None = None,
) -> Tensor:
    """Raw q [b, np, s, D], k, v [b, ng, s, D] -> attention output, all in q's dtype.

    ``decide_in``: dtype of decisions, importance and pooling coefficients when it is not q's (bf16 models decide in
    fp32); the coefficients are then rounded to q's.
    """
    g, d, s, dtype = q.size(1) // k.size(1), q.size(-1), q.size(-2), q.dtype
    wide = decide_in or dtype
    alpha, log_keep = reference_decisions(k[..., -1].to(wide) - bias, temperature, noise)
    mean = q[..., -1].to(wide).unflatten(1, (-1, g)).mean(dim=2)
    omega = torch.sigmoid(mean + bias) + EPSILON
    coefficients = reference_coefficients(alpha, omega, window).to(dtype)
    cos, sin = reference_tables(d, s, dtype, q.device)
    key = reference_rotate(coefficients @ k, cos, sin).repeat_interleave(g, 1)
    value = (coefficients @ v).repeat_interleave(g, 1)
    scores = reference_rotate(q, cos, sin) @ key.transpose(-1, -2) / math.sqrt(d)
    own = torch.eye(s, dtype=torch.bool, device=q.device)
    mask = log_keep.to(dtype).repeat_interleave(g, 1)[..., None, :]
    scores = scores + torch.where(own, torch.zeros((), dtype=dtype, device=q.device), mask)
    scores = scores.masked_fill(torch.ones_like(own).triu(1), -math.inf)
    return scores.softmax(dim=-1) @ value


@pytest.mark.parametrize("window", [1, 3, None])
def test_reference_is_the_definition(window: int | None) -> None:
    """Hard decisions, one head, token by token: lists and sums only."""
    torch.manual_seed(0)
    s, d, bias = 23, 8, 0.0
    q, k, v = (torch.randn(1, 1, s, d, dtype=torch.float64) for _ in range(3))
    k[..., -1] += 0.7  # mostly merges
    got = reference_layer(q, k, v, bias=bias, window=window)[0, 0]
    cos, sin = reference_tables(d, s, torch.float64)
    slots: list[list[int]] = []
    for t in range(s):
        if t > 0 and k[0, 0, t, -1] - bias > 0:
            slots[-1].append(t)
        else:
            slots.append([t])
        scores, values = [], []
        for members in slots:
            recent = members if window is None else members[-window:]
            weights = torch.stack([torch.sigmoid(q[0, 0, i, -1] + bias) + EPSILON for i in recent])
            weights = weights / weights.sum()
            key = sum(w * k[0, 0, i] for w, i in zip(weights, recent))
            values.append(sum(w * v[0, 0, i] for w, i in zip(weights, recent)))
            newest = members[-1]
            key = reference_rotate(key[None], cos[newest : newest + 1], sin[newest : newest + 1])[0]
            query = reference_rotate(q[0, 0, t : t + 1], cos[t : t + 1], sin[t : t + 1])[0]
            scores.append(query @ key / math.sqrt(d))
        want = torch.stack(scores).softmax(0) @ torch.stack(values)
        assert (got[t] - want).abs().max() < 1e-12, t
    assert len(slots) < s / 2
