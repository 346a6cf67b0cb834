"""Linear layers of the serving model, each in the form that its device multiplies fastest; chosen once, at load."""

from collections.abc import Sequence
from typing import Optional, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.dmc import kernels
from megatron.dmc.kernels import cpu_tuning
from megatron.dmc.kernels.panels import pack_weight, weight_rows
from megatron.dmc.kernels.params import PackedWeight


class Linear(Protocol):
    """Linear layer ``x W^T + b``: x [T, in] -> [T, out], contiguous. Holds this tensor-parallel rank's part."""

    form: str
    """Form of the weight, for people: "plain", "packed by oneDNN", "packed in panels"."""
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

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the weight: int64 [T] -> [T, in]."""
        return F.embedding(ids, self.weight)


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


class PanelLinear:
    """Linear layer on a CPU whose weight lies in panels, which this package's own kernel multiplies.

    Measured in CPU time of one thread over the layers of SmolLM2-135M, against :class:`PackedLinear`, on an AMD EPYC
    with AVX512_BF16: in bf16 0.72 times the time at 1 row, 0.73 at 8, 0.87 at 16, 0.92 at 64, 0.98 at 512; in fp32
    0.74, 0.78, 0.88, 0.91, 1.02. With AVX2 alone it is faster than what ran there before (docs/lab_book.md).
    """

    def __init__(self, packed: PackedWeight, form: str = "packed in panels") -> None:
        """packed: numbers, or codes (see ``quantization.py``). A gated layer returns ``silu(gates) * ups``."""
        self.packed, self.form, self.nbytes = packed, form, packed.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return kernels.packed_linear(x, self.packed)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the weight, in fp32 what codes stand for: int64 [T] -> [T, in]."""
        return weight_rows(self.packed, ids)


class StackedLinear:
    """Linear layer whose weight is in parts of several forms, one below the other."""

    def __init__(self, parts: Sequence[Linear]) -> None:
        self.parts, self.nbytes = parts, sum(part.nbytes for part in parts)
        self.form = ", ".join(dict.fromkeys(part.form for part in parts))

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=1)


class OrderedLinear:
    """Linear layer whose weight has its inputs in another order (GPTQ's ``desc_act``)."""

    def __init__(self, linear: Linear, order: Tensor) -> None:
        """order: int64 [in], input of each column of the weight."""
        self.linear, self.order = linear, order
        self.form, self.nbytes = f"{linear.form}, inputs in another order", linear.nbytes + order.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return self.linear(x[:, self.order])


class GatedLinear:
    """Linear layer [gates, ups], and ``silu(gates) * ups`` of it in a step of its own: [T, in] -> [T, out / 2]."""

    def __init__(self, linear: Linear) -> None:
        self.linear, self.form, self.nbytes = linear, linear.form, linear.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return kernels.silu_and_mul(self.linear(x))


def takes_panels(weight: Tensor) -> bool:
    """True where a weight [out, in] is best kept in panels."""
    fits = weight.numel() > 0 and weight.size(1) % 2 == 0
    on_cpu = weight.device.type == "cpu" and kernels.active_backend("cpu") == "cpp"
    return fits and on_cpu and cpu_tuning.panels_multiply(weight.dtype)


def make_linear(weight: Tensor, bias: Optional[Tensor] = None) -> Linear:
    """Linear layer of a weight [out, in] and a bias [out] in the fastest form. A packed layer keeps no plain weight."""
    if takes_panels(weight):
        return PanelLinear(pack_weight(weight, bias))
    packed = weight.device.type == "cpu" and weight.numel() > 0 and cpu_tuning.onednn_multiplies(weight.dtype)
    return PackedLinear(weight, bias) if packed else PlainLinear(weight, bias)


def make_gated(weight: Tensor) -> Linear:
    """Layer ``silu(gates) * ups`` of a weight [gates, ups], [out, in], in the fastest form: [T, in] -> [T, out / 2]."""
    return PanelLinear(pack_weight(weight, gated=True)) if takes_panels(weight) else GatedLinear(make_linear(weight))
