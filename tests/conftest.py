"""Fixtures and options of all tests: the ``gpu`` marker and a modest number of threads."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Set before torch is imported: torch.set_num_threads would make every forked data loader start a thread pool.
# One of several pytest-xdist workers has a core to itself: teams of threads that share one wait for each other.
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1)
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))

# Until all tests are collected: modules are loaded, and hardly anything becomes garbage.
gc.disable()

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What the modules hold stays to the end: the garbage collector need not walk through it, a quarter of a second
    each time.
    """
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device: torch.cuda.is_available() is False")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="module", autouse=True)
def nothing_of_megatron_is_left() -> Iterator[None]:
    """What loads a checkpoint in the test's own process leaves a process group of one behind, and the mode in which
    "cuda" means the CPU, which makes PyTorch's functions almost twice as slow for the files that follow.
    """
    yield
    if torch.distributed.is_initialized():
        from megatron.dmc.training.initialize import shutdown

        shutdown()
    cpu = sys.modules.get("megatron.dmc.training.cpu")
    if cpu is not None and cpu._mode is not None:
        cpu._mode.__exit__(None, None, None)
        cpu._mode = None


@pytest.fixture
def transformers_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers copies the files into a package in its cache, imports and registers them:
    here nothing of it stays.
    """
    from transformers import dynamic_module_utils
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    for name in ("HF_HOME", "HF_MODULES_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "HF_MODULES_CACHE"))
    for mapping in (CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        monkeypatch.setattr(mapping, "_extra_content", dict(mapping._extra_content))
    monkeypatch.setattr(sys, "path", list(sys.path))
    forget_remote_code()
    yield
    forget_remote_code()


def forget_remote_code() -> None:
    """Drop what transformers has imported of model directories."""
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]
