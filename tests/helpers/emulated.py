"""Kernels for hardware that is not there, compiled for the CPU at hand: CUDA kernels with tests/cuda_emulator in place
of a GPU, and those for AMX with tests/amx_emulator in place of the CPU's tiles.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import tvm_ffi

from megatron.dmc.kernels import build
from megatron.dmc.kernels.cpp import CppKernels
from megatron.dmc.kernels.cuda import CudaKernels

TESTS = Path(__file__).resolve().parent.parent
EMULATOR = TESTS / "cuda_emulator"
FLAGS = ["-DDMC_EMULATED", f"-I{EMULATOR}", f"-I{build.SOURCES}"]
KERNEL_FLAGS = ["-std=gnu++17", "-O1", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-x", "c++"]

AMX_EMULATOR = TESTS / "amx_emulator"
AMX_LAUNCHER_FLAGS = ["-DDMC_EMULATED", "-DDMC_WITH_amx"]
AMX_EMULATOR_FLAGS = ["-std=gnu++17", "-O3", "-mavx512f", "-mfma", "-ffp-contract=off", "-fPIC", "-Wall", "-Wextra"]
AS_BUILT = (
    "cpu_prefill.cpp"  # the kernels that use tiles are tested as users have them, the others need no optimization
)


def _built(name: str, digest: str, emulator: Path, jobs: Callable[[list[str], str], list[list[str]]]) -> Path:
    """Library of the jobs that ``jobs(compiler, scratch)`` lists, built on first use and kept where the CPU kernels are
    kept.
    """
    text = hashlib.sha256(digest.encode())
    for path in sorted(emulator.iterdir()):
        text.update(path.read_bytes())
    target = build.cache_directory() / f"{name}-{text.hexdigest()[:16]}.so"
    cxx = build.compiler().split()
    with build._making(target) as scratch:
        if scratch is not None:
            made = jobs(cxx, scratch)
            build._run_all(made)
            build._run([*cxx, "-shared", "-fopenmp", *(job[-1] for job in made), "-o", f"{scratch}/out.so"])
    return target


@cache
def kernels() -> CudaKernels:
    """Ops of the emulated CUDA library."""

    def jobs(cxx: list[str], scratch: str) -> list[list[str]]:
        sources = (*(build.SOURCES / name for name in build.CUDA_SOURCES), EMULATOR / "emulator.cpp")
        return [
            build._launcher(cxx, build.CUDA_LAUNCHER, FLAGS, f"{scratch}/launch.o"),
            *([*cxx, *KERNEL_FLAGS, *FLAGS, "-c", str(x), "-o", f"{scratch}/{x.name}.o"] for x in sources),
        ]

    digest = repr((build.source_hash("cuda"), FLAGS, KERNEL_FLAGS))
    os.environ.setdefault("DMC_EMULATOR_SEED", "1")
    return CudaKernels(tvm_ffi.load_module(str(_built("dmc_cuda-emulated", digest, EMULATOR, jobs))))


def runs_avx512() -> bool:
    """True on a CPU that runs the kernels for AMX but for their tiles."""
    return "avx512bf16" in build.usable_instruction_sets()


@cache
def amx_library() -> Path:
    """Library for AMX alone, with the emulator of its instructions."""

    def jobs(cxx: list[str], scratch: str) -> list[list[str]]:
        flags = [*build.FLAGS, *build.X86["amx"].flags, "-DDMC_ISA(x)=dmc_##x##_amx"]
        made = [build._launcher(cxx, build.CPU_LAUNCHER, AMX_LAUNCHER_FLAGS, f"{scratch}/launch.o")]
        for name in build.CPU_SOURCES:
            level = [] if name == AS_BUILT else ["-O0"]
            made.append([*cxx, *flags, *level, "-c", str(build.SOURCES / name), "-o", f"{scratch}/{name}.o"])
        emulator = str(AMX_EMULATOR / "emulator.cpp")
        made.append([*cxx, *AMX_EMULATOR_FLAGS, "-c", emulator, "-o", f"{scratch}/emulator.o"])
        return made

    digest = repr((build.source_hash(), AMX_LAUNCHER_FLAGS, AMX_EMULATOR_FLAGS))
    return _built("dmc_cpu-amx-emulated", digest, AMX_EMULATOR, jobs)


@cache
def amx_kernels() -> CppKernels:
    """Ops of :func:`amx_library`."""
    return CppKernels(tvm_ffi.load_module(str(amx_library())))


def amx_counters() -> tuple[int, int]:
    """Products of tiles that the emulator has done, and threads whose tiles are configured now."""
    library = ctypes.CDLL(str(amx_library()))
    functions = (library.amx_products, library.amx_configured)
    for function in functions:
        function.restype = ctypes.c_int64
    return tuple(function() for function in functions)
