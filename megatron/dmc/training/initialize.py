"""Process groups and devices of a run."""

import logging
import os
import warnings
from datetime import timedelta

import torch
from torch import distributed

from megatron.dmc.config import RunConfig
from megatron.dmc.training import cpu


def world_size() -> int:
    """Number of processes of this run, as torchrun or SLURM's wrapper set it; 1 without either."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_rank_0() -> bool:
    """True on rank 0, and without a launcher."""
    return int(os.environ.get("RANK", "0")) == 0


def device() -> torch.device:
    """Device of this process."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def initialize(config: RunConfig) -> None:
    """Join the process group (NCCL on GPUs, gloo without) and make Megatron's parallel groups.

    Without torchrun a group of one process is made. Raises ``ValueError`` when the layout does not fit the world size.
    """
    config.check(world_size())
    if not is_rank_0():
        warnings.filterwarnings("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    cpu.enable()
    from megatron.core import parallel_state, tensor_parallel

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not distributed.is_initialized():
        backend, timeout = ("nccl" if cuda else "gloo"), timedelta(minutes=config.parallel.distributed_timeout_minutes)
        if "RANK" in os.environ:
            distributed.init_process_group(backend, timeout=timeout)
        else:
            distributed.init_process_group(
                backend, store=distributed.HashStore(), rank=0, world_size=1, timeout=timeout
            )
    parallel = config.parallel
    if parallel_state.is_initialized():
        if parallel_state.get_tensor_model_parallel_world_size() != parallel.tensor_model_parallel_size or (
            parallel_state.get_pipeline_model_parallel_world_size() != parallel.pipeline_model_parallel_size
        ):
            raise RuntimeError("Megatron's groups exist with another layout; call shutdown() first")
        return
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
    )
    # On the CPU all ranks share one generator, which only the initial weights use.
    tensor_parallel.model_parallel_cuda_manual_seed(
        config.training.seed, inference_rng_tracker=not cuda, force_reset_rng=True
    )
    torch.manual_seed(config.training.seed)


def shutdown() -> None:
    """Leave the process groups. Safe to call twice."""
    from megatron.core import parallel_state

    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    if distributed.is_initialized():
        distributed.destroy_process_group()
