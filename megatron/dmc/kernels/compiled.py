"""Ops of a compiled library, for any device: they allocate the outputs, which the library checks and fills."""

from typing import Any, Optional

import torch
from torch import Tensor

from megatron.dmc.kernels.params import Appended, AppendParams, EvictParams
from megatron.dmc.kernels.state import CacheState


class CompiledKernels:
    """The functions of ``reference.py``, by the exported functions of ``csrc/launch.h``."""

    name: str

    def __init__(self, library: Any) -> None:
        self.library = library
        self._bind = library["bind"]
        self._append, self._append_evicting = library["append"], library["append_evicting"]
        self._fork, self._free = library["fork_rows"], library["free_rows"]
        self._decode, self._prefill = library["decode_attention"], library["prefill_attention"]
        self._norm, self._silu = library["add_rms_norm"], library["silu_and_mul"]

    def threads(self) -> int:
        """CPU threads of a call."""
        return 1

    def append_scratch(self, params: AppendParams) -> Optional[Tensor]:
        """Device memory that :meth:`append` works in, or None."""
        return None

    def evict_scratch(self, state: CacheState, params: EvictParams) -> Optional[Tensor]:
        """Device memory that :meth:`append_evicting` works in, or None."""
        return None

    def decode_scratch(self, state: CacheState, q_rot: Tensor) -> Optional[Tensor]:
        """Device memory that :meth:`decode_attention` works in, or None."""
        return None

    def _cache(self, state: CacheState) -> bytes:
        """The state as the library takes it: checked and converted in the first call, which takes as long as an op."""
        cache = state.bound.get(self)
        if cache is None:
            cache = state.bound[self] = self._bind(*state.tensors())
        return cache

    def append(self, state: CacheState, layer: int, params: AppendParams) -> Appended:
        """See :func:`megatron.dmc.kernels.append`."""
        out = _outputs(params)
        self._append(self._cache(state), layer, *params, *out, self.append_scratch(params), self.threads())
        return out

    def append_evicting(self, state: CacheState, layer: int, params: EvictParams) -> Appended:
        """See :func:`megatron.dmc.kernels.append_evicting`."""
        out = _outputs(params, state)
        scratch = self.evict_scratch(state, params)
        self._append_evicting(self._cache(state), layer, *params, *out, scratch, self.threads())
        return out

    def decode_attention(self, state: CacheState, layer: int, q_rot: Tensor, rows: Tensor, scale: float) -> Tensor:
        """See :func:`megatron.dmc.kernels.decode_attention`."""
        out, scratch = _like(q_rot), self.decode_scratch(state, q_rot)
        self._decode(self._cache(state), layer, q_rot, rows, scale, out, scratch, self.threads())
        return out

    def prefill_attention(
        self, state: CacheState, layer: int, appended: Appended, cu_seqlens: Tensor, rows: Tensor, scale: float
    ) -> Tensor:
        """See :func:`megatron.dmc.kernels.prefill_attention`."""
        out = _like(appended.q_rot)
        self._prefill(self._cache(state), layer, *appended, cu_seqlens, rows, scale, out, self.threads())
        return out

    def fork(self, state: CacheState, source: Tensor, target: Tensor) -> None:
        """See :func:`megatron.dmc.kernels.fork`."""
        self._fork(self._cache(state), source, target)

    def free(self, state: CacheState, rows: Tensor) -> None:
        """See :func:`megatron.dmc.kernels.free`."""
        self._free(self._cache(state), rows)

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """See :func:`megatron.dmc.kernels.rms_norm`."""
        out, none = _like(x), x[:0]
        self._norm(x, none, weight, epsilon, none, out, self.threads())
        return out

    def add_rms_norm(self, x: Tensor, delta: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """See :func:`megatron.dmc.kernels.add_rms_norm`."""
        total, out = _like(x), _like(x)
        self._norm(x, delta, weight, epsilon, total, out, self.threads())
        return total, out

    def silu_and_mul(self, x: Tensor) -> Tensor:
        """See :func:`megatron.dmc.kernels.silu_and_mul`."""
        out = x.new_empty((x.size(0), x.size(1) // 2))
        self._silu(x, out, self.threads())
        return out


def _outputs(params: AppendParams | EvictParams, evicts: Optional[CacheState] = None) -> Appended:
    """Uninitialised outputs of an append. evicts: the state, where the model evicts."""
    q, k, v = params[:3]
    if params.partial:
        recent = (0,) if evicts is None else (params.rows.numel(), *evicts.recent_table.shape[2:])
        index, before = (k.new_empty(shape, dtype=torch.int32) for shape in (k.shape[:2], recent))
        return Appended(_like(q), _like(k), _like(v), index, before)
    index, before = (k.new_empty(0, dtype=torch.int32) for _ in range(2))
    return Appended(_like(q), k.new_empty(0), v.new_empty(0), index, before)


def _like(x: Tensor) -> Tensor:
    """Uninitialised tensor of x's shape, dtype and device, contiguous."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)
