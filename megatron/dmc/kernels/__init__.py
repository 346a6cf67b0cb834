"""Kernels of the inference engine over the compressed paged cache of ``state.py``, and of the rows between its linear
layers.

A step of the engine runs T tokens of N sequences, in order, flattened: sequence i has the tokens ``cu_seqlens[i]`` to
``cu_seqlens[i + 1]`` (one while it decodes, a chunk of its prompt before), and its cache in row ``slots[i]`` of the
state. A row below 0 is padding: its tokens are ignored and its outputs are 0. Rows must be distinct. Hq query heads, H
KV heads, ``g = Hq / H`` of the former to one of the latter, L layers, D head dimension. Tensors may have any strides as
long as their last axis is contiguous.

Every op has one signature and three implementations: PyTorch (``reference.py``, the truth, for any device), C++ for the
CPU, and CUDA. The device chooses; :func:`use_backend`, or MEGATRON_DMC_KERNELS=reference in the environment, forces the
first. A plain model runs through the same ops: ``compress=False`` makes every token append, and no channel is taken
out.

The CUDA ops run on torch's current stream and never wait for the GPU, so they look at no tensor's values and cannot
raise for them: rows that the cache does not have, and offsets that do not fit, are the caller's fault and undefined.
What the others refuse with RuntimeError, they refuse on the device: a head that finds no free page, or no room in its
row of the table, keeps its state (slots, ring, length), its tokens see themselves only, and ``counters[REFUSED]``
grows, for the host to read with the lengths that it reads anyway. Heads before it in the order (sequence, head), and
heads that want no page, go on. A :func:`fork` that does not fit, or whose target is not empty, writes nothing and
counts once. An engine that admits work against the worst case never sees any of it.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

from torch import Tensor

from megatron.dmc.kernels.dispatch import active_backend, use_backend
from megatron.dmc.kernels.state import CacheState, make_state
from megatron.dmc.kernels.torch_ops import call, call_rowwise


class Appended(NamedTuple):
    """What attention needs of a step's tokens."""

    q_rot: Tensor
    """[T, Hq, D], rotated queries, neuron out."""
    k_part: Tensor
    v_part: Tensor
    """[T, H, D], the state of each token's slot right after it, rotated at the token; empty without ``partial``."""
    slot_index: Tensor
    """int32 [T, H], the slot that each token went to; empty without ``partial``."""


def append(
    state: CacheState,
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    slots: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    *,
    bias: float,
    epsilon: float,
    window: Optional[int],
    compress: bool = True,
    partial: bool = True,
) -> Appended:
    """Decide, pool, rotate and write a step's tokens into the cache of one layer (arXiv 2403.09636, section 3).

    A token whose key neuron is above ``bias`` joins its head's last slot, any other opens one, taking a page where the
    last is full. A slot is the mean of its last ``window`` tokens, weighted by sigmoid(mean of the group's query
    neurons + bias) + epsilon, before the rotation; its key is rotated at its newest token. Only the final state of
    every slot is written. Arithmetic in fp32, rounded once.

    Args:
        q: [T, Hq, D]; k, v: [T, H, D], un-rotated, in the dtype of the cache.
        cu_seqlens: int32 [N + 1]; slots: int32 [N]; positions: int32 [T]; inv_freq: fp32 [D / 2].
        window: W, or None for the whole segment.
        partial: False leaves out what only :func:`prefill_attention` needs.

    Raises:
        RuntimeError: when more pages are wanted than are free or than a row of the table holds; nothing is
            written then (CUDA: see above). The engine admits work against a bound, so that this does not happen.
        ValueError: a tensor of the wrong shape, dtype or strides (C++, CUDA).
    """
    arguments = (
        q,
        k,
        v,
        cu_seqlens,
        slots,
        positions,
        inv_freq,
        float(bias),
        float(epsilon),
        window,
        compress,
        partial,
    )
    return Appended(*call("append", state, layer, *arguments))


def decode_attention(state: CacheState, layer: int, q_rot: Tensor, slots: Tensor, scale: float) -> Tensor:
    """Attention of one query per sequence over all slots of its heads, ``softmax(scale * q K^T) V``.

    Args:
        q_rot: [N, Hq, D], of :func:`append`. slots: int32 [N].

    Returns:
        [N, Hq, D] in q's dtype; 0 for a head without slots.
    """
    return call("decode_attention", state, layer, q_rot, slots, float(scale))


def prefill_attention(
    state: CacheState,
    layer: int,
    q_rot: Tensor,
    k_part: Tensor,
    v_part: Tensor,
    slot_index: Tensor,
    cu_seqlens: Tensor,
    slots: Tensor,
    scale: float,
) -> Tensor:
    """Attention of a step's tokens after :func:`append`: token t sees the slots [0, slot_index[t]), final by now, and
    the state of its own slot as it was right after t. The same as feeding tokens one by one, and cheaper by the
    compression ratio.

    Args:
        q_rot, k_part, v_part, slot_index: of :func:`append`. cu_seqlens, slots: those given to it.

    Returns:
        [T, Hq, D] in q's dtype.
    """
    return call("prefill_attention", state, layer, q_rot, k_part, v_part, slot_index, cu_seqlens, slots, float(scale))


def fork(state: CacheState, source: Tensor, target: Tensor) -> None:
    """Make the row ``target[i]`` a copy of the row ``source[i]``: both go on from there, each for itself.

    Pages that can no longer be written are shared. The page of a head with a slot that may still be written (a
    compressing model's last slot; the next slot of a plain model whose last page is not full) is copied into a page
    that is taken in the order (pair, layer, head). Length, open segment and ring are copied.

    Args:
        source: int32 [n], may name a row several times. target: int32 [n], distinct empty rows that are no sources. A
            pair with a row below 0 is ignored.

    Raises:
        RuntimeError: when more pages are wanted than are free; nothing is written then.
        ValueError: a target that is not empty, there twice or a source (on the CPU).
    """
    call("fork", state, source, target)


def free(state: CacheState, slots: Tensor) -> None:
    """Empty the rows ``slots`` (int32 [any], distinct; below 0: ignored). Pages that no row holds any more are free, in
    the order (row as given, layer, head, page) of the last row that held them.
    """
    call("free", state, slots)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """``x / sqrt(mean(x^2) + epsilon) * weight`` of every row (arXiv 1910.07467), in fp32, rounded before the weight
    and after it.

    Args:
        x: [T, h], contiguous; weight: [h], in x's dtype.
    """
    return call_rowwise("rms_norm", x, weight, float(epsilon))


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """``x + delta``, and its :func:`rms_norm`, in one pass: the residual stream between two layers.

    Args:
        x, delta: [T, h], contiguous; weight: [h], in x's dtype.
    """
    return call_rowwise("add_rms_norm", x, delta, weight, float(epsilon))


def silu_and_mul(x: Tensor) -> Tensor:
    """``silu(gates) * ups`` of rows ``[gates, ups]`` (SwiGLU, arXiv 2002.05202): [T, 2 F], contiguous -> [T, F]."""
    return call_rowwise("silu_and_mul", x)


__all__ = [
    "Appended",
    "CacheState",
    "active_backend",
    "add_rms_norm",
    "append",
    "decode_attention",
    "fork",
    "free",
    "make_state",
    "prefill_attention",
    "rms_norm",
    "silu_and_mul",
    "use_backend",
]
