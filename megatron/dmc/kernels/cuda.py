"""CUDA kernels, on torch's current stream, built on first use: see ``build.py``.

Nothing here waits for the GPU, looks at the values of a tensor or allocates by them, so that a CUDA graph can capture
every call.
"""

import sys
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from megatron.dmc.kernels import build, reference
from megatron.dmc.kernels.compiled import CompiledKernels
from megatron.dmc.kernels.params import AppendParams, EvictParams
from megatron.dmc.kernels.state import CacheState


class CudaKernels(CompiledKernels):
    """Ops of a library for GPUs."""

    name = "cuda"

    def __init__(self, library: Any) -> None:
        super().__init__(library)
        self._append_bytes = library["append_bytes"]
        self._evict_bytes = library["evict_bytes"]
        self._decode_bytes = lru_cache(maxsize=1024)(library["decode_bytes"])

    def append_scratch(self, params: AppendParams) -> Tensor:
        size = self._append_bytes(params.rows.numel(), params.q.size(0), params.k.size(1))
        return params.q.new_empty(size, dtype=torch.uint8)

    def evict_scratch(self, state: CacheState, params: EvictParams) -> Tensor:
        size = self._evict_bytes(params.rows.numel(), params.q.size(0), *state.recent_table.shape[2:])
        return params.q.new_empty(size, dtype=torch.uint8)

    def decode_scratch(self, state: CacheState, q_rot: Tensor) -> Tensor:
        n, query_heads, head_dim = q_rot.shape
        heads = state.lengths.size(2)
        size = self._decode_bytes(n, heads, -(-query_heads // heads), head_dim, q_rot.device.index or 0)
        return q_rot.new_empty(size, dtype=torch.uint8)

    # The kernels read 16 bytes at a time, so rows must be multiples of 8 elements.

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        return (reference if x.size(1) % 8 else super()).rms_norm(x, weight, epsilon)

    def add_rms_norm(self, x: Tensor, delta: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        return (reference if x.size(1) % 8 else super()).add_rms_norm(x, delta, weight, epsilon)

    def silu_and_mul(self, x: Tensor) -> Tensor:
        return (reference if x.size(1) % 16 else super()).silu_and_mul(x)


def load() -> CudaKernels:
    """Load the kernels for the GPU that is current, and build them if need be.

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
        print(f"megatron.dmc: building the CUDA kernels for {names}, once, a few minutes", file=sys.stderr, flush=True)
        path = build.build_cuda(build.cache_directory())
    return CudaKernels(tvm_ffi.load_module(str(path)))
