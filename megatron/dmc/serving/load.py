"""Load generator of ``dmc bench serve``: requests to an OpenAI-compatible server, timed token by token, and figures."""

import asyncio
import json
import resource
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Optional

import httpx2
import numpy as np

NOT_OPENAI = (KeyError, TypeError, AttributeError)
"""Errors of reading an event that does not have OpenAI's shape."""


@dataclass
class Timed:
    """Request as the client saw it; times in seconds."""

    prompt_len: int = 0
    """Prompt tokens, as counted by the server or else as sent."""
    start_time: float = 0.0
    queue_time: float = 0.0
    """Time from its arrival to its start, spent waiting for one of ``max_concurrency`` places."""
    ttft: float = 0.0
    itl: list[float] = field(default_factory=list)
    latency: float = 0.0
    """Time from its start to the last token."""
    text: str = ""
    usage_tokens: Optional[int] = None
    """Generated tokens, as counted by the server."""
    slots: int = 0
    """KV slots of the completion, from ``usage.dmc``."""
    states: float = 0.0
    """KV slots that an uncompressed cache would have taken."""
    success: bool = False
    error: str = ""
    _last: float = 0.0

    @property
    def output_tokens(self) -> int:
        """Generated tokens; events with tokens are counted if the server sends no usage."""
        return self.usage_tokens if self.usage_tokens is not None else len(self.itl) + (self.ttft > 0)

    def token(self, text: str, now: float) -> None:
        """Record the arrival of a token."""
        if self.ttft == 0:
            self.ttft = now - self.start_time
        else:
            self.itl.append(now - self._last)
        self._last, self.latency = now, now - self.start_time
        self.text += text

    def take(self, chunk: dict[str, Any], now: float) -> bool:
        """Record an event of the stream. Returns whether it ends the completion; raises ``ValueError`` for an error."""
        if chunk.get("error"):
            raise ValueError(f"the server says: {json.dumps(chunk['error'])[:500]}")
        ended = False
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta")
            text = choice.get("text") if delta is None else delta.get("content")
            opening = delta is not None and "role" in delta and not text  # the first event of a chat holds no token
            if text is not None and not opening:
                self.token(text, now)
            ended = ended or choice.get("finish_reason") is not None
        if usage := chunk.get("usage"):
            self.usage_tokens = usage.get("completion_tokens", self.usage_tokens)
            self.prompt_len = usage.get("prompt_tokens", self.prompt_len)
            if dmc := usage.get("dmc"):
                self.slots, self.states = dmc["slots"], dmc["slots"] * dmc["compression_ratio"]
        return ended


async def ask(client: httpx2.AsyncClient, path: str, body: bytes, prompt_len: int = 0) -> Timed:
    """Send a streaming request and time its tokens. A failure is recorded in ``error`` and not raised.

    Args:
        body: JSON of the request, with ``stream: true``.
    """
    found, ended = Timed(prompt_len, time.perf_counter()), False
    try:
        async with client.stream("POST", path, content=body, headers={"Content-Type": "application/json"}) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                found.error = f"{response.status_code}: {text[:500]}"
                return found
            async for event in httpx2.EventSource(response):
                now = time.perf_counter()
                if event.data == "[DONE]":
                    ended = True
                    break
                ended = found.take(json.loads(event.data), now) or ended
    except (httpx2.HTTPError, ValueError, *NOT_OPENAI) as error:
        found.error = f"{type(error).__name__}: {error}"
        return found
    found.success = ended and found.ttft > 0
    if not found.success:
        found.error = "the stream ended before the completion did" if not ended else "the completion has no tokens"
    return found


@asynccontextmanager
async def connect(base_url: str, headers: dict[str, str], verify: bool = True) -> AsyncIterator[httpx2.AsyncClient]:
    """HTTP client without a limit on connections and on the time of a response."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # a connection is an open file
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard != resource.RLIM_INFINITY else max(soft, 65536), hard))
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    timeout = httpx2.Timeout(None, connect=60.0)
    async with httpx2.AsyncClient(
        base_url=base_url, headers=headers, limits=limits, timeout=timeout, verify=verify
    ) as client:
        yield client


def arrivals(count: int, rate: float, burstiness: float, generator: np.random.Generator) -> list[float]:
    """Arrival times of requests in seconds from the start, as ``vllm bench serve`` draws them.

    Intervals have a gamma distribution of shape ``burstiness``, where 1 is a Poisson process. They are scaled so that
    the last request arrives after exactly ``count / rate`` seconds.
    """
    if not rate > 0 or not burstiness > 0:
        raise ValueError(f"request_rate is {rate!r} and burstiness {burstiness!r}; both must be above 0")
    if rate == float("inf"):
        return [0.0] * count
    intervals = np.ones(count) if burstiness == float("inf") else generator.gamma(burstiness, size=count)
    times = intervals.cumsum()
    return (times * (count / rate / times[-1])).tolist()


async def drive(
    send: Callable[[int], Awaitable[Timed]],
    times: Sequence[float],
    max_concurrency: Optional[int] = None,
    done: Callable[[], None] = lambda: None,
) -> list[Timed]:
    """Send request i at ``times[i]`` seconds, or later, when one of ``max_concurrency`` places is free."""
    places = asyncio.Semaphore(max_concurrency) if max_concurrency else None
    began = time.perf_counter()

    async def one(i: int) -> Timed:
        arrived = began + times[i]
        if places is None:
            found = await send(i)
        else:
            async with places:
                found = await send(i)
        found.queue_time = max(0.0, found.start_time - arrived)
        done()
        return found

    tasks = []
    for i, at in enumerate(times):
        wait = began + at - time.perf_counter()
        if wait > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(one(i)))
    return list(await asyncio.gather(*tasks))


# ----------------------------------------------------------------------------------------------------------- figures

TITLES = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
}


def tpot_of(found: Timed) -> Optional[float]:
    """Mean time per token after the first, or None for a completion of one token."""
    return (found.latency - found.ttft) / (found.output_tokens - 1) if found.output_tokens > 1 else None


def figures(
    outputs: Sequence[Timed],
    duration: float,
    percentiles: Sequence[float],
    goodput: dict[str, float],
    selected: Sequence[str] = tuple(TITLES),
) -> dict[str, Any]:
    """Figures of a run under the keys of ``vllm bench serve --save-result``, and the compression ratio, if known.

    Args:
        duration: seconds from the first arrival to the end of the last response.
        goodput: upper bounds in milliseconds on ``ttft``, ``tpot``, ``e2el`` of a good request.
    """
    good = [output for output in outputs if output.success]
    tokens = sum(output.output_tokens for output in good)
    asked = sum(output.prompt_len for output in good)
    kept = sum(_keeps(output, goodput) for output in good)
    found: dict[str, Any] = {
        "duration": duration,
        "completed": len(good),
        "failed": len(outputs) - len(good),
        "total_input_tokens": asked,
        "total_output_tokens": tokens,
        "request_throughput": len(good) / duration,
        "request_goodput": kept / duration if goodput else None,
        "output_throughput": tokens / duration,
        "total_token_throughput": (asked + tokens) / duration,
        "max_output_tokens_per_s": peak_tokens(good),
        "max_concurrent_requests": peak_requests(good),
    }
    series = {
        "ttft": [o.ttft for o in good],
        "tpot": [t for o in good if (t := tpot_of(o)) is not None],
        "itl": [t for o in good for t in o.itl],
        "e2el": [o.latency for o in good],
    }
    for name in selected:
        values = 1e3 * np.array(series[name] or [0.0])
        found |= {
            f"mean_{name}_ms": values.mean().item(),
            f"median_{name}_ms": np.median(values).item(),
            f"std_{name}_ms": values.std().item(),
        }
        found |= {f"p{p:g}_{name}_ms": np.percentile(values, p).item() for p in percentiles}
    slots = sum(output.slots for output in good)
    found["compression_ratio"] = sum(output.states for output in good) / slots if slots else None
    return found


def _keeps(output: Timed, bounds: dict[str, float]) -> bool:
    seen = {"ttft": output.ttft, "tpot": tpot_of(output) or 0.0, "e2el": output.latency}
    return all(1e3 * seen[name] <= bound for name, bound in bounds.items())


def details(outputs: Sequence[Timed]) -> dict[str, Any]:
    """Lists with an entry for each request, which ``--save-detailed`` adds."""
    return {
        "input_lens": [o.prompt_len for o in outputs],
        "output_lens": [o.output_tokens if o.success else 0 for o in outputs],
        "ttfts": [o.ttft for o in outputs],
        "itls": [o.itl for o in outputs],
        "latencies": [o.latency for o in outputs],
        "start_times": [o.start_time for o in outputs],
        "queue_times": [o.queue_time for o in outputs],
        "generated_texts": [o.text for o in outputs],
        "errors": [o.error for o in outputs],
    }


def peak_tokens(outputs: Sequence[Timed]) -> float:
    """Largest number of tokens in one second, counting seconds from the first request."""
    if not outputs:
        return 0.0
    began = min(output.start_time for output in outputs)
    times = [output.start_time - began + t for output in outputs for t in np.cumsum([output.ttft, *output.itl])]
    return float(np.bincount(np.array(times, dtype=np.int64)).max())


def peak_requests(outputs: Sequence[Timed]) -> int:
    """Largest number of requests that ran at the same time; one that ends as another starts is not counted with it."""
    changes = sorted([(o.start_time, 1) for o in outputs] + [(o.start_time + o.latency, -1) for o in outputs])
    return int(np.cumsum([change for _, change in changes]).max()) if changes else 0


def block(
    found: dict[str, Any],
    percentiles: Sequence[float],
    selected: Sequence[str],
    rate: float = float("inf"),
    max_concurrency: Optional[int] = None,
) -> str:
    """Figures as ``vllm bench serve`` prints them."""

    def line(name: str, value: float) -> str:
        return f"{name + ':':<40} {value:<10}" if isinstance(value, int) else f"{name + ':':<40} {value:<10.2f}"

    totals = (
        ("Successful requests", found["completed"]),
        ("Failed requests", found["failed"]),
        ("Maximum request concurrency", max_concurrency),
        ("Request rate configured (RPS)", float(rate) if rate != float("inf") else None),
        ("Benchmark duration (s)", found["duration"]),
        ("Total input tokens", found["total_input_tokens"]),
        ("Total generated tokens", found["total_output_tokens"]),
        ("Request throughput (req/s)", found["request_throughput"]),
        ("Request goodput (req/s)", found["request_goodput"]),
        ("Output token throughput (tok/s)", found["output_throughput"]),
        ("Peak output token throughput (tok/s)", found["max_output_tokens_per_s"]),
        ("Peak concurrent requests", float(found["max_concurrent_requests"])),
        ("Total token throughput (tok/s)", found["total_token_throughput"]),
    )
    lines = [f"{' Serving Benchmark Result ':=^50}"]
    lines += [line(name, value) for name, value in totals if value is not None]
    for name in selected:
        short, title = TITLES[name]
        lines.append(f"{title:-^50}")
        for label, key in (("Mean", "mean"), ("Median", "median"), *((f"P{p:g}", f"p{p:g}") for p in percentiles)):
            lines.append(line(f"{label} {short} (ms)", found[f"{key}_{name}_ms"]))
    if found["compression_ratio"] is not None:
        lines += [f"{'Compressed Cache':-^50}", line("Compression ratio", found["compression_ratio"])]
    return "\n".join([*lines, "=" * 50])
