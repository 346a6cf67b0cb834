"""Megatron in the process of the tests, and small models there."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import random as mcore_random
from torch import distributed
from torch.distributed import distributed_c10d

from megatron.dmc.config import RunConfig
from megatron.dmc.model import DMCGPTModel
from megatron.dmc.training import cpu, initialize
from megatron.dmc.training.model import transformer_config

VOCAB = 96


@contextmanager
def megatron_in_process(run: RunConfig) -> Iterator[None]:
    """Initialized, and no trace of it (nor of the CPU layer's patches) afterwards."""
    places = [
        (torch.cuda, "current_device"),
        (torch.cuda, "synchronize"),
        (torch.cuda, "current_stream"),
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


def leave_groups() -> None:
    """End all process groups but the world, so that the process can go on with another layout.

    Megatron forgets its groups and ends none: each keeps threads of gloo, which wake up at every collective of the
    layouts that follow.
    """
    parallel_state.destroy_model_parallel()
    distributed.barrier()
    for group in list(distributed_c10d._world.pg_map):
        if group is not distributed.group.WORLD:
            distributed.destroy_process_group(group)
    gc.collect()  # a model's modules hold them too, in cycles


def run_config(dmc: dict | None = None, **model) -> RunConfig:
    sizes = dict(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=VOCAB,
        make_vocab_size_divisible_by=8,
        max_position_embeddings=256,
        init_method_std=0.15,
    )
    return RunConfig.from_dict(
        {
            "model": {**sizes, **model},
            "dmc": dmc or {},
            "stage": dict(stage="retrofit", target_cr=4.0),
            "data": dict(seq_length=64),
            "training": dict(global_batch_size=1),
        }
    )


def device() -> torch.device:
    return initialize.device()


def build(run: RunConfig, *, carry: bool = False, seed: int = 1) -> DMCGPTModel:
    """In eval mode; norms' weights and biases are drawn too, so that none of them is without effect."""
    torch.manual_seed(seed)
    model = DMCGPTModel(transformer_config(run), run.model, run.dmc, carry=carry, transformer_impl="local").to(device())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
            elif "layernorm" in name:
                parameter.uniform_(0.5, 1.5)
    return model.eval()
