"""HTTP/1.1 connection of the server: uvicorn's, with limits on time, on the number of connections, and on framing.

uvicorn 0.54 closes a connection that is idle after a response (``timeout_keep_alive``), but not one that never sends a
request, sends its headers without end, or never reads its response. Its ``limit_concurrency`` answers 503 only to
requests, so silent connections take descriptors until none is left.
"""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Optional

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from megatron.dmc.serving.errors import APIError, too_many_connections, too_slow

MAX_HEADER_BYTES = 64 << 10  # of request line and headers together
FREE_CHUNKS, MEAN_CHUNK = 1024, 64
"""Chunks of a body before their mean size counts, and the least mean size in bytes: parsing one takes about 20 us."""


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits of connections. Times are in seconds."""

    max_connections: int = 4096
    """Connections at a time; requests on further ones are answered 503."""
    header_timeout: float = 10.0
    """Time for the headers of a request, from the connection's start or the first byte of a later request."""
    write_timeout: float = 60.0
    """Time in which a client must read something of a response that waits to be sent."""


SPARE = 64
"""Connections above the limit that are kept open until they have been answered 503; further ones are closed."""


class ServerConnection(h11.Connection):
    """h11's state of a connection, which refuses a body of many tiny chunks and sends a response's head with its body.

    A call to the kernel gives up the interpreter's lock, which the engine's thread may keep for milliseconds: the first
    token goes out in the call that sends the head.
    """

    head = b""
    """Head of a response that waits for the first part of its body."""
    chunked = False
    """Whether the running response is sent with ``Transfer-Encoding: chunked``."""
    chunks = size = 0
    problem: Optional[h11.RemoteProtocolError] = None
    """Why the request is refused."""

    def next_event(self) -> Any:
        try:
            return self._count(super().next_event())
        except h11.RemoteProtocolError as error:
            self.problem = error
            raise

    def send(self, event: Any) -> Any:
        if type(event) is h11.Data and self.chunked and event.data and self.our_state is h11.SEND_BODY:
            # What h11 would make of it in ten times as long: there is one for every token.
            data = b"%x\r\n%b\r\n" % (len(event.data), event.data)
        else:
            data = super().send(event)
        if type(event) is h11.Response:
            self.chunked = b"\r\nTransfer-Encoding: chunked\r\n" in data
            self.head, data = data, b""
        elif self.head:
            self.head, data = b"", self.head + (data or b"")
        return data

    def _count(self, event: Any) -> Any:
        if type(event) is h11.Data:
            self.chunks += 1
            self.size += len(event.data)
            if self.chunks > FREE_CHUNKS and self.size < MEAN_CHUNK * self.chunks:
                raise h11.RemoteProtocolError(f"the body's chunks have less than {MEAN_CHUNK} bytes on average")
        elif type(event) is h11.Request:
            self.chunks = self.size = 0
        return event


class Connection(H11Protocol):
    """Connection that is closed when its client is too slow, and answered 503 when there are too many.

    Args:
        limits: of this and all other connections of the server.
        refused: called with the status of every error that is sent here, without the application.
    """

    def __init__(self, *args: Any, limits: ConnectionLimits, refused: Callable[[int], None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn: ServerConnection = ServerConnection(h11.SERVER, MAX_HEADER_BYTES)
        self.limits, self.refused = limits, refused
        self._excess = False
        self._header_timer: Optional[asyncio.TimerHandle] = None
        self._write_timer: Optional[asyncio.TimerHandle] = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        excess = len(self.connections) - self.limits.max_connections
        self._excess = excess > 0
        if excess > SPARE:
            transport.abort()
        else:
            self._header_timer = self.loop.call_later(self.limits.header_timeout, self._headers_late)

    def connection_lost(self, exc: Optional[Exception]) -> None:
        self._stop_header_timer()
        self.resume_writing()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._excess:
            self._refuse(too_many_connections(self.limits.max_connections))
            return
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_header_timer()
        elif self._header_timer is None and not self.transport.is_closing():  # a later request has begun
            self._header_timer = self.loop.call_later(self.limits.header_timeout, self._headers_late)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.limits.write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP/1.1, or has too long headers, in OpenAI's shape instead of uvicorn's text."""
        problem = self.conn.problem
        status = 400 if problem is None else problem.error_status_hint
        text = {431: f"the headers are longer than {MAX_HEADER_BYTES} bytes"}.get(status, f"{msg} {problem or ''}")
        self._refuse(APIError(status, text.strip(), code="invalid_http"))

    def _headers_late(self) -> None:
        self._header_timer = None
        if self.conn.trailing_data[0]:  # a part of a request has come
            self._refuse(too_slow("headers", self.limits.header_timeout))
        else:
            self.transport.close()

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _refuse(self, error: APIError) -> None:
        """Send an error, if no response has begun, and close the connection."""
        self.refused(error.status)
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # the application's answer, if it makes one, is not sent
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.write(_response(error))
        self.transport.close()


def _response(error: APIError) -> bytes:
    """Whole response of an error, after which the connection is closed."""
    body = json.dumps(error.body()).encode()
    headers = {"Content-Type": "application/json", "Content-Length": len(body), "Connection": "close", **error.headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n{head}\r\n".encode() + body
