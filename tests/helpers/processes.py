"""Processes of the tests: the environment they get, a limit on their time, and an end for all of them."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE = 120.0
"""Seconds after which a test gives up on what must come. Many, so that it means a fault and not a machine under load:
where all is well they do not pass."""
TAIL = 8000  # characters of each stream that a failure shows


def subprocess_env(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This environment with the repository and its tests first on PYTHONPATH and one thread per process, then
    ``extra``.
    """
    path = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", **(extra or {})}


def kill_tree(process: subprocess.Popen) -> None:
    """Kill a process that has not been waited for, its group, and its descendants.

    torch's launcher starts every worker in a session of its own, so the group alone would leave the workers running.
    """
    children: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()


def run_command(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    timeout: float = PATIENCE,
    check: bool = True,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run ``command`` in a process group of its own; kill all of it when ``timeout`` seconds have passed.

    Output goes to files, so that a worker that outlives its parent cannot hold this process on an open pipe. Raises
    AssertionError with the end of the output on a timeout and, with ``check``, on a non-zero exit.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as out, tempfile.TemporaryFile("w+", errors="replace") as err:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=subprocess_env(env),
            cwd=cwd or ROOT,
            start_new_session=True,
        )
        problem = ""
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            problem = f"no end after {timeout:g} s, killed"
        finally:
            if process.returncode is None:
                kill_tree(process)
        out.seek(0)
        err.seek(0)
        result = subprocess.CompletedProcess(list(command), process.returncode, out.read(), err.read())
    if not problem and check and result.returncode != 0:
        problem = f"exit status {result.returncode}"
    if problem:
        raise AssertionError(
            f"{problem}: {' '.join(command)}\n--- stdout\n{result.stdout[-TAIL:]}\n--- stderr\n{result.stderr[-TAIL:]}"
        )
    return result
