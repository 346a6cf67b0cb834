"""Monitor of the run's hosts: names a lost rank within seconds and ends the run on every host that still stands.

A collective whose peer is gone says nothing before its timeout, half an hour by default, and then only that it took too
long. So every rank keeps one idle TCP connection to rank 0. The kernel probes it (keep-alive) and answers for the other
side, whatever the processes do meanwhile: a rank that computes, reads a file or waits for another is never taken for a
lost one. Rank 0 notices a host that no longer answers, or a process that ends without saying goodbye, and tells the
others; a rank that loses rank 0 notices by itself. A connection lost between two other ranks alone is left to the
timeout of the collectives.

Works alike for gloo and NCCL: one thread that waits in the kernel, no collective, nothing per step.
"""

import errno
import os
import secrets
import selectors
import socket
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Optional, Self

from torch import distributed

EXIT_STATUS = 75
"""Exit status of a rank whose peer is lost (sysexits' EX_TEMPFAIL): the same command, run again, goes on."""
LOST_HOST_FILE = "lost_host"
"""File under --save, written when a host was lost, for scripts that start jobs: launchers do not pass a rank's exit
status on."""
_CONNECT_SECONDS = 60.0  # that all ranks have for their first connection
_SILENT = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN)


class _Loss(NamedTuple):
    """Ranks that are gone."""

    how: str
    """silent: their host does not answer; ended or failed: a fault of the run's own."""
    ranks: list[int]
    text: str


class HostMonitor:
    """Context in which a rank watches the others: a normal exit says goodbye, an exception is reported to all of them.

    All ranks make one together, after the process group. A group of one is not watched.

    Args:
        seconds: a host that has not answered for so long is lost; 0 watches nothing.
        save: the --save directory, for :data:`LOST_HOST_FILE`; None writes no file.
        grace: seconds that this rank has, after another one ended by itself, to fail of it too with its own message.

    Raises:
        RuntimeError: a rank does not reach rank 0; raised on both, with the address.
    """

    def __init__(self, seconds: int, save: Optional[str] = None, grace: float = 10.0) -> None:
        self.rank = distributed.get_rank()
        self._seconds, self._save, self._grace = seconds, save, grace
        self._loss_found, self._left = threading.Event(), False
        self._peers: dict[int, socket.socket] = {}
        self._hosts: list[str] = [""] * distributed.get_world_size()
        if not seconds or len(self._hosts) == 1:
            self._thread = None
            return
        distributed.all_gather_object(self._hosts, socket.gethostname())
        self._connect()
        self._wake, self._woken = socket.socketpair()
        # A forked process (a writer of checkpoints, a reader of data) may outlive this one, and would keep it looking
        # alive.
        inherited = weakref.WeakSet([*self._peers.values(), self._wake, self._woken])
        os.register_at_fork(after_in_child=lambda: [each.close() for each in list(inherited)])
        self._thread = threading.Thread(target=self._watch, name="host monitor", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self._thread is None:
            return
        orderly = kind is None or (kind is SystemExit and not error.code)
        if not orderly:
            # A collective fails faster than the kernel gives up on a host, or just as fast as it tells of a process'
            # end.
            self._loss_found.wait(1.0)
        self._left = True
        reason = "bye" if orderly else f"failed {kind.__name__}: {' '.join(str(error).split())[:300]}"
        for peer in self._peers.values():
            _send_line(peer, reason)
        self._wake.send(b"x")
        self._thread.join(5.0)

    def __str__(self) -> str:
        """Describe what is watched, for the log."""
        if self._thread is None:
            return "hosts are not watched" + ("" if self._seconds else " (lost_host_seconds is 0)")
        return (
            f"watching {len(self._hosts)} ranks on {len(set(self._hosts))} hosts: one that does not answer for "
            f"{self._seconds} s ends the run"
        )

    # Connections

    def _connect(self) -> None:
        if self.rank == 0:
            server = _listen()
            hello = [server.getsockname()[1], secrets.token_hex(16)]
        else:
            hello = [0, ""]
        distributed.broadcast_object_list(hello, src=0)
        port, token = hello
        if self.rank == 0:
            with server:
                self._accept(server, token)
            return
        address = os.environ.get("MASTER_ADDR", "127.0.0.1")
        try:
            peer = socket.create_connection((address, port), timeout=_CONNECT_SECONDS)
        except OSError as error:
            raise RuntimeError(
                f"rank {self.rank} on {self._hosts[self.rank]} does not reach rank 0 at {address}:{port}, over "
                f"which hosts are watched: {error}; let TCP through between the hosts, or set "
                "lost_host_seconds to 0"
            ) from error
        _keep_alive(peer, self._seconds)
        _send_line(peer, f"{token} {self.rank}")
        self._peers[0] = peer

    def _accept(self, server: socket.socket, token: str) -> None:
        end = time.monotonic() + _CONNECT_SECONDS
        while len(self._peers) < len(self._hosts) - 1:
            try:
                server.settimeout(max(0.01, end - time.monotonic()))
                peer, _ = server.accept()
                peer.settimeout(5.0)
                said, _, rank = _read_line(peer).partition(" ")
            except OSError as error:
                if time.monotonic() < end:
                    continue
                missing = [rank for rank in range(1, len(self._hosts)) if rank not in self._peers]
                raise RuntimeError(
                    f"{_name_ranks(missing)} did not reach rank 0 within {_CONNECT_SECONDS:.0f} s, over port "
                    f"{server.getsockname()[1]}, over which hosts are watched; let TCP through between the "
                    "hosts, or set lost_host_seconds to 0"
                ) from error
            if secrets.compare_digest(said.encode(), token.encode()) and rank.isdigit():
                _keep_alive(peer, self._seconds)
                self._peers[int(rank)] = peer
            else:
                peer.close()  # a stranger

    # The thread

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            for rank, peer in self._peers.items():
                peer.settimeout(5.0)
                selector.register(peer, selectors.EVENT_READ, rank)
            while len(selector.get_map()) > 1:
                for key, _ in selector.select():
                    if key.fileobj is self._woken:
                        return
                    try:
                        line = _read_line(key.fileobj)
                    except OSError as error:
                        self._lost(key.data, "silent" if error.errno in _SILENT else "ended")
                        return
                    if line == "bye":
                        selector.unregister(key.fileobj)
                    else:
                        self._lost(key.data, *line.split(" ", 1))
                        return

    def _lost(self, rank: int, how: str, what: str = "") -> None:
        """Report the loss of ``rank`` and end this process; return when this rank has failed too, and says so itself.

        ``how`` is "silent", "ended", "failed" (``what`` is the error), or "lost" (``what`` is rank 0's finding).
        """
        loss = self._describe(rank, how, what)
        for other, peer in self._peers.items():
            if self.rank == 0 and other not in loss.ranks:
                _send_line(peer, f"lost {loss.how} {','.join(map(str, loss.ranks))} {loss.text}")
        self._loss_found.set()
        fault = loss.how != "silent"
        if fault and self._left:
            return
        self._report(loss)
        if fault:
            end = time.monotonic() + self._grace
            while time.monotonic() < end and not self._left:
                time.sleep(0.1)
            if self._left:
                return
        self._leave()

    def _describe(self, rank: int, how: str, what: str) -> _Loss:
        name = f"rank {rank} on {self._hosts[rank]}"
        if how == "lost":
            how, ranks, text = what.split(" ", 2)
            return _Loss(how, [int(number) for number in ranks.split(",")], text)
        if how == "silent":
            ranks = [each for each, host in enumerate(self._hosts) if host == self._hosts[rank]]
            name = f"{self._hosts[rank]} ({_name_ranks(ranks)})"
            text = f"{name} has not answered for {self._seconds} s: it is down, or cut off"
            return _Loss(how, ranks, text)
        if how == "failed":
            return _Loss(how, [rank], f"{name} ended before the others: {what}")
        return _Loss(how, [rank], f"{name} ended before the others; its log says why")

    def _report(self, loss: _Loss) -> None:
        """Print the loss, once per host."""
        here = self._hosts[self.rank]
        standing = [rank for rank, host in enumerate(self._hosts) if host == here and rank not in loss.ranks]
        if standing and self.rank != standing[0]:
            return
        message = (
            f"error: {loss.text}. This run ends on {here} now; when all hosts are there again, the same "
            "command goes on from the newest checkpoint"
        )
        print(message, file=sys.stderr, flush=True)
        if loss.how == "silent":
            self._write_lost_host_file(message)

    def _write_lost_host_file(self, message: str) -> None:
        """Write the file without waiting for long: its file system may be gone with the host."""
        if self._save is None:
            return

        def write() -> None:
            with suppress(OSError):  # it is on stderr
                (Path(self._save) / LOST_HOST_FILE).write_text(message + "\n")

        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        thread.join(5.0)

    def _leave(self) -> None:
        # The main thread waits in a collective, where no exception reaches it.
        sys.stdout.flush()
        os._exit(EXIT_STATUS)


def remove_lost_host_file(save: Optional[str]) -> None:
    """Remove the file that an earlier run has left under --save."""
    if save is not None:
        (Path(save) / LOST_HOST_FILE).unlink(missing_ok=True)


def _name_ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    whole = list(ranks) == list(range(ranks[0], ranks[-1] + 1))
    return "ranks " + (f"{ranks[0]}-{ranks[-1]}" if whole else ", ".join(map(str, ranks)))


def _listen() -> socket.socket:
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    return socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=4096)


def _keep_alive(peer: socket.socket, seconds: int) -> None:
    """Probe an idle connection after a third of ``seconds``, then every sixth; give up after ``seconds`` of silence."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, seconds // 3))
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, seconds // 6))
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * seconds)


def _send_line(peer: socket.socket, line: str) -> None:
    with suppress(OSError):  # it is the one that is lost
        peer.sendall(line.encode() + b"\n")


def _read_line(peer: socket.socket) -> str:
    """Read up to the newline. Raises ``ConnectionResetError`` at the stream's end, and for a line no rank sends."""
    line = b""
    while not line.endswith(b"\n"):
        if len(line) > 4096:
            raise ConnectionResetError(errno.ECONNRESET, "too long")
        part = peer.recv(1)
        if not part:
            raise ConnectionResetError(errno.ECONNRESET, "closed")
        line += part
    return line[:-1].decode(errors="replace")
