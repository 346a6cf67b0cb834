#!/usr/bin/env python3
"""One side: runs the commands of all cases with one checkout's code, in the current directory.

    tests/same_results/worker.py CHECKOUT INPUTS [CASE ...]

Every command runs in processes of its own. They are forked from this one, which has imported what is slow to import and
belongs to neither side: torch, transformers and megatron-core.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch
from cases import CASES, Command

HERE = Path(__file__).resolve().parent
PRELOADED = (
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.distributed",
    "megatron.core.models.gpt",
    "megatron.core.optimizer",
    "sentencepiece",
    "torch.utils.tensorboard",
    "transformers.models.auto.modeling_auto",
    "transformers.tokenization_utils_tokenizers",
)


def preload() -> None:
    """Imports only: forked processes must not find threads or groups."""
    for name in PRELOADED:
        importlib.import_module(name)
    ours = [name for name in sys.modules if name.startswith("megatron.dmc.")]
    assert not ours, f"{ours} belong to a side; only its commands may import them"
    torch.set_num_threads(1)


def run_entry(command: Command, checkout: Path, environment: dict[str, str]) -> int:
    """The exit status of the command's entry point, run as Python itself would run it."""
    os.environ.update(environment)
    module, *args = command.words(checkout)
    sys.argv = [module, *args]
    try:
        if module.endswith(".py"):
            script = HERE / module if (HERE / module).is_file() else checkout / module
            sys.path.insert(0, str(script.parent))
            sys.argv[0] = str(script)
            runpy.run_path(str(script), run_name="__main__")
        else:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def child(command: Command, checkout: Path, environment: dict[str, str], log: Path) -> None:
    """Never returns: the forked process ends here."""
    status = 70
    try:
        with log.open("ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        status = run_entry(command, checkout, environment)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def execute(command: Command, checkout: Path, log: Path) -> list[int]:
    """Exit statuses of the command's ranks."""
    if command.fresh:
        script, *args = command.words(checkout)
        with log.open("ab") as file:
            words = [sys.executable, str(checkout / script), *args]
            return [subprocess.call(words, stdout=file, stderr=subprocess.STDOUT)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(command.ranks):
        environment = {}
        if command.ranks > 1:
            environment = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(command.ranks))
            environment |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        pid = os.fork()
        if pid == 0:
            child(command, checkout, environment, log if rank == 0 else log.with_suffix(f".rank{rank}"))
        processes.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in processes]


def main() -> None:
    checkout, inputs, wanted = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    import megatron.dmc

    assert Path(megatron.dmc.__file__).is_relative_to(checkout), f"{megatron.dmc.__file__} is not in {checkout}"
    preload()
    for case in CASES:
        if wanted and case.name not in wanted:
            continue
        began, directory = time.monotonic(), Path(case.name)
        directory.mkdir()
        statuses = []
        for number, command in enumerate(case.commands(inputs)):
            statuses.append(execute(command, checkout, directory / f"command{number}.log"))
            if any(statuses[-1]):
                break
        (directory / "status.json").write_text(json.dumps(statuses))
        print(f"{case.name}: {time.monotonic() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
