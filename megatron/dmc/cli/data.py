"""``dmc data``: training data."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor
from typing import Optional

from megatron.dmc import flags
from megatron.dmc.training.describe import DescribeConfig, describe
from megatron.dmc.training.preprocess import PreprocessConfig, preprocess

EXAMPLES = """
    dmc data preprocess --input a.jsonl b.jsonl.gz --tokenizer tokenizer.model --output-prefix data/train
    dmc data preprocess --input code.jsonl --json-key content --tokenizer Llama-2-7b-hf --output-prefix data/code
    dmc data describe datasets/pile_text_document --tokenizer tokenizer.model
"""


def build_parser() -> flags.Parser:
    parser = flags.Parser(prog="dmc data", description="Prepare training data.", examples=EXAMPLES)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    tokenize = flags.subcommand(
        commands, "preprocess", "Tokenize JSONL text, one document per line, into a Megatron indexed dataset", EXAMPLES
    )
    flags.add_fields(tokenize, PreprocessConfig)
    tokenize.set_defaults(run=_preprocess)
    look = flags.subcommand(
        commands, "describe", "Check an indexed dataset that Megatron-LM wrote, and describe it for training", EXAMPLES
    )
    flags.add_fields(look, DescribeConfig)
    look.set_defaults(run=_describe)
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwind, so that temporary files are removed
    return flags.run(build_parser(), argv, refused=(ValueError, OSError))


def _describe(args: argparse.Namespace) -> int:
    config = flags.read(DescribeConfig, args)
    print(f"{describe(config)}\n--data-path {config.prefix}")
    return 0


def _preprocess(args: argparse.Namespace) -> int:
    config = flags.read(PreprocessConfig, args)
    try:
        print(f"{preprocess(config)}\n--data-path {config.output_prefix}")
    except BrokenExecutor:
        print("error: a worker process was killed, by lack of memory perhaps; use fewer --workers", file=sys.stderr)
        return 1
    return 0
