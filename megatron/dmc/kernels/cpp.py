"""C++ kernels for the CPU, built on first use: see ``build.py``."""

import sys
from functools import cache
from typing import Any, Optional

import torch
import tvm_ffi
from torch import Tensor

from megatron.dmc.kernels import build
from megatron.dmc.kernels.compiled import CompiledKernels
from megatron.dmc.kernels.params import BetweenAttention


class CppKernels(CompiledKernels):
    """Ops of a library for CPUs."""

    name = "cpp"

    def __init__(self, library: Any) -> None:
        super().__init__(library)
        self._packed_linear = library["packed_linear"]
        self._bind_between, self._between = library["bind_between"], library["between_attention"]

    def threads(self) -> int:
        return torch.get_num_threads()

    def packed_linear(self, x: Tensor, weight: Tensor, bias: Optional[Tensor], outputs: int, gated: bool) -> Tensor:
        """See :func:`megatron.dmc.kernels.packed_linear`."""
        out = x.new_empty((x.size(0), outputs))
        self._packed_linear(x, weight, x.new_empty(0) if bias is None else bias, gated, out, self.threads())
        return out

    def between_attention(self, weights: BetweenAttention, mixed: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """See :func:`megatron.dmc.kernels.between_attention`."""
        bound = weights.bound.get(self)
        if bound is None:
            bound = weights.bound[self] = self._bound(weights)
        total, qkv = torch.empty_like(x), x.new_empty((x.size(0), weights.qkv_outputs))
        self._between(bound, mixed, x, total, qkv, self.threads())
        return total, qkv

    def _bound(self, w: BetweenAttention) -> bytes:
        none = w.out.new_empty(0)
        bias = none if w.qkv_bias is None else w.qkv_bias
        tensors = (w.out, w.mlp_norm, w.gate_up, w.down, w.next_norm, w.qkv, bias)
        return self._bind_between(*tensors, w.qkv_outputs, w.epsilon, none)


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
    """Instruction set of the kernels that run on this CPU: avx512bf16, avx512, avx2 or base."""
    return str(load().library["isa"]())
