"""Linear layers of the serving model, each in the form that its device multiplies fastest; chosen once, at load."""

from __future__ import annotations

from typing import Optional, Protocol

import torch
from torch import Tensor

from megatron.dmc.kernels import cpu_tuning


class Linear(Protocol):
    """Linear layer ``x W^T + b``: x [T, in] -> [T, out], contiguous. Holds this tensor-parallel rank's part."""

    form: str
    """Form of the weight, for people: "plain", "packed by oneDNN"."""
    nbytes: int
    """Size of the weight and the bias in bytes."""

    def __call__(self, x: Tensor) -> Tensor: ...


class PlainLinear:
    """Linear layer whose weight is a matrix [out, in] as it was read."""

    form = "plain"

    def __init__(self, weight: Tensor, bias: Optional[Tensor] = None) -> None:
        self.weight, self.bias = weight, bias
        self.nbytes = weight.nbytes + (0 if bias is None else bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        return cpu_tuning.linear(x, self.weight, self.bias)


class PackedLinear:
    """Linear layer on a CPU whose weight lies in the blocks that oneDNN's kernels read, for any number of rows.

    ``F.linear`` brings a plain weight into such blocks in every call, in bf16 always and in fp32 for a few rows or
    more. Measured in one thread, in CPU time, over the layers of SmolLM2-135M, packed against plain: on an AMD EPYC
    with AVX2, in fp32, 1.0 times the time at 1 row, 0.8 at 2, 0.75 at 8, 0.85 at 16, 1.0 from 64 on; on an Intel Xeon
    with AMX, in bf16, 0.65 at 1 and at 16 rows, 0.7 at 64. oneDNN compiles a kernel for every number of rows that it
    meets, once: a millisecond.
    """

    form = "packed by oneDNN"
    ROWS = 64  # that the blocks are laid out for; those for 16 or for 512 rows are no faster at any number of rows

    def __init__(self, weight: Tensor, bias: Optional[Tensor] = None) -> None:
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight, self.ROWS), bias
        self.nbytes = weight.nbytes + (0 if bias is None else bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def make_linear(weight: Tensor, bias: Optional[Tensor] = None) -> Linear:
    """Linear layer of a weight [out, in] and a bias [out] in the fastest form. A packed layer keeps no plain weight."""
    packed = weight.device.type == "cpu" and weight.numel() > 0 and cpu_tuning.onednn_multiplies(weight.dtype)
    return PackedLinear(weight, bias) if packed else PlainLinear(weight, bias)
