"""Times of streamed tokens, as the engine makes them and as a client outside of the server's process receives them."""

import asyncio
import json
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from _http import COMPLETIONS

from megatron.dmc.inference import Engine, SamplingParams

OPTIONS = {"temperature": 0, "ignore_eos": True}


@dataclass
class Times:
    """Times of the requests of one run, in seconds."""

    ttft: list[float] = field(default_factory=list)
    """Time from a request to its first token."""
    gaps: list[float] = field(default_factory=list)
    """Time between two tokens of a request."""
    tokens: int = 0
    seconds: float = 0.0

    def add(self, sent: float, arrivals: Sequence[float], tokens: int) -> None:
        """Add a request of so many tokens and the times at which they came; tokens that came together have one."""
        self.ttft.append(arrivals[0] - sent)
        self.gaps.extend(np.diff(arrivals).tolist())
        self.tokens += tokens

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    def row(self) -> tuple[float, float, float, float, float]:
        """Tokens per second; milliseconds: median TTFT, median, 99th percentile and maximum of the gaps."""
        gaps = 1e3 * np.array(self.gaps)
        median, late = np.percentile(gaps, (50, 99)).tolist()
        return self.rate, 1e3 * statistics.median(self.ttft), median, late, gaps.max().item()


def offline(engine: Engine, asked: Sequence[Sequence[int]], clients: int, new_tokens: int) -> Times:
    """Run requests on the engine itself, ``clients`` at a time, each followed at once by the next one.

    They come to the engine as to a server's: of several that are sent at once the first finds it idle and is started
    alone, and the others join it in the next step, whose prefill is a gap between the first one's tokens.
    """
    params = SamplingParams(max_tokens=new_tokens, **OPTIONS)
    found, left = Times(), iter(range(len(asked)))
    sent: dict[str, float] = {}
    arrivals: dict[str, list[float]] = {}
    waiting: deque[int] = deque()

    def send() -> None:
        if (n := next(left, None)) is not None:
            sent[str(n)], arrivals[str(n)] = time.perf_counter(), []
            waiting.append(n)

    began = time.perf_counter()
    for _ in range(clients):
        send()
    while waiting or engine.has_unfinished():
        for _ in range(len(waiting) if engine.has_unfinished() else 1):
            n = waiting.popleft()
            engine.add_request(str(n), asked[n], params)
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            arrivals[output.request_id].extend([now] * len(output.tokens))
            if output.finished:
                found.add(sent[output.request_id], arrivals[output.request_id], new_tokens)
                send()
    found.seconds = time.perf_counter() - began
    return found


class _Client(asyncio.Protocol):
    """Kept connection that notes when events come; parses no more than it must, so that it takes little CPU time."""

    def __init__(self) -> None:
        self.arrivals: list[float] = []
        self.ended = asyncio.Event()
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        now, data = time.perf_counter(), self._tail + data
        ended = b"data: [DONE]" in data and data.endswith(b"0\r\n\r\n")  # the last chunk of the response
        # An event is counted by its end, which may come in a later piece than its beginning.
        self.arrivals += [now] * (data.count(b"}\n\n") - self._tail.count(b"}\n\n"))
        self._tail = data[-64:] if not ended else b""
        if ended:
            self.ended.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set()

    async def ask(self, body: dict) -> tuple[float, list[float]]:
        """(time of sending, times of the events) of a streamed completion."""
        data = json.dumps(body).encode()
        self.arrivals, self._tail = [], b""
        self.ended.clear()
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: m\r\nContent-Type: application/json\r\n"
        sent = time.perf_counter()
        self.transport.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        await self.ended.wait()
        return sent, self.arrivals


async def http(port: int, asked: Sequence[Sequence[int]], clients: int, new_tokens: int, joined: bool = False) -> Times:
    """Send the same requests from ``clients`` kept connections, each one after the other. Raises ``SystemExit`` for a
    response with another number of events than tokens.

    Args:
        joined: take several tokens in one event, as vLLM sends them when a step ends before the last one's are sent.
    """
    found, left = Times(), iter(range(len(asked)))

    async def client() -> None:
        _, connection = await asyncio.get_running_loop().create_connection(_Client, "127.0.0.1", port)
        for n in left:
            body = {"prompt": asked[n], "max_tokens": new_tokens, "stream": True, **OPTIONS}
            sent, arrivals = await connection.ask(body)
            if len(arrivals) != new_tokens and not (joined and 0 < len(arrivals) < new_tokens):
                raise SystemExit(f"a stream has {len(arrivals)} events for {new_tokens} tokens")
            found.add(sent, arrivals, new_tokens)
        connection.transport.close()

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    found.seconds = time.perf_counter() - began
    return found
