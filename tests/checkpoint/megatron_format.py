"""``torch_dist`` checkpoints as Megatron-LM writes them: a stock ``GPTModel`` and megatron-core's own ``save``."""

from __future__ import annotations

import argparse
import dataclasses
import io
import multiprocessing
import os
import socket
import zlib
from pathlib import Path
from typing import Any, Optional
from unittest import mock

import legacy_format
import torch
from helpers.processes import ROOT
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from torch import Tensor

from megatron.dmc.config import ModelConfig, RunConfig
from megatron.dmc.training import initialize, mcore_compat
from megatron.dmc.training.model import build_optimizer, transformer_config

METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "singleton_local_shards": False}


def stock_model(run: RunConfig, **stage: Any) -> GPTModel:
    """Megatron's own model with its local layers: nothing of this package but the numbers."""
    model = run.model
    return GPTModel(
        config=dataclasses.replace(transformer_config(run), use_te_activation_func=False),
        transformer_layer_spec=get_gpt_layer_local_spec(qk_layernorm=model.qk_layernorm, normalization="RMSNorm"),
        vocab_size=model.padded_vocab_size,
        max_sequence_length=model.max_position_embeddings,
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_base=model.rotary_base,
        rope_scaling=model.rope_scaling is not None,
        rope_scaling_factor=(model.rope_scaling or {}).get("factor", 8.0),
        **stage,
    ).eval()


def full_tensor(key: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Value of a whole parameter, from its name."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    return (torch.randn(shape, generator=generator) * 0.1 + ("norm" in key)).to(dtype)


@torch.no_grad()
def fill(model: GPTModel) -> None:
    """Give every parameter, wherever its shard lies, the values of :func:`full_tensor`."""

    def visit(value: Any) -> None:
        if isinstance(value, dict):
            [visit(inner) for inner in value.values()]
        elif isinstance(value, list):
            [visit(inner) for inner in value]
        elif isinstance(value, ShardedTensor) and value.data is not None:
            whole = full_tensor(value.key, value.global_shape, value.dtype)
            box = whole[tuple(slice(o, o + n) for o, n in zip(value.global_offset, _local(value), strict=True))]
            value.data.copy_(box.reshape(value.data.shape))

    state = model.sharded_state_dict(metadata=dict(METADATA))
    apply_factories(state)  # gate and up are views of one parameter
    visit(state)


def _local(tensor: ShardedTensor) -> tuple[int, ...]:
    return (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)


@torch.no_grad()
def logits(model: GPTModel, tokens: Tensor) -> Tensor:
    """[b, s, padded vocabulary]"""
    mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)[None, None]
    return model(tokens, torch.arange(tokens.shape[1])[None].expand_as(tokens), mask)


def arguments(model: ModelConfig, **more: Any) -> argparse.Namespace:
    """The run's arguments as Megatron-LM saves them."""
    values = legacy_format.arguments(model, model.padded_vocab_size, model_type=ModelType.encoder_or_decoder, **more)
    return argparse.Namespace(**values)


def save(
    directory: Path,
    model: GPTModel,
    args: Optional[argparse.Namespace],
    *,
    iteration: int = 100,
    optimizer: Any = None,
    rename: Any = None,
    extra_state: bool = False,
    **metadata: Any,
) -> Path:
    """``directory`` with the tracker file and one iteration; returns the iteration's directory.

    Args:
        rename: name of a sharded tensor -> the name to save it by.
        extra_state: add what Transformer Engine's layers have beside their parameters.
        metadata: that differs.
    """
    target = directory / f"iter_{iteration:07d}"
    if torch.distributed.get_rank() == 0:
        target.mkdir(parents=True)
        (directory / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    torch.distributed.barrier()
    said = {**METADATA, **metadata}
    state: dict[str, Any] = {"checkpoint_version": 3.0, "iteration": iteration}
    if args is not None:
        state["args"] = args
    state["model"] = model.sharded_state_dict(metadata=dict(said))
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(state["model"], metadata=dict(said))
    if extra_state:
        for name in [n for n in state["model"] if n.endswith("linear_qkv.weight")]:
            key = name.replace("weight", "_extra_state")
            state["model"][key] = ShardedObject(f"{key}", io.BytesIO(b"scales"), (1,), (0,))
    if rename is not None:
        apply_factories(state)
        _rename(state, rename)
    mcore_compat.use_results_file()  # else a process with another torch for every test, see there
    dist_checkpointing.save(state, str(target), content_metadata=said)
    return target


def load(model: GPTModel, checkpoint: Path) -> dict[str, Any]:
    """Load weights as Megatron-LM does; returns what lay beside them."""
    metadata = dist_checkpointing.load_content_metadata(str(checkpoint))
    state = {"model": model.sharded_state_dict(metadata=dict(metadata))}
    loaded = dist_checkpointing.load(state, str(checkpoint))
    model.load_state_dict(loaded.pop("model"))
    return loaded


def _rename(value: Any, rename: Any) -> None:
    if isinstance(value, dict):
        [_rename(inner, rename) for inner in value.values()]
    elif isinstance(value, list):
        [_rename(inner, rename) for inner in value]
    elif isinstance(value, ShardedTensor):
        value.key = rename(value.key)


def save_in_processes(directory: Path, run: RunConfig, tp: int, pp: int) -> None:
    """:func:`save` of the model that :func:`fill` makes, by one process for each rank, with the optimizer's state."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers.tiny_preload"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": str(tp * pp), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    run.parallel.tensor_model_parallel_size, run.parallel.pipeline_model_parallel_size = tp, pp
    run.parallel.use_distributed_optimizer = True
    run.training.global_batch_size = run.training.micro_batch_size
    path = os.pathsep.join([*(str(ROOT / "tests" / part) for part in ("", "checkpoint")), str(ROOT)])
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=path):
        ranks = [
            context.Process(target=_rank, args=(directory, run, {**world, "RANK": str(r)})) for r in range(tp * pp)
        ]
        for process in ranks:
            process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0] * len(ranks)


def _rank(directory: Path, run: RunConfig, env: dict[str, str]) -> None:
    os.environ.update({**env, "LOCAL_RANK": env["RANK"]})
    torch.set_num_threads(1)  # forked: OpenMP must not start threads
    initialize.initialize(run)
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    model = stock_model(run, pre_process=first, post_process=last)
    model.model_type = ModelType.encoder_or_decoder
    fill(model)
    settings = DistributedDataParallelConfig(use_distributed_optimizer=True)
    chunk = DistributedDataParallel(model.config, settings, model)
    optimizer = build_optimizer(run, [chunk])
    mcore_compat.create_adam_state(optimizer)
    p = run.parallel
    sizes = dict(tp=p.tensor_model_parallel_size, pp=p.pipeline_model_parallel_size, vocab_size=run.model.vocab_size)
    save(directory, model, arguments(run.model, **sizes), optimizer=optimizer)
    initialize.shutdown()
