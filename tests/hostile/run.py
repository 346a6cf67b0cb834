"""Hostile clients against a real ``dmc serve`` of a tiny model, while a canary measures what others notice of them.

    python tests/hostile/run.py [--json FILE] [--only NAME ...] [--latency MS]

For every attack: the answers, the server's peak memory, and the slowest of the canary's requests (GET /health on a
kept connection, and a completion of one token), which runs in a process of its own. Exit status 1 when an answer is not
one that docs/serving.md lists, a canary's request takes longer than ``--latency``, or the server's resident memory at
the end is more than 100 MiB above that before the first attack.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

HEAD = b"POST %s HTTP/1.1\r\nHost: m\r\nContent-Type: application/json\r\n"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
CONNECTIONS = 256  # --max-connections of the server
REFUSALS = {400, 404, 408, 413, 415, 431}
RSS_MIB = 100


class Target:
    """The server that is attacked, and the answers it gave."""

    def __init__(self, port: int, max_body_bytes: int) -> None:
        self.port, self.max_body_bytes = port, max_body_bytes
        self.answers: Counter[int] = Counter()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def post(self, path: str, body: object) -> None:
        """Send a body as JSON, or as it is, and count the answer."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request("POST", path, data, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            self.answers[answer.status] += 1
        finally:
            connection.close()

    def raw(self, data: bytes, path: str = COMPLETIONS, head: bool = True) -> None:
        """Send bytes behind the head of a POST, and count the answers until the server closes the connection."""
        with self.connect() as sock:
            with contextlib.suppress(ConnectionError):
                sock.sendall((HEAD % path.encode() if head else b"") + data)
            self.count(sock)

    def count(self, sock: socket.socket) -> None:
        """Count the answers on a connection until it is closed; 0 where it was closed without one."""
        received = b""
        with contextlib.suppress(ConnectionError):
            while part := sock.recv(1 << 16):
                received += part
        statuses = [int(found) for found in re.findall(rb"HTTP/1\.1 (\d+) ", received)]
        self.answers.update(statuses or [0])

    def full(self, start: bytes, element: bytes, end: bytes) -> bytes:
        """The largest body that the server reads: as many elements as fit."""
        return start + b",".join([element] * ((self.max_body_bytes - len(start + end)) // (len(element) + 1))) + end


# ------------------------------------------------------------------------------------------------------------- attacks


def nulls(t: Target) -> None:
    """Lists of nulls where messages, prompts and token ids are wanted: as large as is read, and larger."""
    for path, name in ((CHAT, "messages"), (COMPLETIONS, "prompt"), ("/detokenize", "tokens")):
        t.post(path, t.full(b'{"%s":[' % name.encode(), b"null", b"]}"))
        t.post(path, t.full(b'{"%s":[1,' % name.encode(), b"null", b"]}"))
        t.post(path, b'{"%s":[' % name.encode() + b",".join([b"null"] * 3_000_000) + b"]}")
    t.post(COMPLETIONS, {"prompt": [None] * 1000})
    t.post(CHAT, {"messages": [None] * 4000})


def many_elements(t: Target) -> None:
    """Stop strings, stop tokens, biases, messages, prompts, parts and names without end."""
    one = {"prompt": "a", "n": 16, "max_tokens": 200}
    t.post(COMPLETIONS, one | {"stop": [f"{n:05}" for n in range(20_000)]})
    t.post(COMPLETIONS, t.full(b'{"prompt":"a","stop":[', b'"x"', b"]}"))
    t.post(COMPLETIONS, one | {"stop_token_ids": [1] * 100_000})
    t.post(COMPLETIONS, one | {"logit_bias": {str(n): 1 for n in range(50_000)}})
    t.post(COMPLETIONS, one | {f"x{n}": n for n in range(50_000)})
    t.post(COMPLETIONS, one | {"n": 10**9})
    t.post(COMPLETIONS, {"prompt": ["a"] * 50_000})
    t.post(COMPLETIONS, t.full(b'{"prompt":[', b"[]", b"]}"))
    t.post(CHAT, t.full(b'{"messages":[', b'{"role":"user","content":""}', b"]}"))
    t.post(CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 20_000}]})
    t.post(CHAT, {"messages": [{"role": "user", "content": "a"} | {f"x{n}": n for n in range(50_000)}]})


def long_prompts(t: Target) -> None:
    """Texts and token ids as long as is read."""
    t.post(COMPLETIONS, {"prompt": "a " * ((t.max_body_bytes - 100) // 2)})
    t.post(COMPLETIONS, t.full(b'{"prompt":[', b"1", b"]}"))
    t.post("/detokenize", t.full(b'{"tokens":[', b"1", b"]}"))
    t.post(CHAT, {"messages": [{"role": "user", "content": "a" * (t.max_body_bytes - 100)}]})


def strange_json(t: Target) -> None:
    """Nesting without end, huge numbers, half a body, no object at all."""
    for body in (b"[" * 500_000, b'{"a":' * 100_000, b'{"prompt":' + b"9" * 500_000 + b"}", b'{"prompt":"', b"null"):
        t.post(COMPLETIONS, body)
    t.post(COMPLETIONS, b'{"prompt":"a","temperature":1e999}')


def tiny_chunks(t: Target) -> None:
    """A body in 200,000 chunks of one byte."""
    for _ in range(3):
        t.raw(b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 200_000 + b"0\r\n\r\n")


def two_lengths(t: Target) -> None:
    """Content-Length and Transfer-Encoding in one request, with a second request behind it."""
    data = b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /version HTTP/1.1\r\nHost: m\r\n\r\n"
    for _ in range(20):
        t.raw(data)


def no_http(t: Target) -> None:
    """Bytes that are not HTTP, and headers without end."""
    t.raw(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500) + b"\r\n\r\n", head=False)
    t.raw(b"X: " + b"a" * 300_000)
    t.raw(b"".join(b"x%d: 1\r\n" % n for n in range(40_000)))
    t.raw(b"Connection: close\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}")


def large_bodies(t: Target) -> None:
    """15 MB each, which is more than is read, at once from eight clients."""
    with_threads(8, lambda: t.post(COMPLETIONS, b" " * 15_000_000))


def unfinished_bodies(t: Target) -> None:
    """Forty bodies of the largest size, each without its last byte."""
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(t.connect()) for _ in range(40)]
        for sock in socks:
            size = t.max_body_bytes
            with contextlib.suppress(ConnectionError):
                sock.sendall(HEAD % b"/v1/completions" + b"Content-Length: %d\r\n\r\n" % size + b" " * (size - 1))
        for sock in socks:
            sock.settimeout(180)
            t.count(sock)


def silent_connections(t: Target) -> None:
    """More connections than may be open: silent, with half of the headers, and with a byte now and then."""
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(t.connect()) for _ in range(CONNECTIONS + 150)]
        for n, sock in enumerate(socks):
            with contextlib.suppress(ConnectionError):
                sock.sendall((b"", b"GET / HTTP/1.1\r\nHost:", b"G")[n % 3])
        for _ in range(3):
            time.sleep(0.5)
            for sock in socks[2::3]:
                with contextlib.suppress(OSError):
                    sock.sendall(b"E")
        for sock in socks:
            t.count(sock)


def pipelines(t: Target) -> None:
    """Thousands of requests in one piece, whose answers nobody reads for a second."""
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(t.connect()) for _ in range(4)]
        for sock in socks:
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                sock.send(b"GET /nowhere HTTP/1.1\r\nHost: m\r\n\r\n" * 3000)
        time.sleep(1)
    t.answers[404] += 1


def no_reader(t: Target) -> None:
    """Streams whose client never reads."""
    body = json.dumps({"prompt": "a", "max_tokens": 200, "stream": True, "ignore_eos": True}).encode()
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            sock = stack.enter_context(t.connect())
            sock.sendall(HEAD % b"/v1/completions" + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        time.sleep(3)
    t.answers[408] += 1


ATTACKS: tuple[Callable[[Target], None], ...] = (
    nulls,
    many_elements,
    long_prompts,
    strange_json,
    tiny_chunks,
    two_lengths,
    no_http,
    large_bodies,
    unfinished_bodies,
    silent_connections,
    pipelines,
    no_reader,
)


def with_threads(count: int, call: Callable[[], None]) -> None:
    threads = [threading.Thread(target=call) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# -------------------------------------------------------------------------------------------------------------- canary


def canary(port: int) -> None:
    """Print a line for every request: time of its start, and seconds, until standard input is closed."""
    gone = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), gone.set()), daemon=True).start()
    body = json.dumps({"prompt": [1], "max_tokens": 1})
    requests = (("GET", "/health", None), ("POST", COMPLETIONS, body))
    kept = [http.client.HTTPConnection("127.0.0.1", port, timeout=120) for _ in requests]
    while not gone.wait(0.04):
        for connection, (method, path, data) in zip(kept, requests):
            began = time.time()
            connection.request(method, path, data, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            print(began, time.time() - began, answer.status, path, flush=True)


@contextlib.contextmanager
def watched(port: int) -> Iterator[list[tuple[float, float, int]]]:
    """A running canary; (start, seconds, status) of its requests."""
    command = [sys.executable, __file__, "--canary", str(port)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    seen: list[tuple[float, float, int]] = []

    def follow() -> None:
        for line in process.stdout:
            began, seconds, status, _ = line.split()
            seen.append((float(began), float(seconds), int(status)))

    threading.Thread(target=follow, daemon=True).start()
    try:
        yield seen
    finally:
        process.stdin.close()
        process.wait(120)


@contextlib.contextmanager
def served(path: str) -> Iterator[tuple[psutil.Process, int, list[str]]]:
    """A ``dmc serve`` of the model, its port and its log. It must end with status 0 within 40 s of SIGTERM."""
    command = [sys.executable, "-m", "megatron.dmc.cli", "serve", path, "--port", "0", "--device", "cpu"]
    command += ["--max-connections", str(CONNECTIONS), "--shutdown-timeout", "5"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    lines: list[str] = []
    try:
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"on http://[\d.]+:(\d+)", line):
                break
        else:
            raise SystemExit("".join(lines))
        threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True).start()
        yield psutil.Process(process.pid), int(found[1]), lines
        process.send_signal(signal.SIGTERM)
        if process.wait(40):
            raise SystemExit(f"the server ended with {process.returncode}\n" + "".join(lines[-20:]))
    finally:
        process.kill()
        process.wait()


def attack(t: Target, server: psutil.Process, run: Callable[[Target], None]) -> dict[str, object]:
    """Run one attack. Returns its answers, times and the server's peak memory in MiB."""
    t.answers, done, peak = Counter(), threading.Event(), [0.0]

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], server.memory_info().rss / 2**20)

    watching = threading.Thread(target=watch)
    watching.start()
    began = time.time()
    try:
        run(t)
    finally:
        done.set()
        watching.join()
    answers = {str(status): count for status, count in sorted(t.answers.items())}
    return {"name": run.__name__, "began": began, "seconds": time.time() - began, "answers": answers, "peak": peak[0]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--canary", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="attacks to run (default: all)")
    parser.add_argument("--latency", type=float, default=250, metavar="MS", help="bound on the canary (default: 250)")
    args = parser.parse_args()
    if args.canary is not None:
        canary(args.canary)
        return 0
    from helpers.serving import make_model

    from megatron.dmc.serving.bodies import default_max_body_bytes

    missed: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        model = make_model(Path(name, "m"))
        max_model_len = json.loads(Path(model.path, "config.json").read_text())["max_position_embeddings"]
        with served(model.path) as (server, port, log), watched(port) as seen:
            target = Target(port, default_max_body_bytes(max_model_len))
            attack(target, server, long_prompts)  # imports and buffers that any server has after some minutes
            time.sleep(5)
            before, idle_from = server.memory_info().rss / 2**20, time.time() - 4
            idle = 1e3 * max(seconds for began, seconds, _ in seen if began > idle_from)
            print(f"idle: {before:.0f} MiB, slowest canary {idle:.0f} ms")
            found = []
            for run in ATTACKS:
                if not args.only or run.__name__ in args.only:
                    found.append(attack(target, server, run))
                    time.sleep(1)
            time.sleep(2)
            after = server.memory_info().rss / 2**20
            for entry in found:
                end = entry["began"] + entry["seconds"] + 0.5
                entry["canary_ms"] = 1e3 * max(
                    (seconds for began, seconds, _ in seen if entry["began"] - 0.3 <= began <= end), default=0.0
                )
                print(
                    f"{entry['name']:<20} {entry['seconds']:6.1f} s  peak {entry['peak']:5.0f} MiB  "
                    f"canary {entry['canary_ms']:5.0f} ms  answers {entry['answers']}"
                )
                allowed = REFUSALS | (
                    {503, 0} if entry["name"] in ("silent_connections", "unfinished_bodies") else set()
                )
                if wrong := {status for status in entry["answers"] if int(status) not in allowed}:
                    missed.append(f"{entry['name']}: answers {sorted(wrong)}")
                if entry["canary_ms"] > args.latency:
                    missed.append(
                        f"{entry['name']}: a canary took {entry['canary_ms']:.0f} ms, more than {args.latency:g}"
                    )
            if refused := {status for _, _, status in seen} - {200}:
                missed.append(f"the canary was answered {sorted(refused)}")
    print(f"{before:.0f} MiB before, {after:.0f} MiB after; {len(seen)} canary requests; {len(log)} lines of log")
    if after - before > RSS_MIB:
        missed.append(f"resident memory went from {before:.0f} to {after:.0f} MiB")
    for text in missed:
        print(f"MISSED {text}")
    if args.json:
        figures = {"before": before, "after": after, "idle_canary_ms": idle, "attacks": found, "missed": missed}
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
