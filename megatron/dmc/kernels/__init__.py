"""Kernels of the inference engine, over the compressed paged cache of ``state.py`` and over the rows between its linear
layers.

A step of the engine runs T tokens of N sequences, in order, flattened: sequence i has the tokens ``cu_seqlens[i]`` to
``cu_seqlens[i + 1]`` (one while it decodes, a chunk of its prompt in prefill), and its cache in row ``rows[i]`` of the
state. A row below 0 is padding: its tokens are ignored and its outputs are 0. Rows must be distinct. Hq query heads, H
KV heads, ``g = Hq / H`` of the former to one of the latter, L layers, D head dimension. Tensors may have any strides as
long as their last axis is contiguous.

Every op has one signature and three implementations: PyTorch (``reference.py``, which defines the results, for any
device), C++ for the CPU, and CUDA. The device chooses; :func:`use_backend`, or MEGATRON_DMC_KERNELS=reference in the
environment, forces the first. A plain model runs through the same ops: with ``compress=False`` every token opens a
slot, and no channel is taken out.

The CUDA ops run on torch's current stream and never wait for the GPU, so they look at no tensor's values and cannot
raise for them: rows that the cache does not have, and offsets that do not fit, are undefined behaviour. What the others
refuse with RuntimeError, they refuse on the device: a head that finds no free page, or no room in its row of the page
table, keeps its state (slots, ring, recent tokens, marks, length), and ``counters[REFUSED]`` grows, for the host to
read together with the lengths. Its tokens see only themselves in :func:`prefill_attention`, and only that state in
:func:`decode_attention`. Heads before it in the order (sequence, head), and heads that need no page, go on. A
:func:`fork` that does not fit, or whose target is not empty, writes nothing and counts once. An engine that admits
requests against the worst case never sees any of it.
"""

from torch import Tensor

from megatron.dmc.kernels import dispatch
from megatron.dmc.kernels.dispatch import active_backend, use_backend
from megatron.dmc.kernels.params import Appended, AppendParams, BetweenAttention, EvictParams, PackedWeight
from megatron.dmc.kernels.state import CacheState, make_state
from megatron.dmc.kernels.torch_ops import call


def append(state: CacheState, layer: int, params: AppendParams) -> Appended:
    """Decide, pool, rotate and write a step's tokens into the cache of one layer (arXiv 2403.09636, section 3).

    A token whose key neuron is above ``bias`` merges into its head's last slot, any other opens one, taking a page
    where the last is full. A slot is the mean of its last ``window`` tokens, weighted by sigmoid(mean of the group's
    query neurons + bias) + epsilon, before the rotation; its key is rotated at its newest token. Only the final state
    of every slot is written. Arithmetic in fp32, rounded once.

    Args:
        state: written in place.
        layer: 0 to L - 1.
        params: see :class:`AppendParams` for shapes and dtypes.

    Raises:
        RuntimeError: when more pages are needed than are free or than a row of the page table holds; nothing is
            written then (CUDA: see the package). The engine admits requests against a bound, so that this does not
            happen.
        ValueError: a tensor of the wrong shape, dtype or strides (C++, CUDA).
    """
    return Appended(*call("append", state.k_pages.device, state, layer, params))


def append_evicting(state: CacheState, layer: int, params: EvictParams) -> Appended:
    """Mark, rotate and write a step's tokens into the cache of one layer of a model that evicts (arXiv 2506.05345).

    Query t sees token j while ``t - j <= w``, and after that if j is not marked. So a token that leaves the window,
    when token j + w + 1 comes, moves from the recent pages to the head's next kept slot, or is given up. Pages are
    taken in the order (sequence, head), kept pages before recent ones, and those that have left the window are given
    back after all were taken, in the order (sequence, head, page): what they hold stays as it is until the next append
    of any layer, for :func:`prefill_attention` of this one. Tokens of a chunk that leave the window within it are never
    written to recent pages.

    Args:
        state: written in place; of ``make_state(evict_window=w)``.
        layer: 0 to L - 1.
        params: see :class:`EvictParams` for shapes and dtypes.

    Raises:
        RuntimeError: when more pages are needed than are free or than a row of the page table holds; nothing is
            written then (CUDA: see the package).
        ValueError: a tensor of the wrong shape, dtype or strides, or a cache of a model that does not evict.
    """
    return Appended(*call("append_evicting", state.k_pages.device, state, layer, params))


def decode_attention(state: CacheState, layer: int, q_rot: Tensor, rows: Tensor, scale: float) -> Tensor:
    """Attention of one query per sequence over all slots of its heads, ``softmax(scale * q K^T) V``; where the model
    evicts, over the kept slots and the latest w + 1 tokens.

    Args:
        q_rot: [N, Hq, D], of :func:`append` or :func:`append_evicting`.
        rows: int32 [N].
        scale: 1 / sqrt(D) for the usual attention.

    Returns:
        [N, Hq, D] in q's dtype; 0 for a head without slots.

    Raises:
        ValueError: a tensor of the wrong shape, dtype or strides (C++, CUDA).
    """
    return call("decode_attention", state.k_pages.device, state, layer, q_rot, rows, float(scale))


def prefill_attention(
    state: CacheState, layer: int, appended: Appended, cu_seqlens: Tensor, rows: Tensor, scale: float
) -> Tensor:
    """Attention of a step's tokens after :func:`append`: token t sees the slots [0, slot_index[t]), final by now, and
    the state of its own slot as it was right after t. Where the model evicts, the kept slots [0, slot_index[t]) and
    tokens t - w to t.

    The result is that of feeding tokens one by one; the work is less by the compression ratio.

    Args:
        appended: of :func:`append` or :func:`append_evicting`, with ``partial``; or the part of it that belongs to some
            sequences. Nothing may have been appended since.
        cu_seqlens: int32 [N + 1], offsets of these sequences.
        rows: int32 [N].
        scale: 1 / sqrt(D) for the usual attention.

    Returns:
        [T, Hq, D] in q's dtype.

    Raises:
        ValueError: a tensor of the wrong shape, dtype or strides (C++, CUDA).
    """
    return call("prefill_attention", state.k_pages.device, state, layer, appended, cu_seqlens, rows, float(scale))


def fork(state: CacheState, source: Tensor, target: Tensor) -> None:
    """Make the row ``target[i]`` a copy of the row ``source[i]``; either is written on its own from then on.

    Pages that can no longer be written are shared. The page of a head with a slot that may still be written (a
    compressing model's last slot; the next slot of a plain model whose last page is not full; the next of each kind for
    a model that evicts) is copied into a page that is taken in the order (pair, layer, head, kept before recent).
    Length, open segment, ring and marks are copied.

    Args:
        source: int32 [n], may name a row several times.
        target: int32 [n], distinct empty rows that are no sources. A pair with a row below 0 is ignored.

    Raises:
        RuntimeError: when more pages are needed than are free; nothing is written then.
        ValueError: a target that is not empty, there twice or a source (on the CPU).
    """
    call("fork", state.k_pages.device, state, source, target)


def free(state: CacheState, rows: Tensor) -> None:
    """Empty rows of the cache. Pages that no row holds any more become free, in the order (row as given, layer, head,
    page; kept before recent) of the last row that held them.

    Args:
        rows: int32 [any], distinct; below 0: ignored.
    """
    call("free", state.k_pages.device, state, rows)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """``x / sqrt(mean(x^2) + epsilon) * weight`` of every row (arXiv 1910.07467), in fp32, rounded before and after the
    product with the weight.

    Args:
        x: [T, h], contiguous.
        weight: [h], in x's dtype.

    Returns:
        [T, h] in x's dtype.
    """
    return call("rms_norm", x.device, x, weight, float(epsilon))


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """``x + delta``, and its :func:`rms_norm`, in one pass: the residual stream between two layers.

    Args:
        x, delta: [T, h], contiguous.
        weight: [h], in x's dtype.

    Returns:
        (sum, norm), each [T, h] in x's dtype.
    """
    return call("add_rms_norm", x.device, x, delta, weight, float(epsilon))


def silu_and_mul(x: Tensor) -> Tensor:
    """``silu(gates) * ups`` of rows ``[gates, ups]`` (SwiGLU, arXiv 2002.05202): [T, 2 F], contiguous -> [T, F]."""
    return call("silu_and_mul", x.device, x)


def packed_linear(x: Tensor, packed: PackedWeight) -> Tensor:
    """Linear layer on a CPU: ``x W^T + b``, or of a gated layer ``silu(x G^T) * (x U^T)``, rounded where the separate
    steps round.

    Rows are rounded before they meet codes, each group of inputs by itself: to the nearest multiple of its largest
    magnitude / 127 for codes of 4 bits, / 32,767 for those of 8. A group is that of the weight's scales, or 32 inputs
    where the weight has a scale for each output. Products of a group are sums of integers.

    Args:
        x: [T, K] of fp32 or bf16, contiguous; of the weight's dtype, unless that is of codes.

    Returns:
        [T, outputs], contiguous.
    """
    return dispatch.call("packed_linear", x.device.type, x, packed)


def between_attention(weights: BetweenAttention, mixed: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """All that lies between the attention of one layer and that of the next, on a CPU, in one call: output projection,
    residual sum and norm, MLP, residual sum and the next layer's norm and projection. Results are those of
    :func:`packed_linear` and :func:`add_rms_norm`; a step of few tokens saves what nine calls cost.

    Args:
        mixed: [T, Hq D], what attention returns, contiguous.
        x: [T, h], the residual stream before it, contiguous.

    Returns:
        The residual stream after the MLP [T, h], and the next layer's queries, keys and values [T, (Hq + 2 H) D].
    """
    return dispatch.call("between_attention", x.device.type, weights, mixed, x)
