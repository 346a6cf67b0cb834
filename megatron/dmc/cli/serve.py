"""``dmc serve``: a model over HTTP, with OpenAI's API."""

import argparse

from megatron.dmc import flags
from megatron.dmc.cli import options
from megatron.dmc.serving.config import ServerConfig
from megatron.dmc.serving.http_config import HTTPConfig


def build_parser() -> flags.Parser:
    parser = flags.Parser(
        prog="dmc serve",
        description="Serve a model over HTTP, with OpenAI's API, vLLM's parameters and Prometheus metrics.",
        examples="""
            dmc serve Llama-2-7B-DMC-4x --port 8000
            dmc serve Llama-2-7B-DMC-4x --host 0.0.0.0 --api-key-file keys.txt --max-num-seqs 128
            dmc serve Llama-2-70B-DMC-4x --tensor-parallel-size 4
            """,
    )
    flags.add_fields(parser.add_argument_group("server"), ServerConfig)
    flags.add_fields(parser.add_argument_group("connections"), HTTPConfig)
    options.add_engine(parser)
    parser.set_defaults(run=_run)
    return parser


main = flags.entry(build_parser)


def _run(args: argparse.Namespace) -> int:
    config = flags.read(ServerConfig, args)
    http = flags.read(HTTPConfig, args)
    config.keys()  # wrong keys and certificates are refused before anything slow is imported
    http.check()
    from megatron.dmc.serving import server

    return server.run(config, http, options.engine_config(args))
