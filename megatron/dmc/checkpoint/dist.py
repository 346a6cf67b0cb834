"""Saving and loading ``torch_dist`` checkpoints in any layout (megatron-core's ``dist_checkpointing``)."""

from __future__ import annotations

import os
import pickle
import queue
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, distributed
from torch.distributed.checkpoint.api import CheckpointException

from megatron.dmc.checkpoint import checksums
from megatron.dmc.checkpoint.manifest import (
    LATEST,
    TEMPORARY,
    Manifest,
    complete_checkpoints,
    iteration_directory,
    read_manifest,
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


def _without_copies(state: dict) -> dict:
    """The state with every tensor as a storage of its own, on the same memory.

    Parameters are views into large buffers. A tensor is written with all of its storage, so megatron-core copies views
    first, while training waits: a third of a gigabyte per 100M parameters. The writer reads the memory as it is
    instead.
    """
    apply_factories(state)  # they cut tensors: views again

    def separate(leaf: Any) -> Any:
        if isinstance(leaf, ShardedTensor) and leaf.data is not None:
            leaf.data = _as_storage(leaf.data)
        return leaf

    dict_list_map_inplace(separate, state)
    return state


def _as_storage(tensor: Tensor) -> Tensor:
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    if tensor.device.type != "cpu" or whole or not tensor.is_contiguous() or not tensor.nbytes:
        return tensor
    data = tensor.detach().view(-1).view(torch.uint8).numpy()
    return torch.from_numpy(data).view(tensor.dtype).view(tensor.shape)


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
    *,
    retain: Optional[int] = None,
    background: Optional[AsyncCallsQueue] = None,
) -> Path:
    """Write ``directory/iter_N`` by all ranks. It appears under its name only when it is complete.

    Args:
        directory: the run's --save directory.
        config_text: the resolved configuration, saved as ``config.yaml``.
        keep: checkpoints that stay, the newest first; None keeps all.
        hf_files: small files of the Hugging Face model at the start of the lineage, for export.
        retain: checkpoints whose iteration is a multiple of this stay too.
        background: write in a forked process. The tensors are those of this moment, whatever training does to them
            afterwards: on the CPU the fork is the copy, from a GPU they are copied before it. The checkpoint is
                complete
            when the queue's ``maybe_finalize_async_calls`` says so, which all ranks must call; finish one before the
            next.
    """
    target = iteration_directory(directory, manifest.iteration)
    # A name that no other start of this run has: a writer that outlived a killed one cannot get in between.
    name = [f"{TEMPORARY}{target.name}_{uuid.uuid4().hex[:8]}"]
    distributed.broadcast_object_list(name, src=0)
    temporary = directory / name[0]
    if _rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob(TEMPORARY + "*"):
            _rmtree(leftover, in_thread=background is not None)
        temporary.mkdir()
    distributed.barrier()
    results = _Results()
    filesystem_async._results_queue = results
    request = dist_checkpointing.save(
        _without_copies(_state(chunks, optimizer, False)),
        str(temporary),
        content_metadata=dict(_METADATA),
        async_sharded_save=True,
    )
    assert request is not None
    if request.async_fn is not None:
        request = request._replace(async_fn=partial(_write, request.async_fn))

    def complete() -> None:
        gathered = [{}] * distributed.get_world_size() if _rank() == 0 else None
        distributed.gather_object(results.checksums() if request.async_fn is not None else {}, gathered, dst=0)
        if _rank() == 0:
            (temporary / "config.yaml").write_text(config_text)
            write_hf_files(temporary, hf_files or {})
            manifest.has_optimizer = optimizer is not None
            manifest.write(temporary, {name: value for part in gathered for name, value in part.items()})
            _publish(temporary, target, keep, retain, in_thread=background is not None)
        distributed.barrier()

    request.add_finalize_fn(complete)
    if background is None:
        request.execute_sync()
    else:
        background.schedule_async_request(request)
    return target


def _write(write: Callable, rank: int, buckets: list, results: _Results) -> None:
    """This rank's files, and then their checksums, in whichever process it runs."""
    write(rank, buckets, results)
    paths = [Path(bucket[0]) for bucket in buckets]
    if all(path.is_file() for path in paths):  # else an error is among the results
        results.put(checksums.checksums(paths[0].parent, [path.name for path in paths]))


class _Results:
    """megatron-core's queue from the writing process to this one, as an unnamed file that a fork shares.

    Its own is a manager process per rank, which imports torch anew (seconds, a quarter of a gigabyte) and outlives a
    killed run, holding on to its log file. A pipe would not do: who writes more than it holds never ends.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()
        self._read = 0

    def put(self, value: object) -> None:
        pickle.dump(value, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        self._file.seek(self._read)
        try:
            value = pickle.load(self._file)
        except EOFError:
            raise queue.Empty from None
        self._read = self._file.tell()
        return value

    def checksums(self) -> dict[str, str]:
        """What :func:`_write` put last; megatron-core has taken the rest."""
        return self.get_nowait()


def _publish(temporary: Path, target: Path, keep: Optional[int], retain: Optional[int], in_thread: bool) -> None:
    """Give a complete checkpoint its name, note it, and remove those that need not stay (``in_thread``: meanwhile)."""
    directory = target.parent
    sync_tree(temporary)
    if target.exists():
        _remove(target)
    os.rename(temporary, target)
    sync(directory)
    latest = directory / (LATEST + ".tmp")
    latest.write_text(f"{int(target.name[5:])}\n")
    os.replace(latest, directory / LATEST)
    for old in complete_checkpoints(directory)[: -keep or None] if keep else []:
        if not retain or int(old.name[5:]) % retain:
            _remove(old, in_thread)


def _remove(checkpoint: Path, in_thread: bool = False) -> None:
    """In one step as others see it: a half-deleted checkpoint must not look complete, whatever kills the job."""
    doomed = checkpoint.with_name(f"{TEMPORARY}old_{checkpoint.name}")
    os.rename(checkpoint, doomed)
    _rmtree(doomed, in_thread)


def _rmtree(doomed: Path, in_thread: bool) -> None:
    """``in_thread``: file systems take a tenth of a second and more per gigabyte."""
    thread = threading.Thread(target=shutil.rmtree, args=(doomed, True))
    thread.start()
    if not in_thread:
        thread.join()


def load(
    directory: Path, chunks: list[DMCGPTModel], optimizer: Optional[MegatronOptimizer] = None, verify: bool = True
) -> None:
    """Load weights, and the optimizer's state when it is given, from one checkpoint, in any layout.

    Args:
        verify: compare the files with the manifest's checksums first, each on one of the ranks.

    Raises:
        ValueError: a file is not what was written, by its name; or the checkpoint does not hold this model (missing
            tensors or other shapes), with megatron-core's message.
    """
    if verify:
        _verify(directory)
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
        pickle.UnpicklingError,
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


def _verify(directory: Path) -> None:
    manifest = read_manifest(directory)
    mine = checksums.share(manifest.files, _rank(), distributed.get_world_size())
    found: list = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, checksums.damaged(directory, manifest.crc32, mine))
    if odd := sorted(name for part in found for name in part):
        raise ValueError(
            f"checkpoint {directory} is damaged, its checksums differ: {', '.join(odd[:5])}"
            f"{', ...' if odd[5:] else ''}; restore it from a copy, or name another checkpoint"
        )


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if getattr(part, "optimizer", None) is not None]


def _inner(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    return [part.optimizer for part in _parts(optimizer)]


@contextmanager
def _steps_beside_shards(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Let the distributed optimizer load torch's Adam: megatron-core 0.16.1 takes ``step`` from the parameter groups,
    as it should, and then asks the shards, which have none, for it once more (KeyError).
    """

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
