"""Settings for CPUs in one place: huge pages, memory that is kept, and the matrix product with a plain weight.

None of them changes a result beyond rounding, and none is an error where the operating system, the C library or the CPU
lacks what it uses. Each function says why it is there and what was measured, on an AMD EPYC and an Intel Xeon (Emerald
Rapids) with two cores each and torch 2.13; docs/lab_book.md has the experiments. The thresholds below which a kernel
keeps to one thread stand beside their loops in ``csrc/cpu_*.cpp``.
"""

import ctypes
import platform
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

HUGE_PAGE_BYTES = 2**21  # of Linux on x86-64 and arm64
MADV_DONTNEED, MADV_HUGEPAGE = 4, 14  # asm-generic/mman-common.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc: malloc.h
SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA = 158, 0x1023, 18  # x86-64: asm/unistd_64.h, asm/prctl.h
KEPT_BYTES = 256 * 2**20  # freed memory that the process keeps
LARGEST_KEPT_BYTES = 32 * 2**20  # of one allocation; glibc takes no more (DEFAULT_MMAP_THRESHOLD_MAX)

FEW_ROWS = 64  # up to so many rows the product with a weight is faster transposed
VECTOR_INPUTS = 2048  # up to so many inputs one row is faster as two
IN_PLACE_ROWS = 4  # up to so many rows MKL reads the weight where it lies on Intel's CPUs
HALF_ROWS = 3  # up to so many rows the product in a 16-bit type is fast without instructions for it
CONVERTED = 2**18  # elements of a weight that are converted at a time: 1 MiB in fp32


@cache
def cpu_info() -> dict[str, str]:
    """Fields of the first processor in /proc/cpuinfo, such as ``vendor_id`` and ``flags``; empty without that file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}


@cache
def is_intel() -> bool:
    """True on a CPU made by Intel."""
    return cpu_info().get("vendor_id") == "GenuineIntel"


@cache
def may_use_tiles() -> bool:
    """True where this process may use Intel's tiles (AMX). Linux has to be asked once per process, and refuses on a CPU
    without them, and where a thread's stack for signals is too small for their 8 KiB.
    """
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return False
    libc = ctypes.CDLL(None)
    return libc.syscall(SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0


@cache
def panels_multiply(dtype: torch.dtype) -> bool:
    """True where linear layers over panels (``csrc/cpu_linear.cpp``) are faster than oneDNN's at any number of rows:
    in fp32 and bf16 on AMD's CPUs. On Intel's, where oneDNN has AMX for bf16, it was not measured.
    """
    return cpu_info().get("vendor_id") == "AuthenticAMD" and dtype in (torch.float32, torch.bfloat16)


@cache
def onednn_multiplies(dtype: torch.dtype) -> bool:
    """True where oneDNN has matrix products of ``dtype`` for this CPU: fp32 everywhere, 16-bit types with AVX-512,
    AMX or Arm's instructions for them. False in a torch without oneDNN, or with ``torch.backends.mkldnn`` disabled.
    """
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    if dtype == torch.float32:
        return True
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported()


def empty_in_huge_pages(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Uninitialised tensor of ``shape`` in huge pages of the operating system, where it has them.

    A decode step reads all weights, and pages of the cache in random order: without huge pages each 4 KiB cost a walk
    through the translation tables. Measured for decode attention over 512 and 1,024 MiB of cache, on the Xeon: 8.2
    GB/s a core instead of 5.9 (8 query heads per KV head, D = 64), 10.3 instead of 7.6 (4 per KV head, D = 128).
    """
    x = torch.empty(tuple(shape), dtype=dtype, device=device)
    _advise(x, MADV_HUGEPAGE)  # before the first touch
    return x


def clear_in_huge_pages(x: Tensor) -> None:
    """Fill a contiguous tensor with zeros, and move it to huge pages: for memory that somebody else has allocated and
    touched, see :func:`empty_in_huge_pages`. Its old pages go back to the operating system first.
    """
    _advise(x, MADV_HUGEPAGE, MADV_DONTNEED)
    x.zero_()


def _advise(x: Tensor, *advice: int) -> None:
    """Tell Linux what to do with the whole huge pages that a contiguous tensor covers. A Linux that cannot do it
    returns an error, which changes nothing.
    """
    size = x.numel() * x.element_size()
    if x.device.type != "cpu" or size < 2 * HUGE_PAGE_BYTES or sys.platform != "linux":
        return
    begin = -(-x.data_ptr() // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    end = (x.data_ptr() + size) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    for one in advice:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), one)


def keep_freed_memory() -> None:
    """Make glibc keep up to 256 MiB of freed memory, and serve allocations up to 32 MiB from it.

    Every step of an engine allocates the same activations. When they go back to the operating system in between, each
    4 KiB of them costs a page fault: 1.4 us in a virtual machine, a tenth of the time of prefill. The setting holds for
    the whole process. Nothing happens where the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b``: x [T, in], weight [out, in], bias [out] -> [T, out], contiguous.

    ``F.linear`` but on a CPU. In fp32 ``W x^T`` is faster for few rows: MKL reads the weight as it lies, where
    ``F.linear`` packs it first. On the EPYC one row of up to 2,048 inputs is faster as two (MKL's matrix-vector product
    reads 12 GB/s of such weights, its product with two rows 30), and 9 to 15 rows as 16. On Intel's CPUs MKL reads the
    weight as it lies for up to four rows anyway (1.8 ms for 92 MB, 4.8 transposed). In a 16-bit type that the CPU has
    no instructions for, four rows or more are multiplied in fp32, by blocks of the weight.
    """
    rows = x.size(0)
    if x.device.type != "cpu":
        return F.linear(x, weight, bias)
    if x.dtype != torch.float32:
        widen = rows > HALF_ROWS and not onednn_multiplies(x.dtype)
        return blocked_linear(x, weight, bias) if widen else F.linear(x, weight, bias)
    if rows > FEW_ROWS or (rows <= IN_PLACE_ROWS and is_intel()):
        return F.linear(x, weight, bias)
    if rows == 1 and x.size(1) > VECTOR_INPUTS:
        return F.linear(x, weight, bias)
    padded = 2 if rows == 1 else 16 if 8 < rows < 16 else rows
    y = torch.mm(weight, (F.pad(x, (0, 0, 0, padded - rows)) if padded > rows else x).t()).t()[:rows].contiguous()
    return y if bias is None else y.add_(bias)


def blocked_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` with a weight of a type that is not multiplied as it lies, rounded once at the end.

    Blocks of the weight are converted to fp32, one after the other. torch's own product of a 16-bit type takes 0.2 ms
    of a core of the EPYC in bf16 for each row and million weights, however many rows there are; this one, over the
    layers of SmolLM2-135M, 0.76 times as long at 4 rows, 0.53 at 8, 0.4 at 16.

    Args:
        x: [T, in].
        weight: [out, in], of a 16-bit type.
        bias: [out].

    Returns:
        [T, out], contiguous, of x's type.
    """
    converted, y = x.float(), torch.empty(x.size(0), weight.size(0))
    step = max(1, CONVERTED // max(1, weight.size(1)))
    for rows, out in zip(weight.split(step), y.split(step, dim=1), strict=True):
        torch.mm(converted, rows.float().t(), out=out)
    return (y if bias is None else y.add_(bias)).to(x.dtype)
