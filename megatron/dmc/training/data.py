"""Training data: checks before a run, megatron-core datasets with a safe index cache, and batches for any layout."""

import hashlib
import json
import math
import os
import shutil
import signal
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Optional

import megatron.core
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from torch import distributed
from torch.utils.data import DataLoader, Dataset

from megatron.dmc.checkpoint.staging import sync_tree
from megatron.dmc.config import RunConfig
from megatron.dmc.training.disk import naming_disk_errors
from megatron.dmc.training.indexed_writer import Sidecar
from megatron.dmc.training.mcore_compat import arrays_only, process_group_for_blends
from megatron.dmc.training.tokenizer import Tokenizer

_FIELDS = ("tokens", "labels", "loss_mask", "position_ids")


def parse_blend(data_path: list[str], name: str = "data_path") -> tuple[list[str], Optional[list[float]]]:
    """Split ``[prefix, ...]`` or ``[weight, prefix, weight, prefix, ...]`` into absolute prefixes and weights.

    Returns:
        The prefixes, and their weights (any positive scale) or None when none are given.

    Raises:
        ValueError: weights and prefixes do not alternate, or a weight is not a positive number.
    """

    def number(text: str) -> Optional[float]:
        try:
            return float(text)
        except ValueError:
            return None

    numbers = [number(item) for item in data_path]
    if not any(n is not None for n in numbers):
        return [os.path.abspath(item) for item in data_path], None
    weights, prefixes = numbers[0::2], data_path[1::2]
    if len(data_path) % 2 or None in weights or any(n is not None for n in numbers[1::2]):
        raise ValueError(
            f"{name} {' '.join(data_path)} mixes weights and prefixes; give either only prefixes or "
            "weight prefix weight prefix ... (a dataset whose name is a number: write ./NAME)"
        )
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"{name} has the weight {weight}; weights must be positive numbers")
    return [os.path.abspath(item) for item in prefixes], weights


def check_datasets(config: RunConfig, tokenizer: Tokenizer) -> list[str]:
    """Refuse data that cannot be trained on. Reads a few small files, builds nothing and needs no process group.

    Returns:
        Warnings for the log: what could not be checked, and datasets whose documents do not begin as the tokenizer
        begins a text.

    Raises:
        ValueError: no training data is named; a file is missing or truncated; a dataset was made with another
            tokenizer, holds less than one sequence, or has more ids than the model's embedding.
    """
    data, model = config.data, config.model
    if not data.data_path:
        raise ValueError("data_path is empty; name at least one dataset prefix that dmc data preprocess wrote")
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"tokenizer {tokenizer.path} has {tokenizer.vocab_size} ids, the model's vocab_size is "
            f"{model.vocab_size}; use the model's own tokenizer, or raise vocab_size"
        )
    warnings = []
    for name in ("data_path", "valid_data_path"):
        for prefix in parse_blend(getattr(data, name), name)[0]:
            sidecar = _check_dataset(prefix, name, tokenizer, data.seq_length)
            warnings += [*_unchecked(sidecar, prefix), *_check_bos(sidecar, prefix, tokenizer)]
    return list(dict.fromkeys(warnings))


def _unchecked(sidecar: Sidecar, prefix: str) -> list[str]:
    if not sidecar.described:
        return []
    ends = "" if sidecar.eod_appended else " Not every document ends with EOD."
    return [
        f"{prefix} was made by other software (dmc data describe): its ids are all in the vocabulary, but that "
        f"{sidecar.tokenizer} made them could not be checked.{ends}"
    ]


def _check_bos(sidecar: Sidecar, prefix: str, tokenizer: Tokenizer) -> list[str]:
    """Compare what a dataset's documents begin with, and what a prompt will."""
    if sidecar.bos_prepended is tokenizer.adds_bos or tokenizer.bos_id is None:
        return []
    puts = f"tokenizer {tokenizer.path} puts {'BOS' if tokenizer.adds_bos else 'no BOS'} before a text"
    if sidecar.bos_prepended is None:
        return [f"{prefix}.json does not say whether the documents begin with BOS; {puts}"]
    begin = "begin with" if sidecar.bos_prepended else "do not begin with"
    flag = "--prepend-bos" if tokenizer.adds_bos else "--no-prepend-bos"
    return [
        f"{prefix}: documents {begin} BOS, but {puts}, and so does inference before a prompt; "
        f"dmc data preprocess {flag} makes them alike"
    ]


def _check_dataset(prefix: str, name: str, tokenizer: Tokenizer, seq_length: int) -> Sidecar:
    for suffix in (".bin", ".idx"):
        if not os.path.isfile(prefix + suffix):
            hint = f"; give the prefix without {suffix}" if prefix.endswith((".bin", ".idx")) else ""
            raise ValueError(f"{name}: {prefix}{suffix} does not exist{hint or '; make it with dmc data preprocess'}")
    sidecar = Sidecar.read(prefix)
    for suffix, expected in ((".bin", sidecar.bin_bytes), (".idx", sidecar.idx_bytes)):
        size = os.path.getsize(prefix + suffix)
        if size != expected:
            raise ValueError(
                f"{name}: {prefix}{suffix} has {size} bytes and should have {expected}: it is truncated or "
                "was replaced; copy it again, or run dmc data preprocess again"
            )
    if sidecar.tokenizer_fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"{name}: {prefix} was made with another tokenizer ({sidecar.tokenizer}, fingerprint "
            f"{sidecar.tokenizer_fingerprint[:12]}) than {tokenizer.path} ({tokenizer.fingerprint[:12]}); "
            "give that tokenizer, or run dmc data preprocess again with this one"
        )
    if sidecar.vocab_size > tokenizer.vocab_size:
        # Same files, other library: an old transformers may drop added tokens.
        raise ValueError(
            f"{name}: {prefix} has ids below {sidecar.vocab_size}, tokenizer {tokenizer.path} loads with "
            f"{tokenizer.vocab_size}; run dmc data preprocess again in this environment"
        )
    if sidecar.tokens < seq_length + 1:
        raise ValueError(
            f"{name}: {prefix} has {sidecar.tokens} tokens, less than one sample of seq_length + 1 = "
            f"{seq_length + 1}; use more data or a smaller seq_length"
        )
    return sidecar


def build_datasets(
    config: RunConfig, tokenizer: Tokenizer, train_samples: int, valid_samples: int
) -> tuple[Optional[Dataset], Optional[Dataset]]:
    """Build (or load from the cache) the training and the validation dataset. Call :func:`check_datasets` first.

    Collective where there is a process group: every rank gets both datasets, memory-mapped, so an unused one costs
    nothing. Samples are ``seq_length`` tokens with their labels, cut from the shuffled, concatenated documents; data
    that is too small is gone through several times.

    The order of the samples depends on the data, ``seq_length``, the seed, **and** ``train_samples``: a run that is
    resumed must pass the same numbers.

    Rank 0 builds the index cache under a name of its own and renames the finished directory, so that a killed build
    or two runs that start together never leave half a cache for the next one to load. The directory's name is a hash of
    all that the content depends on, the documents' lengths included: data that is made anew gets a new index.

    Args:
        train_samples: samples (sequences) needed over the whole stage; 0 builds no training dataset.
        valid_samples: samples per evaluation; 0, or an empty ``valid_data_path``, builds no validation dataset.

    Returns:
        ``(train, valid)``; each has at least the number of samples asked for, or is None.

    Raises:
        ValueError: the cache directory cannot be written, or other ranks cannot see it.
    """
    wanted = [("data_path", train_samples), ("valid_data_path", valid_samples)]
    blends = [_weighted_blend(getattr(config.data, name), name) if samples > 0 else None for name, samples in wanted]
    if not any(blends):
        return None, None
    sizes = [samples if blend else 0 for blend, (_, samples) in zip(blends, wanted)]

    with process_group_for_blends(any(blend is not None and len(blend[0]) > 1 for blend in blends)):
        rank = distributed.get_rank() if distributed.is_initialized() else 0
        # Rank 0 alone looks for the cache: looking is racy, and on NFS a failed look is remembered for a while.
        choice = [_choose_cache(config, tokenizer, blends, sizes)] if rank == 0 else [None]
        if distributed.is_initialized():
            distributed.broadcast_object_list(choice, src=0)
        cache = choice[0]
        if cache.problem:
            raise ValueError(cache.problem)
        builds = rank == 0 and cache.directory != cache.target
        settings = GPTDatasetConfig(
            random_seed=config.training.seed,
            sequence_length=config.data.seq_length,
            tokenizer=tokenizer,
            blend_per_split=[*blends, None],
            path_to_cache=cache.directory,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        try:
            with naming_disk_errors(Path(cache.directory), (OSError,)), arrays_only():
                train, valid, _ = BlendedMegatronDatasetBuilder(GPTDataset, [*sizes, 0], lambda: True, settings).build()
        except BaseException as error:
            if isinstance(error, ValueError) and not builds:
                raise ValueError(
                    f"the index cache {cache.directory} is damaged, or not of training's making ({error}); remove it, "
                    "and it is made anew"
                ) from error
            if rank != 0 and isinstance(error, FileNotFoundError):
                raise ValueError(
                    f"rank {rank} cannot see {error.filename}, which rank 0 wrote; set data_cache_path to a "
                    "directory that all nodes share"
                ) from error
            if builds:
                shutil.rmtree(cache.directory, ignore_errors=True)
            raise
        if distributed.is_initialized():
            distributed.barrier()  # every rank has opened the files; an open file survives the renaming
        if builds:
            _publish(cache.directory, cache.target)
    return train, valid


def _weighted_blend(data_path: list[str], name: str) -> Optional[tuple[list[str], Optional[list[float]]]]:
    """A blend for megatron-core. Several prefixes always get weights, their token counts when the user gives none:
    without weights megatron-core stops after one epoch, however many samples are asked for."""
    if not data_path:
        return None
    prefixes, weights = parse_blend(data_path, name)
    if len(prefixes) > 1 and weights is None:
        weights = [float(Sidecar.read(prefix).tokens) for prefix in prefixes]
    return prefixes, weights


class _Cache(NamedTuple):
    """Index cache of a run's datasets, as rank 0 chooses it for all."""

    directory: str
    """Directory to use now."""
    target: str
    """Directory to rename it to when it is finished; the same one when the cache exists."""
    problem: str = ""
    """Error message when there can be no cache."""


def _choose_cache(config: RunConfig, tokenizer: Tokenizer, blends: list, sizes: list[int]) -> _Cache:
    content = {
        "megatron_core": megatron.core.__version__,
        "tokenizer": tokenizer.fingerprint,
        "seed": config.training.seed,
        "seq_length": config.data.seq_length,
        "sizes": sizes,
        "blends": blends,
        "documents": [[Sidecar.read(prefix).idx_sha256 for prefix in blend[0]] for blend in blends if blend],
    }
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]
    first = next(blend for blend in blends if blend)[0][0]
    root = Path(config.data.data_cache_path or Path(first).parent / "cache").absolute()
    target = root / key
    if target.is_dir():
        return _Cache(str(target), str(target))
    building = root / f".{key}.{uuid.uuid4().hex[:8]}"
    try:
        building.mkdir(parents=True)
    except OSError as error:
        problem = f"the index cache {root} cannot be written ({error.strerror}); set data_cache_path to one that can"
        return _Cache("", "", problem)
    return _Cache(str(building), str(target))


def _publish(directory: str, target: str) -> None:
    """Give a finished cache its name, after its content is on disk."""
    sync_tree(Path(directory))
    try:
        os.rename(directory, target)
    except OSError:
        # Another run has published the same content first. Ours stays where it is: other nodes have its files mapped,
        # and over NFS they would lose them.
        if not os.path.isdir(target):
            raise


def batch_iterator(
    dataset: Optional[Dataset],
    *,
    consumed_samples: int,
    micro_batch_size: int,
    global_batch_size: int,
    dp_rank: int,
    dp_size: int,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[dict[str, torch.Tensor]]:
    """Iterate over the micro-batches of one data-parallel rank, step after step.

    The samples: with ``b = micro_batch_size``, ``G = global_batch_size``, step ``i`` (counted from the iterator's
    start), micro-batch ``m`` and rank ``r``, row ``j`` is sample

        consumed_samples + i * G + m * b * dp_size + r * b + j

    of the dataset (Megatron's order). So step i takes the same set of G samples whatever the layout, and an iterator
    that starts at ``consumed_samples = k`` goes on exactly where another would be after k samples. Nothing is random
    here; torch's global generator is not touched.

    Yields:
        ``G / (b * dp_size)`` dicts per step, on ``device``: tokens, labels, position_ids int64 [b, s]; loss_mask fp32
        [b, s]; sample_ids int64 [b], the index in the dataset. With ``dataset=None``, for a pipeline stage that needs
        no tokens, only sample_ids, without end. Otherwise it ends before a step that the dataset cannot fill.

    Raises:
        ValueError: the sizes do not divide, or ``dp_rank`` or ``consumed_samples`` are out of range.
    """
    if min(micro_batch_size, global_batch_size, dp_size) < 1 or global_batch_size % (micro_batch_size * dp_size):
        raise ValueError(
            f"global_batch_size {global_batch_size} is not a positive multiple of micro_batch_size "
            f"{micro_batch_size} x data parallel size {dp_size}"
        )
    if not 0 <= dp_rank < dp_size:
        raise ValueError(f"data-parallel rank {dp_rank} is not below the data-parallel size {dp_size}")
    if consumed_samples < 0:
        raise ValueError(f"consumed_samples is {consumed_samples}; it must not be negative")
    stop = None if dataset is None else len(dataset)  # type: ignore[arg-type]
    indices = _micro_batches(consumed_samples, stop, micro_batch_size, global_batch_size, dp_rank, dp_size)
    device = torch.device(device)
    if dataset is None:
        return ({"sample_ids": torch.tensor(rows, dtype=torch.int64, device=device)} for rows in indices)
    loader = DataLoader(
        _Samples(dataset),
        batch_sampler=indices,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_shield_worker,
        generator=torch.Generator(),  # else the loader takes a seed from the global one and shifts all later noise
    )
    return ({name: value.to(device, non_blocking=True) for name, value in batch.items()} for batch in loader)


def _micro_batches(
    start: int, stop: Optional[int], micro: int, batch: int, rank: int, ranks: int
) -> Iterator[list[int]]:
    while stop is None or start + batch <= stop:
        for first in range(start + rank * micro, start + batch, micro * ranks):
            yield list(range(first, first + micro))
        start += batch


class _Samples(Dataset):
    """Samples with the fields that training uses, and their index."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.dataset[index]
        return {**{name: sample[name] for name in _FIELDS}, "sample_ids": index}


def _shield_worker(_: int) -> None:
    """Let only the training process end its loader processes.

    SLURM signals every process of a job, and torch.distributed.run the whole process group. A loader that died of it
    would take the trainer down in the middle of the step that it wants to finish and save.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
