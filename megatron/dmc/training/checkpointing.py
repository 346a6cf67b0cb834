"""Saving and loading ``torch_dist`` checkpoints in any layout (megatron-core's ``dist_checkpointing``)."""

import os
import pickle
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Optional

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.optimizer import MegatronOptimizer
from torch import distributed
from torch.distributed.checkpoint.api import CheckpointException

from megatron.dmc.checkpoint import checksums
from megatron.dmc.checkpoint.formats.torch_dist.metadata import read_metadata
from megatron.dmc.checkpoint.frozen_base import find_base
from megatron.dmc.checkpoint.manifest import (
    LATEST,
    TEMPORARY,
    Manifest,
    complete_checkpoints,
    iteration_directory,
    read_manifest,
    write_hf_files,
)
from megatron.dmc.checkpoint.pickled import cause, weights_only
from megatron.dmc.checkpoint.staging import sync, sync_tree
from megatron.dmc.model import DMCGPTModel, is_adapter
from megatron.dmc.training import mcore_compat
from megatron.dmc.training.disk import DiskError, naming_disk_errors

_EXTRA_STATE = "_extra_state"
"""Part of the names of Transformer Engine's fp8 scaling state. It is not saved: fp8 is not used here, and converted
checkpoints do not have it."""


@dataclass
class CheckpointWriter:
    """Writes the checkpoints of one run into its --save directory. All ranks call every method."""

    directory: Path
    """The --save directory."""
    chunks: list[DMCGPTModel]
    """This rank's pipeline chunks of the model."""
    optimizer: Optional[MegatronOptimizer]
    """None writes weights only."""
    config_text: str
    """Resolved configuration, saved as ``config.yaml``."""
    hf_files: Mapping[str, bytes] = field(default_factory=dict)
    """Small files of the Hugging Face model at the start of the lineage, for export."""
    keep: Optional[int] = None
    """Checkpoints that stay, the newest first; None keeps all."""
    retain: Optional[int] = None
    """Checkpoints whose iteration is a multiple of this stay too."""
    background: bool = False
    """Write in a forked process. The tensors are those of the moment of :meth:`save`, whatever training does to them
    afterwards: on the CPU the fork is the copy, from a GPU they are copied before it."""
    pending: Optional[Path] = field(default=None, init=False)
    """The checkpoint that :meth:`save` was called for and :meth:`finish` has not reported yet."""
    _queue: AsyncCallsQueue = field(default_factory=AsyncCallsQueue, init=False)

    def save(self, manifest: Manifest) -> None:
        """Write ``directory/iter_N``, which appears under its name only when it is complete.

        In the background it is complete once :meth:`finish` returns its path; only one is written at a time.
        """
        self.finish(wait=True)
        with self._naming_disk_errors():
            self._save(manifest)

    def _save(self, manifest: Manifest) -> None:
        target = iteration_directory(self.directory, manifest.iteration)
        temporary = self._make_temporary_directory(target.name)
        results = mcore_compat.use_results_file()
        request = dist_checkpointing.save(
            mcore_compat.give_own_storages(_state(self.chunks, self.optimizer, self._wanted, is_loading=False)),
            str(temporary),
            content_metadata=_metadata(),
            async_sharded_save=True,
            **mcore_compat.async_save_options(),
        )
        assert request is not None
        writes = request.async_fn is not None  # else this rank has nothing to write
        if writes:
            request = request._replace(async_fn=partial(_write_with_checksums, request.async_fn))
        request.add_finalize_fn(partial(self._complete, temporary, target, manifest, results if writes else None))
        self.pending = target
        if self.background:
            self._queue.schedule_async_request(request)
        else:
            request.execute_sync()

    def _wanted(self, name: str) -> bool:
        """Whether a parameter is saved: of a model with a frozen base, the adapters are."""
        return is_adapter(name) or not self.chunks[0].base_frozen

    def finish(self, wait: bool) -> Optional[Path]:
        """Complete the pending checkpoint if all of it is written, or ``wait`` for it. Returns its path then."""
        if self.pending is None:
            return None
        with self._naming_disk_errors():
            if self.background and not self._queue.maybe_finalize_async_calls(blocking=wait):
                return None
        path, self.pending = self.pending, None
        return path

    @contextmanager
    def _naming_disk_errors(self) -> Iterator[None]:
        """Errors of the disk by their names; what a failed save has written is removed, which makes room again."""
        try:
            with naming_disk_errors(self.directory, (Exception, CheckpointException)):
                yield
        except DiskError:
            if distributed.get_rank() == 0:
                for leftover in self.directory.glob(TEMPORARY + "*"):
                    shutil.rmtree(leftover, ignore_errors=True)
            raise

    def _make_temporary_directory(self, name: str) -> Path:
        # A name that no other start of this run has: a writer that outlived a killed one cannot get in between.
        names = [f"{TEMPORARY}{name}_{uuid.uuid4().hex[:8]}"]
        distributed.broadcast_object_list(names, src=0)
        temporary = self.directory / names[0]
        if distributed.get_rank() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            for leftover in self.directory.glob(TEMPORARY + "*"):
                self._remove_tree(leftover)
            temporary.mkdir()
        distributed.barrier()
        return temporary

    def _complete(
        self, temporary: Path, target: Path, manifest: Manifest, results: Optional[mcore_compat.ResultsFile]
    ) -> None:
        """Collect the checksums of all ranks' files, write what is not sharded, and give the checkpoint its name."""
        # megatron-core has taken its own results; the checksums are what _write_with_checksums put last.
        crc32 = {} if results is None else results.get_nowait()
        gathered: Optional[list] = [{}] * distributed.get_world_size() if distributed.get_rank() == 0 else None
        distributed.gather_object(crc32, gathered, dst=0)
        if gathered is not None:
            (temporary / "config.yaml").write_text(self.config_text)
            write_hf_files(temporary, self.hf_files)
            manifest.has_optimizer = self.optimizer is not None
            manifest.write(temporary, {name: value for part in gathered for name, value in part.items()})
            self._publish(temporary, target)
        distributed.barrier()

    def _publish(self, temporary: Path, target: Path) -> None:
        """Rename a complete checkpoint, note it as the latest, and remove those that need not stay."""
        sync_tree(temporary)
        if target.exists():
            self._remove_checkpoint(target)
        os.rename(temporary, target)
        sync(self.directory)
        latest = self.directory / (LATEST + ".tmp")
        latest.write_text(f"{int(target.name[5:])}\n")
        os.replace(latest, self.directory / LATEST)
        for old in complete_checkpoints(self.directory)[: -self.keep] if self.keep else []:
            if not self.retain or int(old.name[5:]) % self.retain:
                self._remove_checkpoint(old)

    def _remove_checkpoint(self, checkpoint: Path) -> None:
        """Rename, then remove: a half-deleted checkpoint must not look complete, whatever kills the job."""
        doomed = checkpoint.with_name(f"{TEMPORARY}old_{checkpoint.name}")
        os.rename(checkpoint, doomed)
        self._remove_tree(doomed)

    def _remove_tree(self, doomed: Path) -> None:
        thread = threading.Thread(target=shutil.rmtree, args=(doomed, True))
        thread.start()
        if not self.background:  # else training goes on: file systems take a tenth of a second and more per gigabyte
            thread.join()


def _write_with_checksums(write: Callable, rank: int, buckets: list, results: mcore_compat.ResultsFile) -> None:
    """Write this rank's files, then take their checksums, in whichever process it runs."""
    write(rank, buckets, results)
    paths = [Path(bucket[0]) for bucket in buckets]
    if all(path.is_file() for path in paths):  # else an error is among the results
        results.put(checksums.checksums(paths[0].parent, [path.name for path in paths]))


def load(
    directory: Path, chunks: list[DMCGPTModel], optimizer: Optional[MegatronOptimizer] = None, verify: bool = True
) -> None:
    """Load weights, and the optimizer's state when it is given, from one checkpoint, in any layout.

    The frozen weights of a checkpoint of adapters come from its base. Where a checkpoint has no adapters and the model
    has, these stay as they are.

    Args:
        verify: compare the files with the manifest's checksums first, each on one of the ranks.

    Raises:
        ValueError: a file is not what was written, by its name; or the checkpoint does not hold this model (missing
            tensors or other shapes), with megatron-core's message; or its base is gone or was changed.
    """
    base = find_base(directory, read_manifest(directory))
    if base != directory:
        _load(base, chunks, None, verify, wanted=lambda name: not is_adapter(name))
        _load(directory, chunks, optimizer, verify, wanted=is_adapter)
    elif any(is_adapter(name) for name in read_metadata(directory).state_dict_metadata):
        _load(directory, chunks, optimizer, verify)
    else:
        _load(directory, chunks, optimizer, verify, wanted=lambda name: not is_adapter(name))


def _load(
    directory: Path,
    chunks: list[DMCGPTModel],
    optimizer: Optional[MegatronOptimizer],
    verify: bool,
    wanted: Callable[[str], bool] = lambda name: True,
) -> None:
    """Load the parameters with ``wanted`` names, and the optimizer's state, from the files of one directory."""
    if verify:
        _verify(directory)
    metadata = read_metadata(directory)
    if optimizer is not None:
        mcore_compat.create_adam_state(optimizer)
    try:
        with weights_only(), mcore_compat.use_metadata(metadata):
            loaded = dist_checkpointing.load(_state(chunks, optimizer, wanted, is_loading=True), str(directory))
    except (
        dist_checkpointing.core.CheckpointingException,
        CheckpointException,  # derives from BaseException
        KeyError,
        AttributeError,
        RuntimeError,
        OSError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:
        raise ValueError(_refusal(directory, error)) from error
    for name, chunk in zip(_chunk_names(chunks), chunks, strict=True):
        found = chunk.load_state_dict(loaded[name], strict=False)
        odd = [k for k in (*found.missing_keys, *found.unexpected_keys) if _EXTRA_STATE not in k and wanted(k)]
        if odd:
            raise ValueError(f"checkpoint {directory} does not fit this model: {', '.join(odd[:5])}")
    if optimizer is not None:
        mcore_compat.load_optimizer_state(optimizer, loaded["optimizer"])
    else:
        distributed.barrier()


def _refusal(directory: Path, error: BaseException) -> str:
    """Message for a checkpoint that cannot be loaded, with the cause of the first rank that failed."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, pickle.UnpicklingError):
        return f"checkpoint {directory} is refused: {cause(error)}; it would run code when it is read"
    return f"checkpoint {directory} does not fit this model: {cause(error)}"


def _verify(directory: Path) -> None:
    """Compare checksums, each rank those of its share of the files. Raises ``ValueError`` on all ranks."""
    manifest = read_manifest(directory)
    share = checksums.share(manifest.files, distributed.get_rank(), distributed.get_world_size())
    found: list = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, checksums.damaged(directory, manifest.crc32, share))
    if odd := sorted(name for part in found for name in part):
        raise ValueError(
            f"checkpoint {directory} is damaged, its checksums differ: {', '.join(odd[:5])}"
            f"{', ...' if odd[5:] else ''}; restore it from a copy, or name another checkpoint"
        )


def _metadata() -> dict:
    """Layout-free format of the distributed optimizer, which any data-, tensor- and pipeline-parallel size may load.

    A new dict for every use: megatron-core writes its process groups into it.
    """
    return {"distrib_optim_sharding_type": "fully_reshardable"}


def _chunk_names(chunks: list[DMCGPTModel]) -> list[str]:
    return ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]


def _state(
    chunks: list[DMCGPTModel],
    optimizer: Optional[MegatronOptimizer],
    wanted: Callable[[str], bool],
    *,
    is_loading: bool,
) -> dict:
    """Sharded state of the parameters of the model's chunks with ``wanted`` names and, when given, the optimizer."""
    state = {}
    for name, chunk in zip(_chunk_names(chunks), chunks, strict=True):
        sharded = chunk.sharded_state_dict(metadata=_metadata())
        state[name] = {key: value for key, value in sharded.items() if _EXTRA_STATE not in key and wanted(key)}
    if optimizer is not None:
        # Parameters of all chunks in one dict: their global names do not collide, their local ones would.
        parameters = {f"{i}.{k}": v for i, part in enumerate(state.values()) for k, v in part.items()}
        if len(chunks) == 1:
            parameters = state["model"]
        state["optimizer"] = optimizer.sharded_state_dict(parameters, is_loading=is_loading, metadata=_metadata())
    return state
