"""Gate in front of the application: keys, bodies, request ids, and whether the server still accepts requests."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Optional
from urllib.parse import quote

from megatron.dmc.serving.bodies import Bodies, BodyLimits, Receive, too_large
from megatron.dmc.serving.errors import APIError, shutting_down, wrong_key

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

access_log = logging.getLogger("megatron.dmc.access")

OPEN = frozenset({"/", "/health", "/metrics", "/version", "/docs", "/openapi.json"})
"""Paths that need no API key: they show nothing of what clients send, and are answered while the server shuts down."""
DISCARD_SECONDS, DISCARD_BYTES = 2.0, 32 << 20
"""Most of a refused body that is still read, so that its client sees the response instead of a reset connection."""


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
    body_limits: BodyLimits
    draining: bool = False
    """Refuse new requests, because the server is shutting down."""
    in_flight: int = 0
    """Number of accepted requests whose response is not complete."""
    log_requests: bool = False
    """Write a line to the access log for each request."""
    open_paths: frozenset[str] = frozenset()
    """Further paths that need no API key."""


@dataclass
class _Exchange:
    """Request and its response, as they pass the gate."""

    scope: Scope
    send_on: Send
    request_id: str
    began: float = field(default_factory=time.monotonic)
    status: int = 499
    """Status of the response; 499 until one begins, which is also what a client that has left gets."""

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Pass a message of the response on; its headers get the request's id."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self.request_id.encode())]
        await self.send_on(message)

    def log(self) -> None:
        """Write the line of the access log. The client is the peer, or what a trusted proxy says it is."""
        client, scope = self.scope.get("client") or ("-", 0), self.scope
        path = quote(scope["path"][:500]) + ("?" + quote(scope["query_string"][:500]) if scope["query_string"] else "")
        seconds = time.monotonic() - self.began
        line = '%s:%d "%s %s HTTP/%s" %d %.3fs %s'
        version = scope.get("http_version", "1.1")
        access_log.info(line, *client, scope["method"], path, version, self.status, seconds, self.request_id)


class GateMiddleware:
    """ASGI middleware that refuses a request, or reads its body up to the limits and calls the application.

    Args:
        refused: called with the status of every error that is answered here.
        answered: called with every request's scope, status and seconds at the end of its response.
    """

    def __init__(
        self,
        app: App,
        gate: Gate,
        refused: Callable[[int], None] = lambda status: None,
        answered: Callable[[Scope, int, float], None] = lambda scope, status, seconds: None,
    ) -> None:
        self.app, self.gate, self.refused, self.answered = app, gate, refused, answered
        self.bodies = Bodies(gate.body_limits)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        exchange = _Exchange(scope, send, request_id(headers))
        inner = _routed(scope)
        try:
            await self._pass(inner, headers, _Incoming(receive), exchange)
        except Exception:
            exchange.status = 500  # Starlette answers it outside of the gate
            raise
        finally:
            self.answered(inner, exchange.status, time.monotonic() - exchange.began)
            if self.gate.log_requests:
                exchange.log()

    async def _pass(self, scope: Scope, headers: dict[bytes, bytes], incoming: _Incoming, exchange: _Exchange) -> None:
        try:
            self._check(scope, headers)
            body = await self.bodies.read(incoming)
            self._check_draining(scope)  # receiving a body may take long
        except APIError as error:
            self.refused(error.status)
            wants_more = error.status != 408 and b"expect" not in headers
            await send_error(error, exchange.send, incoming if wants_more else None)
            return
        if body is None:
            return  # the client has left
        self.gate.in_flight += 1
        try:
            await self.app(scope, _replay(body, incoming), exchange.send)
        finally:
            self.gate.in_flight -= 1

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        """Raise :class:`APIError` for a request that its headers refuse."""
        gate = self.gate
        if b"content-length" in headers and b"transfer-encoding" in headers:
            # Two parties that disagree on where the request ends may be made to smuggle another (RFC 9112, 6.1).
            text = "the request has both Content-Length and Transfer-Encoding; send one of them"
            raise APIError(400, text, code="invalid_http", headers={"Connection": "close"})
        if _path(scope) not in OPEN:
            keyless = not gate.keys or _path(scope) in gate.open_paths
            if not keyless and not gate.keys.accept(headers.get(b"authorization", b"")):
                raise wrong_key()
            self._check_draining(scope)
        encoding = headers.get(b"content-encoding", b"identity").strip().lower()
        if encoding not in (b"identity", b""):
            text = f"the body has Content-Encoding {encoding[:40].decode('latin1')!r}; send it without an encoding"
            close = {"Accept-Encoding": "identity", "Connection": "close"}
            raise APIError(415, text, code="unsupported_encoding", headers=close)
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length[:20]) > gate.body_limits.max_bytes:
            raise too_large(gate.body_limits.max_bytes)

    def _check_draining(self, scope: Scope) -> None:
        if self.gate.draining and _path(scope) not in OPEN:
            raise shutting_down()


def _path(scope: Scope) -> str:
    """Path below ``--root-path``, which uvicorn puts before every path."""
    return scope["path"].removeprefix(scope.get("root_path", ""))


def _routed(scope: Scope) -> Scope:
    """Scope for the application: HEAD is answered as GET, whose body uvicorn leaves out; /v1/models/ is /v1/models."""
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    path = scope["path"][:-1] if _path(scope) == "/v1/models/" else scope["path"]
    return {**scope, "method": method, "path": path}


def request_id(headers: dict[bytes, bytes]) -> str:
    """Id of a request: its header ``x-request-id``, if that is 1 to 128 visible ASCII characters, or a new one."""
    given = headers.get(b"x-request-id", b"")
    if 0 < len(given) <= 128 and all(33 <= byte < 127 for byte in given):
        return given.decode()
    return uuid.uuid4().hex


class _Incoming:
    """``receive`` that knows whether the body is complete."""

    def __init__(self, receive: Receive) -> None:
        self._receive, self.complete = receive, False

    async def __call__(self) -> MutableMapping[str, Any]:
        message = await self._receive()
        self.complete = self.complete or not message.get("more_body", False)
        return message

    async def discard(self) -> None:
        """Read the rest of the body, or some of it, and keep nothing."""
        size, deadline = 0, time.monotonic() + DISCARD_SECONDS
        while not self.complete and size < DISCARD_BYTES:
            left = deadline - time.monotonic()
            if left <= 0:
                return
            try:
                size += len((await asyncio.wait_for(self(), left)).get("body", b""))
            except TimeoutError:
                return


def _replay(body: bytes, receive: Receive) -> Receive:
    """``receive`` that returns the body first."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> MutableMapping[str, Any]:
        return waiting.pop() if waiting else await receive()

    return again


async def send_error(error: APIError, send: Send, incoming: Optional[_Incoming] = None) -> None:
    """Send an error as a whole response, and read what is still coming of the request before it ends."""
    body = json.dumps(error.body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    if incoming is not None:
        await incoming.discard()
    await send({"type": "http.response.body", "body": b"", "more_body": False})
