"""C++ kernels for the CPU, built on first use: see ``build.py``."""

import sys
from functools import cache
from typing import Any

import torch
import tvm_ffi
from torch import Tensor

from megatron.dmc.kernels import build
from megatron.dmc.kernels.compiled import CompiledKernels
from megatron.dmc.kernels.params import BetweenAttention, PackedWeight


class CppKernels(CompiledKernels):
    """Ops of a library for CPUs."""

    name = "cpp"

    def __init__(self, library: Any) -> None:
        super().__init__(library)
        self._packed_linear = library["packed_linear"]
        self._bind_linear = library["bind_linear"]
        self._bind_between, self._between = library["bind_between"], library["between_attention"]

    def threads(self) -> int:
        return torch.get_num_threads()

    def packed_linear(self, x: Tensor, packed: PackedWeight) -> Tensor:
        """See :func:`megatron.dmc.kernels.packed_linear`."""
        out = x.new_empty((x.size(0), packed.outputs))
        self._packed_linear(x, *packed, out, self.threads())
        return out

    def between_attention(self, weights: BetweenAttention, mixed: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """See :func:`megatron.dmc.kernels.between_attention`."""
        bound = weights.bound.get(self)
        if bound is None:
            bound = weights.bound[self] = self._bound(weights)
        total, qkv = torch.empty_like(x), x.new_empty((x.size(0), weights.qkv.outputs))
        self._between(bound, mixed, x, total, qkv, self.threads())
        return total, qkv

    def _bound(self, w: BetweenAttention) -> bytes:
        bf16 = w.mlp_norm.dtype == torch.bfloat16
        out, gate_up, down, qkv = (self._bind_linear(*packed, bf16) for packed in (w.out, w.gate_up, w.down, w.qkv))
        return self._bind_between(out, w.mlp_norm, gate_up, down, w.next_norm, qkv, w.epsilon)


@cache
def load() -> CppKernels:
    """Load the kernels for this machine, and build them if need be.

    Raises:
        build.BuildError: there is no compiler, or it failed.
    """
    path = build.find_library()
    if path is None:
        name = build.best_instruction_set()
        print(
            f"megatron.dmc: building the CPU kernels for {name}, once, about half a minute", file=sys.stderr, flush=True
        )
        path = build.build_cpu([name], build.cache_directory())
    return CppKernels(tvm_ffi.load_module(str(path)))


def instruction_set() -> str:
    """Instruction set of the kernels that run on this CPU: amx, avx512bf16, avx512, avx2 or base."""
    return str(load().library["isa"]())
