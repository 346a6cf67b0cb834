"""A run that is started twice, a full disk, a log that nobody reads, Ctrl-C: one line, and nothing is lost."""

import errno
import fcntl
import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import threading
import time

import pytest
from helpers import tiny
from helpers.processes import PATIENCE

from megatron.dmc.training import disk, preemption, save_lock
from megatron.dmc.training.save_lock import SaveLock
from megatron.dmc.training.starting_point import find_starting_point


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.make_data(tmp_path_factory.mktemp("data"))


def command(data, save, **more):
    return tiny.command(data, "pretrain", **{**dict(train_iters=6, save_interval=2, save=save), **more})


def names(save):
    return sorted(path.name for path in save.iterdir())


# The place for checkpoints


@pytest.mark.parametrize("name, what", [("manifest.json", "a checkpoint"), ("config.json", "a Hugging Face directory")])
def test_a_model_is_no_place_for_checkpoints(tmp_path, name, what):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=f"is {what} itself; name another place"):
        find_starting_point(str(tmp_path), None)
    assert names(tmp_path) == [name]


def test_a_place_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file/save cannot be made: Not a directory"):
        SaveLock(str(tmp_path / "file" / "save")).acquire(None)


# One run at a time


@pytest.mark.slow
def test_a_second_start_leaves_the_first_alone_and_a_killed_one_holds_nothing(data, tmp_path):
    save = tmp_path / "save"
    argv = command(data, save)
    first = tiny.Run(argv, tmp_path / "first", hang="shards:2")  # in the middle of writing a checkpoint
    first.wait_for_hang()
    before = names(save)
    second = tiny.run(argv, tmp_path / "second", status=2)
    (line,) = [line for line in second.output().splitlines() if line.startswith("error:")]
    assert line.startswith(f"error: --save {save} is being written by another run (host {socket.gethostname()}, ")
    assert f"process {first.ranks[0].pid}, since 20" in line and names(save) == before
    assert any(name.startswith(".tmp_") for name in before)
    os.kill(first.ranks[0].pid, signal.SIGKILL)
    run = tiny.run(argv, tmp_path / "third")
    first.kill()
    assert f"resumed {save / 'iter_0000002'} at iteration 2" in run.output()
    assert names(save)[-2:] == ["iter_0000006", "latest_checkpointed_iteration.txt"] and save_lock.FILE not in names(
        save
    )


def _hold(save, says, held, leave):
    lock = SaveLock(save)
    lock.acquire(None)
    if says:  # not by another descriptor: closing any of a file gives a process's lock on it back
        os.ftruncate(lock._descriptor, 0)
        os.pwrite(lock._descriptor, says.encode(), 0)
    held.set()
    leave.wait(PATIENCE)
    lock.release()


@pytest.fixture
def holder(tmp_path):
    """Holds the lock of tmp_path in another process, in whose name it is told."""
    context, started = multiprocessing.get_context("fork"), []

    def start(says=""):
        held, leave = context.Event(), context.Event()
        process = context.Process(target=_hold, args=(str(tmp_path), says, held, leave))
        started.append(process)
        process.start()
        assert held.wait(PATIENCE)
        return process, leave

    yield start
    for process in started:
        process.kill()
        process.join()


def test_a_holder_is_waited_for_as_long_as_it_may_be_gone(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(save_lock, "_SECONDS_HERE", 0.0)
    process, leave = holder()
    with pytest.raises(ValueError, match=f"is being written by another run .host .*, process {process.pid}, since"):
        SaveLock(str(tmp_path)).acquire(None)
    process.kill()
    process.join()
    lock = SaveLock(str(tmp_path))
    lock.acquire(None)  # the file is still there
    lock.release()
    lock.release()
    assert names(tmp_path) == []
    # A holder on another host may be dead, and a file server may not know it yet.
    _, leave = holder(json.dumps({"host": "another", "process": 5, "SLURM job": "77"}))
    monkeypatch.setattr(save_lock, "_SECONDS_ELSEWHERE", 0.3)
    with pytest.raises(ValueError, match="host another, process 5, SLURM job 77"):
        SaveLock(str(tmp_path)).acquire(None)
    monkeypatch.setattr(save_lock, "_SECONDS_ELSEWHERE", 20.0)
    leave.set()
    lock.acquire(None)
    lock.release()
    # What it has written meanwhile was not seen when this run looked for its start.
    _, leave = holder(json.dumps({"host": "another"}))
    (tmp_path / "iter_0000009").mkdir()
    (tmp_path / "iter_0000009" / "manifest.json").write_text("{}")
    threading.Timer(0.3, leave.set).start()
    with pytest.raises(ValueError, match="has just ended, with .*iter_0000009; start again"):
        lock.acquire(None)


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    lock = SaveLock(str(tmp_path))
    lock.acquire(None)
    assert "has no locks (No locks available)" in lock.warning and names(tmp_path) == []
    SaveLock(None).acquire(None)


# The disk


@pytest.mark.slow
def test_a_full_disk_is_named_and_what_was_there_stays(data, tmp_path):
    save = tmp_path / "save"
    run = tiny.Run(command(data, save), tmp_path / "a", hang="pause:6")  # behind the first checkpoint
    run.wait_for_hang()
    resource.prlimit(run.ranks[0].pid, resource.RLIMIT_FSIZE, (60000, 60000))
    run.go_on()
    run.join(1)
    assert f"error: writing {save} failed: File too large; look at the disk, then run" in run.output()
    assert "Traceback" not in run.output()
    assert names(save) == ["iter_0000002", "latest_checkpointed_iteration.txt"]
    assert "resumed" in tiny.run(command(data, save), tmp_path / "b").output()


def test_errors_of_a_disk_are_found_whatever_says_them(tmp_path, monkeypatch):
    def failing(error):
        with disk.naming_disk_errors(tmp_path, (Exception,)):
            raise error

    with pytest.raises(RuntimeError, match="unexpected pos"):
        failing(RuntimeError("unexpected pos 704 vs 598"))  # the disk takes what is written: it is not that
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    chained = RuntimeError("unexpected pos 704 vs 598")
    chained.__context__ = full
    for error in (full, chained):
        with pytest.raises(disk.DiskError, match=f"^writing {tmp_path} failed: the disk is full: No space left on dev"):
            failing(error)

    def fsync(_):
        raise full

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(disk.DiskError, match="the disk is full"):
        failing(RuntimeError("unexpected pos 704 vs 598"))
    assert names(tmp_path) == []


# The log


@pytest.mark.parametrize("stderr", ["open", "closed"])
def test_a_log_that_nobody_reads_ends_nothing(tmp_path, stderr):
    from megatron.dmc.training.metrics import say

    child = os.fork()
    if child == 0:
        try:
            reader, writer = os.pipe()
            os.close(reader)
            os.dup2(writer, 1)
            os.dup2(os.open(tmp_path / "err", os.O_WRONLY | os.O_CREAT) if stderr == "open" else writer, 2)
            sys.stdout = open(1, "w", closefd=False)
            for number in range(3):
                say(f"line {number}")
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    if stderr == "open":
        log = (tmp_path / "err").read_text()
        assert "WARNING: stdout cannot be written (Broken pipe); the log goes on here" in log
        assert [line for line in log.splitlines() if line.startswith("line")] == ["line 0", "line 1", "line 2"]


# Signals


def test_a_second_interrupt_ends_at_once():
    child = os.fork()
    if child == 0:
        try:
            stop = preemption.StopSignal()
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.received == signal.SIGINT
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGINT
