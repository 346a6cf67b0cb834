"""Weights of linear layers in panels, the form that the C++ kernel for CPUs (``csrc/cpu_linear.cpp``) reads."""

import torch.nn.functional as F
from torch import Tensor

from megatron.dmc.kernels.cpu_tuning import empty_in_huge_pages

PANEL = 32
"""Outputs of a panel."""


def pack_weight(weight: Tensor, gated: bool = False) -> Tensor:
    """Weight [N, K] of fp32 or bf16 in the panels that :func:`packed_linear` reads: [N / 32, K / pair, 32, pair], where
    a pair is two numbers of bf16 or one of fp32, and N is filled up with zeros. gated: the first half of the outputs
    are gates of the second; every panel has 16 of each, and N / 2 is filled up to a multiple of 16.

    Raises:
        ValueError: an odd K in bf16.
    """
    pair = 4 // weight.element_size()
    if weight.size(1) % pair:
        raise ValueError(f"a weight of {tuple(weight.shape)} in {weight.dtype} has no pairs of inputs")
    parts = [
        F.pad(part, (0, 0, 0, -part.size(0) % each)).unflatten(0, (-1, each))
        for part, each in ([(half, PANEL // 2) for half in weight.chunk(2)] if gated else [(weight, PANEL)])
    ]
    count, inputs = parts[0].size(0), weight.size(1)
    panels = empty_in_huge_pages((count, inputs // pair, PANEL, pair), weight.dtype, weight.device)
    offset = 0
    for part in parts:
        # [N / each, each, K] -> [N / each, K / pair, each, pair]
        panels[:, :, offset : offset + part.size(1)].copy_(part.unflatten(2, (-1, pair)).transpose(1, 2))
        offset += part.size(1)
    return panels


def unpack_weight(panels: Tensor) -> Tensor:
    """Weight [N, K], N rounded up to whole panels, of panels that are not gated."""
    # [N / 32, K / pair, 32, pair] -> [N / 32, 32, K]
    return panels.transpose(1, 2).flatten(2).flatten(0, 1)


def weight_rows(panels: Tensor, ids: Tensor) -> Tensor:
    """Rows ``ids`` [T] of a weight in panels: [T, K]."""
    # [N / 32, K / pair, 32, pair] -> [T, K / pair, pair]
    return panels[ids // PANEL, :, ids % PANEL].flatten(1)
