"""Flags that several commands share: those of the engine and of sampling."""

import argparse
import dataclasses
from typing import Any

from megatron.dmc import flags
from megatron.dmc.inference.config import EngineConfig
from megatron.dmc.inference.sampling_params import SamplingParams


def _names(cls: type, without: str) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(cls) if field.name not in without.split())


ENGINE = _names(EngineConfig, "num_pages max_prefix_snapshots prefix_cache_min_tokens seed")
SAMPLING = _names(
    SamplingParams,
    "logit_bias stop stop_token_ids bad_words allowed_token_ids ignore_eos logprobs prompt_logprobs structured_outputs "
    "skip_special_tokens include_stop_str_in_output",
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
