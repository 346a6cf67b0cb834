"""Megatron in the process of the tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.tensor_parallel import random as mcore_random

from megatron.dmc.config import RunConfig
from megatron.dmc.training import cpu, initialize


@contextmanager
def megatron_in_process(run: RunConfig) -> Iterator[None]:
    """Initialized, and no trace of it (nor of the CPU layer's patches) afterwards."""
    places = [
        (torch.cuda, "current_device"),
        (torch.cuda, "synchronize"),
        (mcore_random, "_get_cuda_rng_state"),
        (mcore_random, "_set_cuda_rng_state"),
    ]
    saved, patched_before = [getattr(*place) for place in places], cpu._mode is not None
    initialize.initialize(run)
    try:
        yield
    finally:
        initialize.shutdown()
        if cpu._mode is not None and not patched_before:
            cpu._mode.__exit__(None, None, None)
            cpu._mode = None
            for (module, name), value in zip(places, saved):
                setattr(module, name, value)
