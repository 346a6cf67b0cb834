"""A real SLURM of two nodes on this machine: munged, slurmctld and two slurmd, in a directory of their own.

Needs root, and the packages slurmctld, slurmd, slurm-client and munge (seen with Debian 12's, SLURM 22.05). It ends
only what it has started, by the process ids in its own directory.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool.%n
SlurmctldPidFile={directory}/ctld.pid
SlurmdPidFile={directory}/slurmd.%n.pid
SlurmctldLogFile={directory}/ctld.log
SlurmdLogFile={directory}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
ReturnToService=2
MpiDefault=none
JobRequeue=1
KillWait=30
SlurmctldPort={port}
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=2 RealMemory=4000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=2 RealMemory=4000
PartitionName=p Nodes=n[1-2] Default=YES MaxTime=60 State=UP OverSubscribe=FORCE:4
"""


def wait_for(condition: Callable[[], object], what: str, seconds: float = 60) -> object:
    """What ``condition`` returns, once it is true."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.2)
    return value


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


class Cluster:
    """``with Cluster(directory) as cluster:``; ``cluster.env`` makes SLURM's commands talk to it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.env = {**os.environ, "SLURM_CONF": str(directory / "slurm.conf")}
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> Cluster:
        missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]
        if missing or os.geteuid() != 0:
            raise SystemExit(
                f"needs root and {', '.join(missing) or 'SLURM'}: apt install slurmctld slurmd slurm-client munge"
            )
        self.directory.mkdir(parents=True)
        self.directory.chmod(0o755)
        port, first, second = _free_ports(3)
        host = socket.gethostname().split(".")[0]
        (self.directory / "slurm.conf").write_text(
            CONFIGURATION.format(directory=self.directory, host=host, port=port, first=first, second=second)
        )
        (self.directory / "state").mkdir()
        key = self.directory / "munge.key"
        key.write_bytes(os.urandom(64))
        key.chmod(0o600)
        try:
            self._start(
                "munged",
                "--foreground",
                "--force",
                f"--socket={self.directory}/munge.socket",
                f"--key-file={key}",
                f"--pid-file={self.directory}/munged.pid",
                f"--log-file={self.directory}/munged.log",
                f"--seed-file={self.directory}/munged.seed",
            )
            wait_for(lambda: (self.directory / "munge.socket").exists(), "munged")
            self._start("slurmctld", "-D")
            for node in ("n1", "n2"):
                self._start("slurmd", "-D", "-N", node)
            wait_for(lambda: self.run("sinfo", "-h", "-o", "%T %D") == "idle 2", "two idle nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self, *command: str) -> None:
        with (self.directory / f"{command[0]}.out").open("a") as out:
            self._daemons.append(
                subprocess.Popen(command, env=self.env, stdout=out, stderr=out, start_new_session=True)
            )

    def __exit__(self, *_: object) -> None:
        if len(self._daemons) > 1:
            subprocess.run(["scancel", "--partition=p", "--signal=KILL"], env=self.env, timeout=30)
            subprocess.run(["scancel", "--partition=p"], env=self.env, timeout=30)
            time.sleep(2)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def run(self, *command: str, check: bool = False) -> str:
        """Output of one of SLURM's commands."""
        result = subprocess.run(command, env=self.env, capture_output=True, text=True)
        if check and result.returncode:
            raise RuntimeError(f"{' '.join(command)}: {result.stderr}")
        return result.stdout.strip()

    def state(self, job: str) -> str:
        return self.field(job, "JobState")

    def field(self, job: str, name: str) -> str:
        words = self.run("scontrol", "show", "job", "-o", job).split()
        return next((word.split("=", 1)[1] for word in words if word.startswith(name + "=")), "")

    def start_now(self, job: str) -> None:
        """A requeued job waits for two minutes; not here."""
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now")
