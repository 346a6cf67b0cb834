"""``dmc bench serve``: load on a running server, in the words of ``vllm bench serve``.

    dmc bench serve --base-url http://127.0.0.1:8000 --input-len 512 --output-len 128 --num-prompts 200 --request-rate 4
    dmc bench serve --backend openai-chat --max-concurrency 16 --goodput ttft:500 tpot:50 --save-result

Any OpenAI-compatible server will do. Random prompts are made of tokens that the server itself makes of a text
(``/tokenize``); for one that cannot, name its tokenizer or a file of prompts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import string
import time
from datetime import datetime
from pathlib import Path
from typing import Any, Optional

from megatron.dmc.inference.cli import Command

ENDPOINTS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}
SAMPLING = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "repetition_penalty": float,
}
WORDS = " ".join(
    [
        "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they",
        *string.ascii_letters,
        *string.digits,
    ]
)


def _number(kind: type, least: float, above: bool = False) -> Any:
    def parse(text: str) -> Any:
        value = kind(text)
        if not (value > least if above else value >= least):
            raise argparse.ArgumentTypeError(f"{text} is not {'above' if above else 'at least'} {least:g}")
        return value

    parse.__name__ = kind.__name__
    return parse


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _percentiles(text: str) -> list[float]:
    values = [float(part) for part in _list(text)]
    if not all(0 <= value <= 100 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r} has a number that is not within 0 and 100")
    return values


def _metrics(text: str) -> list[str]:
    from megatron.dmc.serving.load import TITLES

    if wrong := [name for name in _list(text) if name not in TITLES]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is none of {', '.join(TITLES)}")
    return _list(text)


def _bound(text: str) -> tuple[str, float]:
    name, colon, value = text.partition(":")
    try:
        if not colon or name not in ("ttft", "tpot", "e2el") or float(value) < 0:
            raise ValueError
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not such as ttft:100, tpot:20 or e2el:3000 (ms)") from None


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key.strip(), value.strip()


def _add(parser: argparse.ArgumentParser) -> None:
    server = parser.add_argument_group("server")
    server.add_argument("--base-url", metavar="URL", help="instead of host and port")
    server.add_argument("--host", default="127.0.0.1", help="(default: %(default)s)")
    server.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    server.add_argument(
        "--backend", choices=tuple(ENDPOINTS), default="openai", help="completions or chat (default: %(default)s)"
    )
    server.add_argument("--endpoint", metavar="PATH", help="default: that of the backend")
    server.add_argument("--model", metavar="NAME", help="default: the first that the server lists")
    server.add_argument(
        "--header",
        type=_pair,
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="of every request; an API key is taken from OPENAI_API_KEY",
    )
    server.add_argument("--insecure", action="store_true", help="do not check the server's certificate")
    server.add_argument(
        "--ready-check-timeout-sec",
        type=_number(float, 0),
        default=0.0,
        metavar="SECONDS",
        help="wait so long for a first answer (default: do not ask for one)",
    )
    work = parser.add_argument_group("work")
    work.add_argument("--dataset-name", choices=("random", "custom"), default="random", help="(default: %(default)s)")
    work.add_argument("--dataset-path", metavar="FILE", help='JSONL, {"prompt": text or token ids} in each line')
    work.add_argument("--tokenizer", metavar="DIR", help="for random prompts; default: the server's")
    work.add_argument("--num-prompts", type=_number(int, 1), default=1000, help="requests (default: %(default)s)")
    work.add_argument(
        "--input-len", type=_number(int, 1), default=1024, help="tokens of a random prompt (default: %(default)s)"
    )
    work.add_argument("--output-len", type=_number(int, 1), default=128, help="max_tokens (default: %(default)s)")
    work.add_argument(
        "--random-range-ratio", type=float, default=0.0, metavar="R", help="lengths in N (1 - R) to N (1 + R)"
    )
    work.add_argument("--ignore-eos", action="store_true", help="answers of exactly --output-len")
    work.add_argument(
        "--extra-body", type=json.loads, default={}, metavar="JSON", help="more parameters of every request"
    )
    work.add_argument("--seed", type=int, default=0, help="of prompts and arrivals (default: %(default)s)")
    for name, kind in SAMPLING.items():
        work.add_argument("--" + name.replace("_", "-"), type=kind, help="default: the server's")
    traffic = parser.add_argument_group("traffic")
    traffic.add_argument(
        "--request-rate",
        type=_number(float, 0, above=True),
        default=float("inf"),
        metavar="RPS",
        help="open loop: requests per second (default: all at once)",
    )
    traffic.add_argument(
        "--burstiness",
        type=_number(float, 0, above=True),
        default=1.0,
        help="1: Poisson; below: in bursts; above: more even (default: %(default)s)",
    )
    traffic.add_argument(
        "--max-concurrency", type=_number(int, 1), metavar="N", help="closed loop: at most so many at a time"
    )
    traffic.add_argument(
        "--num-warmups", type=_number(int, 0), default=0, help="requests before (default: %(default)s)"
    )
    result = parser.add_argument_group("result")
    result.add_argument(
        "--percentile-metrics", type=_metrics, default=["ttft", "tpot", "itl", "e2el"], metavar="NAME,..."
    )
    result.add_argument(
        "--metric-percentiles", type=_percentiles, default=[99.0], metavar="P,...", help="(default: 99)"
    )
    result.add_argument(
        "--goodput", type=_bound, nargs="+", default=[], metavar="KEY:MS", help="such as ttft:100 tpot:20"
    )
    result.add_argument("--save-result", action="store_true", help="write a JSON")
    result.add_argument("--save-detailed", action="store_true", help="with every request in it")
    result.add_argument("--append-result", action="store_true", help="add a line to the file")
    result.add_argument("--result-dir", type=Path, metavar="DIR", help="default: here")
    result.add_argument("--result-filename", metavar="NAME", help="default: {label}-{rate}qps-{model}-{time}.json")
    result.add_argument("--label", help="default: the backend")
    result.add_argument("--metadata", type=_pair, nargs="+", default=[], metavar="KEY=VALUE", help="kept in the JSON")
    result.add_argument("--disable-tqdm", action="store_true", help="no progress bar")


def _run(args: argparse.Namespace) -> int:
    if args.dataset_name == "custom" and args.dataset_path is None:
        raise ValueError("--dataset-name custom needs --dataset-path FILE")
    if not isinstance(args.extra_body, dict):
        raise ValueError(f"--extra-body is {json.dumps(args.extra_body)[:100]}; it must be a JSON object")
    try:
        result = asyncio.run(benchmark(args))
    except ModuleNotFoundError as error:
        raise ValueError(
            f"dmc bench serve needs the package {error.name}: pip install 'megatron-dmc[serve]'"
        ) from error
    save(args, result)
    return 0


# ---------------------------------------------------------------------------------------------------------------- the
# work


async def _get(client: Any, method: str, path: str, what: str, body: Optional[dict] = None) -> dict[str, Any]:
    import httpx2

    url = str(client.base_url).rstrip("/") + path
    try:
        answer = await client.request(method, path, json=body)
        if answer.status_code != 200:
            raise ValueError(f"{what} {url}: {answer.status_code}: {answer.text[:200]}")
        return answer.json()
    except httpx2.HTTPError as error:
        raise ValueError(f"{what} {url}: {type(error).__name__}: {error}; is the server there?") from error


async def model_of(client: Any, args: argparse.Namespace) -> str:
    """Raises ``ValueError`` when the server lists none."""
    if args.model is not None:
        return args.model
    listed = (await _get(client, "GET", "/v1/models", "no model at")).get("data") or []
    if not listed:
        raise ValueError(f"{client.base_url} lists no model; name one with --model")
    return listed[0]["id"]


class Tokens:
    """Ordinary tokens of the model and their text, from a directory or from the server."""

    def __init__(self, client: Any, model: str, directory: Optional[str]) -> None:
        self.client, self.model, self.tokenizer = client, model, None
        if directory is not None:
            from megatron.dmc.inference.text import load_tokenizer

            self.tokenizer = load_tokenizer(directory)
            if self.tokenizer is None:
                raise ValueError(f"{directory} has no tokenizer files")

    async def some(self) -> list[int]:
        """Distinct tokens that text is made of, for random prompts."""
        if self.tokenizer is not None:
            special = set(self.tokenizer.all_special_ids)
            return [token for token in range(len(self.tokenizer)) if token not in special]
        body = {"model": self.model, "prompt": WORDS, "add_special_tokens": False}
        try:
            found = await _get(self.client, "POST", "/tokenize", "no tokens from", body)
        except ValueError as error:
            raise ValueError(f"{error}; give --tokenizer DIR or --dataset-path FILE") from None
        return sorted(set(found["tokens"]))

    async def text(self, ids: list[int]) -> str:
        if self.tokenizer is not None:
            return self.tokenizer.decode(ids)
        return (await _get(self.client, "POST", "/detokenize", "no text from", {"model": self.model, "tokens": ids}))[
            "prompt"
        ]


async def requests_of(args: argparse.Namespace, client: Any, model: str) -> list[tuple[bytes, int]]:
    """(body, expected tokens of the prompt) of each request, made before the clock runs."""
    import numpy as np

    from megatron.dmc.inference.bench import random_lens, read_prompts

    generator, chat = np.random.default_rng(args.seed), args.backend == "openai-chat"
    prompts: list[Any]
    if args.dataset_path is not None:
        prompts = list(read_prompts(args.dataset_path, args.num_prompts))
        lens = [0 if isinstance(prompt, str) else len(prompt) for prompt in prompts]  # the server's usage says it
    else:
        tokens = Tokens(client, model, args.tokenizer)
        some = await tokens.some()
        lens = random_lens(args.input_len, args.random_range_ratio, args.num_prompts, generator)
        prompts = [generator.choice(some, size=length).tolist() for length in lens]
        if chat:
            prompts = [await tokens.text(ids) for ids in prompts]
    new = random_lens(args.output_len, args.random_range_ratio, args.num_prompts, generator)
    given = {name: value for name in SAMPLING if (value := getattr(args, name)) is not None}
    given |= {"ignore_eos": True} if args.ignore_eos else {}
    bodies = []
    for prompt, length, most in zip(prompts, lens, new):
        if chat and not isinstance(prompt, str):
            raise ValueError("a chat takes no token ids; give the prompts of --dataset-path as text")
        asked = (
            {"messages": [{"role": "user", "content": prompt}], "max_completion_tokens": most}
            if chat
            else {"prompt": prompt, "max_tokens": most}
        )
        body = {
            "model": model,
            **asked,
            "stream": True,
            "stream_options": {"include_usage": True},
            **given,
            **args.extra_body,
        }
        bodies.append((json.dumps(body).encode(), length))
    return bodies


async def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Load the server and print the block; what is saved. Raises ``ValueError`` when no request was answered."""
    import numpy as np
    from tqdm import tqdm

    from megatron.dmc.serving import load

    path = args.endpoint or ENDPOINTS[args.backend]
    key = os.environ.get("OPENAI_API_KEY")
    headers = ({"Authorization": f"Bearer {key}"} if key else {}) | dict(args.header)
    async with load.connect(args.base_url or f"http://{args.host}:{args.port}", headers, not args.insecure) as client:
        await ready(client, path, args)
        model = await model_of(client, args)
        bodies = await requests_of(args, client, model)

        async def send(i: int) -> load.Timed:
            return await load.ask(client, path, *bodies[i % len(bodies)])

        if args.num_warmups:
            await load.drive(send, [0.0] * args.num_warmups, args.max_concurrency or 8)
        times = load.arrivals(len(bodies), args.request_rate, args.burstiness, np.random.default_rng([args.seed, 1]))
        bar = tqdm(total=len(bodies), disable=True if args.disable_tqdm else None)
        began = time.perf_counter()
        outputs = await load.drive(send, times, args.max_concurrency, bar.update)
        duration = time.perf_counter() - began
        bar.close()
    for output in [output for output in outputs if not output.success][:10]:
        print(f"failed: {output.error}")
    if not any(output.success for output in outputs):
        raise ValueError(f"none of {len(outputs)} requests was answered; the first one: {outputs[0].error}")
    bounds = dict(args.goodput)
    found = load.figures(outputs, duration, args.metric_percentiles, bounds, args.percentile_metrics)
    print(load.block(found, args.metric_percentiles, args.percentile_metrics, args.request_rate, args.max_concurrency))
    return _head(args, model) | found | (load.details(outputs) if args.save_detailed else {})


async def ready(client: Any, path: str, args: argparse.Namespace) -> None:
    """Wait until the server lists its models. Raises ``ValueError`` when it takes too long."""
    deadline = time.monotonic() + args.ready_check_timeout_sec
    while args.ready_check_timeout_sec:
        try:
            await _get(client, "GET", "/v1/models", "no answer from")
            return
        except ValueError as error:
            if time.monotonic() > deadline:
                raise ValueError(f"{error}, for {args.ready_check_timeout_sec:g} s") from None
            await asyncio.sleep(1)


def _head(args: argparse.Namespace, model: str) -> dict[str, Any]:
    rate = args.request_rate if args.request_rate != float("inf") else "inf"
    return {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": args.backend,
        "backend": args.backend,
        "label": args.label,
        "model_id": model,
        "tokenizer_id": args.tokenizer or model,
        "num_prompts": args.num_prompts,
        **dict(args.metadata),
        "request_rate": rate,
        "burstiness": args.burstiness,
        "max_concurrency": args.max_concurrency,
    }


def save(args: argparse.Namespace, result: dict[str, Any]) -> Optional[Path]:
    """Write what was asked for; where."""
    if not args.save_result and not args.append_result:
        return None
    limit = f"-concurrency{args.max_concurrency}" if args.max_concurrency is not None else ""
    model = Path(result["model_id"]).name
    name = f"{args.label or args.backend}-{args.request_rate}qps{limit}-{model}-{result['date']}.json"
    path = (args.result_dir or Path()) / (args.result_filename or name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a" if args.append_result else "w", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
    return path


COMMAND = Command("serve", "load a running server and take the times of its answers", _add, _run)
