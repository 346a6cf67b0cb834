"""Saving and loading ``torch_dist`` checkpoints in any layout (megatron-core's ``dist_checkpointing``)."""

from __future__ import annotations

import os
import queue
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Optional

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import distributed
from torch.distributed.checkpoint.api import CheckpointException

from megatron.dmc.checkpoint.manifest import (
    LATEST,
    TEMPORARY,
    Manifest,
    complete_checkpoints,
    iteration_directory,
    write_hf_files,
)
from megatron.dmc.checkpoint.staging import sync, sync_tree
from megatron.dmc.model import DMCGPTModel

# The layout-free format of the distributed optimizer: any data-, tensor- and pipeline-parallel size may load it.
# Copied at every use: megatron-core writes its process groups into it.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


_EXTRA = "_extra_state"
"""Transformer Engine's scaling state for fp8, which nothing here uses; converted checkpoints do not have it."""


def _model_state(chunks: list[DMCGPTModel]) -> dict:
    names = ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]
    return {
        name: {k: v for k, v in chunk.sharded_state_dict(metadata=dict(_METADATA)).items() if _EXTRA not in k}
        for name, chunk in zip(names, chunks, strict=True)
    }


def _state(chunks: list[DMCGPTModel], optimizer: Optional[MegatronOptimizer], is_loading: bool) -> dict:
    state = _model_state(chunks)
    if optimizer is not None:
        # Parameters of all chunks in one dict: their global names do not collide, their local ones would.
        parameters = {f"{i}.{k}": v for i, part in enumerate(state.values()) for k, v in part.items()}
        if len(chunks) == 1:
            parameters = state["model"]
        state["optimizer"] = optimizer.sharded_state_dict(parameters, is_loading=is_loading, metadata=dict(_METADATA))
    return state


def _rank() -> int:
    return distributed.get_rank()


def save(
    directory: Path,
    chunks: list[DMCGPTModel],
    optimizer: Optional[MegatronOptimizer],
    manifest: Manifest,
    config_text: str,
    keep: Optional[int] = None,
    hf_files: Optional[Mapping[str, bytes]] = None,
) -> Path:
    """Write ``directory/iter_N`` by all ranks. It appears under its name only when it is complete.

    Args:
        directory: the run's --save directory.
        config_text: the resolved configuration, saved as ``config.yaml``.
        keep: checkpoints that stay, the newest first; None keeps all.
        hf_files: small files of the Hugging Face model at the start of the lineage, for export.
    """
    target = iteration_directory(directory, manifest.iteration)
    temporary = directory / (TEMPORARY + target.name)
    if _rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob(TEMPORARY + "*"):
            shutil.rmtree(leftover, ignore_errors=True)  # a writer that outlived its run may still be adding to it
        temporary.mkdir()
    distributed.barrier()
    _write_without_manager()
    dist_checkpointing.save(_state(chunks, optimizer, False), str(temporary), content_metadata=dict(_METADATA))
    distributed.barrier()
    if _rank() == 0:
        (temporary / "config.yaml").write_text(config_text)
        write_hf_files(temporary, hf_files or {})
        manifest.has_optimizer = optimizer is not None
        manifest.write(temporary)
        sync_tree(temporary)
        if target.exists():
            _remove(target)
        os.rename(temporary, target)
        sync(directory)
        latest = directory / (LATEST + ".tmp")
        latest.write_text(f"{manifest.iteration}\n")
        os.replace(latest, directory / LATEST)
        for old in complete_checkpoints(directory)[: -keep or None] if keep else []:
            _remove(old)
    distributed.barrier()
    return target


def _write_without_manager() -> None:
    """Results of a synchronous write stay in this process: a plain queue does.

    megatron-core would start a manager process per rank for it, which imports torch anew (seconds, a quarter of a
    gigabyte) and outlives a killed run, holding on to its log file.
    """
    if hasattr(filesystem_async, "_results_queue") and filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()


def _remove(checkpoint: Path) -> None:
    """In one step as others see it: a half-deleted checkpoint must not look complete, whatever kills the job."""
    doomed = checkpoint.with_name(f"{TEMPORARY}old_{checkpoint.name}")
    os.rename(checkpoint, doomed)
    shutil.rmtree(doomed)


def load(
    directory: Path,
    chunks: list[DMCGPTModel],
    optimizer: Optional[MegatronOptimizer] = None,
) -> None:
    """Load weights, and the optimizer's state when it is given, from one checkpoint, in any layout.

    Raises:
        ValueError: the checkpoint does not hold this model (missing tensors or other shapes), with its message.
    """
    if optimizer is not None:
        _prime(optimizer)
    try:
        loaded = dist_checkpointing.load(_state(chunks, optimizer, True), str(directory))
    except (
        dist_checkpointing.core.CheckpointingException,
        CheckpointException,  # derives from BaseException
        KeyError,
        RuntimeError,
        OSError,
        EOFError,
        UnpicklingError,
    ) as error:
        raise ValueError(f"checkpoint {directory} does not fit this model: {error}") from error
    for i, chunk in enumerate(chunks):
        found = chunk.load_state_dict(loaded["model" if len(chunks) == 1 else f"model{i}"], strict=False)
        odd = [k for k in (*found.missing_keys, *found.unexpected_keys) if _EXTRA not in k]
        if odd:
            raise ValueError(f"checkpoint {directory} does not fit this model: {', '.join(odd[:5])}")
    if optimizer is not None:
        with _steps_beside_shards(optimizer):
            optimizer.load_state_dict(loaded["optimizer"])
        _separate_steps(optimizer)
    else:
        distributed.barrier()


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if getattr(part, "optimizer", None) is not None]


def _inner(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    return [part.optimizer for part in _parts(optimizer)]


@contextmanager
def _steps_beside_shards(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Let the distributed optimizer load torch's Adam: megatron-core 0.16.1 takes ``step`` from the parameter groups, as
    it should, and then asks the shards, which have none, for it once more (KeyError)."""

    def with_step(part: DistributedOptimizer, load: Callable) -> Callable:
        def set_states(model_param: torch.nn.Parameter, tensors: dict) -> None:
            group, order = part.model_param_group_index_map[model_param]
            state = part.optimizer.state[part.optimizer.param_groups[group]["params"][order]]
            load(model_param, {"step": state["step"], **tensors} if "step" in state else tensors)

        return set_states

    name = "_set_main_param_and_optimizer_states"
    sharded = [part for part in _parts(optimizer) if isinstance(part, DistributedOptimizer)]
    for part in sharded:
        setattr(part, name, with_step(part, getattr(part, name)))
    try:
        yield
    finally:
        for part in sharded:
            delattr(part, name)


def _prime(optimizer: MegatronOptimizer) -> None:
    """Give a fresh optimizer the state tensors that loading fills, by one step that changes no parameter."""
    for inner in _inner(optimizer):
        if inner.state:
            continue
        saved = [(group["lr"], group["weight_decay"]) for group in inner.param_groups]
        for group in inner.param_groups:
            group["lr"] = group["weight_decay"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        inner.step()
        for group, (lr, weight_decay) in zip(inner.param_groups, saved, strict=True):
            group["lr"], group["weight_decay"] = lr, weight_decay
            for parameter in group["params"]:
                parameter.grad = None


def _separate_steps(optimizer: MegatronOptimizer) -> None:
    """One ``step`` tensor per parameter: after loading megatron-core 0.16.1 lets all share one, so that torch's Adam
    counts a step once per parameter and its bias correction is silently wrong."""
    for inner in _inner(optimizer):
        for state in inner.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()
