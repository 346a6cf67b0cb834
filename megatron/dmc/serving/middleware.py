"""Gate in front of the application: API keys, the size of bodies, and whether the server still accepts requests."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

from megatron.dmc.serving.errors import APIError, shutting_down, wrong_key

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = frozenset({"/", "/health", "/metrics", "/version", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"})
"""Paths that need no API key: they show nothing of what clients send, and are answered while the server shuts down."""


class Keys:
    """API keys, kept as digests. Without any key every request is accepted."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = [self._digest(key.encode()) for key in keys]

    @staticmethod
    def _digest(key: bytes) -> bytes:
        return hashlib.sha256(key).digest()

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accept(self, authorization: bytes) -> bool:
        """Check that a header ``Bearer KEY`` holds one of the keys, in a time that tells nothing about them."""
        scheme, _, key = authorization.partition(b" ")
        given, found = self._digest(key.strip()), False
        for digest in self._digests:
            found |= hmac.compare_digest(given, digest)
        return found and scheme.lower() == b"bearer"


@dataclass
class Gate:
    """State that the server shares with its middleware."""

    keys: Keys
    max_body_bytes: int
    draining: bool = False
    """Refuse new requests, because the server is shutting down."""
    in_flight: int = 0
    """Number of accepted requests whose response is not complete."""


class GateMiddleware:
    """ASGI middleware that refuses a request, or reads its body up to the limit and calls the application."""

    def __init__(self, app: App, gate: Gate, refused: Callable[[int], None] = lambda status: None) -> None:
        self.app, self.gate, self.refused = app, gate, refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            body = await self._admit(scope, dict(scope["headers"]), receive)
        except _Refused as refused:
            self.refused(refused.error.status)
            await send_error(refused.error, send)
            return
        if body is None:
            return
        self.gate.in_flight += 1
        try:
            await self.app(scope, _replay(body, receive), send)
        finally:
            self.gate.in_flight -= 1

    async def _admit(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """Body of an accepted request, or None if the client has left. Raises :class:`_Refused`."""
        gate = self.gate
        if scope["path"] not in OPEN:
            if gate.keys and not gate.keys.accept(headers.get(b"authorization", b"")):
                raise _Refused(wrong_key())
            self._check_draining(scope)
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length[:20]) > gate.max_body_bytes:
            raise _Refused(self._too_large())
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            size += len(part)
            if size > gate.max_body_bytes:
                raise _Refused(self._too_large())
            parts.append(part)
            if not message.get("more_body", False):
                self._check_draining(scope)  # receiving a body may take long
                return b"".join(parts)

    def _check_draining(self, scope: Scope) -> None:
        if self.gate.draining and scope["path"] not in OPEN:
            raise _Refused(shutting_down())

    def _too_large(self) -> APIError:
        message = f"the body is larger than {self.gate.max_body_bytes} bytes"
        # The rest of the body is not read, so the connection cannot be used again.
        return APIError(413, message, code="request_too_large", headers={"Connection": "close"})


class _Refused(Exception):
    """Error to answer a request with instead of calling the application."""

    def __init__(self, error: APIError) -> None:
        self.error = error


def _replay(body: bytes, receive: Receive) -> Receive:
    """``receive`` that returns the body first."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> MutableMapping[str, Any]:
        return waiting.pop() if waiting else await receive()

    return again


async def send_error(error: APIError, send: Send) -> None:
    """Send an error as a whole response."""
    body = json.dumps(error.body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
