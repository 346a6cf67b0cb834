"""Weights of linear layers in panels of 32 outputs, the form that the C++ kernels for CPUs read, as numbers
(``csrc/cpu_linear.cpp``) or as codes of 8 or 4 bits (``csrc/cpu_quantized.cpp``).
"""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.dmc.kernels.cpu_tuning import empty_in_huge_pages
from megatron.dmc.kernels.params import PackedWeight

PANEL = 32
"""Outputs of a panel."""
UNIT = 32
"""Inputs of which codes have whole multiples."""
ZEROS = {4: 8, 8: 128}
"""Code of 0, by bits."""


def _in_panels(x: Tensor, gated: bool) -> Tensor:
    """[N, ...] -> [N / 32, 32, ...], filled up with zeros. gated: every panel has 16 rows of the first half of x and
    the same 16 of the second.
    """
    each = PANEL // 2 if gated else PANEL
    parts = []
    for part in x.chunk(2) if gated else (x,):
        missing = -part.size(0) % each
        filled = torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) if missing else part
        parts.append(filled.unflatten(0, (-1, each)))
    return torch.cat(parts, dim=1) if gated else parts[0]


def _copied(x: Tensor) -> Tensor:
    return empty_in_huge_pages(x.shape, x.dtype, x.device).copy_(x)


def pack_weight(weight: Tensor, bias: Optional[Tensor] = None, gated: bool = False) -> PackedWeight:
    """Panels of a weight [N, K] of fp32 or bf16. gated: the first half of the outputs are gates of the second.

    Raises:
        ValueError: an odd K in bf16.
    """
    pair, none = 4 // weight.element_size(), weight.new_empty(0)
    if weight.size(1) % pair:
        raise ValueError(f"a weight of {tuple(weight.shape)} in {weight.dtype} has no pairs of inputs")
    # [N / 32, 32, K] -> [N / 32, K / pair, 32, pair]
    panels = _copied(_in_panels(weight, gated).unflatten(2, (-1, pair)).transpose(1, 2))
    outputs = weight.size(0) // 2 if gated else weight.size(0)
    return PackedWeight(panels, none, none if bias is None else bias, weight.size(1), outputs, gated)


def pack_codes(
    codes: Tensor,
    scales: Tensor,
    bias: Optional[Tensor],
    bits: int,
    gated: bool = False,
    zero: Optional[int] = None,
    scaled: bool = False,
) -> PackedWeight:
    """Panels of the codes of a weight: ``w = scale (code - zero)``, plus an offset of the group where it has any.

    Args:
        codes: uint8 [N, K]; with 4 bits, or groups, K is a multiple of 32.
        scales: fp32, fp16 or bf16: of each output [N], with 8 bits alone, or of each group of inputs [N, K / group, 1],
            with its offset [N, K / group, 2].
        bits: 8 or 4.
        gated: see :func:`pack_weight`.
        zero: code of 0; None: that of :data:`ZEROS`.
        scaled: offsets are multiples of their scales.
    """
    rows, scales = _in_panels(codes, gated), _in_panels(scales, gated)
    if bits == 4:
        # [N / 32, 32, K] -> [N / 32, 32, K / 8, 2, 4] -> [N / 32, 32, K / 8, 4]
        low, high = rows.unflatten(2, (-1, 2, 4)).unbind(3)
        words = low | high << 4
    else:
        words = F.pad(rows, (0, -rows.size(2) % UNIT)).unflatten(2, (-1, 2, 2)).transpose(3, 4).flatten(3)
    if scales.ndim == 4:
        scales = scales.permute(0, 2, 3, 1)  # [N / 32, 32, K / group, 1 or 2] -> [N / 32, K / group, 1 or 2, 32]
    outputs = codes.size(0) // 2 if gated else codes.size(0)
    none = scales.new_empty(0) if bias is None else bias
    zero = ZEROS[bits] if zero is None else zero
    panels = _copied(words.transpose(1, 2))
    return PackedWeight(panels, scales.contiguous(), none, codes.size(1), outputs, gated, zero, scaled)


def unpack_weight(packed: PackedWeight) -> Tensor:
    """Weight in its panels [N / 32, 32, K]: of its dtype, or what codes stand for in fp32."""
    # [N / 32, K / pair, 32, pair] -> [N / 32, 32, K / pair, pair]
    words, scales = packed.weight.transpose(1, 2), packed.scales
    if not packed.bits:
        return words.flatten(2)
    # [N / 32, K / group, 1 or 2, 32] -> [N / 32, 32, K / group, 1 or 2]
    return _decoded(packed, words, scales.permute(0, 3, 1, 2) if packed.group else scales)


def _decoded(packed: PackedWeight, words: Tensor, scales: Tensor) -> Tensor:
    """What codes [..., K / (32 / bits), 4] stand for: fp32 [..., K].

    Args:
        scales: [..., K / group, 1 or 2], or [...] where all inputs share one.
    """
    if packed.bits == 4:
        codes = torch.stack([words & 15, words >> 4], dim=-2).flatten(-3)
    else:
        codes = words.unflatten(-1, (2, 2)).transpose(-1, -2).flatten(-3)[..., : packed.inputs]
    numbers, scales = codes.float() - packed.zero, scales.float()
    if not packed.group:
        return numbers * scales[..., None]
    scale, *offset = scales[..., None].unbind(-2)
    numbers = numbers.unflatten(-1, (-1, packed.group)) * scale
    if offset:
        numbers += offset[0] * scale if packed.scaled else offset[0]
    return numbers.flatten(-2)


def weight_rows(packed: PackedWeight, ids: Tensor) -> Tensor:
    """Rows ``ids`` [T] of a weight that is not gated: [T, K], of its dtype, or what codes stand for in fp32."""
    # [N / 32, K / pair, 32, pair] -> [T, K / pair, pair]
    words = packed.weight[ids // PANEL, :, ids % PANEL]
    if not packed.bits:
        return words.flatten(1)
    scales = packed.scales[ids // PANEL, ..., ids % PANEL]  # [N / 32, K / group, 1 or 2, 32] -> [T, K / group, 1 or 2]
    return _decoded(packed, words, scales)
