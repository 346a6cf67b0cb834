"""``dmc data``: training data."""

import sys
from concurrent.futures import BrokenExecutor

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
    tokenize = "Tokenize JSONL text, one document per line, into a Megatron indexed dataset"
    flags.add_command(commands, "preprocess", tokenize, EXAMPLES, PreprocessConfig, _preprocess)
    look = "Check an indexed dataset that Megatron-LM wrote, and describe it for training"
    flags.add_command(commands, "describe", look, EXAMPLES, DescribeConfig, _describe)
    return parser


main = flags.entry(build_parser, unwinds=True)


def _describe(config: DescribeConfig) -> int:
    print(f"{describe(config)}\n--data-path {config.prefix}")
    return 0


def _preprocess(config: PreprocessConfig) -> int:
    try:
        print(f"{preprocess(config)}\n--data-path {config.output_prefix}")
    except BrokenExecutor:
        print("error: a worker process was killed, by lack of memory perhaps; use fewer --workers", file=sys.stderr)
        return 1
    return 0
