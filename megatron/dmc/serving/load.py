"""A client that loads an OpenAI-compatible server and takes the time of every token: what ``dmc bench serve`` measures
with.
"""

from __future__ import annotations

import asyncio
import json
import resource
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Optional, Union

import httpx2
import numpy as np

Prompt = Union[str, list[int], list[dict[str, Any]]]
"""A text, token ids, or the messages of a chat."""


@dataclass
class Timed:
    """One request as the client saw it; seconds."""

    prompt_len: int = 0
    """Tokens: what the server counts, or what was asked for."""
    start_time: float = 0.0
    queue_time: float = 0.0
    """Between its arrival and its start, for a free place among ``max_concurrency``."""
    ttft: float = 0.0
    itl: list[float] = field(default_factory=list)
    latency: float = 0.0
    """From the start to the last token."""
    text: str = ""
    usage_tokens: Optional[int] = None
    """Tokens of the answer as the server counts them."""
    slots: int = 0
    states: float = 0.0
    """Of ``usage.dmc``: cache slots, and what an uncompressed cache would have taken."""
    success: bool = False
    error: str = ""
    _last: float = 0.0

    @property
    def output_tokens(self) -> int:
        """Of the server's usage; without one, the events that brought some."""
        return self.usage_tokens if self.usage_tokens is not None else len(self.itl) + (self.ttft > 0)

    def token(self, text: str, now: float) -> None:
        if self.ttft == 0:
            self.ttft = now - self.start_time
        else:
            self.itl.append(now - self._last)
        self._last, self.latency = now, now - self.start_time
        self.text += text

    def take(self, chunk: dict[str, Any], now: float) -> bool:
        """One event of the stream; True when it ends the answer. Raises ``ValueError`` for an error that the server
        sends.
        """
        if chunk.get("error"):
            raise ValueError(f"the server says: {json.dumps(chunk['error'])[:500]}")
        ended = False
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta")
            text = choice.get("text") if delta is None else delta.get("content")
            opening = delta is not None and "role" in delta and not text  # who speaks; no token yet
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
    """Send one streaming request, and time what comes. What goes wrong is in ``error``; nothing is raised for it.

    Args:
        body: JSON of the request, with ``stream``.
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
    except (
        httpx2.HTTPError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:  # the last ones: not OpenAI's shape
        found.error = f"{type(error).__name__}: {error}"
        return found
    found.success = ended and found.ttft > 0
    if not found.success:
        found.error = "the stream ended before the answer" if not ended else "the answer has no tokens"
    return found


@asynccontextmanager
async def connect(base_url: str, headers: dict[str, str], verify: bool = True) -> AsyncIterator[httpx2.AsyncClient]:
    """A client without a bound on connections, and without a time limit on answers."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # a connection is a file
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard != resource.RLIM_INFINITY else max(soft, 65536), hard))
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    timeout = httpx2.Timeout(None, connect=60.0)
    async with httpx2.AsyncClient(
        base_url=base_url, headers=headers, limits=limits, timeout=timeout, verify=verify
    ) as client:
        yield client


def arrivals(count: int, rate: float, burstiness: float, generator: np.random.Generator) -> list[float]:
    """Seconds from the start at which requests arrive: intervals of a gamma distribution with shape ``burstiness`` (1:
    a Poisson process), scaled so that the last one comes after exactly ``count / rate`` seconds, as ``vllm bench
    serve`` does.
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
    """Send request i at ``times[i]`` seconds (open loop), or when one of ``max_concurrency`` places is free (closed
    loop).
    """
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


# ----------------------------------------------------------------------------------------------------------------
# figures

TITLES = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
}


def tpot_of(found: Timed) -> Optional[float]:
    """Seconds per token after the first; None for an answer of one token."""
    return (found.latency - found.ttft) / (found.output_tokens - 1) if found.output_tokens > 1 else None


def figures(
    outputs: Sequence[Timed],
    duration: float,
    percentiles: Sequence[float],
    goodput: dict[str, float],
    selected: Sequence[str] = tuple(TITLES),
) -> dict[str, Any]:
    """Figures of a run under the keys of ``vllm bench serve --save-result``, and the compression ratio where the server
    tells it.

    Args:
        duration: seconds from the first arrival to the last answer.
        goodput: bounds in milliseconds on ``ttft``, ``tpot``, ``e2el`` that a request must keep to count as good.
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
    """What ``--save-detailed`` adds, by request."""
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
    """Most events with tokens in a second, of the seconds since the first request."""
    if not outputs:
        return 0.0
    began = min(output.start_time for output in outputs)
    times = [output.start_time - began + t for output in outputs for t in np.cumsum([output.ttft, *output.itl])]
    return float(np.bincount(np.array(times, dtype=np.int64)).max())


def peak_requests(outputs: Sequence[Timed]) -> int:
    """Most requests under way at a time; one that ends as another starts does not count with it."""
    changes = sorted([(o.start_time, 1) for o in outputs] + [(o.start_time + o.latency, -1) for o in outputs])
    return int(np.cumsum([change for _, change in changes]).max()) if changes else 0


def block(
    found: dict[str, Any],
    percentiles: Sequence[float],
    selected: Sequence[str],
    rate: float = float("inf"),
    max_concurrency: Optional[int] = None,
) -> str:
    """The figures as ``vllm bench serve`` prints them."""

    def line(name: str, value: float) -> str:
        return f"{name + ':':<40} {value:<10}" if isinstance(value, int) else f"{name + ':':<40} {value:<10.2f}"

    lines = [
        f"{' Serving Benchmark Result ':=^50}",
        line("Successful requests", found["completed"]),
        line("Failed requests", found["failed"]),
    ]
    if max_concurrency is not None:
        lines.append(line("Maximum request concurrency", max_concurrency))
    if rate != float("inf"):
        lines.append(line("Request rate configured (RPS)", float(rate)))
    lines += [
        line("Benchmark duration (s)", found["duration"]),
        line("Total input tokens", found["total_input_tokens"]),
        line("Total generated tokens", found["total_output_tokens"]),
        line("Request throughput (req/s)", found["request_throughput"]),
    ]
    if found["request_goodput"] is not None:
        lines.append(line("Request goodput (req/s)", found["request_goodput"]))
    lines += [
        line("Output token throughput (tok/s)", found["output_throughput"]),
        line("Peak output token throughput (tok/s)", found["max_output_tokens_per_s"]),
        line("Peak concurrent requests", float(found["max_concurrent_requests"])),
        line("Total token throughput (tok/s)", found["total_token_throughput"]),
    ]
    for name in selected:
        short, title = TITLES[name]
        lines.append(f"{title:-^50}")
        for label, key in (("Mean", "mean"), ("Median", "median"), *((f"P{p:g}", f"p{p:g}") for p in percentiles)):
            lines.append(line(f"{label} {short} (ms)", found[f"{key}_{name}_ms"]))
    if found["compression_ratio"] is not None:
        lines += [f"{'Compressed Cache':-^50}", line("Compression ratio", found["compression_ratio"])]
    return "\n".join([*lines, "=" * 50])
