"""Python commands in processes that are forked from a server with torch, transformers and megatron-core loaded:
importing these takes a new interpreter two to three seconds, which is most of what a command on a tiny model takes.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Optional
from unittest import mock

from helpers.processes import PATIENCE

ROOT = Path(__file__).resolve().parent.parent.parent
_starting = threading.Lock()


def start(target, *args: object) -> multiprocessing.Process:
    """Process that calls ``target(*args)``. Its environment is the server's, which was this process's at first."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers.tiny_preload"])
    process = context.Process(target=target, args=args)
    # The server keeps these; it looks for what to preload before it is told sys.path.
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    with _starting, mock.patch.dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=path):
        process.start()
    return process


class Forked:
    """As much of ``subprocess.Popen`` as its users here need, for a command that begins with ``sys.executable``.

    ``log``: file that stdout and stderr are appended to.
    """

    def __init__(self, command: Sequence[str], log: Path, env: Mapping[str, str], cwd: Path = ROOT) -> None:
        assert command[0] == sys.executable
        self._process = start(_run, list(command[1:]), str(log), dict(env), str(cwd))
        self.pid = self._process.pid

    def wait(self, timeout: Optional[float] = None) -> int:
        """Exit status, as ``Popen.wait`` gives it."""
        connection.wait([self._process.sentinel], timeout)
        # The server tells a status once, and starting a process asks for those of all others: a thread that asks at
        # the same time as another finds nothing, which counts as status 255.
        with _starting:
            self._process.join(0)
            code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired("forked", timeout or 0)
        return code

    def is_alive(self) -> bool:
        with _starting:
            return self._process.is_alive()

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        """Kill it and what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()


def run_ranks(
    target: Path | str, count: int, args: Sequence[object], directory: Path, timeout: float = PATIENCE
) -> str:
    """Run ``target``, a script or the name of a module, as ``count`` ranks of one group, each with one thread. Returns
    what they say. Raises AssertionError with the end of it when one of them fails, or ``timeout`` seconds have passed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    words = [str(target)] if isinstance(target, Path) else ["-m", target]
    log, end = directory / f"{words[-1].replace('/', '_')}-{count}.log", time.monotonic() + timeout
    command = [sys.executable, *words, *map(str, args)]
    ranks = [
        Forked(command, log, {**os.environ, **{k: str(v) for k, v in {**shared, "RANK": n, "LOCAL_RANK": n}.items()}})
        for n in range(count)
    ]
    try:
        codes = [rank.wait(max(0.1, end - time.monotonic())) for rank in ranks]
    except subprocess.TimeoutExpired:
        codes = ["no end in time"]
    finally:
        for rank in ranks:
            rank.kill()
    said = log.read_text(errors="replace")
    assert codes == [0] * count, f"{' '.join(words)}: {codes}\n{said[-8000:]}"
    return said


def run(command: Sequence[object], log: Path, timeout: float = PATIENCE, status: int = 0) -> str:
    """Run one command, which begins with ``sys.executable``, with one thread. Returns what it says. Raises
    AssertionError with the end of it when it ends with another status, or not in time.
    """
    process = Forked(list(map(str, command)), log, {**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        process.kill()
    said = log.read_text(errors="replace")
    assert code == status, f"{command}: {'no end in time' if code is None else code}\n{said[-8000:]}"
    return said


def _run(words: list[str], log: str, env: dict[str, str], cwd: str) -> None:
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    import torch

    torch.set_num_threads(1)  # forked: OpenMP must not start threads
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        sys.path.insert(0, cwd)
        exec(words[1], {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, cwd)
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")
