"""The ``dmc`` command: one subcommand in each module of this package, which is imported when it is called."""

import importlib
import sys
from collections.abc import Sequence
from typing import Optional

from megatron.dmc import __version__, flags

COMMANDS = {
    "train": "pre-train a model, or run one stage of a retrofit",
    "convert": "import, export, verify and inspect checkpoints",
    "data": "tokenize text into a training dataset",
    "plan": "estimate memory, time and serving capacity before a run",
    "eval": "measure perplexity and compression of trained checkpoints",
    "compare": "compare DMC with other ways to shrink the KV cache",
    "generate": "generate text from prompts",
    "serve": "serve a model over HTTP with OpenAI's API",
    "batch": "complete a file of requests, each line once",
    "bench": "measure throughput, latency and a running server",
    "build": "compile the kernels ahead of time",
}


def build_parser(name: str) -> flags.Parser:
    """Parser of one command."""
    return importlib.import_module(f"{__name__}.{name}").build_parser()


def _overview() -> flags.Parser:
    parser = flags.Parser(
        prog="dmc",
        description="Language models with a compressed KV cache: training, conversion, evaluation and serving.",
        examples="""
            dmc COMMAND --help
            dmc generate Llama-2-7B-DMC-4x --prompt "The cache of"
            """,
    )
    parser.add_argument("--version", action="version", version=f"megatron-dmc {__version__}", help="Print the version.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text)
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a command line. Exit status: 0; 2 with one line on stderr for a wrong command or value; 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return importlib.import_module(f"{__name__}.{argv[0]}").main(argv[1:])
    return flags.run(_overview(), argv)
