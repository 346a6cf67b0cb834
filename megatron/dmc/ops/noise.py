"""Decision noise that is the same in every parallel layout of a run.

The noise of a token's decision is a function of (seed, step, sample, layer, head, position) and of nothing else: no
generator state, so tensor, pipeline and data parallelism, micro-batch size, recomputation and resuming cannot change
it, and each rank computes just the heads that it owns.
"""

import torch
from torch import Tensor

# splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"), as signed 64-bit integers.
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX2 = 0x94D049BB133111EB - (1 << 64)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """Finalizer of splitmix64, elementwise on int64 [...]; multiplication wraps."""
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


def _absorb(state: Tensor, word: Tensor | int) -> Tensor:
    return _mix(state + _GAMMA + word)


def _logistic(bits: Tensor) -> Tensor:
    """Logistic(0, 1) in fp32 from int64 random bits, log(u / (1 - u)): symmetric, finite for all bits."""
    # The upper 23 bits plus one half, out of 2^23: both numbers are exact in fp32, and neither is ever 0.
    n = _shift(bits, 41).float() + 0.5
    return (n / (2.0**23 - n)).log()


def logistic_noise(sample_ids: Tensor, heads: range, length: int, *, seed: int, step: int, layer: int) -> Tensor:
    """Logistic(0, 1) noise, the law of the difference of two Gumbel(0, 1), for the heads of one layer.

    Args:
        sample_ids: int64 [b], global index of each sequence (its place in the stream of training samples).
        heads: global indices of the KV heads wanted, of any contiguous range.
        length: s, tokens per sequence.
        seed: of the run.
        step: optimizer step.
        layer: global layer number.

    Returns:
        fp32 [b, len(heads), s] on the device of ``sample_ids``.
    """
    device = sample_ids.device
    head = torch.arange(heads.start, heads.stop, device=device)
    position = torch.arange(length, device=device)
    state = torch.zeros((), dtype=torch.int64, device=device)
    for word in (seed, step, layer):
        state = _absorb(state, word)
    state = _absorb(state, sample_ids)[:, None]  # [b, 1]
    state = _absorb(state, head)[:, :, None]  # [b, h, 1]
    bits = _absorb(state, position)  # [b, h, s]
    return _logistic(bits)
