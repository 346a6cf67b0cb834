"""Quantization of the serving model's linear layers on CPUs, at load: weights of 8 or 4 bits, multiplied with rows that
are rounded to 16 or 8 bits first (see :func:`megatron.dmc.kernels.packed_linear`).

Weights are rounded to the nearest value, without calibration. Between layers activations keep the model's type, as do
the embedding, norms, adapters and the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Optional, get_args

import torch
from torch import Tensor

from megatron.dmc.inference.linear import Linear, PanelLinear
from megatron.dmc.kernels.panels import ZEROS, pack_codes

Method = Literal["int8", "int4"]
METHODS: tuple[str, ...] = get_args(Method)
GROUP_SIZES = (32, 64, 128)
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

    def check(self, device: torch.device) -> None:
        """Raise ``ValueError`` for a device that the kernels do not run on."""
        if device.type != "cpu":
            raise ValueError(f"quantization {self.method} runs on CPUs, and device is {device}; leave one of them out")

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
