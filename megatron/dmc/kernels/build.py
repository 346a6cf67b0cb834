"""Builds of the compiled kernels: on first use for the machine at hand, and ahead of time by ``dmc build``.

A library goes to the user's cache ($XDG_CACHE_HOME or ~/.cache, megatron-dmc/kernels), or beside the sources, which is
what an image for many users and machines wants. Its name holds a hash of the sources, the flags and the version of
apache-tvm-ffi: one that is out of date is never loaded.
"""

import fcntl
import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

from megatron.dmc.kernels.cpu_tuning import cpu_info, is_intel, may_use_tiles

SOURCES = Path(__file__).resolve().parent / "csrc"
PACKAGED = Path(__file__).resolve().parent / "lib"
CPU_LAUNCHER, CUDA_LAUNCHER = "cpu_launch.cpp", "cuda_launch.cpp"
CPU_SOURCES = sorted({path.name for path in SOURCES.glob("cpu_*.cpp")} - {CPU_LAUNCHER})
CUDA_SOURCES = sorted(path.name for path in SOURCES.glob("cuda_*.cu"))

# No errno and no trapping: both keep loops from becoming vectors. Nothing that changes results: no -ffast-math.
FLAGS = tuple(
    "-std=gnu++17 -O3 -fPIC -fopenmp -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wno-psabi".split()
)


class InstructionSet(NamedTuple):
    """Kind of CPU that the kernels are compiled for."""

    flags: tuple[str, ...]
    """Flags of the compiler."""
    needs: frozenset[str]
    """Flags in /proc/cpuinfo of the CPUs that run it."""


_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *_AVX2)
_AVX512_CPU = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})
_BF16 = (*_AVX512, "-mavx512bf16", "-mavx512vnni")
_BF16_CPU = _AVX512_CPU | {"avx512_bf16", "avx512_vnni"}
X86 = {  # best first
    "amx": InstructionSet((*_BF16, "-mamx-tile", "-mamx-bf16"), _BF16_CPU | {"amx_tile", "amx_bf16"}),
    "avx512bf16": InstructionSet(_BF16, _BF16_CPU),
    "avx512": InstructionSet(_AVX512, _AVX512_CPU),
    "avx2": InstructionSet(_AVX2, frozenset({"avx2", "fma", "f16c"})),
    "base": InstructionSet((), frozenset()),
}
CUDA_ARCHITECTURES = ("80", "90")  # code for these, and what later GPUs can make their own of
CUDA_FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-Xptxas", "-v")


class BuildError(RuntimeError):
    """Failure to build the kernels: there is no compiler, or it failed. The message says what to do."""


def cache_directory() -> Path:
    """Folder of the libraries that are built on first use."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "megatron-dmc" / "kernels"


def instruction_sets() -> dict[str, InstructionSet]:
    """Instruction sets that exist for this kind of machine, best first."""
    return X86 if platform.machine() in ("x86_64", "AMD64") else {"base": X86["base"]}


def usable_instruction_sets() -> list[str]:
    """Instruction sets that this CPU runs, best first: the order in which a portable library looks."""
    have = set(cpu_info().get("flags", "").split())
    if not may_use_tiles():
        have.discard("amx_tile")
    usable = [name for name, kind in instruction_sets().items() if have >= kind.needs]
    # In the two cycles that Intel's CPUs take for a product of pairs of bf16 they do four FMA, each half as many
    # products.
    if "avx512bf16" in usable and is_intel():
        usable.remove("avx512bf16")
        usable.insert(usable.index("avx512") + 1, "avx512bf16")
    return usable


def best_instruction_set() -> str:
    """Fastest of :func:`instruction_sets` that this CPU runs."""
    return usable_instruction_sets()[0]


def source_files(device: str) -> list[str]:
    """Names of the files in ``csrc`` that a library is made of. device: cpu or cuda."""
    return sorted(path.name for path in SOURCES.iterdir() if path.name.startswith((device, "launch.h", "params.h")))


@cache
def source_hash(device: str = "cpu") -> str:
    """Hash of the sources, the flags and the version of tvm-ffi: 16 hex digits. device: cpu or cuda."""
    x86 = {name: kind.flags for name, kind in X86.items()}
    flags = (FLAGS, x86) if device == "cpu" else (CUDA_FLAGS, CUDA_ARCHITECTURES)
    digest = hashlib.sha256(repr((*flags, importlib.metadata.version("apache-tvm-ffi"))).encode())
    for name in source_files(device):
        digest.update(name.encode() + (SOURCES / name).read_bytes())
    return digest.hexdigest()[:16]


def kernel_hashes() -> dict[str, str]:
    """Hashes of the files of the CUDA library, 16 hex digits each, for records of measurements."""
    return {name: hashlib.sha256((SOURCES / name).read_bytes()).hexdigest()[:16] for name in source_files("cuda")}


def library_name(sets: Sequence[str]) -> str:
    """File name of the CPU library for some instruction sets."""
    return f"dmc_cpu-{platform.machine()}-{'-'.join(sets)}-{source_hash()}.so"


def cuda_library_name() -> str:
    """File name of the CUDA library."""
    return f"dmc_cuda-{platform.machine()}-sm{'-'.join(CUDA_ARCHITECTURES)}-{source_hash('cuda')}.so"


def _find(names: Sequence[str]) -> Path | None:
    """First library of ``names`` that was built before, in the package and then in the user's cache."""
    candidates = [folder / name for folder in (PACKAGED, cache_directory()) for name in names]
    return next((path for path in candidates if path.is_file()), None)


def find_library() -> Path | None:
    """CPU library that was built before, portable ones first; None if there is none."""
    return _find([library_name(list(instruction_sets())), library_name([best_instruction_set()])])


def find_cuda_library() -> Path | None:
    """CUDA library that was built before; None if there is none."""
    return _find([cuda_library_name()])


def compiler() -> str:
    """C++ compiler: $CXX, g++ or clang++.

    Raises:
        BuildError: there is none.
    """
    wish = os.environ.get("CXX")
    for name in [wish] if wish else ["g++", "clang++", "c++"]:
        if shutil.which(name.split()[0]):
            return name
    raise BuildError(
        f"no C++ compiler ({wish or 'g++, clang++'}) on PATH: install one (apt-get install g++), or build the kernels "
        "on another machine with dmc build"
    )


def cuda_compiler() -> str:
    """CUDA compiler: $NVCC, nvcc on PATH, or that of $CUDA_HOME or /usr/local/cuda.

    Raises:
        BuildError: there is none.
    """
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    for name in (os.environ.get("NVCC"), "nvcc", f"{home}/bin/nvcc"):
        if name and shutil.which(name):
            return name
    raise BuildError(
        f"no nvcc on PATH nor in {home}/bin: install the CUDA toolkit (12 or later), or build the kernels on another "
        "machine with dmc build --device cuda"
    )


def _run(command: Sequence[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise BuildError(f"{' '.join(command)}\nfailed:\n{(result.stderr or result.stdout)[-4000:]}")
    return result.stderr


def _run_all(jobs: Sequence[Sequence[str]]) -> list[str]:
    with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1))) as pool:
        return list(pool.map(_run, jobs))


def _launcher(cxx: Sequence[str], source: str, flags: Sequence[str], to: str) -> list[str]:
    """Command that compiles a launcher, the part that uses tvm-ffi."""
    from tvm_ffi import libinfo

    includes = [f"-isystem{path}" for path in (libinfo.find_include_path(), libinfo.find_dlpack_include_path())]
    return [*cxx, "-std=gnu++17", "-O2", "-fPIC", *flags, *includes, "-c", str(SOURCES / source), "-o", to]


@contextmanager
def _making(target: Path) -> Iterator[str | None]:
    """Folder to build in, whose out.so becomes ``target``; None if that exists. One process at a time."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / f".{target.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_file():
            yield None
            return
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            yield scratch
            os.replace(f"{scratch}/out.so", target)


def build_cpu(sets: Sequence[str], directory: Path, unoptimized: Collection[str] = ()) -> Path:
    """Compile for the instruction sets ``sets`` into one library; returns its path. Several processes may call it at
    once.

    Args:
        unoptimized: sets of ``sets`` that are compiled without optimization, in a tenth of the time, as is enough
            where nothing will run them.

    Raises:
        BuildError: there is no compiler, or it failed; with its output.
    """
    cxx, target = compiler().split(), directory / library_name(sets)
    with _making(target) as scratch:
        if scratch is None:
            return target
        jobs = [_launcher(cxx, CPU_LAUNCHER, [f"-DDMC_WITH_{name}" for name in sets], f"{scratch}/launch.o")]
        for name in sets:
            for source in CPU_SOURCES:
                flags = [*FLAGS, *instruction_sets()[name].flags, f"-DDMC_ISA(x)=dmc_##x##_{name}"]
                flags += ["-O0"] if name in unoptimized else []
                jobs.append([*cxx, *flags, "-c", str(SOURCES / source), "-o", f"{scratch}/{source}.{name}.o"])
        _run_all(jobs)
        # tvm_ffi's library is in the process already: this one is loaded by it.
        _run([*cxx, "-shared", "-fopenmp", *(job[-1] for job in jobs), "-o", f"{scratch}/out.so"])
    return target


def build_cuda(directory: Path) -> Path:
    """Compile for :data:`CUDA_ARCHITECTURES` into one library; returns its path. Several processes may call it at once.

    Raises:
        BuildError: there is no nvcc or C++ compiler, or it failed; with its output.
    """
    nvcc, cxx, target = cuda_compiler(), compiler().split(), directory / cuda_library_name()
    with _making(target) as scratch:
        if scratch is None:
            return target
        code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CUDA_ARCHITECTURES]
        code.append("-gencode=arch=compute_{0},code=compute_{0}".format(CUDA_ARCHITECTURES[-1]))
        code.append(f"--threads={len(CUDA_ARCHITECTURES)}")  # compile for these at the same time
        jobs = [_launcher(cxx, CUDA_LAUNCHER, [], f"{scratch}/launch.o")]
        for source in CUDA_SOURCES:
            jobs.append([nvcc, *CUDA_FLAGS, *code, "-c", str(SOURCES / source), "-o", f"{scratch}/{source}.o"])
        _run_all(jobs)
        # CUDA's runtime goes into the library: it need not be the one that torch has.
        _run([nvcc, "-shared", "-cudart", "static", *(job[-1] for job in jobs), "-o", f"{scratch}/out.so"])
    return target


class Resources(NamedTuple):
    """Resources of one kernel, as ptxas reports them."""

    kernel: str
    architecture: str
    registers: int
    shared: int
    """Bytes, static."""
    stack: int
    spilled: int
    """Bytes that are stored and loaded for want of registers."""


def cuda_resources() -> list[Resources]:
    """Resources of every CUDA kernel. Compiles them, which takes as long as a build, and leaves nothing.

    Raises:
        BuildError: as :func:`build_cuda`.
    """
    nvcc = cuda_compiler()
    with tempfile.TemporaryDirectory() as scratch:
        jobs = [
            [nvcc, *CUDA_FLAGS, f"-arch=sm_{arch}", "-c", str(SOURCES / source), "-o", f"{scratch}/{source}.{arch}.o"]
            for source in CUDA_SOURCES
            for arch in CUDA_ARCHITECTURES
        ]
        return read_resources("".join(_run_all(jobs)))


def read_resources(text: str) -> list[Resources]:
    """Resources in the output of ``ptxas -v``, in order of the kernels' names."""
    found = []
    entry = re.compile(
        r"Compiling entry function '(\w+)' for 'sm_(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) "
        r"bytes spill loads.*?Used (\d+) registers([^\n]*)",
        re.DOTALL,
    )
    for name, arch, stack, stores, loads, registers, rest in entry.findall(text):
        shared = re.search(r"(\d+) bytes smem", rest)
        resources = (int(registers), int(shared.group(1)) if shared else 0, int(stack), int(stores) + int(loads))
        found.append(Resources(_demangled(name), arch, *resources))
    return sorted(found)


def _demangled(name: str) -> str:
    """Name and template arguments of a kernel, without namespaces and parameters; as it is where c++filt is not."""
    if not shutil.which("c++filt"):
        return name
    text = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    text = re.sub(r"\(anonymous namespace\)::|dmc::|^void ", "", text)
    return text[: text.rindex("(")].replace(" >", ">")


def has_nvcc() -> bool:
    """True where there is a CUDA compiler."""
    try:
        return bool(cuda_compiler())
    except BuildError:
        return False


if __name__ == "__main__":
    from megatron.dmc.cli.build import main

    sys.exit(main())
