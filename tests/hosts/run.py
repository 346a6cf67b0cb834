#!/usr/bin/env python3
"""Two hosts on one machine, in network namespaces, one of which is cut off while torchrun trains across both. Not among
the other
tests: needs root and iproute2.

    tests/hosts/run.py [--keep DIRECTORY] [--lost-host-seconds 30] [silent | down ...]

Each host has its own network, its own name and its own torchrun; both see one file system. In the middle of a stage

silent: the switch forgets the port of one host: all packets are lost, and every link stays up;
down: the network interface of one host goes down.

On both hosts torchrun must end within a minute, with a message that names the other host. Then the network is mended
and the same commands run again: losses and checkpoints must be those of an undisturbed run, bit for bit.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
for folder in (ROOT, ROOT / "tests"):
    sys.path.insert(0, str(folder))

from helpers.processes import kill_tree  # noqa: E402

STEPS, LIMIT = 200, 60.0  # of the stage; seconds from the cut to the end on both hosts
LAYOUTS = {"silent": ["--tensor-model-parallel-size", "2"], "down": ["--use-distributed-optimizer"]}


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def ip(*words: str, namespace: str = "") -> None:
    subprocess.run(["ip", *(["-n", namespace] if namespace else []), *words], check=True)


class Network:
    """Hosts ``host-a`` and ``host-b`` at a switch. A context: all of it is taken down at the end."""

    def __init__(self, directory: Path) -> None:
        self.directory, tag = directory, f"{os.getpid():x}"
        self.switch, self.spaces = f"sw{tag}", {"host-a": f"dmc-a-{tag}", "host-b": f"dmc-b-{tag}"}
        self.ports = {name: f"p{name[-1]}{tag}" for name in self.spaces}
        self.addresses = {"host-a": "10.231.77.1", "host-b": "10.231.77.2"}

    def __enter__(self) -> Network:
        if missing := [name for name in ("ip", "unshare", "mount") if shutil.which(name) is None] or os.geteuid():
            raise SystemExit(f"needs root and {missing or 'iproute2'}: apt install iproute2")
        self.directory.mkdir(parents=True)
        (self.directory / "hosts").write_text(
            "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in self.addresses.items())
        )
        try:
            ip("link", "add", self.switch, "type", "bridge")
            ip("link", "set", self.switch, "up")
            for name, space in self.spaces.items():
                ip("netns", "add", space)
                ip("link", "add", self.ports[name], "type", "veth", "peer", "name", "eth0", "netns", space)
                ip("link", "set", self.ports[name], "master", self.switch, "up")
                ip("link", "set", "lo", "up", namespace=space)
                ip("address", "add", f"{self.addresses[name]}/24", "dev", "eth0", namespace=space)
                ip("link", "set", "eth0", "up", namespace=space)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for space in self.spaces.values():
            subprocess.run(["ip", "netns", "del", space], stderr=subprocess.DEVNULL)
        subprocess.run(["ip", "link", "del", self.switch], stderr=subprocess.DEVNULL)

    def cut(self, name: str, how: str) -> None:
        if how == "silent":
            ip("link", "set", self.ports[name], "nomaster")
        else:
            ip("link", "set", "eth0", "down", namespace=self.spaces[name])

    def mend(self, name: str, how: str) -> None:
        if how == "silent":
            ip("link", "set", self.ports[name], "master", self.switch)
        else:
            ip("link", "set", "eth0", "up", namespace=self.spaces[name])

    def start(self, name: str, command: list[str], log: Path) -> subprocess.Popen:
        """On one host, in a session of its own."""
        script = 'mount --bind "$0" /etc/hosts && hostname "$1" && shift && exec "$@"'
        inside = [
            "ip",
            "netns",
            "exec",
            self.spaces[name],
            "unshare",
            "--uts",
            "--mount",
            "sh",
            "-c",
            script,
            str(self.directory / "hosts"),
            name,
            *command,
        ]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        with log.open("w") as out:
            return subprocess.Popen(inside, env=env, stdout=out, stderr=out, start_new_session=True)


class Stage:
    """One stage under ``work/NAME``, by a torchrun on each host."""

    def __init__(self, network: Network, work: Path, name: str, flags: list[str]) -> None:
        from helpers import tiny

        self.network, self.save, self.directory, self.starts = network, work / name / "save", work / name, 0
        self.directory.mkdir()
        self.command = [
            *tiny.command(
                work,
                "zero_out",
                train_iters=STEPS,
                save=self.save,
                save_interval=20,
                init_from=work / "original",
                micro_batch_size=1,
            ),
            *flags,
        ]
        self.port, self.processes = 20000 + os.getpid() % 20000, {}

    def start(self) -> None:
        self.starts += 1
        for rank, name in enumerate(self.network.spaces):
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nnodes",
                "2",
                "--nproc-per-node",
                "1",
                "--node-rank",
                str(rank),
                "--master-addr",
                self.network.addresses["host-a"],
                "--master-port",
                str(self.port),
                "-m",
                "megatron.dmc.training.retrofit",
                *self.command,
            ]
            self.processes[name] = self.network.start(name, command, self.log(name))

    def log(self, name: str) -> Path:
        return self.directory / f"{name}.{self.starts}.log"

    def wait_for_step(self, step: int, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not re.search(rf"iteration +{step}/", self.log("host-a").read_text()):
            assert time.monotonic() < end and all(p.poll() is None for p in self.processes.values()), self.logs()
            time.sleep(0.05)

    def ends(self, seconds: float) -> dict[str, tuple[float, int]]:
        """Host -> (seconds until its torchrun ended, exit status)."""
        begun, found = time.monotonic(), {}
        while len(found) < len(self.processes):
            for name, process in self.processes.items():
                if name not in found and process.poll() is not None:
                    found[name] = (time.monotonic() - begun, process.returncode)
            assert time.monotonic() < begun + seconds, f"only {found} ended within {seconds:g} s\n{self.logs()}"
            time.sleep(0.05)
        return found

    def logs(self) -> str:
        return "".join(f"--- {name}\n{self.log(name).read_text()[-3000:]}\n" for name in self.processes)

    def losses(self) -> dict[int, str]:
        """Iteration -> what all starts together have logged for it last."""
        found = {}
        for start in range(1, self.starts + 1):
            text = (self.directory / f"host-a.{start}.log").read_text()
            found.update({int(n): loss for n, loss in re.findall(r"iteration +(\d+)/.*? lm loss: (\S+)", text)})
        return found

    def stop(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                kill_tree(process)


def cut_off(network: Network, work: Path, how: str, seconds: int) -> None:
    from helpers import tiny

    whole = Stage(network, work, f"{how}-whole", LAYOUTS[how])
    stage = Stage(network, work, f"{how}-cut", [*LAYOUTS[how], "--lost-host-seconds", str(seconds)])
    try:
        whole.start()
        assert {status for _, status in whole.ends(300).values()} == {0}, whole.logs()
        stage.start()
        stage.wait_for_step(50)
        network.cut("host-b", how)
        ended = stage.ends(LIMIT)
        for name, other in (("host-a", "host-b"), ("host-b", "host-a")):
            text = stage.log(name).read_text()
            message = f"error: {other} (rank {int(other == 'host-b')}) has not answered for {seconds} s"
            assert ended[name][1] != 0 and message in text, (name, ended[name], stage.logs())
            say(f"  {name} ended {ended[name][0]:.1f} s after the cut: {re.search('error: .*', text)[0]}")
        assert (stage.save / "lost_host").exists()
        last = max(stage.losses())
        assert 50 <= last < STEPS, last
        network.mend("host-b", how)
        stage.start()
        assert {status for _, status in stage.ends(300).values()} == {0}, stage.logs()
    finally:
        whole.stop()
        stage.stop()
    resumed = re.search(r"resumed \S+ at iteration (\d+)", stage.log("host-a").read_text())
    assert resumed and 40 <= int(resumed[1]) <= last, stage.logs()
    assert not (stage.save / "lost_host").exists()
    assert stage.losses() == whole.losses() and len(stage.losses()) == STEPS
    name = f"iter_{STEPS:07d}"
    tiny.assert_same_checkpoint(whole.save / name, stage.save / name)
    say(
        f"{how} ({' '.join(LAYOUTS[how])}): cut after step {last}, resumed at {resumed[1]}; losses of all {STEPS} "
        "steps and the last checkpoint equal the undisturbed run's bit for bit"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="DIRECTORY", help="for all files; it must not exist")
    parser.add_argument("--lost-host-seconds", type=int, default=30)
    parser.add_argument("parts", nargs="*", choices=[*LAYOUTS, []], help="default: all")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # through Network's end
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.keep or Path(temporary) / "work").absolute()
        with Network(work / "network") as network:
            from helpers import tiny

            tiny.make_data(work)
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "megatron.dmc.training.retrofit",
                    *tiny.command(work, "pretrain", train_iters=4, save=work / "original"),
                ],
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
                check=True,
                stdout=subprocess.DEVNULL,
            )
            for how in args.parts or LAYOUTS:
                cut_off(network, work, how, args.lost_host_seconds)
    say("all as it should be")
    return 0


if __name__ == "__main__":
    sys.exit(main())
