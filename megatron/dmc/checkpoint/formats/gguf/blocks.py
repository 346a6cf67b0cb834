"""Blocks of GGUF types as codes: those whose scales are for 32 inputs (ggml's ``block_q4_0`` to ``block_q5_K``).

The others (Q2_K, Q3_K, Q6_K, and the IQ types) have scales for 16 inputs or look numbers up in tables.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megatron.dmc.checkpoint.codes import Layout

Read = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Blocks uint8 [n, blocks, bytes] -> codes [n, blocks, inputs], scales or scales and offsets [n, blocks, groups, 1 or
2]."""


class BlockType(NamedTuple):
    """A GGUF type that consists of codes."""

    layout: Layout
    nbytes: int
    """Size of a block in the file, in bytes."""
    read: Read


def _halves(block: Tensor) -> Tensor:
    """Numbers of fp16: uint8 [..., 2 n] -> [..., n]."""
    return block.contiguous().view(torch.float16)


def _nibbles(block: Tensor) -> Tensor:
    """Codes of 4 bits, the lower ones of all bytes first: uint8 [..., n] -> [..., 2 n]."""
    return torch.cat([block & 15, block >> 4], dim=-1)


def _fifth_bits(block: Tensor) -> Tensor:
    """Bit i of 32 for input i, in the place of a code's fifth bit: uint8 [..., 4] -> [..., 32]."""
    bits = block[..., None] >> torch.arange(8, dtype=torch.uint8) & 1
    return bits.flatten(-2) << 4


def _q4(head: int) -> Read:
    return lambda block: (_nibbles(block[..., head:]), _halves(block[..., :head])[..., None, :])


def _q5(head: int) -> Read:
    def read(block: Tensor) -> tuple[Tensor, Tensor]:
        codes = _nibbles(block[..., head + 4 :]) | _fifth_bits(block[..., head : head + 4])
        return codes, _halves(block[..., :head])[..., None, :]

    return read


def _q8_0(block: Tensor) -> tuple[Tensor, Tensor]:
    return block[..., 2:] ^ 128, _halves(block[..., :2])[..., None, :]


def _k_scales(block: Tensor) -> Tensor:
    """Scales and offsets of the eight groups of 32 in a block of Q4_K or Q5_K: fp32 [..., 8, 2]. Each is a number of 6
    bits times one of the block, so fp16 does not hold it.
    """
    whole = _halves(block[..., :4]).float()
    first, second, third = block[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat([first & 63, third & 15 | first >> 6 << 4], dim=-1)
    offsets = torch.cat([second & 63, third >> 4 | second >> 6 << 4], dim=-1)
    return torch.stack([whole[..., :1] * scales, -whole[..., 1:] * offsets], dim=-1)


def _k_nibbles(block: Tensor) -> Tensor:
    """Codes of 4 bits, by 64 inputs: uint8 [..., 128] -> [..., 256]."""
    return _nibbles(block.unflatten(-1, (4, 32))).flatten(-2)


def _q4_k(block: Tensor) -> tuple[Tensor, Tensor]:
    return _k_nibbles(block[..., 16:]), _k_scales(block)


def _q5_k(block: Tensor) -> tuple[Tensor, Tensor]:
    # Bit g of byte i belongs to input i of group g.
    fifth = block[..., 16:48][..., None, :] >> torch.arange(8, dtype=torch.uint8)[:, None] & 1
    return _k_nibbles(block[..., 48:]) | fifth.flatten(-2) << 4, _k_scales(block)


def _kind(name: str, bits: int, zero: int, nbytes: int, read: Read) -> BlockType:
    return BlockType(Layout(f"GGUF {name}", bits, 32, zero), nbytes, read)


TYPES = {
    "Q4_0": _kind("Q4_0", 4, 8, 18, _q4(2)),
    "Q4_1": _kind("Q4_1", 4, 0, 20, _q4(4)),
    "Q4_K": _kind("Q4_K", 4, 0, 144, _q4_k),
    "Q5_0": _kind("Q5_0", 8, 16, 22, _q5(2)),
    "Q5_1": _kind("Q5_1", 8, 0, 24, _q5(4)),
    "Q5_K": _kind("Q5_K", 8, 0, 176, _q5_k),
    "Q8_0": _kind("Q8_0", 8, 128, 34, _q8_0),
}
"""Types by their names in ggml. Codes of 5 bits take 8."""
