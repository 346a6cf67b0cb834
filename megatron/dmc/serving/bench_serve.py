"""``dmc bench serve``: load a running server and print what ``vllm bench serve`` prints.

Any OpenAI-compatible server will do. Random prompts are made of tokens that the server's ``/tokenize`` returns; for a
server without it, name a tokenizer or a file of prompts.
"""

import asyncio
import json
import os
import string
import time
from datetime import datetime
from pathlib import Path
from typing import Any, Optional

from megatron.dmc.serving.config import BenchServeConfig

ENDPOINTS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
WORDS = "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they"
TEXT = " ".join([WORDS, *string.ascii_letters, *string.digits])
"""Text whose tokens random prompts are made of."""


async def _call(client: Any, method: str, path: str, what: str, body: Optional[dict] = None) -> dict[str, Any]:
    import httpx2

    url = str(client.base_url).rstrip("/") + path
    try:
        response = await client.request(method, path, json=body)
        if response.status_code != 200:
            raise ValueError(f"{what} {url}: {response.status_code}: {response.text[:200]}")
        return response.json()
    except httpx2.HTTPError as error:
        raise ValueError(f"{what} {url}: {type(error).__name__}: {error}; is the server there?") from error


async def model_of(client: Any, config: BenchServeConfig) -> str:
    """Model of ``--model``, or the first that the server lists. Raises ``ValueError`` when it lists none."""
    if config.model is not None:
        return config.model
    listed = (await _call(client, "GET", "/v1/models", "no model at")).get("data") or []
    if not listed:
        raise ValueError(f"{client.base_url} lists no model; name one with --model")
    return listed[0]["id"]


class Tokens:
    """Tokens of the model and their text, from a tokenizer's directory or from the server."""

    def __init__(self, client: Any, model: str, directory: Optional[str]) -> None:
        self.client, self.model, self.tokenizer = client, model, None
        if directory is not None:
            from megatron.dmc.inference.text import load_tokenizer

            self.tokenizer = load_tokenizer(directory)
            if self.tokenizer is None:
                raise ValueError(f"{directory} has no tokenizer files")

    async def some(self) -> list[int]:
        """Distinct tokens, none of them special, to make random prompts of."""
        if self.tokenizer is not None:
            special = set(self.tokenizer.all_special_ids)
            return [token for token in range(len(self.tokenizer)) if token not in special]
        body = {"model": self.model, "prompt": TEXT, "add_special_tokens": False}
        try:
            found = await _call(self.client, "POST", "/tokenize", "no tokens from", body)
        except ValueError as error:
            raise ValueError(f"{error}; give --tokenizer DIR or --dataset-path FILE") from None
        return sorted(set(found["tokens"]))

    async def text(self, ids: list[int]) -> str:
        """Text of these tokens."""
        if self.tokenizer is not None:
            from megatron.dmc.inference.text import decode

            return decode(self.tokenizer, ids)
        body = {"model": self.model, "tokens": ids}
        return (await _call(self.client, "POST", "/detokenize", "no text from", body))["prompt"]


async def requests_of(config: BenchServeConfig, client: Any, model: str) -> list[tuple[bytes, int]]:
    """Body and prompt length of each request, made before the clock starts. The length of a text is 0: unknown."""
    import numpy as np

    from megatron.dmc.inference.bench import random_lens, read_prompts

    generator, chat = np.random.default_rng(config.seed), config.backend == "openai-chat"
    prompts: list[Any]
    if config.dataset_path is not None:
        prompts = list(read_prompts(config.dataset_path, config.num_prompts))
        lens = [0 if isinstance(prompt, str) else len(prompt) for prompt in prompts]
    else:
        tokens = Tokens(client, model, config.tokenizer)
        some = await tokens.some()
        lens = random_lens(config.input_len, config.random_range_ratio, config.num_prompts, generator)
        prompts = [generator.choice(some, size=length).tolist() for length in lens]
        if chat:
            prompts = [await tokens.text(ids) for ids in prompts]
    new = random_lens(config.output_len, config.random_range_ratio, config.num_prompts, generator)
    given = {name: value for name in SAMPLING if (value := getattr(config, name)) is not None}
    given |= {"ignore_eos": True} if config.ignore_eos else {}
    given |= {"stream": True, "stream_options": {"include_usage": True}}
    bodies = []
    for prompt, length, most in zip(prompts, lens, new):
        if not chat:
            body = {"prompt": prompt, "max_tokens": most}
        elif isinstance(prompt, str):
            body = {"messages": [{"role": "user", "content": prompt}], "max_completion_tokens": most}
        else:
            raise ValueError("a chat takes no token ids; give the prompts of --dataset-path as text")
        bodies.append((json.dumps({"model": model, **body, **given, **config.extra_body}).encode(), length))
    return bodies


async def benchmark(config: BenchServeConfig) -> dict[str, Any]:
    """Load the server and print the table of times. Returns what ``save`` writes.

    Raises:
        ValueError: wrong settings, or no request that succeeded.
    """
    config.check()
    import numpy as np
    from tqdm import tqdm

    from megatron.dmc.serving import load

    path = config.endpoint or ENDPOINTS[config.backend]
    key = os.environ.get("OPENAI_API_KEY")
    headers = ({"Authorization": f"Bearer {key}"} if key else {}) | dict(config.header)
    url = config.base_url or f"http://{config.host}:{config.port}"
    async with load.connect(url, headers, not config.insecure) as client:
        await ready(client, config)
        model = await model_of(client, config)
        bodies = await requests_of(config, client, model)

        async def send(i: int) -> load.Timed:
            return await load.ask(client, path, *bodies[i % len(bodies)])

        if config.num_warmups:
            await load.drive(send, [0.0] * config.num_warmups, config.max_concurrency or 8)
        generator = np.random.default_rng([config.seed, 1])
        times = load.arrivals(len(bodies), config.request_rate, config.burstiness, generator)
        bar = tqdm(total=len(bodies), disable=True if config.disable_tqdm else None)
        began = time.perf_counter()
        outputs = await load.drive(send, times, config.max_concurrency, bar.update)
        duration = time.perf_counter() - began
        bar.close()
    for output in [output for output in outputs if not output.success][:10]:
        print(f"failed: {output.error}")
    if not any(output.success for output in outputs):
        raise ValueError(f"none of {len(outputs)} requests was completed; the first one: {outputs[0].error}")
    percentiles, selected = config.metric_percentiles, config.percentile_metrics
    found = load.figures(outputs, duration, percentiles, dict(config.goodput), selected)
    print(load.block(found, percentiles, selected, config.request_rate, config.max_concurrency))
    return _head(config, model) | found | (load.details(outputs) if config.save_detailed else {})


async def ready(client: Any, config: BenchServeConfig) -> None:
    """Wait until the server lists its models. Raises ``ValueError`` when that takes too long."""
    seconds = config.ready_check_timeout_sec
    deadline = time.monotonic() + seconds
    while seconds:
        left = max(1.0, deadline - time.monotonic())
        try:
            # A server that loads its model may accept the connection long before it answers.
            await asyncio.wait_for(_call(client, "GET", "/v1/models", "no answer from"), left)
            return
        except TimeoutError:
            raise ValueError(f"no answer from {client.base_url} for {seconds:g} s") from None
        except ValueError as error:
            if time.monotonic() > deadline:
                raise ValueError(f"{error}, for {seconds:g} s") from None
            await asyncio.sleep(1)


def _head(config: BenchServeConfig, model: str) -> dict[str, Any]:
    rate = config.request_rate if config.request_rate != float("inf") else "inf"
    return {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": config.backend,
        "backend": config.backend,
        "label": config.label,
        "model_id": model,
        "tokenizer_id": config.tokenizer or model,
        "num_prompts": config.num_prompts,
        **dict(config.metadata),
        "request_rate": rate,
        "burstiness": config.burstiness,
        "max_concurrency": config.max_concurrency,
    }


def run(config: BenchServeConfig) -> int:
    """Load the server, print the table of times and save what was asked for. Returns the exit status."""
    save(config, asyncio.run(benchmark(config)))
    return 0


def save(config: BenchServeConfig, result: dict[str, Any]) -> Optional[Path]:
    """Write the result file if one was asked for. Returns its path."""
    if not config.save_result and not config.append_result:
        return None
    limit = f"-concurrency{config.max_concurrency}" if config.max_concurrency is not None else ""
    model = Path(result["model_id"]).name
    name = f"{config.label or config.backend}-{config.request_rate}qps{limit}-{model}-{result['date']}.json"
    path = (config.result_dir or Path()) / (config.result_filename or name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a" if config.append_result else "w", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
    return path
