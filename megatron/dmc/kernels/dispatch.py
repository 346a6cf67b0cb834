"""Which implementation of the kernels runs: by device, unless one is forced."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any, Optional

from torch._C._profiler import _RecordFunctionFast

from megatron.dmc.kernels import reference
from megatron.dmc.kernels.state import CacheState

BACKENDS = ("reference", "cpp")
VARIABLE = "MEGATRON_DMC_KERNELS"

_forced: Optional[str] = None


@cache
def _cpp() -> ModuleType:
    return importlib.import_module("megatron.dmc.kernels.cpp")


@cache
def _of_device(device_type: str) -> str:
    """The best that works here. Says so, once, when it is not a compiled one."""
    if device_type == "cpu":
        # Here, for `python -m megatron.dmc.kernels.build` wants to be the first to import it.
        from megatron.dmc.kernels.build import BuildError

        try:
            _cpp()
            return "cpp"
        except (BuildError, ImportError, OSError) as error:
            why = f"the C++ kernels could not be built or loaded:\n{error}"
    else:
        why = f"there are no compiled kernels for {device_type}"
    bar = "*" * 100
    print(f"{bar}\nmegatron.dmc: {why}\nPyTorch kernels run instead: same results, many times slower.\n{bar}", file=sys.stderr)
    return "reference"


def active_backend(device_type: str) -> str:
    """``reference`` or ``cpp``: what the ops run on a device of this type. Builds the kernels if need be.

    Raises:
        ValueError: MEGATRON_DMC_KERNELS names no backend.
    """
    forced = _forced or os.environ.get(VARIABLE)
    if not forced:
        return _of_device(device_type)
    if forced not in BACKENDS:
        raise ValueError(f"{VARIABLE} is {forced!r}; use one of {', '.join(BACKENDS)}")
    return forced


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force an implementation for the duration of a block; for tests and measurements."""
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"there is no backend {name!r}; use one of {', '.join(BACKENDS)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def call(op: str, state: CacheState, *arguments: Any) -> Any:
    """Run ``op`` on the backend of the state's device."""
    name = active_backend(state.k_pages.device.type)
    module = _cpp() if name == "cpp" else reference
    with _RecordFunctionFast(f"dmc::{op}"):  # the C++ kernels are no torch ops: so that torch.profiler shows them
        return getattr(module, op)(state, *arguments)
