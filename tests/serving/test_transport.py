"""The server's connections: what is set on a socket, and what is answered below the endpoints."""

from __future__ import annotations

import http.client
import socket

from helpers.serving import Running


def test_segments_are_sent_at_once(server: Running) -> None:
    """Nagle's algorithm is off on accepted connections: with it, a response waits for the client's delayed ACK."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        connection.request("GET", "/health")
        assert connection.getresponse().read() == b"{}"
        accepted = [kept.transport.get_extra_info("socket") for kept in server.server.server_state.connections]
        assert accepted and all(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for sock in accepted)
    finally:
        connection.close()
