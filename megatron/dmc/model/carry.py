"""Count of kept slots per sequence, which travels through the decoder in one extra row of the hidden state.

The compression loss needs the slots kept by the whole model, whose layers live on different pipeline stages. Each layer
adds its own count to the row; point-to-point transfers, interleaving and recomputation treat the row like any other,
and autograd brings the gradient back the same way, so the loss is the same in every layout.

The count is written in base 256, one digit per channel, and its gradient in three terms: bf16 holds both exactly.
With tensor parallelism each rank carries the count of its own heads; they are summed once, at the end.
"""

import torch
from torch import Tensor

_DIGITS = 4
_TERMS = 3  # three bf16 mantissas of 8 bits make up fp32's 24


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx, row):
        ctx.save_for_backward(torch.empty(0, dtype=row.dtype, device=row.device))
        ctx.shape = row.shape
        powers = 256.0 ** torch.arange(_DIGITS, dtype=torch.float64, device=row.device)
        return (row[0, :, :_DIGITS].double() * powers).sum(dim=-1)

    @staticmethod
    def backward(ctx, grad):
        (like,) = ctx.saved_tensors
        out = like.new_zeros(ctx.shape)
        rest = grad.float()
        for i in range(_TERMS):
            out[0, :, i] = rest
            rest = rest - out[0, :, i].float()
        return out


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx, count, hidden_size, dtype):
        row = torch.zeros(1, count.numel(), hidden_size, dtype=dtype, device=count.device)
        rest = count
        for i in range(_DIGITS):
            row[0, :, i] = rest % 256.0
            rest = torch.floor(rest / 256.0)
        return row

    @staticmethod
    def backward(ctx, grad):
        return grad[0, :, :_TERMS].float().sum(dim=-1).double(), None, None


def read_count(row: Tensor) -> Tensor:
    """Read the count: row [1, b, h] -> fp64 [b]."""
    return _Read.apply(row)


def write_count(count: Tensor, hidden_size: int, dtype: torch.dtype) -> Tensor:
    """Write a count: fp64 [b] of integers below 2^32 -> row [1, b, h] in the hidden state's dtype."""
    return _Write.apply(count, hidden_size, dtype)
