"""Choice of the backend that runs the kernels: by device, unless one is forced."""

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch._C._profiler import _RecordFunctionFast

BACKENDS = ("reference", "cpp", "cuda")
VARIABLE = "MEGATRON_DMC_KERNELS"
COMPILED = {"cpu": "cpp", "cuda": "cuda"}  # by device

_forced: Any = None


@cache
def _load(name: str) -> Any:
    """The ops of a backend: the module of the reference, or a :class:`CompiledKernels`."""
    # Imported here, for `python -m megatron.dmc.kernels.build` must be the first to import what these import.
    module = importlib.import_module(f"megatron.dmc.kernels.{name}")
    return module if name == "reference" else module.load()


def _best(device_type: str) -> str:
    """Name of the best backend that works for a device. A banner says why when it is not a compiled one."""
    name = COMPILED.get(device_type)
    if name:
        from megatron.dmc.kernels.build import BuildError

        try:
            _load(name)
            return name
        except (BuildError, ImportError, OSError) as error:
            why = f"the {'C++' if name == 'cpp' else 'CUDA'} kernels could not be built or loaded:\n{error}"
    else:
        why = f"there are no compiled kernels for {device_type}"
    bar = "*" * 100
    print(
        f"{bar}\nmegatron.dmc: {why}\nPyTorch kernels run instead: same results, many times slower.\n{bar}",
        file=sys.stderr,
    )
    return "reference"


@cache
def _default(device_type: str) -> Any:
    """The ops that run on a device when :func:`use_backend` forces none."""
    name = os.environ.get(VARIABLE) or _best(device_type)
    if name not in BACKENDS:
        raise ValueError(f"{VARIABLE} is {name!r}; use one of {', '.join(BACKENDS)}")
    return _load(name)


def active_backend(device_type: str) -> str:
    """Name of the backend that runs on a device ("cpu", "cuda"): reference, cpp or cuda. Builds it if need be.

    Raises:
        ValueError: MEGATRON_DMC_KERNELS names no backend.
    """
    return (_forced or _default(device_type)).name


@contextmanager
def use_backend(backend: Any) -> Iterator[None]:
    """Force a backend for the duration of a block, by its name or as an object that has the ops; for tests and
    measurements.

    Raises:
        ValueError: there is no backend of that name.
    """
    global _forced
    if isinstance(backend, str):
        if backend not in BACKENDS:
            raise ValueError(f"there is no backend {backend!r}; use one of {', '.join(BACKENDS)}")
        backend = _load(backend)
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


def call(op: str, device_type: str, *arguments: Any) -> Any:
    """Run ``op`` on the backend of a device."""
    backend = _forced or _default(device_type)
    with _RecordFunctionFast(f"dmc::{op}"):  # the compiled kernels are no torch ops: so that torch.profiler shows them
        return getattr(backend, op)(*arguments)
