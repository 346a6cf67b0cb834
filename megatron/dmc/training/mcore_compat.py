"""Workarounds for megatron-core 0.16.1 to 0.20, each with its reason; look here first when its version changes.

``cpu.py`` beside this file has what lets megatron-core run without a GPU.
"""

import inspect
import pickle
import queue
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, distributed
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint.metadata import StorageMeta


class ResultsFile:
    """Queue from the process that writes a checkpoint to this one, kept in an unnamed file that both share.

    megatron-core's own queue is a manager process per rank, which imports torch anew (seconds, a quarter of a gigabyte)
    and outlives a killed run, holding on to its log file. A pipe would block a writer whose results exceed its buffer.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()
        self._position = 0

    def put(self, value: object) -> None:
        """Append ``value``."""
        pickle.dump(value, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        """Take the oldest value that has not been taken. Raises ``queue.Empty`` when there is none."""
        self._file.seek(self._position)
        try:
            value = pickle.load(self._file)
        except EOFError:
            raise queue.Empty from None
        self._position = self._file.tell()
        return value


def use_results_file() -> ResultsFile:
    """Make a :class:`ResultsFile` the queue of the next save; returns it."""
    results = ResultsFile()
    filesystem_async._results_queue = results
    return results


@contextmanager
def use_metadata(metadata: Metadata) -> Iterator[None]:
    """Let megatron-core take a checkpoint's ``.metadata`` as it was read here: torch's reader runs what is in it."""

    def read_metadata(reader: FileSystemReader, *_: Any, **__: Any) -> Metadata:
        metadata.storage_meta = StorageMeta(load_id=reader.load_id)
        return metadata

    inner, FileSystemReader.read_metadata = FileSystemReader.read_metadata, read_metadata  # type: ignore[method-assign]
    try:
        yield
    finally:
        FileSystemReader.read_metadata = inner  # type: ignore[method-assign]


def async_save_options() -> dict[str, str]:
    """Arguments by which ``dist_checkpointing.save`` prepares a save of megatron-core's own making.

    From 0.17 on it takes that of nvidia-resiliency-ext by default: another package, with requests of another kind.
    """
    takes_strategy = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    return {"async_strategy": "mcore"} if takes_strategy else {}


def give_own_storages(state: dict) -> dict:
    """Replace every tensor of a sharded state by one that has a storage of its own, on the same memory.

    Parameters are views into large buffers. A tensor is written with all of its storage, so megatron-core copies views
    first, while training waits: a third of a gigabyte per 100M parameters. With storages of their own they are written
    from where they are.
    """
    apply_factories(state)  # factories cut tensors, which makes views again

    def separate(leaf: Any) -> Any:
        if isinstance(leaf, ShardedTensor) and leaf.data is not None:
            leaf.data = _with_own_storage(leaf.data)
        return leaf

    dict_list_map_inplace(separate, state)
    return state


def _with_own_storage(tensor: Tensor) -> Tensor:
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    if tensor.device.type != "cpu" or whole or not tensor.is_contiguous() or not tensor.nbytes:
        return tensor
    data = tensor.detach().view(-1).view(torch.uint8).numpy()
    return torch.from_numpy(data).view(tensor.dtype).view(tensor.shape)


def create_adam_state(optimizer: MegatronOptimizer) -> None:
    """Give a fresh optimizer the state tensors that loading fills, by one step that changes no parameter.

    megatron-core creates the moments of torch's Adam before it loads them, but not ``step``.
    """
    for adam in _torch_optimizers(optimizer):
        if adam.state:
            continue
        saved = [(group["lr"], group["weight_decay"]) for group in adam.param_groups]
        for group in adam.param_groups:
            group["lr"] = group["weight_decay"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        adam.step()
        for group, (lr, weight_decay) in zip(adam.param_groups, saved, strict=True):
            group["lr"], group["weight_decay"] = lr, weight_decay
            for parameter in group["params"]:
                parameter.grad = None


def load_optimizer_state(optimizer: MegatronOptimizer, state: dict) -> None:
    """``optimizer.load_state_dict(state)`` with the ``step`` of torch's Adam right for every parameter."""
    with _accept_shards_without_step(optimizer):
        optimizer.load_state_dict(state)
    # After loading all parameters share one ``step`` tensor: Adam would count each step once per parameter, and its
    # bias correction would silently be wrong.
    for adam in _torch_optimizers(optimizer):
        for moments in adam.state.values():
            if isinstance(moments.get("step"), torch.Tensor):
                moments["step"] = moments["step"].clone()


@contextmanager
def _accept_shards_without_step(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Let the distributed optimizer load torch's Adam.

    It takes ``step`` from the parameter groups, as it should, and then asks the shards, which have none, once more
    (KeyError).
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


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if getattr(part, "optimizer", None) is not None]


def _torch_optimizers(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    return [part.optimizer for part in _parts(optimizer)]


@contextmanager
def arrays_only() -> Iterator[None]:
    """Let megatron-core's index caches hold arrays and nothing else.

    It reads them with ``allow_pickle=True``, which runs whatever pickle has been put in an array's place.
    """
    inner = numpy.load

    def load(*args: Any, **settings: Any) -> Any:
        return inner(*args, **{**settings, "allow_pickle": False})

    numpy.load = load  # type: ignore[assignment]
    try:
        yield
    finally:
        numpy.load = inner


@contextmanager
def process_group_for_blends(needed: bool) -> Iterator[None]:
    """Hold a process group of this process alone where ``needed`` and there is none.

    megatron-core's BlendedDataset asks for its rank even without a group.
    """
    if not needed or distributed.is_initialized():
        yield
        return
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()
