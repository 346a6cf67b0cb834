"""Flags that several commands share: those of the engine and of sampling."""

from __future__ import annotations

import argparse
from typing import Any

from megatron.dmc import flags
from megatron.dmc.inference.config import EngineConfig
from megatron.dmc.inference.sampling_params import SamplingParams

ENGINE = (
    "dtype",
    "load_format",
    "device",
    "tensor_parallel_size",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "block_size",
    "kv_cache_memory_bytes",
    "gpu_memory_utilization",
    "enforce_eager",
    "enable_prefix_caching",
)
SAMPLING = (
    "n",
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
)


def add_engine(parser: flags.Parser, **defaults: Any) -> None:
    """Add the flags of :class:`EngineConfig`, with ``defaults`` where they differ from its own."""
    flags.add_fields(parser.add_argument_group("engine"), EngineConfig, ENGINE, defaults)


def engine_config(args: argparse.Namespace, **more: Any) -> EngineConfig:
    """Engine settings of a command line, and ``more``, which win."""
    return EngineConfig(**{name: getattr(args, name) for name in ENGINE} | more)


def add_sampling(parser: flags.Parser, names: tuple[str, ...] = SAMPLING, text: str = "", **defaults: Any) -> None:
    """Add the flags of :class:`SamplingParams`, with ``defaults`` where they differ from its own."""
    flags.add_fields(parser.add_argument_group("sampling", text or None), SamplingParams, names, defaults)
