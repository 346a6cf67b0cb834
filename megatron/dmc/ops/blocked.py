"""Causal attention on CPUs by matrix products: a block of rows at a time, with all columns up to its last token.

torch's own CPU kernel reaches a fraction of the speed of matrix products. Here the scores of one block exist at a time,
few enough for the caches, so memory stays O(S). Tensors are fp32 inside (fp64 for fp64). Where the model computes in
bf16, the factors of products are rounded to bf16 and the sums are fp32, as in flash attention (arXiv 2205.14135,
algorithm 4), on CPUs with instructions for it; on others the products are fp32.

A column may have an additive mask for rows more than ``window`` later, which is what DMS trains with
(:mod:`megatron.dmc.ops.eviction`).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Optional

import torch
from torch import Tensor

ROWS = 64
"""Rows of a block."""
ELEMENTS = 2**18
"""Scores of a block, at most, unless those of one KV head are more: 1 MiB."""


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: Optional[float] = None, mask: Optional[Tensor] = None, window: int = 0
) -> tuple[Tensor, Tensor]:
    """Attend.

    Args:
        q: [b, np, rows, D], those of the last tokens; k, v: [b, ng, s, D].
        scale: factor on the scores; None: 1 / sqrt(D).
        mask: [b, ng, s], added to the scores of a column for rows more than ``window`` later.

    Returns:
        Output [b, np, rows, D] and row statistics fp32 [b, np, rows].
    """
    wide = _wide(q)
    rows_q, keys, values = _by_group(q, k), k.flatten(0, 1).to(wide), v.flatten(0, 1).to(wide)
    out, lse = torch.empty_like(rows_q), rows_q.new_empty(rows_q.shape[:3])
    add_mask = _Mask(mask, window, wide)
    scale = 1 / math.sqrt(q.size(-1)) if scale is None else scale
    with _products_in(q.dtype):
        for head, row, token in _blocks(q, k):
            column = slice(0, token.stop)
            scores = add_mask(head, token, _product(rows_q[head, :, row], keys[head, column].mT, scale))
            top = scores.amax(dim=-1)
            p = torch.softmax(scores, dim=-1)
            out[head, :, row] = _product(p, values[head, column])
            lse[head, :, row] = top - p.amax(dim=-1).log_()  # the largest probability is 1 / the row's sum
    return out.view(q.shape).to(q.dtype), lse.view(q.shape[:3])


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: Optional[float] = None,
    mask: Optional[Tensor] = None,
    window: int = 0,
) -> tuple[Tensor, ...]:
    """Gradients of q, k and v, and of ``mask`` where there is one. ``lse`` may be that of longer rows, of which these
    columns are a part.
    """
    wide = _wide(q)
    rows_q, rows_do = _by_group(q, k), _by_group(do, k)
    keys, values = k.flatten(0, 1).to(wide), v.flatten(0, 1).to(wide)
    delta = (rows_do * _by_group(o, k)).sum(dim=-1, keepdim=True)
    lse = _by_group(lse, k).unsqueeze(-1)
    dq, dk, dv = torch.empty_like(rows_q), torch.zeros_like(keys), torch.zeros_like(values)
    add_mask = _Mask(mask, window, wide)
    scale = 1 / math.sqrt(q.size(-1)) if scale is None else scale
    with _products_in(q.dtype):
        for head, row, token in _blocks(q, k):
            column, own_q, own_do = slice(0, token.stop), rows_q[head, :, row], rows_do[head, :, row]
            scores = add_mask(head, token, _product(own_q, keys[head, column].mT, scale))
            p = scores.sub_(lse[head, :, row]).exp_()
            dv[head, column] += torch.bmm(p.flatten(1, 2).mT, own_do.flatten(1, 2))
            ds = _product(own_do, values[head, column].mT).sub_(delta[head, :, row]).mul_(p)
            add_mask.add_gradient(head, token, ds)
            dq[head, :, row] = _product(ds, keys[head, column], scale)
            dk[head, column] += torch.bmm(ds.flatten(1, 2).mT, own_q.flatten(1, 2))
    dk *= scale
    found = (x.view(like.shape).to(like.dtype) for x, like in ((dq, q), (dk, k), (dv, v)))
    return (*found, *(() if mask is None else (add_mask.gradient.view(mask.shape).to(mask.dtype),)))


class _Mask:
    """Mask of a block of scores: causal, and for each column another one for rows more than ``window`` later.

    Args:
        mask: [b, ng, s], or None.
    """

    def __init__(self, mask: Optional[Tensor], window: int, dtype: torch.dtype) -> None:
        self.mask, self.window = None if mask is None else mask.flatten(0, 1).to(dtype), window
        self.gradient = None if self.mask is None else torch.zeros_like(self.mask)
        self.causal = torch.full((ROWS, ROWS), -math.inf, dtype=dtype).triu(1)
        # Of row i of a block and the column window - j before its first row: 1 where the mask holds.
        self.late = torch.ones(ROWS, ROWS, dtype=dtype).tril(-1)

    def __call__(self, heads: slice, tokens: slice, scores: Tensor) -> Tensor:
        """Add to scores [heads, g, rows, columns], in place."""
        n = scores.size(2)
        scores[..., tokens] += self.causal[:n, :n]
        if self.mask is not None:
            always, partly, late = self._columns(tokens)
            mask = self.mask[heads, None, None]
            scores[..., always] += mask[..., always]
            scores[..., partly] += mask[..., partly] * late
        return scores

    def add_gradient(self, heads: slice, tokens: slice, ds: Tensor) -> None:
        """Sum the gradient of the columns' masks over a block's rows, from that of its scores."""
        if self.mask is not None:
            always, partly, late = self._columns(tokens)
            self.gradient[heads, always] += ds[..., always].sum(dim=(1, 2))
            self.gradient[heads, partly] += (ds[..., partly] * late).sum(dim=(1, 2))

    def _columns(self, tokens: slice) -> tuple[slice, slice, Tensor]:
        """Columns that are masked for all of these rows, and the further ones that are for some: 1 where they are."""
        origin = tokens.start - self.window
        first, last = max(0, origin), max(0, tokens.stop - 1 - self.window)
        return (
            slice(0, first),
            slice(first, last),
            self.late[: tokens.stop - tokens.start, first - origin : last - origin],
        )


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _by_group(x: Tensor, k: Tensor) -> Tensor:
    """What belongs to queries, by KV head, in fp32: [b, np, s, ...] -> [b * ng, g, s, ...]."""
    return x.reshape(k.size(0) * k.size(1), -1, *x.shape[2:]).to(_wide(x))


def _blocks(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """KV heads (of all sequences), rows and their tokens of each block."""
    heads, group, before = k.size(0) * k.size(1), q.size(1) // k.size(1), k.size(2) - q.size(2)
    for start in range(0, q.size(2), ROWS):
        rows = slice(start, min(start + ROWS, q.size(2)))
        tokens = slice(before + rows.start, before + rows.stop)
        step = max(1, ELEMENTS // (group * (rows.stop - rows.start) * tokens.stop))
        for head in range(0, heads, step):
            yield slice(head, min(head + step, heads)), rows, tokens


def _product(x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
    """``scale * x @ y``: x [heads, g, rows, n], y [heads, n, m]."""
    flat = x.flatten(1, 2)
    return torch.baddbmm(flat.new_empty(1), flat, y, beta=0, alpha=scale).view(*x.shape[:3], -1)


@contextmanager
def _products_in(dtype: torch.dtype) -> Iterator[None]:
    """Let products of fp32 matrices round their factors to bf16 where that is the model's ``dtype``."""
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    if dtype == torch.bfloat16:
        setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before
