"""Builds the compiled kernels: on first use for the machine at hand, and ahead of time for any.

    python -m megatron.dmc.kernels.build [--in-package | --output DIR] [--for-this-machine]

Without options a portable library goes to the user's cache ($XDG_CACHE_HOME or ~/.cache, megatron-dmc/kernels); with
--in-package it goes beside the sources, which is what an image for many users and machines wants. A library's name holds a hash
of the sources, the flags and the version of apache-tvm-ffi: one that is out of date is never loaded.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "csrc"
PACKAGED = Path(__file__).resolve().parent / "lib"
CPU_SOURCES = ("cpu_append.cpp", "cpu_decode.cpp", "cpu_prefill.cpp")
CPU_HEADERS = ("cpu.h", "cpu_attention.h", "cpu_rows.h", "cpu_vec.h")
CPU_LAUNCHER = "cpu_launch.cpp"

# No errno and no trapping: both keep loops from becoming vectors. Nothing that changes results: no -ffast-math.
FLAGS = ("-std=gnu++17", "-O3", "-fPIC", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c")
X86 = {
    "avx512bf16": (*AVX512, "-mavx512bf16"),
    "avx512": AVX512,
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "base": (),
}
CPU_FLAGS_OF = {
    "avx512bf16": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx2": {"avx2", "fma", "f16c"},
    "base": set(),
}


class BuildError(RuntimeError):
    """No compiler, or it failed. The message says what to do."""


def cache_directory() -> Path:
    """Where libraries that are built on first use lie."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "megatron-dmc" / "kernels"


def instruction_sets() -> dict[str, tuple[str, ...]]:
    """The builds that exist for this kind of machine, best first, and their flags."""
    return X86 if platform.machine() in ("x86_64", "AMD64") else {"base": ()}


def best_instruction_set() -> str:
    """The best of :func:`instruction_sets` that this CPU runs."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    have = set(next((line.split(":", 1)[1] for line in lines if line.startswith("flags")), "").split())
    return next(name for name in instruction_sets() if have >= CPU_FLAGS_OF[name])


@cache
def source_hash() -> str:
    """Changes with the sources, the flags and tvm-ffi: 16 hex digits."""
    digest = hashlib.sha256(repr((FLAGS, X86, importlib.metadata.version("apache-tvm-ffi"))).encode())
    for name in (*CPU_HEADERS, *CPU_SOURCES, CPU_LAUNCHER):
        digest.update(name.encode() + (SOURCES / name).read_bytes())
    return digest.hexdigest()[:16]


def library_name(sets: Sequence[str]) -> str:
    return f"dmc_cpu-{platform.machine()}-{'-'.join(sets)}-{source_hash()}.so"


def find_library() -> Path | None:
    """A library that was built before: portable ones first in the package, then in the cache, then one for this machine."""
    portable, here = library_name(list(instruction_sets())), library_name([best_instruction_set()])
    candidates = (PACKAGED / portable, PACKAGED / here, cache_directory() / portable, cache_directory() / here)
    return next((path for path in candidates if path.is_file()), None)


def compiler() -> str:
    """$CXX, g++ or clang++.

    Raises:
        BuildError: there is none.
    """
    wish = os.environ.get("CXX")
    for name in [wish] if wish else ["g++", "clang++", "c++"]:
        if shutil.which(name.split()[0]):
            return name
    raise BuildError(
        f"no C++ compiler ({wish or 'g++, clang++'}) on PATH: install one (apt-get install g++), or build the kernels on another "
        "machine with python -m megatron.dmc.kernels.build"
    )


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise BuildError(f"{' '.join(command)}\nfailed:\n{(result.stderr or result.stdout)[-4000:]}")


def build_cpu(sets: Sequence[str], directory: Path) -> Path:
    """Compile for the instruction sets ``sets`` into one library; returns its path. Several processes may call it at once.

    Raises:
        BuildError: there is no compiler, or it failed; with its output.
    """
    from tvm_ffi import libinfo

    cxx = compiler().split()
    target = directory / library_name(sets)
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / f".{target.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_file():
            return target
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            jobs, objects = [], []
            for name in sets:
                for source in CPU_SOURCES:
                    objects.append(f"{scratch}/{source}.{name}.o")
                    flags = [*FLAGS, *instruction_sets()[name], f"-DDMC_ISA(x)=dmc_##x##_{name}"]
                    jobs.append([*cxx, *flags, "-c", str(SOURCES / source), "-o", objects[-1]])
            objects.append(f"{scratch}/launch.o")
            defines = [f"-DDMC_WITH_{name}" for name in sets]
            includes = [f"-isystem{path}" for path in (libinfo.find_include_path(), libinfo.find_dlpack_include_path())]
            launcher = ["-std=gnu++17", "-O2", "-fPIC", *defines, *includes, "-c", str(SOURCES / CPU_LAUNCHER), "-o", objects[-1]]
            jobs.insert(0, [*cxx, *launcher])
            with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1))) as pool:
                list(pool.map(_run, jobs))
            # tvm_ffi's library is in the process already: this one is loaded by it.
            _run([*cxx, "-shared", "-fopenmp", *objects, "-o", f"{scratch}/out.so"])
            os.replace(f"{scratch}/out.so", target)
    return target


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m megatron.dmc.kernels.build``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--in-package", action="store_true", help="put the library beside the sources, for images")
    place.add_argument("--output", type=Path, metavar="DIR", help="put the library there")
    parser.add_argument("--for-this-machine", action="store_true", help="only the instruction set of this CPU: builds faster")
    args = parser.parse_args(argv)
    sets = [best_instruction_set()] if args.for_this_machine else list(instruction_sets())
    start = time.perf_counter()
    try:
        path = build_cpu(sets, PACKAGED if args.in_package else args.output or cache_directory())
    except (BuildError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    print(f"{path}: CPU kernels for {', '.join(sets)}, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
