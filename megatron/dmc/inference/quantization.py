"""Quantized linear layers of the serving model on CPUs: weights of 8 or 4 bits, multiplied with rows that are rounded
to 16 or 8 bits first (see :func:`megatron.dmc.kernels.packed_linear`).

Weights are rounded at load, to the nearest value and without calibration, or kept in the codes of their files. Between
layers activations keep the model's type, as do the embedding, norms, adapters and the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Optional, get_args

import torch
from torch import Tensor

from megatron.dmc.checkpoint.codes import CodedTensor, form
from megatron.dmc.inference.linear import Linear, OrderedLinear, PanelLinear
from megatron.dmc.inference.weights import ModelInfo
from megatron.dmc.kernels.panels import ZEROS, pack_codes

Method = Literal["int8", "int4"]
METHODS: tuple[str, ...] = get_args(Method)
GROUP_SIZES = (32, 64, 128)
KERNEL_GROUPS = (128, 64, 32)
"""Inputs of which the kernel rounds rows together, the best first: greater groups of weights repeat their scale."""
TINY = torch.finfo(torch.float32).tiny


def int8_linear(weight: Tensor, bias: Optional[Tensor] = None, gated: bool = False) -> PanelLinear:
    """Linear layer with an int8 weight and one scale per output: ``w = s q``, q within -127 and 127."""
    # Rounded first, so that the weight makes up for it.
    scales = (weight.abs().amax(1).float() / 127).bfloat16()
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for rows, scale, q in zip(weight.split(4096), scales.split(4096), codes.split(4096), strict=True):
        q.copy_((rows.float() / scale.float().clamp_min(TINY)[:, None]).round_().clamp_(-127, 127).add_(ZEROS[8]))
    return PanelLinear(pack_codes(codes, scales, bias, 8, gated), "int8")


def int4_linear(weight: Tensor, group_size: int, bias: Optional[Tensor] = None, gated: bool = False) -> PanelLinear:
    """Linear layer with a 4-bit weight, and a scale and an offset per group of inputs: ``w = s (q - 8) + z``, q within
    0 and 15.
    """
    # [out, in] -> [out, groups, group_size]
    groups = weight.float().unflatten(1, (-1, group_size))
    low, high = groups.amin(2), groups.amax(2)
    scales = ((high - low) / 15).bfloat16()
    offsets = (low + ZEROS[4] * scales.float()).bfloat16()  # both rounded first, so that the weight makes up for it
    divisors = scales.float().clamp_min(TINY)[..., None]
    q = ((groups - offsets.float()[..., None]) / divisors).round_().add_(ZEROS[4]).clamp_(0, 15)
    scales_and_offsets = torch.stack([scales, offsets], dim=2)
    packed = pack_codes(q.flatten(1).to(torch.uint8), scales_and_offsets, bias, 4, gated)
    return PanelLinear(packed, f"int4 in groups of {group_size}")


def coded_linear(
    name: str,
    parts: Sequence[tuple[CodedTensor, slice]],
    inputs: slice,
    bias: Optional[Tensor] = None,
    gated: bool = False,
) -> Linear:
    """Linear layer in the codes of its tensors.

    Args:
        name: of the layer, for messages.
        parts: tensors of one layout and order, and the outputs of each that are wanted, one below the other.
        inputs: those that are wanted.
        gated: see :meth:`Quantization.layer`.

    Raises:
        ValueError: inputs of a tensor-parallel rank that are no whole groups.
    """
    first, _ = parts[0]
    layout, total, order = first.layout, first.shape[1], first.order
    whole = inputs == slice(0, total)
    if order is not None and not whole:
        raise ValueError(
            f"{first.name} has its inputs in another order (desc_act, actorder), which tensor-parallel ranks cannot "
            "divide; run it on one"
        )
    read = [tensor.read_codes(rows.start, rows.stop) for tensor, rows in parts]
    codes = torch.cat([found for found, _ in read])[:, inputs]
    scales = torch.cat([found for _, found in read])
    if scales.size(2) == 2 and not scales[..., 1].any():
        scales = scales[..., :1]
    if layout.bits == 8 and layout.group == total and scales.size(2) == 1:
        scales = scales[:, 0, 0]
    else:
        fits = [n for n in KERNEL_GROUPS if not any(x % n for x in (layout.group, inputs.start, inputs.stop))]
        if not fits:
            raise ValueError(
                f"{name} has inputs {inputs.start} to {inputs.stop - 1} of groups of {layout.group} on a rank; they "
                f"must be multiples of {KERNEL_GROUPS[-1]}: take fewer ranks"
            )
        group_of = torch.arange(inputs.start, inputs.stop, fits[0]) // layout.group
        scales = scales[:, group_of]
    packed = pack_codes(codes, scales, bias, layout.bits, gated, layout.zero, layout.scaled)
    linear = PanelLinear(packed, form(layout, total))
    return linear if order is None else OrderedLinear(linear, order)


def check_quantization(info: ModelInfo, quantization: Optional[Quantization], device: torch.device) -> None:
    """Raise ``ValueError`` for a model whose weights are quantized twice, or on a device that the kernels do not run
    on.
    """
    if info.quantization is not None and quantization is not None:
        raise ValueError(
            f"{info.path} has quantized weights ({info.quantization}), which are kept as they are; leave quantization "
            f"{quantization.method} out"
        )
    method = info.quantization or quantization and quantization.method
    if method is not None and device.type != "cpu":
        raise ValueError(f"quantization {method} runs on CPUs, and device is {device}; leave one of them out")


@dataclass(frozen=True)
class Quantization:
    """How the linear layers of a model are quantized."""

    method: str
    """int8 or int4."""
    group_size: int = 32
    """Inputs that share a scale, for int4."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"quantization is {self.method!r}; use {' or '.join(METHODS)}")
        if self.group_size not in GROUP_SIZES:
            raise ValueError(
                f"quantization_group_size is {self.group_size!r}; use one of {', '.join(map(str, GROUP_SIZES))}"
            )

    def layer(self, name: str, weight: Tensor, bias: Optional[Tensor] = None, gated: bool = False) -> Linear:
        """Quantized layer of a weight [out, in]. Raises ``ValueError`` for a shape that int4 does not take.

        Args:
            gated: the first half of the outputs are gates, and the layer returns ``silu(gates) * ups``: [T, out / 2].
        """
        if self.method == "int8":
            return int8_linear(weight, bias, gated)
        inputs = weight.size(1)
        if inputs % self.group_size:
            raise ValueError(
                f"{name} has {inputs} inputs on a rank, no multiple of quantization_group_size {self.group_size}; use "
                "another one, or quantization int8"
            )
        return int4_linear(weight, self.group_size, bias, gated)
