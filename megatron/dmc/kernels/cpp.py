"""The C++ kernels for the CPU: the same functions as ``reference.py``. Built on first use, see ``build.py``.

Importing this module loads, and if need be builds, the library.
"""

from __future__ import annotations

import sys
from typing import Optional

import torch
import tvm_ffi
from torch import Tensor

from megatron.dmc.kernels import build
from megatron.dmc.kernels.state import CacheState


def _load():
    path = build.find_library()
    if path is None:
        name = build.best_instruction_set()
        print(
            f"megatron.dmc: building the CPU kernels for {name}, once, about half a minute", file=sys.stderr, flush=True
        )
        path = build.build_cpu([name], build.cache_directory())
    return tvm_ffi.load_module(str(path))


_library = _load()
_append, _decode, _prefill, _fork, _free, _norm, _silu = (
    _library[name]
    for name in (
        "append",
        "decode_attention",
        "prefill_attention",
        "fork_rows",
        "free_rows",
        "add_rms_norm",
        "silu_and_mul",
    )
)


def instruction_set() -> str:
    """The build that this CPU runs: avx512bf16, avx512, avx2 or base."""
    return str(_library["isa"]())


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
    bias: float,
    epsilon: float,
    window: Optional[int],
    compress: bool,
    partial: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`megatron.dmc.kernels.append`."""
    q_rot = torch.empty(q.shape, dtype=q.dtype)
    shape = k.shape if partial else (0,)
    k_part, v_part = torch.empty(shape, dtype=k.dtype), torch.empty(shape, dtype=v.dtype)
    slot_index = torch.empty(shape[:2], dtype=torch.int32)
    tensors = (q, k, v, cu_seqlens, slots, positions, inv_freq)
    options = (bias, epsilon, window or 0, compress)
    outputs = (q_rot, k_part, v_part, slot_index)
    _append(*state.tensors(), layer, *tensors, *options, *outputs, torch.get_num_threads())
    return outputs


def decode_attention(state: CacheState, layer: int, q_rot: Tensor, slots: Tensor, scale: float) -> Tensor:
    """See :func:`megatron.dmc.kernels.decode_attention`."""
    out = torch.empty(q_rot.shape, dtype=q_rot.dtype)
    _decode(*state.tensors(), layer, q_rot, slots, scale, out, torch.get_num_threads())
    return out


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
    """See :func:`megatron.dmc.kernels.prefill_attention`."""
    out = torch.empty(q_rot.shape, dtype=q_rot.dtype)
    tensors = (q_rot, k_part, v_part, slot_index, cu_seqlens, slots)
    _prefill(*state.tensors(), layer, *tensors, scale, out, torch.get_num_threads())
    return out


def fork(state: CacheState, source: Tensor, target: Tensor) -> None:
    """See :func:`megatron.dmc.kernels.fork`."""
    _fork(*state.tensors(), source, target)


def free(state: CacheState, slots: Tensor) -> None:
    """See :func:`megatron.dmc.kernels.free`."""
    _free(*state.tensors(), slots)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """See :func:`megatron.dmc.kernels.rms_norm`."""
    out, none = torch.empty_like(x), x[:0]
    _norm(x, none, weight, epsilon, none, out, torch.get_num_threads())
    return out


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """See :func:`megatron.dmc.kernels.add_rms_norm`."""
    total, out = torch.empty_like(x), torch.empty_like(x)
    _norm(x, delta, weight, epsilon, total, out, torch.get_num_threads())
    return total, out


def silu_and_mul(x: Tensor) -> Tensor:
    """See :func:`megatron.dmc.kernels.silu_and_mul`."""
    out = torch.empty((x.size(0), x.size(1) // 2), dtype=x.dtype)
    _silu(x, out, torch.get_num_threads())
    return out
