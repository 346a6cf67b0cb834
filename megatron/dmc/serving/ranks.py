"""Tensor parallelism under the server: rank 0 serves, the others follow it, step by step.

Every rank runs the same engine on the same requests (``inference.parallel``). Calls that rank 0 gets between two steps
are sent to the others with the next step, over a gloo group of their own. The ranks are started by ``dmc serve``
itself, or by torchrun.
"""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any, Optional

import torch.distributed as dist

from megatron.dmc.inference import Engine, EngineConfig, Request, StepOutput
from megatron.dmc.inference.parallel import TensorParallel
from megatron.dmc.inference.text import load_tokenizer
from megatron.dmc.inference.weights import read_info

IDLE = timedelta(days=365)  # the others wait for the next step as long as it takes


class LeadingEngine(Engine):
    """Engine of rank 0: has its calls repeated by the other ranks."""

    def __init__(self, path: str | Path, config: EngineConfig, tokenizer: Optional[Any]) -> None:
        super().__init__(path, config, tokenizer)
        self._group = dist.new_group(backend="gloo", timeout=IDLE)
        self._calls: list[tuple[str, tuple[Any, ...]]] = []

    def add(self, request: Request) -> None:
        super().add(request)
        self._note("add", request)

    def reset_prefix_cache(self) -> None:
        self._note("reset_prefix_cache")
        super().reset_prefix_cache()

    def abort(self, request_id: str) -> list[StepOutput]:
        self._note("abort", request_id)
        return super().abort(request_id)

    def step(self) -> list[StepOutput]:
        self._note("step")
        self._send()
        return super().step()

    def release(self) -> None:
        """Let the other ranks end."""
        self._note("stop")
        self._send()

    def _note(self, name: str, *arguments: Any) -> None:
        self._calls.append((name, arguments))

    def _send(self) -> None:
        calls, self._calls = self._calls, []
        dist.broadcast_object_list([calls], src=0, group=self._group)


def check_size(path: str, config: EngineConfig) -> None:
    """Raise ``ValueError`` when the model cannot be cut into so many parts, before any process is started."""
    TensorParallel(0, config.tensor_parallel_size).check(read_info(config.open_directory(path)).model)


def follow(path: str, config: EngineConfig, tokenizer: str) -> None:
    """Repeat the calls of rank 0 on this rank, until it is released."""
    engine = Engine(path, config, load_tokenizer(tokenizer))
    group = dist.new_group(backend="gloo", timeout=IDLE)
    while True:
        box: list[Any] = [None]
        dist.broadcast_object_list(box, src=0, group=group)
        for name, arguments in box[0]:
            if name == "stop":
                return
            getattr(engine, name)(*arguments)


class Followers:
    """Processes of the other ranks on this machine; empty with one rank, or where torchrun has started them."""

    def __init__(self, path: str, config: EngineConfig, tokenizer: str) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        if config.tensor_parallel_size == 1 or "RANK" in os.environ:
            return
        with closing(socket.create_server(("127.0.0.1", 0))) as free:
            port = free.getsockname()[1]
        size = str(config.tensor_parallel_size)
        shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= shared | {"RANK": "0", "LOCAL_RANK": "0"}
        told = json.dumps([os.getpid(), path, dataclasses.asdict(config), tokenizer])
        for rank in range(1, config.tensor_parallel_size):
            env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            # In a session of their own: a Ctrl+C at the terminal is for rank 0, which has requests to finish.
            command = [sys.executable, "-m", "megatron.dmc.serving.ranks", told]
            self.processes.append(subprocess.Popen(command, env=env, start_new_session=True))

    def ended(self) -> bool:
        """Whether one has ended, which none does by itself."""
        return any(process.poll() is not None for process in self.processes)

    def kill(self) -> None:
        """Kill all that run."""
        for process in self.processes:
            process.kill()

    def stop(self, seconds: float = 10) -> None:
        """Wait for those that were released; kill the others."""
        for process in self.processes:
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _end_with(parent: int) -> None:
    """End this process soon after its parent: a rank 0 that is killed while it loads can end nobody."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    _parent, _path, _config, _tokenizer = json.loads(sys.argv[1])
    threading.Thread(target=_end_with, args=(_parent,), daemon=True).start()
    follow(_path, EngineConfig(**_config), _tokenizer)
