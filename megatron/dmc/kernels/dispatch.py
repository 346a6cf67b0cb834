"""Which implementation of the kernels runs: by device, unless one is forced."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch._C._profiler import _RecordFunctionFast

from megatron.dmc.kernels import reference

BACKENDS = ("reference", "cpp", "cuda")
VARIABLE = "MEGATRON_DMC_KERNELS"
COMPILED = {"cpu": "cpp", "cuda": "cuda"}  # by device

_forced: Any = None


@cache
def _load(name: str) -> Any:
    """What has the ops of a backend."""
    # Here, for `python -m megatron.dmc.kernels.build` wants to be the first to import what these import.
    if name == "cuda":
        return importlib.import_module("megatron.dmc.kernels.cuda").load()
    return importlib.import_module("megatron.dmc.kernels.cpp") if name == "cpp" else reference


@cache
def _of_device(device_type: str) -> str:
    """The best that works here. Says so, once, when it is not a compiled one."""
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


def _choice(device_type: str) -> Any:
    forced = _forced or os.environ.get(VARIABLE)
    if not forced:
        return _of_device(device_type)
    if isinstance(forced, str) and forced not in BACKENDS:
        raise ValueError(f"{VARIABLE} is {forced!r}; use one of {', '.join(BACKENDS)}")
    return forced


def active_backend(device_type: str) -> str:
    """``reference``, ``cpp`` or ``cuda``: what the ops run on a device of this type. Builds the kernels if need be.

    Raises:
        ValueError: MEGATRON_DMC_KERNELS names no backend.
    """
    choice = _choice(device_type)
    return choice if isinstance(choice, str) else choice.name


@contextmanager
def use_backend(backend: Any) -> Iterator[None]:
    """Force an implementation for the duration of a block, by its name or as an object that has the ops; for tests and
    measurements."""
    global _forced
    if isinstance(backend, str) and backend not in BACKENDS:
        raise ValueError(f"there is no backend {backend!r}; use one of {', '.join(BACKENDS)}")
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


def call(op: str, device_type: str, *arguments: Any) -> Any:
    """Run ``op`` on the backend of a device."""
    choice = _choice(device_type)
    backend = _load(choice) if isinstance(choice, str) else choice
    with _RecordFunctionFast(f"dmc::{op}"):  # the compiled kernels are no torch ops: so that torch.profiler shows them
        return getattr(backend, op)(*arguments)
