"""A lost rank is noticed and named on all the others; a slow one is not lost.

Hosts that fall silent are tested by tests/hosts/run.py.
"""

import os
import signal
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.forked import Forked
from helpers.in_process import megatron_in_process
from helpers.processes import PATIENCE, subprocess_env
from torch import distributed

from megatron.dmc.config import ParallelConfig, RunConfig, StageConfig
from megatron.dmc.training import host_monitor

WORKER = Path(__file__).resolve().parent / "host_monitor_worker.py"


class Ranks:
    """Processes of host_monitor_worker.py, two to a host."""

    def __init__(self, directory, *hows):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.directory, self.logs = directory, [directory / f"log-{rank}" for rank in range(len(hows))]
        self.processes = []
        for rank, how in enumerate(hows):
            command = [sys.executable, WORKER, rank, len(hows), port, directory, how]
            self.processes.append(Forked(list(map(str, command)), self.logs[rank], subprocess_env()))

    def wait_until_ready(self, seconds=PATIENCE):
        end = time.monotonic() + seconds
        while not all((self.directory / f"ready-{rank}").exists() for rank in range(len(self.processes))):
            assert time.monotonic() < end, self.said()
            time.sleep(0.02)

    def go(self, *ranks):
        for rank in ranks:
            (self.directory / f"go-{rank}").touch()

    def ends(self, seconds=PATIENCE):
        return [process.wait(seconds) for process in self.processes]

    def said(self):
        return [log.read_text() for log in self.logs]

    def close(self):
        (self.directory / "end").touch()
        for process in self.processes:
            process.kill()


@pytest.fixture
def start(tmp_path):
    started = []

    def begin(*hows):
        started.append(Ranks(tmp_path, *hows))  # closed below even when it does not become ready
        started[-1].wait_until_ready()
        return started[-1]

    yield begin
    for ranks in started:
        ranks.close()


def errors(text):
    return [line for line in text.splitlines() if line.startswith("error: ")]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 3])
def test_a_killed_rank_is_named_on_every_host_and_ends_the_others(start, tmp_path, killed):
    """The others wait where no exception reaches them. Each host prints one message, from a rank that was not lost."""
    ranks = start("sleep", "sleep", "sleep", "fork")  # rank 3's child holds on to what it has inherited
    os.kill(ranks.processes[killed].pid, signal.SIGKILL)
    assert ranks.ends() == [-signal.SIGKILL if rank == killed else host_monitor.EXIT_STATUS for rank in range(4)]
    said = [errors(text) for text in ranks.said()]
    start_of = (
        f"error: rank {killed} on host-{killed // 2} ended before the others; its log says why. This run ends on host-"
    )
    for host in (0, 1):
        speakers = [rank for rank in (2 * host, 2 * host + 1) if said[rank]]
        assert speakers == [min(rank for rank in (2 * host, 2 * host + 1) if rank != killed)], said
        assert said[speakers[0]][0].startswith(f"{start_of}{host} now"), said
    assert not (tmp_path / host_monitor.LOST_HOST_FILE).exists()  # a fault of the run's own, not the host's


@pytest.mark.slow
def test_a_rank_that_fails_tells_the_others_why(start):
    ranks = start("raise", "sleep", "sleep", "raise")
    ranks.go(3)
    assert ranks.ends() == [host_monitor.EXIT_STATUS] * 3 + [1]
    for rank in (0, 2):
        assert (
            "rank 3 on host-1 ended before the others: ArithmeticError: iteration 7: the gradients hold nan. This run "
            f"ends on host-{rank // 2}" in ranks.said()[rank]
        )
    assert "Traceback" in ranks.said()[3] and not errors(ranks.said()[3])


@pytest.mark.slow
def test_an_orderly_end_is_no_loss(start):
    ranks = start("end", "end", "end")
    ranks.go(1)
    ranks.processes[1].wait(PATIENCE)
    time.sleep(0.5)
    assert [process.is_alive() for process in ranks.processes] == [True, False, True]
    ranks.go(0)
    ranks.processes[0].wait(PATIENCE)
    time.sleep(0.5)
    assert ranks.processes[2].is_alive()
    ranks.go(2)
    assert ranks.ends() == [0, 0, 0] and not any(map(errors, ranks.said()))
    assert "watching 3 ranks on 2 hosts: one that does not answer for 30 s ends the run" in ranks.said()[0]


@pytest.fixture
def fake():
    """A HostMonitor without a group: four ranks on two hosts, and what each of its peers is told."""

    def make(rank, seconds=30, save=None):
        self = host_monitor.HostMonitor.__new__(host_monitor.HostMonitor)
        self.rank, self._seconds, self._save, self._left, self._hosts = rank, seconds, save, False, ["a", "a", "b", "b"]
        self._loss_found, self._peers, self.left, self.ends = host_monitor.threading.Event(), {}, 0, {}
        self._leave = lambda: setattr(self, "left", self.left + 1)
        for other in [0] if rank else [1, 2, 3]:
            self._peers[other], self.ends[other] = socket.socketpair()
        made.append(self)
        return self

    made = []
    yield make
    for each in made:
        for one in (*each._peers.values(), *each.ends.values()):
            one.close()


def test_a_silent_host_is_told_to_all_others_and_noted(fake, tmp_path, capsys):
    first = fake(0, save=str(tmp_path))
    first._lost(3, "silent")
    assert "error: b (ranks 2-3) has not answered for 30 s" in capsys.readouterr().err
    assert "b (ranks 2-3)" in (tmp_path / host_monitor.LOST_HOST_FILE).read_text() and first.left == 1
    told = host_monitor._read_line(first.ends[1])
    for end in (first.ends[2], first.ends[3]):
        end.setblocking(False)
        with pytest.raises(BlockingIOError):  # what is sent to a lost host may block
            end.recv(1)
    second = fake(1, save=str(tmp_path))
    second._lost(0, *told.split(" ", 1))
    assert second.left == 1
    assert not capsys.readouterr().err  # one rank of a host speaks
    host_monitor.remove_lost_host_file(str(tmp_path))
    host_monitor.remove_lost_host_file(str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [110, 113, 101])
def test_the_kernels_word_for_silence(fake, monkeypatch, number):
    """ETIMEDOUT, and what a router or the own network card says of it."""
    found = []
    self = fake(2)
    self._woken, _wake = socket.socketpair()
    self._lost = lambda *args: found.append(args)

    def broken(peer):
        raise OSError(number, "")

    monkeypatch.setattr(host_monitor, "_read_line", broken)
    self.ends[0].send(b"x")
    self._watch()
    assert found == [(0, "silent")]


def test_the_kernel_is_asked_to_probe_within_the_time():
    with socket.socket() as peer:
        host_monitor._keep_alive(peer, 30)
        get = lambda name: peer.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))  # noqa: E731
        assert peer.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert get("TCP_USER_TIMEOUT") == 30_000
        assert get("TCP_KEEPIDLE") + get("TCP_KEEPCNT") * get("TCP_KEEPINTVL") == 30


def test_strangers_at_the_port_are_sent_away(fake, monkeypatch):
    """One sends nothing of use, one leaves at once, one sends without end; then the expected rank comes."""
    first = fake(0)
    first._peers, first._hosts = {}, ["a", "b"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        said = ["GET / HTTP/1.1\r\n", "", "x" * 5000, "\u00e9\u00e9 1\n", "token 1\n"]
        callers = [socket.create_connection(server.getsockname()) for _ in said]
        for caller, line in zip(callers, said):
            caller.sendall(line.encode())
            caller.shutdown(socket.SHUT_WR)
        first._accept(server, "token")
        assert first._peers[1].getpeername() == callers[-1].getsockname()
        monkeypatch.setattr(host_monitor, "_CONNECT_SECONDS", 0.2)
        first._peers = {}
        with pytest.raises(RuntimeError, match="rank 1 did not reach rank 0 within 0 s"):
            first._accept(server, "token")
    for caller in callers:
        caller.close()


def test_times_that_cannot_be():
    with pytest.raises(ValueError, match="lost_host_seconds is 2; use at least 5"):
        ParallelConfig(lost_host_seconds=2).check()
    with pytest.raises(ValueError, match="distributed_timeout_minutes"):
        ParallelConfig(distributed_timeout_minutes=0).check()
    ParallelConfig(lost_host_seconds=0).check()


# Whole runs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.make_data(tmp_path_factory.mktemp("data"))


def command(data, save, **more):
    return tiny.command(data, "pretrain", train_iters=4, save_interval=2, save=save, micro_batch_size=1, **more)


@pytest.mark.slow
def test_a_run_whose_rank_is_killed_ends_and_goes_on(data, tmp_path):
    """Rank 0 stands in mid-step and would stand there for ten minutes."""
    argv = command(data, tmp_path / "save")
    whole = tiny.run(command(data, tmp_path / "whole"), tmp_path / "w", 2)
    run = tiny.Run(argv, tmp_path / "run", 2, hang="step:6")
    run.wait_for_hang()
    os.kill(run.ranks[1].pid, signal.SIGKILL)
    run.ranks[0].join(PATIENCE)
    assert run.ranks[0].exitcode == host_monitor.EXIT_STATUS, run.output()
    assert "watching 2 ranks on 1 hosts" in run.output() and len(errors(run.output())) == 1
    assert "error: rank 1 on " in run.output() and "ended before the others; its log says why" in run.output()
    run.join(None)
    resumed = tiny.run(argv, tmp_path / "run", 2)
    assert "at iteration 2" in resumed.output()
    assert whole.values()[4] == resumed.values()[4]
    tiny.assert_same_checkpoint(*(tmp_path / name / "iter_0000004" for name in ("whole", "save")))


@pytest.mark.slow
def test_a_slow_rank_is_not_lost(data, tmp_path):
    """Its host answers for it."""
    run = tiny.Run(command(data, tmp_path / "save", lost_host_seconds=5), tmp_path / "run", 2, hang="pause:3")
    run.wait_for_hang()
    run.signal(signal.SIGSTOP, rank=1)
    time.sleep(8)
    run.signal(signal.SIGCONT, rank=1)
    run.join(0)
    assert not errors(run.output()) and (tmp_path / "save" / "iter_0000004").is_dir()


def test_the_timeout_of_collectives_is_the_runs():
    """The whole group and Megatron's groups have it."""
    run = RunConfig(stage=StageConfig("pretrain", 1), parallel=ParallelConfig(distributed_timeout_minutes=7))
    with megatron_in_process(run):
        from megatron.core import parallel_state

        groups = (
            distributed.group.WORLD,
            parallel_state.get_tensor_model_parallel_group(),
            parallel_state.get_pipeline_model_parallel_group(),
            parallel_state.get_data_parallel_group(),
        )
        found = [group._get_backend(torch.device("cpu")).options._timeout for group in groups]
        assert found == [timedelta(minutes=7)] * 4
        with host_monitor.HostMonitor(30) as alone:
            assert str(alone) == "hosts are not watched"
