"""The CUDA kernels: the same functions as ``reference.py``, on torch's current stream. Built on first use, see
``build.py``.

Nothing here waits for the GPU, looks at the values of a tensor or allocates by them, so that a CUDA graph can capture
every call.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any, Optional

import torch
from torch import Tensor

from megatron.dmc.kernels import build, reference
from megatron.dmc.kernels.state import CacheState


class CudaKernels:
    """The ops of one library of kernels."""

    name = "cuda"

    def __init__(self, library: Any) -> None:
        names = ("append", "decode_attention", "prefill_attention", "fork_rows", "free_rows")
        self._append, self._decode, self._prefill, self._fork, self._free = (library[name] for name in names)
        self._norm, self._silu = library["add_rms_norm"], library["silu_and_mul"]
        self._append_bytes = library["append_bytes"]
        self._decode_bytes = lru_cache(maxsize=1024)(library["decode_bytes"])

    def append(
        self,
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
        q_rot = _like(q)
        shape = k.shape if partial else (0,)
        k_part, v_part = (torch.empty(shape, dtype=x.dtype, device=x.device) for x in (k, v))
        slot_index = torch.empty(shape[:2], dtype=torch.int32, device=k.device)
        scratch = _scratch(self._append_bytes(slots.numel(), q.size(0), k.size(1)), q.device)
        tensors = (q, k, v, cu_seqlens, slots, positions, inv_freq)
        outputs = (q_rot, k_part, v_part, slot_index)
        self._append(*state.tensors(), layer, *tensors, bias, epsilon, window or 0, compress, *outputs, scratch)
        return outputs

    def decode_attention(self, state: CacheState, layer: int, q_rot: Tensor, slots: Tensor, scale: float) -> Tensor:
        """See :func:`megatron.dmc.kernels.decode_attention`."""
        out, heads = _like(q_rot), state.lengths.size(2)
        size = self._decode_bytes(
            slots.numel(), heads, -(-q_rot.size(1) // heads), q_rot.size(2), q_rot.device.index or 0
        )
        self._decode(*state.tensors(), layer, q_rot, slots, scale, out, _scratch(size, q_rot.device))
        return out

    def prefill_attention(
        self,
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
        out = _like(q_rot)
        self._prefill(*state.tensors(), layer, q_rot, k_part, v_part, slot_index, cu_seqlens, slots, scale, out)
        return out

    def fork(self, state: CacheState, source: Tensor, target: Tensor) -> None:
        """See :func:`megatron.dmc.kernels.fork`."""
        self._fork(*state.tensors(), source, target)

    def free(self, state: CacheState, slots: Tensor) -> None:
        """See :func:`megatron.dmc.kernels.free`."""
        self._free(*state.tensors(), slots)

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """See :func:`megatron.dmc.kernels.rms_norm`."""
        if x.size(1) % 8:
            return reference.rms_norm(x, weight, epsilon)
        out, none = _like(x), x[:0]
        self._norm(x, none, weight, epsilon, none, out)
        return out

    def add_rms_norm(self, x: Tensor, delta: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """See :func:`megatron.dmc.kernels.add_rms_norm`."""
        if x.size(1) % 8:
            return reference.add_rms_norm(x, delta, weight, epsilon)
        total, out = _like(x), _like(x)
        self._norm(x, delta, weight, epsilon, total, out)
        return total, out

    def silu_and_mul(self, x: Tensor) -> Tensor:
        """See :func:`megatron.dmc.kernels.silu_and_mul`."""
        if x.size(1) % 16:
            return reference.silu_and_mul(x)
        out = torch.empty((x.size(0), x.size(1) // 2), dtype=x.dtype, device=x.device)
        self._silu(x, out)
        return out


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _scratch(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


def load() -> CudaKernels:
    """The kernels for the GPU that is current, built if need be.

    Raises:
        build.BuildError: there is no code for this GPU, no compiler, or it failed.
    """
    import tvm_ffi

    least = int(build.CUDA_ARCHITECTURES[0])
    major, minor = torch.cuda.get_device_capability()
    if 10 * major + minor < least:
        name = torch.cuda.get_device_name()
        raise build.BuildError(f"{name} is of sm_{major}{minor}; the CUDA kernels need sm_{least} (Ampere) or later")
    path = build.find_cuda_library()
    if path is None:
        names = " and ".join(f"sm_{arch}" for arch in build.CUDA_ARCHITECTURES)
        print(f"megatron.dmc: building the CUDA kernels for {names}, once, about a minute", file=sys.stderr, flush=True)
        path = build.build_cuda(build.cache_directory())
    return CudaKernels(tvm_ffi.load_module(str(path)))
