"""``dmc bench``: throughput and latency of models side by side, and load on a running server."""

from collections.abc import Callable
from typing import Any

from megatron.dmc import flags
from megatron.dmc.cli import options
from megatron.dmc.inference.bench_models import LatencyConfig, ThroughputConfig, latency, throughput
from megatron.dmc.inference.config import EngineConfig
from megatron.dmc.serving.config import BenchServeConfig

EXAMPLES = """
    dmc bench throughput Llama-2-7B Llama-2-7B-DMC-4x --input-len 512,2048 --kv-cache-memory-bytes 8000000000
    dmc bench latency llama-7b-config/ --load-format dummy --compression-ratio 1,4,8 --batch-size 1,16
    dmc bench serve --base-url http://127.0.0.1:8000 --input-len 512 --num-prompts 200 --request-rate 4
    dmc bench serve --backend openai-chat --max-concurrency 16 --goodput ttft:500 tpot:50 --save-result
"""


def build_parser() -> flags.Parser:
    parser = flags.Parser(
        prog="dmc bench", description="Measure speed and memory, with vLLM's flags and figures.", examples=EXAMPLES
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_offline(commands, "throughput", "Tokens per second of many requests at once", ThroughputConfig, throughput)
    _add_offline(commands, "latency", "Seconds of one batch of requests", LatencyConfig, latency)
    flags.add_command(
        commands, "serve", "Load a running server and time its responses", EXAMPLES, BenchServeConfig, _serve
    )
    return parser


main = flags.entry(build_parser)


def _add_offline(
    commands: Any, name: str, text: str, config: type, measure: Callable[[Any, EngineConfig], int]
) -> None:
    parser = flags.subcommand(commands, name, text, EXAMPLES)
    flags.add_fields(parser, config)
    # Iterations repeat their prompts.
    options.add_engine(parser, enable_prefix_caching=False)
    parser.set_defaults(run=lambda args: measure(flags.read(config, args), options.engine_config(args)))


def _serve(config: BenchServeConfig) -> int:
    from megatron.dmc.serving import bench_serve

    return bench_serve.run(config)
