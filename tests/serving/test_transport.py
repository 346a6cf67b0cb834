"""The server's connections: what is set on a socket, and what is answered below the endpoints."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import h11
import pytest
from helpers.engines import Model
from helpers.processes import PATIENCE
from helpers.serving import COMPLETIONS, Running, until

from megatron.dmc.serving.bodies import default_max_body_bytes
from megatron.dmc.serving.connection import ServerConnection
from megatron.dmc.serving.http_config import HTTPConfig

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: m\r\nContent-Type: application/json\r\n"
GET = b"GET /version HTTP/1.1\r\nHost: m\r\n\r\n"
LIMIT = 12


@pytest.fixture(scope="module")
def server(model: Model) -> Iterator[Running]:
    """A server that has little patience, and room for twelve connections."""
    http_config = HTTPConfig(max_connections=LIMIT, timeout_header=1.0, timeout_body=1.0, timeout_keep_alive=30.0)
    with Running(model.path, http=http_config) as running:
        yield running


@contextlib.contextmanager
def connected(server: Running) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as sock:
        yield sock


def until_closed(sock: socket.socket) -> bytes:
    """What the server sends until it closes the connection."""
    received = b""
    while part := sock.recv(65536):
        received += part
    return received


def talk(server: Running, data: bytes) -> tuple[int, dict | None]:
    """Status and JSON of the only response to these bytes, after which the server closes the connection."""
    with connected(server) as sock:
        sock.sendall(data)
        received = until_closed(sock)
    assert received.count(b"HTTP/1.1 ") == 1, received
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body) if body else None


def code_of(answer: tuple[int, dict | None]) -> tuple[int, str]:
    status, body = answer
    assert body is not None and set(body["error"]) == {"message", "type", "param", "code"}
    return status, body["error"]["code"]


def test_segments_are_sent_at_once(server: Running) -> None:
    """Nagle's algorithm is off on accepted connections: with it, a response waits for the client's delayed ACK."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    try:
        connection.request("GET", "/health")
        assert connection.getresponse().read() == b"{}"
        accepted = [kept.transport.get_extra_info("socket") for kept in server.server.server_state.connections]
        assert accepted and all(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for sock in accepted)
    finally:
        connection.close()


@pytest.mark.parametrize("parts", [(b"token",), ()])
def test_the_head_of_a_response_is_sent_with_its_body(parts: tuple[bytes, ...]) -> None:
    """The first token of a stream takes one call to the kernel; a response without a body has its head at the end."""
    connection = ServerConnection(h11.SERVER)
    connection.receive_data(GET)
    connection.next_event()
    sent = [connection.send(h11.Response(status_code=200, headers=[]))]
    sent += [connection.send(h11.Data(data=part)) for part in parts]
    sent += [connection.send(h11.EndOfMessage())]
    empty, first, *_ = sent
    assert empty == b"" and first.startswith(b"HTTP/1.1 200 ")
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="GET", target="/version", headers=[("Host", "m")]))
    client.receive_data(b"".join(sent))
    found = [client.next_event() for _ in range(2 + len(parts))]
    assert [bytes(event.data) for event in found if isinstance(event, h11.Data)] == list(parts)
    assert isinstance(found[-1], h11.EndOfMessage)


# ------------------------------------------------------------------------------------------------------------ framing


def test_two_lengths_are_refused_and_what_follows_is_not_a_request(server: Running) -> None:
    """RFC 9112, 6.1: a request with Content-Length and Transfer-Encoding may be smuggling another one."""
    request = HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n" + GET
    assert code_of(talk(server, request)) == (400, "invalid_http")


def test_what_is_not_http(server: Running) -> None:
    assert code_of(talk(server, b"hello\r\n\r\n")) == (400, "invalid_http")
    assert code_of(talk(server, HEAD + b"X: " + b"a" * 70000)) == (431, "invalid_http")


def test_a_body_of_tiny_chunks(server: Running) -> None:
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in b'{"prompt": "' + b"a" * 1500 + b'"}') + b"0\r\n\r\n"
    assert code_of(talk(server, HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)) == (400, "invalid_http")
    large = json.dumps({"prompt": "a" * 100, "max_tokens": 1}).encode()
    request = HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (
        len(large),
        large,
    )
    assert talk(server, request)[0] == 200


def test_an_encoding_that_is_not_taken(server: Running) -> None:
    status, headers, text = server.ask(COMPLETIONS, {"prompt": "a"}, headers={"Content-Encoding": "gzip"})
    assert (status, json.loads(text)["error"]["code"]) == (415, "unsupported_encoding")
    assert headers["accept-encoding"] == "identity"
    assert server.ask(COMPLETIONS, {"prompt": "a"}, headers={"Content-Encoding": "identity"})[0] == 200


# ----------------------------------------------------------------------------------------------------- time and number


def test_silent_connections_are_closed(server: Running) -> None:
    """A client that sends nothing is left without a word; one that sends half a request is told why."""
    with connected(server) as half, connected(server) as silent, connected(server) as again:
        half.sendall(HEAD)
        again.sendall(GET)
        assert again.recv(65536).startswith(b"HTTP/1.1 200 ")
        again.sendall(HEAD)
        assert until_closed(silent) == b""
        assert until_closed(half).startswith(b"HTTP/1.1 408 ")
        assert b"HTTP/1.1 408 " in until_closed(again), "the second request of a connection, too"


def test_a_body_that_does_not_come(server: Running) -> None:
    requests = (HEAD + b"Content-Length: 100\r\n\r\n", HEAD + b'Content-Length: 100\r\n\r\n{"pro')
    with ThreadPoolExecutor(2) as pool:
        answers = [code_of(answer) for answer in pool.map(lambda data: talk(server, data), requests)]
    assert answers == [(408, "request_timeout")] * 2


def test_connections_above_the_limit_are_answered(server: Running) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(LIMIT):
            stack.enter_context(connected(server))
        until(lambda: len(server.server.server_state.connections) >= LIMIT)
        assert code_of(talk(server, GET)) == (503, "too_many_connections")
    until(lambda: not server.server.server_state.connections)
    assert server.ask("/version")[0] == 200


def test_unfinished_bodies_take_bounded_memory(server: Running) -> None:
    """A body that stalls gives way to others when the memory of all is short; a whole one gets through."""
    bodies = server.app_gate().bodies
    size = bodies.limits.max_bytes
    memory = bodies.limits.memory
    object.__setattr__(bodies.limits, "memory", 3 * size)
    object.__setattr__(bodies.limits, "timeout", 20.0)
    try:
        with contextlib.ExitStack() as stack:
            stalled = [stack.enter_context(connected(server)) for _ in range(3)]
            for sock in stalled:
                sock.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % size + b" " * (size - 1))
            until(lambda: bodies.held > 3 * size - 3 * 65536)
            time.sleep(1.1)
            text = json.dumps({"prompt": "a", "max_tokens": 1, "user": "u" * (size - 200)})
            assert server.ask(COMPLETIONS, raw=text.encode())[0] == 200
            assert until_closed(stalled[0]).startswith(b"HTTP/1.1 408 ")
            assert bodies.held <= 3 * size
        until(lambda: bodies.held == 0)
    finally:
        object.__setattr__(bodies.limits, "memory", memory)
        object.__setattr__(bodies.limits, "timeout", 1.0)


def test_a_refused_body_is_read_so_that_the_client_sees_why(server: Running) -> None:
    """Closing at once would reset the connection while the client still sends, and its answer would be lost."""
    body = b" " * (8 << 20)
    request = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    for _ in range(3):
        assert code_of(talk(server, request)) == (413, "request_too_large")


def test_the_default_body_limit_follows_the_context_length() -> None:
    assert default_max_body_bytes(4096) < 1.2 * 2**20
    ids = json.dumps({"prompt": [128255] * 131072}, separators=(",", ": "))
    assert len(ids) < default_max_body_bytes(131072) < 8 << 20


# ----------------------------------------------------------------------------------------------- ids, methods and paths


def test_request_ids(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    """A request's id comes back and stands in the access log; without a usable one it gets a new one."""
    server.service.gate.log_requests = True
    try:
        with caplog.at_level(logging.INFO, "megatron.dmc.access"):
            assert server.ask("/version", headers={"X-Request-Id": "r-1"})[1]["x-request-id"] == "r-1"
            assert server.ask("/nowhere", headers={"X-Forwarded-For": "9.9.9.9"})[1]["x-request-id"]
            made = {server.ask("/version", headers={"X-Request-Id": given})[1]["x-request-id"] for given in ("", "a b")}
            assert len(made) == 2 and all(len(name) == 32 for name in made)
            assert server.ask(COMPLETIONS, {}, headers={"X-Request-Id": "r-2"})[1]["x-request-id"] == "r-2"
            until(lambda: len(caplog.messages) >= 5)
    finally:
        server.service.gate.log_requests = False
    assert '"GET /version HTTP/1.1" 200 ' in caplog.messages[0] and caplog.messages[0].endswith("s r-1")
    assert "9.9.9.9" not in caplog.text, "anybody can send X-Forwarded-For"
    assert '"POST /v1/completions HTTP/1.1" 400 ' in caplog.messages[-1] and caplog.messages[-1].endswith("s r-2")


@pytest.mark.parametrize("path", ["/", "/health", "/version", "/metrics", "/v1/models", "/v1/models/m"])
def test_head(server: Running, path: str) -> None:
    status, headers, text = server.ask(path, method="HEAD")
    assert status == 200 and text == "" and int(headers["content-length"]) > 0


def test_a_slash_at_the_end(server: Running) -> None:
    assert server.json("/v1/models/") == server.json("/v1/models")


def test_head_of_what_takes_no_get(server: Running) -> None:
    assert server.ask(COMPLETIONS, method="HEAD")[0] == 405
