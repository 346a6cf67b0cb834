"""Light HTTP client on asyncio, and an overload with clients that disconnect, for benchmarks/serving.py and tests."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

COMPLETIONS = "/v1/completions"


async def post(port: int, body: Mapping[str, object], *, leave_after: int | None = None) -> tuple[int, bytes]:
    """(status, body) of a completion, or (0, b"") after disconnecting at so many bytes of the response.

    Speaks HTTP/1.0, so that the response ends with the connection and needs no parsing.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        data = json.dumps(body).encode()
        head = f"POST {COMPLETIONS} HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        await writer.drain()
        if leave_after is not None:
            await reader.read(leave_after) if leave_after else await asyncio.sleep(0.005)
            return 0, b""
        answer = await reader.read(-1)
        head_text, _, found = answer.partition(b"\r\n\r\n")
        if not head_text:
            raise ConnectionError("the server closed the connection without a response")
        return int(head_text.split(b" ", 2)[1]), found
    finally:
        writer.close()


def tokens_of(body: bytes, stream: bool) -> list[int]:
    """Token ids of a response, whole or streamed. Raises ``ValueError`` for one that is cut off or ends in an error."""
    if not stream:
        return json.loads(body)["choices"][0]["token_ids"]
    events = body.split(b"\n\n")
    if events[-2:] != [b"data: [DONE]", b""]:
        raise ValueError(f"the stream ends with {body[-200:]!r}")
    chunks = [json.loads(event.removeprefix(b"data: ")) for event in events[:-2]]
    if any("error" in chunk for chunk in chunks) or chunks[-1]["choices"][0]["finish_reason"] is None:
        raise ValueError(f"the stream ends with {body[-400:]!r}")
    return [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]]


def text_of(body: bytes, stream: bool) -> str:
    """Text of a response, whole or streamed."""
    if not stream:
        return json.loads(body)["choices"][0]["text"]
    events = (event.removeprefix(b"data: ") for event in body.split(b"\n\n")[:-2])
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


@dataclass
class Outcome:
    """Outcome of a load. Every request is in one of the counts, or in ``wrong`` with the reason."""

    counts: Counter[str] = field(default_factory=Counter)
    """Number of requests by outcome: answered, structured (and answered), refused (503), left (by the client)."""
    wrong: list[str] = field(default_factory=list)
    tokens: int = 0


async def load(
    port: int,
    prompts: Sequence[Sequence[int]],
    lone: Sequence[Sequence[int]],
    *,
    requests: int,
    clients: int = 64,
    seed: int = 0,
    leaving: float = 0.15,
    choices: Sequence[str] = (),
) -> Outcome:
    """Send requests of random lengths, ``clients`` at a time, some streamed; a share ``leaving`` disconnects.

    ``lone`` has the greedy completion of each prompt, generated alone. With ``choices``, a quarter of the requests are
    structured: their completions, sampled, must be one of these.
    """
    outcome, order = Outcome(), random.Random(seed)
    left = iter(range(requests))

    async def client() -> None:
        for n in left:
            which, stream = order.randrange(len(prompts)), order.random() < 0.5
            most = order.randint(1, len(lone[which]))
            leave = order.choice((0, 1, 200, 2000)) if order.random() < leaving else None
            body = {"prompt": list(prompts[which]), "max_tokens": most, "stream": stream}
            structured = bool(choices) and order.random() < 0.25
            if structured:
                most = max(map(len, choices)) + 4
                body |= {"max_tokens": most, "seed": n, "structured_outputs": {"choice": list(choices)}}
            else:
                body |= {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
            try:
                status, text = await post(port, body, leave_after=leave)
                if status == 200 and structured:
                    if text_of(text, stream) not in choices:
                        raise ValueError(f"structured: {text_of(text, stream)!r} is none of {choices}")
                    outcome.counts["structured"] += 1
                elif status == 200:
                    found = tokens_of(text, stream)
                    if found != list(lone[which][:most]):
                        raise ValueError(f"tokens {found}, alone {list(lone[which][:most])}")
                    outcome.tokens += most
                elif status not in (0, 503):
                    raise ValueError(f"HTTP {status}: {text[:200]!r}")
                if not (status == 200 and structured):
                    outcome.counts[{0: "left", 200: "answered", 503: "refused"}[status]] += 1
                if status == 503:
                    await asyncio.sleep(0.2)  # less than Retry-After asks for
            except (OSError, ValueError) as error:
                outcome.wrong.append(f"request {n}: {error}")

    await asyncio.gather(*(client() for _ in range(clients)))
    return outcome
