"""CUDA kernels compiled for the CPU at hand, with tests/cuda_emulator in place of a GPU."""

from __future__ import annotations

import hashlib
import os
from functools import cache
from pathlib import Path

import tvm_ffi

from megatron.dmc.kernels import build
from megatron.dmc.kernels.cuda import CudaKernels

EMULATOR = Path(__file__).resolve().parent.parent / "cuda_emulator"
FLAGS = ["-DDMC_EMULATED", f"-I{EMULATOR}", f"-I{build.SOURCES}"]
KERNEL_FLAGS = ["-std=gnu++17", "-O1", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-x", "c++"]


@cache
def kernels() -> CudaKernels:
    """Ops of the emulated library, which is built on first use and kept where the CPU kernels are kept."""
    digest = hashlib.sha256(repr((build.source_hash("cuda"), FLAGS, KERNEL_FLAGS)).encode())
    for path in sorted(EMULATOR.iterdir()):
        digest.update(path.read_bytes())
    target = build.cache_directory() / f"dmc_cuda-emulated-{digest.hexdigest()[:16]}.so"
    cxx = build.compiler().split()
    with build._making(target) as scratch:
        if scratch is not None:
            jobs = [build._launcher(cxx, build.CUDA_LAUNCHER, FLAGS, f"{scratch}/launch.o")]
            for source in (*(build.SOURCES / name for name in build.CUDA_SOURCES), EMULATOR / "emulator.cpp"):
                jobs.append([*cxx, *KERNEL_FLAGS, *FLAGS, "-c", str(source), "-o", f"{scratch}/{source.name}.o"])
            build._run_all(jobs)
            build._run([*cxx, "-shared", *(job[-1] for job in jobs), "-o", f"{scratch}/out.so"])
    os.environ.setdefault("DMC_EMULATOR_SEED", "1")
    return CudaKernels(tvm_ffi.load_module(str(target)))
