"""Bodies of requests as they come in: bounded in size, in time, and in the memory of all that are not complete."""

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Optional

from megatron.dmc.serving.errors import APIError, overloaded, too_slow

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
BYTES_PER_TOKEN, LEAST = 32, 1 << 20
STALLED = 1.0  # seconds without a byte after which a body gives way to others


def default_max_body_bytes(max_model_len: int) -> int:
    """Size of the largest body by default: 1 MiB and 32 bytes per token of the context.

    A token id takes up to 8 bytes in JSON; a token of text about 4, and up to 24 where every character is escaped.
    """
    return LEAST + BYTES_PER_TOKEN * max_model_len


@dataclass(frozen=True)
class BodyLimits:
    """Limits of request bodies."""

    max_bytes: int
    """Bytes of the largest body."""
    timeout: float = 20.0
    """Seconds in which a body must come, besides those that its size allows, and between two of its bytes."""
    bytes_per_second: int = 16 << 10
    """Least rate: a body gets one more second for so many bytes."""
    memory: int = 64 << 20
    """Bytes of all bodies that are not complete."""


@dataclass(eq=False)
class _Body:
    """Body that is not complete."""

    parts: bytearray = field(default_factory=bytearray)
    progress: float = field(default_factory=time.monotonic)
    """Time of its last byte."""
    given_up: asyncio.Event = field(default_factory=asyncio.Event)


class Bodies:
    """Reader of bodies. One that makes no progress is given up (408) when the memory of all is short."""

    def __init__(self, limits: BodyLimits) -> None:
        self.limits, self.held = limits, 0
        self._open: set[_Body] = set()

    async def read(self, receive: Receive) -> Optional[bytes]:
        """Whole body, or None if the client has left.

        Raises:
            APIError: 413, 408, or 503 when too many large bodies come at the same time.
        """
        try:
            async with asyncio.timeout(self.limits.timeout):
                message = await receive()
        except TimeoutError:
            raise too_slow("body", self.limits.timeout) from None
        if message["type"] == "http.disconnect":
            return None
        if not message.get("more_body", False):
            self._check(len(message.get("body", b"")))
            return message.get("body", b"")
        body = _Body()
        self._open.add(body)
        try:
            return await self._read(body, message.get("body", b""), receive)
        finally:
            self._open.discard(body)
            self.held -= len(body.parts)

    async def _read(self, body: _Body, first: bytes, receive: Receive) -> Optional[bytes]:
        began = time.monotonic()
        self._add(body, first)
        leave = asyncio.ensure_future(body.given_up.wait())
        try:
            while True:
                allowed = self.limits.timeout + len(body.parts) / self.limits.bytes_per_second
                coming = asyncio.ensure_future(receive())
                try:
                    left = min(began + allowed - time.monotonic(), self.limits.timeout)
                    await asyncio.wait((coming, leave), timeout=left, return_when=asyncio.FIRST_COMPLETED)
                    if not coming.done():
                        raise too_slow("body", round(time.monotonic() - began, 1))
                    message = coming.result()
                finally:
                    coming.cancel()
                if message["type"] == "http.disconnect":
                    return None
                self._add(body, message.get("body", b""))
                if not message.get("more_body", False):
                    return bytes(body.parts)
        finally:
            leave.cancel()

    def _add(self, body: _Body, part: bytes) -> None:
        self._check(len(body.parts) + len(part))
        if self.held + len(part) > self.limits.memory:
            self._make_room(body)
        body.parts += part
        body.progress = time.monotonic()
        self.held += len(part)

    def _check(self, size: int) -> None:
        if size > self.limits.max_bytes:
            raise too_large(self.limits.max_bytes)

    def _make_room(self, body: _Body) -> None:
        """Give the body up that has stalled longest, or raise :class:`APIError` when all make progress."""
        others = [other for other in self._open if other is not body and not other.given_up.is_set()]
        stalled = min(others, key=lambda other: other.progress, default=None)
        if stalled is None or time.monotonic() - stalled.progress < STALLED:
            raise overloaded("too many large bodies are coming at the same time; try again later", close=True)
        self.held -= len(stalled.parts)
        stalled.parts = bytearray()
        stalled.given_up.set()


def too_large(most: int) -> APIError:
    """413. The rest of the body is not kept, so the connection cannot be used again."""
    message = f"the body is larger than {most} bytes"
    return APIError(413, message, code="request_too_large", headers={"Connection": "close"})
