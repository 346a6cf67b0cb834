"""Versions and hardware, as manifests, reports and benchmarks record them. Imports torch only when it is asked."""

import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron.dmc import __version__

PACKAGES = ("megatron-dmc", "megatron-core", "torch", "safetensors")
"""Distributions that a checkpoint depends on."""


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Installed version of each distribution, without those that are missing."""
    found = {}
    for package in packages:
        try:
            # An uninstalled checkout of this package has no metadata.
            found[package] = __version__ if package == "megatron-dmc" else metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def usable_cores() -> int:
    """Cores that this process may use: fewer than the machine's under SLURM, taskset or a container's cpuset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(packages: Iterable[str] = PACKAGES) -> dict[str, Any]:
    """Hardware of this machine and :func:`versions`."""
    import torch

    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **versions(packages),
    }


def cpu_name() -> str:
    """Model name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
