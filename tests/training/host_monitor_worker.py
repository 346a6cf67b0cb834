"""Ranks of test_host_monitor.py: host_monitor_worker.py RANK WORLD PORT DIRECTORY HOW.

Each writes ready-RANK, then waits for go-RANK.

HOW, for what it does then: sleep (it stands still), end (orderly), raise, fork (like sleep, with a child that outlives
it).
"""

import os
import socket
import sys
import time
from pathlib import Path

from torch import distributed

from megatron.dmc.training.host_monitor import HostMonitor

rank, world, port, directory, how = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), sys.argv[5]
socket.gethostname = lambda: f"host-{rank // 2}"
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
distributed.init_process_group("gloo")
with HostMonitor(30, str(directory), grace=1.0) as monitor:
    print(monitor, flush=True)
    if how == "fork" and os.fork() == 0:
        while not (directory / "end").exists():
            time.sleep(0.1)
        os._exit(0)
    (directory / f"ready-{rank}").touch()
    while how in ("sleep", "fork") or not (directory / f"go-{rank}").exists():
        time.sleep(0.01)
    if how == "raise":
        raise ArithmeticError("iteration 7:\nthe gradients hold nan")
