"""``dmc batch``: a file of requests in, a file of responses out, whatever happens in between."""

import argparse

from megatron.dmc import flags
from megatron.dmc.cli import options
from megatron.dmc.serving.config import BatchConfig

SAMPLING = tuple(name for name in options.SAMPLING if name != "seed")


def build_parser() -> flags.Parser:
    parser = flags.Parser(
        prog="dmc batch",
        description="Complete a file of requests, each line once.\n\n"
        "The same command, run again, goes on where it was interrupted. Exit status 75: stopped before the end.",
        examples="""
            dmc batch -i requests.jsonl.gz -o responses.jsonl --model Llama-2-7B-DMC-4x
            dmc batch -i requests.jsonl -o responses-0.jsonl --model Llama-2-7B-DMC-4x --shard 0/8 --max-tokens 256
            """,
    )
    flags.add_fields(parser, BatchConfig)
    options.add_sampling(parser, SAMPLING, "Parameters of lines that do not give them.", **dict.fromkeys(SAMPLING))
    options.add_engine(parser)
    parser.set_defaults(run=_run)
    return parser


main = flags.entry(build_parser)


def _run(args: argparse.Namespace) -> int:
    from megatron.dmc.serving import batch_run

    defaults = {name: value for name in SAMPLING if (value := getattr(args, name)) is not None}
    return batch_run.run(flags.read(BatchConfig, args), options.engine_config(args), defaults)
