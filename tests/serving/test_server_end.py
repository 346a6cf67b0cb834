"""How the HTTP server ends: an engine that fails, SIGTERM under load, a rank that dies, options that are wrong."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from helpers.engines import Model
from helpers.forked import Forked
from helpers.processes import PATIENCE, run_command, subprocess_env
from helpers.serving import Running, make_model, until
from test_server import COMPLETIONS, GREEDY, IGNORE, samples

from megatron.dmc.cli import main
from megatron.dmc.serving import async_engine
from megatron.dmc.serving.server import listen


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model(tmp_path_factory.mktemp("server") / "m")


# -------------------------------------------------------------------------------------------------- failures, the end


def test_a_failing_engine(model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with Running(model.path) as server:
        step, steps = server.engine.step, []

        def failing() -> list:
            steps.append(1)
            if len(steps) > 30:
                raise RuntimeError("the disc is on fire")
            time.sleep(0.005)
            return step()

        monkeypatch.setattr(server.engine, "step", failing)
        body = {"prompt": "a", "max_tokens": 200} | IGNORE
        with ThreadPoolExecutor(4) as pool:
            whole = pool.submit(server.ask, COMPLETIONS, body)
            streamed = pool.submit(server.ask, COMPLETIONS, body | {"stream": True})
            status, _, text = whole.result()
            assert status == 500 and json.loads(text)["error"]["code"] == "engine_failed" and "fire" not in text
            status, _, text = streamed.result()
            events = text.split("\n\n")
            assert status == 200 and events[-2] == "data: [DONE]"
            assert json.loads(events[-3].removeprefix("data: "))["error"]["code"] == "engine_failed"
        assert server.json("/health", status=503)["error"]["code"] == "engine_failed"
        assert server.json(COMPLETIONS, body, 503)["error"]["code"] == "engine_failed"
        found = samples(server.ask("/metrics")[2])
        assert found["dmc:engine_up[('model_name', 'm')]"] == 0
        assert found["dmc:request_success_total[('finished_reason', 'error'), ('model_name', 'm')]"] == 2
    assert "the disc is on fire" in caplog.text


def test_logits_that_are_no_numbers(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with Running(model.path) as server:
        forward = server.engine.model.forward
        monkeypatch.setattr(server.engine.model, "forward", lambda *args: forward(*args) * float("nan"))
        for extra in ({}, {"stream": True}):
            status, _, text = server.ask(COMPLETIONS, {"prompt": "a"} | extra)
            assert status == 500 and json.loads(text)["error"]["code"] == "not_answered"
        monkeypatch.undo()
        assert server.json(COMPLETIONS, {"prompt": "a"})["choices"]
        server.settle()


def start(model: Model, log: Path, *options: str, **env: str) -> tuple[Forked, str]:
    """``dmc serve`` in a process of its own, and its URL."""
    command = [sys.executable, "-m", "megatron.dmc.cli", "serve", model.path, "--port", "0", *options]
    process = Forked(command, log, subprocess_env(env))
    deadline = time.monotonic() + PATIENCE
    while not (found := re.search(r"on (http://\S+)\n", said := log.read_text() if log.exists() else "")):
        assert process.is_alive() and time.monotonic() < deadline, said
        time.sleep(0.01)
    return process, found[1]


def follower_of(process: Forked) -> psutil.Process:
    """The second rank of a server, once it has begun. Another child renders chat templates."""
    found: list[psutil.Process] = []

    def begun() -> bool:
        children = psutil.Process(process.pid).children()
        found[:] = [child for child in children if "megatron.dmc.serving.ranks" in child.cmdline()]
        return bool(found)

    until(begun)
    return found[0]


def post(url: str, body: dict, key: str = "") -> tuple[int, str]:
    host, port = url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=PATIENCE)
    try:
        connection.request(
            "POST",
            COMPLETIONS,
            json.dumps(body),
            {"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
        )
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


@pytest.mark.slow
def test_sigterm_under_load(model: Model, tmp_path: Path) -> None:
    """Every request that was taken is answered, new ones are not taken, and the exit status is 0."""
    (tmp_path / "keys").write_text("sk-file\n")
    process, url = start(
        model, tmp_path / "log", "--max-num-seqs", "4", "--api-key-file", str(tmp_path / "keys"), DMC_API_KEY="sk-env"
    )
    try:
        body = {"prompt": "a", "max_tokens": 200, "temperature": 0} | IGNORE
        assert post(url, body, "wrong")[0] == 401
        wanted = json.loads(post(url, body, "sk-file")[1])["choices"][0]["text"]
        answered: list[tuple[int, str]] = []
        refused: list[Exception] = []
        stopping = threading.Event()

        def ask(n: int) -> None:
            while True:
                try:
                    answered.append(post(url, body | {"stream": n % 2 == 0}, "sk-env"))
                except (ConnectionError, OSError) as error:
                    refused.append(error)
                    if not stopping.is_set():
                        raise
                    return
                if answered[-1][0] != 200:
                    return

        with ThreadPoolExecutor(16) as pool:
            asking = [pool.submit(ask, n) for n in range(16)]
            until(lambda: len(answered) >= 20)
            stopping.set()
            process.terminate()
            for one in asking:
                one.result()
        assert process.wait(PATIENCE) == 0
        # Refused to connect, or told so; never a connection that was accepted and closed without an answer
        # (RemoteDisconnected).
        assert all(type(error) in (ConnectionRefusedError, ConnectionResetError) for error in refused), refused
        assert {status for status, _ in answered} <= {200, 503} and len(answered) + len(refused) >= 20 + 16
        for status, text in answered:
            if status == 200 and text.startswith("data: "):
                events = text.split("\n\n")
                assert events[-2] == "data: [DONE]"
                assert (
                    "".join(json.loads(e.removeprefix("data: "))["choices"][0]["text"] for e in events[:-2]) == wanted
                )
            elif status == 200:
                assert json.loads(text)["choices"][0]["text"] == wanted
            else:
                assert json.loads(text)["error"]["code"] == "shutting_down"
    finally:
        process.kill()
    assert "sk-" not in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_two_ranks(model: Model, tmp_path: Path) -> None:
    """Tensor parallelism: the same answers; a rank that is gone is an engine that has failed; nobody is left behind."""
    process, url = start(model, tmp_path / "1", "--tensor-parallel-size", "2", "--max-num-seqs", "4")
    try:
        with ThreadPoolExecutor(6) as pool:
            bodies = [{"prompt": f"a {n}", "return_token_ids": True} | GREEDY | IGNORE for n in range(6)]
            for status, text in pool.map(lambda body: post(url, body), bodies):
                choice = json.loads(text)["choices"][0]
                assert status == 200 and tuple(choice["token_ids"]) == model.answer(
                    tuple(choice["prompt_token_ids"]), 12
                )
        follower = follower_of(process)
        assert follower.is_running()
        process.terminate()
        assert process.wait(PATIENCE) == 0 and not follower.is_running()
    finally:
        process.kill()
    process, url = start(model, tmp_path / "2", "--tensor-parallel-size", "2")
    try:
        follower = follower_of(process)
        follower.kill()
        assert post(url, bodies[0])[0] in (500, 503)
        deadline = time.monotonic() + 20
        while (health := post(url, bodies[0]))[0] != 503:
            assert time.monotonic() < deadline, health
            time.sleep(0.1)
        process.terminate()
        assert process.wait(PATIENCE) == 1
    finally:
        process.kill()


def test_while_it_drains(model: Model) -> None:
    """On connections that are open already, new requests are refused and /health says so; what runs is finished."""
    with Running(model.path) as server:
        step = server.engine.step
        server.engine.step = lambda: (time.sleep(0.01), step())[1]  # type: ignore[method-assign]
        kept = [http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE) for _ in range(2)]
        for connection in kept:
            connection.request("GET", "/health")
            assert connection.getresponse().read() == b"{}"
        body = {"prompt": "a", "max_tokens": 200, "return_token_ids": True} | IGNORE
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(server.json, COMPLETIONS, body)
            until(lambda: server.service.runner.unfinished)
            server.loop.call_soon_threadsafe(server.server.stop)
            until(lambda: server.service.gate.draining)
            for connection, path, data in zip(kept, (COMPLETIONS, "/health"), (json.dumps(body), None)):
                connection.request("POST" if data else "GET", path, data, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                assert answer.status == 503 and answer.getheader("Connection") == "close"
                assert json.loads(answer.read())["error"]["code"] == "shutting_down"
            with pytest.raises(ConnectionRefusedError):
                server.ask("/health")
            assert len(running.result()["choices"][0]["token_ids"]) == 200


def test_the_end_comes_in_time(model: Model) -> None:
    """What is not finished when the time is over is told so."""
    with Running(model.path, timeout=0.3) as server:
        step = server.engine.step
        server.engine.step = lambda: (time.sleep(0.02), step())[1]  # type: ignore[method-assign]
        with ThreadPoolExecutor(2) as pool:
            body = {"prompt": "a", "max_tokens": 240} | IGNORE
            whole, streamed = (
                pool.submit(server.ask, COMPLETIONS, body),
                pool.submit(server.ask, COMPLETIONS, body | {"stream": True}),
            )
            until(lambda: server.service.runner.unfinished == 2 and server.service.runner.stats.generation_tokens >= 4)
            server.loop.call_soon_threadsafe(server.server.stop)
            status, _, text = whole.result()
            assert status == 503 and json.loads(text)["error"]["code"] == "shutting_down"
            assert (
                json.loads(streamed.result()[2].split("\n\n")[-3].removeprefix("data: "))["error"]["code"]
                == "shutting_down"
            )


# ------------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--port", "99999"], "--port is 99999"),
        (["--api-key", "a b"], "--api-key: a key is empty"),
        (["--api-key", ""], "a key is empty"),
        (["--api-key-file", "nowhere"], "--api-key-file nowhere cannot be read: FileNotFoundError"),
        (["--max-model-len", "100000"], "max_model_len is 100000"),
        (["--tensor-parallel-size", "3"], "3"),
    ],
)
def test_wrong_options(model: Model, options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", model.path, "--port", "0", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and "a b" not in error


def test_a_taken_port(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", model.path, "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot listen on 127.0.0.1" in capsys.readouterr().err


def test_a_port_of_a_server_that_still_loads(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    with listen("127.0.0.1", 0) as loading:
        assert main(["serve", model.path, "--port", str(loading.getsockname()[1])]) == 2
    assert "cannot listen on 127.0.0.1" in capsys.readouterr().err


LOADED = """
import os, sys, time
import torch
from megatron.dmc.inference import Engine
from megatron.dmc.serving.server import load

def threads():
    return len(os.listdir("/proc/self/task"))

def make():
    torch.ones(1 << 20).exp()
    seen.append(threads())
    return Engine(sys.argv[1])

before, seen = threads(), []
load(make)
deadline = time.monotonic() + 60
while threads() > before and time.monotonic() < deadline:
    time.sleep(0.01)
print(seen[0] - before, threads() - before)
"""


def test_loading_leaves_no_threads_behind(model: Model) -> None:
    done = run_command([sys.executable, "-c", LOADED, model.path], env={"OMP_NUM_THREADS": "2"})
    assert done.stdout.split() == ["2", "0"]  # the thread that loads, and a worker of OpenMP


def test_a_key_file_without_keys(model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "keys").write_text("\n \n")
    assert main(["serve", model.path, "--port", "0", "--api-key-file", str(tmp_path / "keys")]) == 2
    assert "open to all" in capsys.readouterr().err


def test_an_engine_that_hangs_does_not_stop_the_end(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that never returns, as when another rank hangs: clients are told, and the engine counts as failed."""
    monkeypatch.setattr(async_engine, "LAST_STEP", 0.2)
    released = threading.Event()
    with Running(model.path, timeout=0.2) as server:
        monkeypatch.setattr(server.engine, "step", lambda: released.wait(PATIENCE) and [])
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(server.ask, COMPLETIONS, {"prompt": "a"})
            until(lambda: server.service.runner.unfinished)
            server.loop.call_soon_threadsafe(server.server.stop)
            assert asked.result()[0] == 503
    assert isinstance(server.service.runner.failure, TimeoutError)
    released.set()


def test_a_shutdown_that_hangs_is_ended(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each signal sets a limit of its own, whatever hangs; the second one does not wait for requests."""
    seconds: list[float] = []

    class Timer:
        def __init__(self, after: float, call: object) -> None:
            seconds.append(after)

        def start(self) -> None: ...

    with Running(model.path, timeout=20) as server:
        monkeypatch.setattr(server.server, "on_hang", lambda: None)
        monkeypatch.setattr(threading, "Timer", Timer)
        server.loop.call_soon_threadsafe(server.server.stop)
        server.loop.call_soon_threadsafe(server.server.stop)
        until(lambda: len(seconds) == 2)
    assert seconds[0] == seconds[1] + 20 and seconds[1] <= 30


@pytest.mark.slow
def test_sigterm_while_ranks_load(model: Model, tmp_path: Path) -> None:
    """Rank 0 ends at once, and the other rank soon after it."""
    command = [sys.executable, "-m", "megatron.dmc.cli", "serve", model.path, "--port", "0"]
    process = Forked([*command, "--tensor-parallel-size", "2"], tmp_path / "log", subprocess_env())
    try:
        follower = follower_of(process)
        process.terminate()
        assert process.wait(PATIENCE) == -signal.SIGTERM
        until(lambda: not follower.is_running() or follower.status() == psutil.STATUS_ZOMBIE)
    finally:
        process.kill()


@pytest.mark.slow
def test_a_rank_that_hangs(model: Model, tmp_path: Path) -> None:
    """A rank that is stopped, and does not end: two signals end the server all the same, with status 1."""
    process, url = start(model, tmp_path / "log", "--tensor-parallel-size", "2", "--shutdown-timeout", "1")
    try:
        follower = follower_of(process)
        follower.suspend()
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(post, url, {"prompt": "a", "max_tokens": 200} | IGNORE)
            time.sleep(1)
            process.terminate()
            assert asked.result()[0] in (500, 503)
        assert process.wait(PATIENCE) == 1
        until(lambda: not follower.is_running() or follower.status() == psutil.STATUS_ZOMBIE)
    finally:
        process.kill()
