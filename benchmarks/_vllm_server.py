"""A ``vllm serve`` of another environment, for benchmarks/serving.py."""

import os
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START = 900.0  # seconds; torch.compile takes minutes


@contextmanager
def vllm_served(python: Path, path: Path, preload: str, *options: object) -> Iterator[int]:
    """Port of a ``vllm serve`` that gets SIGTERM at the end.

    Args:
        python: interpreter of an environment with vLLM.
        path: model directory.
        preload: libraries to load before all others, as vLLM's documentation wants it on CPUs.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python.with_name("vllm"), "serve", path, "--host", "127.0.0.1", "--port", port, *options]
    env = {**os.environ, "LD_PRELOAD": preload}
    env.pop("OMP_NUM_THREADS", None)  # vLLM takes all cores that it may run on
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([str(part) for part in command], stdout=log, stderr=log, env=env)
        try:
            _wait(process, f"http://127.0.0.1:{port}/health")
            yield port
        except BaseException:
            log.seek(0)
            print("".join(log.readlines()[-40:]))
            raise
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen, url: str) -> None:
    """Wait until the server answers. Raises ``SystemExit`` when it ends, or takes too long."""
    deadline = time.monotonic() + START
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"vllm serve has ended with {process.returncode}")
        try:
            urllib.request.urlopen(url, timeout=10).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise SystemExit(f"vllm serve does not answer after {START:g} s")
