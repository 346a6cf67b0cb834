"""C++ kernels for the CPU, built on first use: see ``build.py``."""

from __future__ import annotations

import sys
from functools import cache

import torch
import tvm_ffi

from megatron.dmc.kernels import build
from megatron.dmc.kernels.compiled import CompiledKernels


class CppKernels(CompiledKernels):
    """Ops of a library for CPUs."""

    name = "cpp"

    def threads(self) -> int:
        return torch.get_num_threads()


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
