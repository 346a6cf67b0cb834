"""``dmc serve MODEL``: its options. What it runs is in ``server``, which is imported when it runs.

dmc serve Llama-2-7B-DMC-4x --port 8000 --api-key-file keys.txt
"""

from __future__ import annotations

import argparse
import os
import string
from collections.abc import Callable
from pathlib import Path

from megatron.dmc.inference import EngineConfig
from megatron.dmc.inference.cli import ENGINE_OPTIONS, Command, add_options

KEY_VARIABLE = "DMC_API_KEY"


def at_least(low: float, kind: type = int) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not value >= low or value == float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not a number of at least {low}")
        return value

    parse.__name__ = kind.__name__
    return parse


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="Hugging Face directory, plain or exported from a retrofit")
    parser.add_argument("--tokenizer", metavar="DIR", help="default: the model's")
    parser.add_argument(
        "--served-model-name", metavar="NAME", help="by which clients ask for it (default: MODEL as it is given)"
    )
    web = parser.add_argument_group("web server")
    web.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all (default: %(default)s)")
    web.add_argument("--port", type=int, default=8000, help="0: a free one, which the log names (default: %(default)s)")
    web.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help=f"may be given several times; ps shows it, but not {KEY_VARIABLE} or a file",
    )
    web.add_argument("--api-key-file", type=Path, metavar="FILE", help="one key per line")
    web.add_argument(
        "--max-num-queued-requests",
        type=at_least(1),
        default=1024,
        metavar="N",
        help="answers that may wait for a place in the cache; others get 503 (default: %(default)s)",
    )
    web.add_argument(
        "--max-num-queued-tokens", type=at_least(1), metavar="N", help="tokens of their prompts (default: no bound)"
    )
    web.add_argument(
        "--max-body-bytes", type=at_least(1), default=16 << 20, metavar="N", help="of a body (default: %(default)s)"
    )
    web.add_argument(
        "--shutdown-timeout",
        type=at_least(0, float),
        default=30.0,
        metavar="SECONDS",
        help="for what runs when SIGTERM comes (default: %(default)s)",
    )
    web.add_argument(
        "--metrics-prefix", choices=("dmc", "vllm"), default="dmc", help="of metrics (default: %(default)s)"
    )
    web.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), default="info", help="(default: %(default)s)"
    )
    web.add_argument("--disable-access-log", action="store_true", help="no line for each request")
    add_options(parser.add_argument_group("engine"), EngineConfig, ENGINE_OPTIONS)  # type: ignore[arg-type]


def read_keys(args: argparse.Namespace) -> list[str]:
    """From flag, file and environment. Raises ``ValueError`` that does not show them."""
    found = [("--api-key", key) for key in args.api_key]
    if args.api_key_file is not None:
        try:
            lines = args.api_key_file.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--api-key-file {args.api_key_file} cannot be read: {type(error).__name__}") from None
        inside = [(f"--api-key-file {args.api_key_file}", line.strip()) for line in lines if line.strip()]
        if not inside:
            raise ValueError(f"--api-key-file {args.api_key_file} holds no key; the server would be open to all")
        found += inside
    if KEY_VARIABLE in os.environ:
        found.append((KEY_VARIABLE, os.environ[KEY_VARIABLE].strip()))
    allowed = set(string.ascii_letters + string.digits + string.punctuation)
    for source, key in found:
        if not key or not set(key) <= allowed:
            raise ValueError(f"{source}: a key is empty, or has a space or a character that is not ASCII")
    return [key for _, key in found]


def _run(args: argparse.Namespace) -> int:
    keys = read_keys(args)
    try:
        from megatron.dmc.serving import server
    except ModuleNotFoundError as error:
        raise ValueError(f"dmc serve needs the package {error.name}: pip install 'megatron-dmc[serve]'") from error
    return server.run(args, keys)


COMMAND = Command("serve", "serve a model over HTTP, with OpenAI's API", _add, _run)
