"""Weight-only quantization of the serving model's linear layers on CPUs, at load, by torch's own kernels.

Weights are rounded to the nearest value, without calibration. Activations, the embedding, norms, adapters and the cache
keep the model's type. torchao's way was tried (0.18): its int8 layers convert the whole weight in every call on CPUs,
and its int4 layers call the same kernel as :class:`Int4Linear`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Optional, get_args

import torch
from torch import Tensor

from megatron.dmc.inference.linear import Linear
from megatron.dmc.kernels.cpu_tuning import blocked_linear, empty_in_huge_pages

Method = Literal["int8", "int4"]
METHODS: tuple[str, ...] = get_args(Method)
GROUP_SIZES = (32, 64, 128)


class Int8Linear:
    """Linear layer with an int8 weight and one scale per output: ``w = s q``, q within -127 and 127."""

    form = "int8"
    ROWS = 16  # up to so many rows torch's kernel is faster than blocks of the weight in the activations' type
    WIDTH = 16  # torch 2.13 reads past the end of a weight whose inputs are no multiple of it

    def __init__(self, weight: Tensor, bias: Optional[Tensor] = None) -> None:
        self.bias = bias
        # Rounded first, so that the weight makes up for it.
        self.scales = (weight.abs().amax(1).float() / 127).to(weight.dtype)
        self.weight = empty_in_huge_pages(weight.shape, torch.int8, weight.device)
        scales = self.scales.float().clamp_min(torch.finfo(torch.float32).tiny)
        for rows, part, q in zip(weight.split(4096), scales.split(4096), self.weight.split(4096), strict=True):
            q.copy_((rows.float() / part[:, None]).round_().clamp_(-127, 127))
        self.nbytes = self.weight.nbytes + self.scales.nbytes + (0 if bias is None else bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        if x.size(0) > self.ROWS or x.size(1) % self.WIDTH:
            return blocked_linear(x, self.weight, self.scales, self.bias)
        y = torch.ops.aten._weight_int8pack_mm(x, self.weight, self.scales)
        return y if self.bias is None else y.add_(self.bias)


class Int4Linear:
    """Linear layer with a 4-bit weight, and a scale and an offset per group of inputs: ``w = s (q - 8) + z``, q within
    0 and 15.

    torch's kernel is written for few rows: over the layers of SmolLM2-135M in one thread of an AMD EPYC it takes 0.65
    times as long as a bf16 weight at 1 row, and 1.3 times as long at 64.
    """

    OUTPUTS = 16  # torch's kernel takes multiples of it

    def __init__(self, weight: Tensor, group_size: int, bias: Optional[Tensor] = None) -> None:
        self.group_size, self.bias, self.form = group_size, bias, f"int4 in groups of {group_size}"
        # [out, in] -> [out, groups, group_size]
        groups = weight.float().unflatten(1, (-1, group_size))
        low, high = groups.amin(2), groups.amax(2)
        scales = ((high - low) / 15).to(weight.dtype)
        offsets = (low + 8 * scales.float()).to(weight.dtype)  # both rounded first, so that the weight makes up for it
        divisors = scales.float().clamp_min(torch.finfo(torch.float32).tiny)[..., None]
        q = ((groups - offsets.float()[..., None]) / divisors).round_().add_(8).clamp_(0, 15)
        self.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.flatten(1).int(), 1)
        # [out, groups] twice -> [groups, out, 2]
        self.scales = torch.stack([scales.t(), offsets.t()], dim=-1).contiguous()
        self.nbytes = self.weight.nbytes + self.scales.nbytes + (0 if bias is None else bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.weight, self.group_size, self.scales)
        return y if self.bias is None else y.add_(self.bias)


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

    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        """Raise ``ValueError`` for a device or a type of activations that the kernels do not take."""
        if device.type != "cpu":
            raise ValueError(f"quantization {self.method} runs on CPUs, and device is {device}; leave one of them out")
        if dtype != torch.bfloat16:
            name = str(dtype).removeprefix("torch.")
            raise ValueError(
                f"quantization {self.method} computes in bfloat16, and dtype is {name}; use dtype bfloat16 or auto"
            )

    def layer(self, name: str, weight: Tensor, bias: Optional[Tensor] = None) -> Linear:
        """Quantized layer of a weight [out, in]. Raises ``ValueError`` for a shape that int4 does not take."""
        if self.method == "int8":
            return Int8Linear(weight, bias)
        outputs, inputs = weight.shape
        if inputs % self.group_size:
            raise ValueError(
                f"{name} has {inputs} inputs on a rank, no multiple of quantization_group_size {self.group_size}; use "
                "another one, or quantization int8"
            )
        if outputs % Int4Linear.OUTPUTS:
            raise ValueError(
                f"{name} has {outputs} outputs on a rank; int4 takes multiples of {Int4Linear.OUTPUTS}: use "
                "quantization int8"
            )
        return Int4Linear(weight, self.group_size, bias)
