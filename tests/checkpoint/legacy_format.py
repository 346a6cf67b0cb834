"""Writes small checkpoints exactly as Megatron-LM of 2024 does (branch ``dmc``, commit d36bf8d):
``mp_rank_*/model_optim_rng.pt``.

Everything that a real file has is there: the run's whole argument list with an enum of a module that exists no more,
numpy's and CUDA's random states, an optimizer, Transformer Engine's extra state, parameters that are views of one flat
buffer on a GPU.
"""

from __future__ import annotations

import argparse
import enum
import io
import pathlib
import random
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from megatron.dmc.config import ModelConfig

ENUM_MODULE = "megatron.core.enums_of_2024"
DMC_ARGS = dict(
    dmc_init_val=5.0,
    dmc_window_size=12,
    dmc_temp=0.1,
    dmc_cr=8.0,
    dmc_finetune=True,
    dmc_is_stage_one=False,
    dmc_paged_cache_size=40.0,
    dmc_paged_block_size=256,
)
"""Arguments that ``_add_dmc_args`` of the branch defines; checkpoints of its ``pretrain_gpt_with_dmc.py`` have all."""


class ModelType(enum.Enum):
    encoder_or_decoder = 1
    encoder_and_decoder = 2


@contextmanager
def temporary_module(name: str, *members: type) -> Iterator[None]:
    """While it is there, ``members`` are pickled as the module's. No trace of it is left."""
    module = types.ModuleType(name)
    before = [(member, member.__module__) for member in members]
    for member in members:
        setattr(module, member.__name__, member)
        member.__module__ = name
    sys.modules[name] = module
    try:
        yield
    finally:
        del sys.modules[name]
        for member, place in before:
            member.__module__ = place


def full_tensors(model: ModelConfig, padded: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Random parameters by Megatron Core's names (Transformer Engine spec), not cut, layers numbered through."""
    h, f, d = model.hidden_size, model.ffn_hidden_size, model.head_dim
    q, kv = model.num_attention_heads * d, model.kv_heads * d
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (padded, h)}
    for i in range(model.num_layers):
        attention, mlp = f"decoder.layers.{i}.self_attention.", f"decoder.layers.{i}.mlp."
        shapes |= {
            attention + "linear_proj.weight": (h, q),
            attention + "linear_qkv.layer_norm_weight": (h,),
            attention + "linear_qkv.weight": (q + 2 * kv, h),
        }
        if model.add_qkv_bias:
            shapes[attention + "linear_qkv.bias"] = (q + 2 * kv,)
        if model.qk_layernorm:
            shapes |= {attention + "q_layernorm.weight": (d,), attention + "k_layernorm.weight": (d,)}
        shapes |= {
            mlp + "linear_fc1.layer_norm_weight": (h,),
            mlp + "linear_fc1.weight": (2 * f, h),
            mlp + "linear_fc2.weight": (h, f),
        }
    shapes["decoder.final_layernorm.weight"] = (h,)
    if model.untie_embeddings_and_output_weights:
        shapes["output_layer.weight"] = (padded, h)
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def arguments(model: ModelConfig, padded: int, tp: int = 1, pp: int = 1, vpp: int = 1, **more: Any) -> dict[str, Any]:
    """The part of Megatron's arguments that says something of the model, and some of the rest."""
    gqa = model.kv_heads != model.num_attention_heads
    values = dict(
        num_layers=model.num_layers,
        encoder_num_layers=model.num_layers,
        decoder_num_layers=None,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        kv_channels=model.head_dim,
        group_query_attention=gqa,
        num_query_groups=model.kv_heads if gqa else 1,
        max_position_embeddings=model.max_position_embeddings,
        seq_length=model.max_position_embeddings,
        position_embedding_type="rope",
        use_rotary_position_embeddings=True,
        rotary_base=int(model.rotary_base),
        rotary_percent=1.0,
        rotary_interleaved=False,
        rotary_seq_len_interpolation_factor=None,
        use_rope_scaling=False,
        add_position_embedding=False,
        make_vocab_size_divisible_by=model.make_vocab_size_divisible_by,
        normalization="RMSNorm",
        norm_epsilon=model.norm_epsilon,
        apply_layernorm_1p=False,
        apply_residual_connection_post_layernorm=False,
        openai_gelu=False,
        squared_relu=False,
        swiglu=True,
        add_bias_linear=False,
        untie_embeddings_and_output_weights=model.untie_embeddings_and_output_weights,
        add_qkv_bias=model.add_qkv_bias,
        qk_layernorm=model.qk_layernorm,
        multi_latent_attention=False,
        num_experts=None,
        use_legacy_models=False,
        spec=None,
        init_method_std=model.init_method_std,
        init_method_xavier_uniform=False,
        transformer_impl="transformer_engine",
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        sequence_parallel=tp > 1,
        context_parallel_size=1,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        num_layers_per_virtual_pipeline_stage=model.num_layers // (pp * vpp) if vpp > 1 else None,
        vocab_size=None,
        padded_vocab_size=padded,
        tokenizer_type="SentencePieceTokenizer",
        tokenizer_model="tokenizer.model",
        params_dtype=torch.bfloat16,
        bf16=True,
        fp16=False,
        model_type=ModelType.encoder_or_decoder,
        data_path=["1.0", "wiki"],
        train_iters=2000,
        train_samples=2048000,
        iteration=99,
        curr_iteration=99,
        consumed_train_samples=102400,
        global_batch_size=1024,
        lr=3e-5,
        min_lr=3e-6,
        adam_eps=1e-8,
        data_cache_path=pathlib.PosixPath("cache"),
        rank=0,
        world_size=tp * pp,
    )
    return {**values, **more}


def cut(name: str, tensor: Tensor, rank: int, size: int) -> Tensor:
    """Tensor rank ``rank``'s share, as ColumnParallelLinear, RowParallelLinear and VocabParallelEmbedding have it."""
    if name.endswith("linear_fc1.weight"):
        return torch.cat([half.chunk(size)[rank] for half in tensor.chunk(2)])  # [2 * F, h] -> [2 * F / tp, h]
    if name.endswith(("linear_qkv.weight", "linear_qkv.bias", "word_embeddings.weight", "output_layer.weight")):
        return tensor.chunk(size)[rank]
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return tensor.chunk(size, dim=1)[rank]
    return tensor


def local_name(name: str) -> str:
    """Name of a parameter in the local layer spec."""
    name = name.replace("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")
    return name.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")


def extra_state() -> io.BytesIO:
    """Transformer Engine's before version 1.14, without FP8."""
    buffer = io.BytesIO()
    torch.save(None, buffer)
    return buffer


def chunk_state(
    full: dict[str, Tensor], t: int, tp: int, layers: range, first: bool, last: bool, spec: str
) -> OrderedDict:
    """``state_dict_for_save_checkpoint()`` of one model chunk, as views of one flat buffer."""
    shares: dict[str, Tensor] = {}
    for name, tensor in full.items():
        if name.startswith("decoder.layers."):
            _, _, number, rest = name.split(".", 3)
            if int(number) in layers:
                shares[f"decoder.layers.{int(number) - layers.start}.{rest}"] = cut(name, tensor, t, tp)
        elif first if name.startswith("embedding.") else last:
            shares[name] = cut(name, tensor, t, tp)
    if last and not first and "output_layer.weight" not in full:
        shares["output_layer.weight"] = cut("output_layer.weight", full["embedding.word_embeddings.weight"], t, tp)
    buffer = torch.cat([share.reshape(-1) for share in shares.values()])
    state, at = OrderedDict(), 0
    for name, share in shares.items():
        state[name if spec == "te" else local_name(name)] = buffer[at : at + share.numel()].view(share.shape)
        at += share.numel()
        if spec == "te" and name.endswith(
            ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")
        ):
            state[name.replace("weight", "_extra_state")] = extra_state()
    state["output_layer._extra_state"] = None
    state._metadata = OrderedDict()  # nn.Module.state_dict() has it
    return state


def rng_state() -> list[dict[str, Any]]:
    return [
        {
            "random_rng_state": random.getstate(),
            "np_rng_state": np.random.RandomState(1).get_state(),
            "torch_rng_state": torch.get_rng_state(),
            "cuda_rng_state": torch.zeros(16, dtype=torch.uint8),
            "rng_tracker_states": {"model-parallel-rng": torch.ones(16, dtype=torch.uint8)},
        }
    ]


def optimizer_state(models: list[OrderedDict]) -> dict[str, Any]:
    """Float16OptimizerWithFloat16Params around Adam."""
    main = [v.float() for model in models for v in model.values() if isinstance(v, Tensor)]
    state = {i: {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.ones_like(p)} for i, p in enumerate(main)}
    groups = [{"lr": 3e-5, "betas": (0.9, 0.95), "eps": 1e-8, "step": 100, "params": list(range(len(main)))}]
    return {"optimizer": {"state": state, "param_groups": groups}, "fp32_from_fp16_params": [main]}


def save_file(content: Any, path: Path) -> None:
    """``torch.save`` on a machine with a GPU."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        temporary_module(ENUM_MODULE, ModelType),
        mock.patch("torch.serialization.location_tag", lambda storage: "cuda:0"),
    ):
        torch.save(content, path)


def rank_directory(directory: Path, t: int, p: int, pp: int) -> Path:
    return directory / (f"mp_rank_{t:02d}" if pp == 1 else f"mp_rank_{t:02d}_{p:03d}")


def write(
    directory: Path,
    full: dict[str, Tensor],
    model: ModelConfig,
    *,
    tp: int = 1,
    pp: int = 1,
    vpp: int = 1,
    iteration: int = 100,
    spec: str = "te",
    prefix: str = "",
    optimizer: bool = True,
    change: Any = None,
    **more: Any,
) -> Path:
    """``directory`` with the tracker file and one iteration; returns the iteration's directory.

    Args:
        spec: "te" or "local".
        prefix: of every name, e.g. Float16Module's "module.".
        change: called with (content, t, p) before a file is written.
        more: arguments that differ.
    """
    target = directory / f"iter_{iteration:07d}"
    padded, count = full["embedding.word_embeddings.weight"].shape[0], model.num_layers // (pp * vpp)
    for t in range(tp):
        for p in range(pp):
            models = []
            for v in range(vpp):
                start = (v * pp + p) * count
                state = chunk_state(
                    full, t, tp, range(start, start + count), p == v == 0, (v, p) == (vpp - 1, pp - 1), spec
                )
                models.append(OrderedDict((prefix + name, value) for name, value in state.items()))
            args = argparse.Namespace(**arguments(model, padded, tp, pp, vpp, **more))
            content = {"args": args, "checkpoint_version": 3.0, "iteration": iteration}
            content |= {"model": models[0]} if vpp == 1 else {f"model{v}": state for v, state in enumerate(models)}
            if optimizer:
                content |= {
                    "optimizer": optimizer_state(models),
                    "opt_param_scheduler": {"max_lr": 3e-5, "num_steps": 102400},
                }
            content |= {"rng_state": rng_state(), "num_floating_point_operations_so_far": 3 * 10**20}
            if change is not None:
                change(content, t, p)
            save_file(content, rank_directory(target, t, p, pp) / "model_optim_rng.pt")
    (directory / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return target
