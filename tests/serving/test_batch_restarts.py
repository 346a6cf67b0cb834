"""``dmc batch``, interrupted: killed, asked to stop or cut anywhere, each line is completed once."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from batch_lines import GREEDY, command, completion, mixed, read, run, strip, write
from helpers.engines import Model, all_back
from helpers.forked import Forked, run_ranks
from helpers.processes import PATIENCE
from helpers.serving import make_model

from megatron.dmc.cli import main
from megatron.dmc.inference import Engine, EngineConfig, SamplingParams
from megatron.dmc.inference.text import load_tokenizer
from megatron.dmc.serving.batch import DRAIN, LEAVE, RUN, seeded
from megatron.dmc.serving.batch_run import UNFINISHED

KILLS = int(os.environ.get("DMC_TEST_KILLS", 8))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model(tmp_path_factory.mktemp("batch") / "m")


def test_seeds_belong_to_lines() -> None:
    drawn, greedy, own = SamplingParams(), SamplingParams(temperature=0), SamplingParams(seed=5)
    assert seeded(greedy, "a", 0) is greedy and seeded(own, "a", 0) is own
    seeds = {seeded(drawn, name, seed).seed for name in ("a", "b", "\ud800") for seed in (0, 1)}
    assert len(seeds) == 6 and all(0 <= seed < 2**63 for seed in seeds)
    assert seeded(drawn, "a", 0) == seeded(drawn, "a", 0)


def test_an_output_that_is_cut_anywhere_is_completed(model: Model, tmp_path: Path) -> None:
    """As a kill or a full disk leaves it: the torn line is answered again, and nothing else."""
    engine = Engine(model.path, EngineConfig(max_num_seqs=4), load_tokenizer(model.path))
    source = write(tmp_path / "in", mixed(12))
    run(engine, source, tmp_path / "whole")
    whole, data = read(tmp_path / "whole"), (tmp_path / "whole").read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == 10]
    cuts = [
        0,
        18,
        ends[0] - 1,
        ends[0],
        ends[0] + 1,
        ends[5],
        len(data) - 1,
        *random.Random(3).sample(range(len(data)), 6),
    ]
    for cut in cuts:
        (tmp_path / "out").write_bytes(data[:cut])
        said = run(engine, source, tmp_path / "out")
        assert said.skipped == sum(end <= cut for end in ends) and said.complete and not said.strangers
        assert read(tmp_path / "out") == whole
    (tmp_path / "out").write_bytes(data[: ends[3]] + b"\0" * 50)  # what a power cut may leave
    assert run(engine, source, tmp_path / "out").skipped == 4 and read(tmp_path / "out") == whole


def test_lines_may_move_between_runs(model: Model, tmp_path: Path) -> None:
    """It is the custom_id that counts; answers to lines that are gone are told of."""
    engine = Engine(model.path, EngineConfig(max_num_seqs=4), load_tokenizer(model.path))
    lines = [completion(name) for name in "abcd"]
    run(engine, write(tmp_path / "in", lines), tmp_path / "out")
    said = run(engine, write(tmp_path / "in", [completion("e"), *lines[:0:-1]]), tmp_path / "out")
    assert (said.completed, said.skipped, said.strangers) == (1, 3, 1)
    assert read(tmp_path / "out").keys() == set("abcde")


def test_an_output_of_another_input_is_refused(model: Model, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """One that shares no line with the input, and one whose line of the same name is another request."""
    source, out = write(tmp_path / "in", [completion("a"), {"prompt": "x", **GREEDY}]), tmp_path / "out"
    assert main(command(model, source, out)) == 0
    before = out.read_bytes()
    same = {**GREEDY, "prompt": "x"}  # in another order
    refused = {
        f"{out} belongs to another input: of its 2 lines none": [completion("b"), completion("c")],
        f"line 2 of the input ('line-2') is not the request that {out} has": [completion("a"), {**same, "prompt": "y"}],
        f"line 1 of the input ('a') is not the request that {out} has": [{"custom_id": "a"}],
    }
    for message, lines in refused.items():
        assert main(command(model, write(tmp_path / "other", lines), out)) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: {message}") and err.count("\n") == 1, err
        assert out.read_bytes() == before
    assert main(command(model, source, out, "--shard", "0/2")) == 0  # of which it has the first line
    more = write(tmp_path / "longer", [completion("b"), completion("a")])
    assert main(command(model, more, out, "--shard", "0/2")) == 2
    assert f"belongs to another shard: of its 2 lines none has the custom_id of a line of shard 0/2 of {more}" in (
        capsys.readouterr().err
    )
    assert main(command(model, write(tmp_path / "more", [completion("a"), same, completion("b")]), out)) == 0
    assert "1 lines completed, 0 with an error; 2 were there before" in capsys.readouterr().out
    out.write_bytes(re.sub(rb'("req_\d+)_\w+', rb"\1", out.read_bytes()))  # as older versions wrote it: of any request
    changed = [completion("a"), {**same, "prompt": "y"}]
    assert main(command(model, write(tmp_path / "other", changed), out)) == 0


def test_a_pipe_is_read_once(model: Model, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """All of its lines reach a run that goes on."""
    lines, out = [completion(name) for name in "abc"], tmp_path / "out"
    assert main(command(model, write(tmp_path / "in", lines[:1]), out)) == 0
    end, writer = os.pipe()
    try:
        os.write(writer, write(tmp_path / "in", lines).read_bytes())
        os.close(writer)
        assert main(command(model, Path(f"/dev/fd/{end}"), out)) == 0
    finally:
        os.close(end)
    assert "2 lines completed, 0 with an error; 1 were there before" in capsys.readouterr().out


@pytest.mark.parametrize("later", [LEAVE, DRAIN])
def test_a_run_that_is_asked_to_stop(later: int, model: Model, tmp_path: Path) -> None:
    """LEAVE drops what runs, DRAIN finishes it; no more lines are taken either way, and the next run completes the
    file.
    """
    # The lines have one prompt: with the prefix cache the second would start when the first has read it.
    engine = Engine(model.path, EngineConfig(max_num_seqs=2, enable_prefix_caching=False), load_tokenizer(model.path))
    source = write(tmp_path / "in", [completion(f"{n}", max_tokens=8) for n in range(10)])
    phases = iter([RUN] * 9)
    said = run(engine, source, tmp_path / "out", lambda: next(phases, later))
    all_back(engine)
    assert not said.complete and 0 < said.completed < 10
    assert said.unfinished == (0 if later == DRAIN else 4) and said.completed == (2 if later == LEAVE else 6)
    assert run(engine, source, tmp_path / "out").complete
    assert run(engine, source, tmp_path / "other").completed == 10 and read(tmp_path / "out") == read(
        tmp_path / "other"
    )


def start(arguments: list[str], tmp_path: Path) -> Forked:
    """``dmc batch`` in a process of its own."""
    return Forked([sys.executable, "-m", "megatron.dmc.cli", *arguments], tmp_path / "log", os.environ)


def wait_for_lines(path: Path, count: int, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.002)
    raise AssertionError(f"{path} has not got {count} lines")


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again(model: Model, tmp_path: Path) -> None:
    """kill -9 after a random number of lines and a random moment more: at the end every line is answered once, and as
    if nothing had happened.
    """
    source, draw = write(tmp_path / "in", [*mixed(6 * KILLS), b"{bad", completion("c0")]), random.Random()
    options = ("--max-num-seqs", "4")
    assert start(command(model, source, tmp_path / "whole", *options), tmp_path).wait(PATIENCE) == 0
    out, killed = tmp_path / "out", 0
    for _ in range(KILLS):
        there = out.read_bytes().count(b"\n") if out.exists() else 0
        process = start(command(model, source, out, *options), tmp_path)
        wait_for_lines(out, there + draw.randrange(0, 4))
        time.sleep(draw.random() * 0.02)
        os.kill(process.pid, signal.SIGKILL)
        killed += process.wait(PATIENCE) == -signal.SIGKILL
    assert killed == KILLS
    assert start(command(model, source, out, *options), tmp_path).wait(PATIENCE) == 0
    lines = {
        name: sorted(path.read_bytes().splitlines(), key=lambda x: json.loads(x)["id"])
        for name, path in (("whole", tmp_path / "whole"), ("out", out))
    }
    assert len(lines["whole"]) == 6 * KILLS + 2
    assert [strip(line) for line in lines["out"]] == [strip(line) for line in lines["whole"]]


@pytest.mark.parametrize(("number", "timeout"), [(signal.SIGTERM, "0"), (signal.SIGTERM, "60"), (signal.SIGINT, "0")])
def test_a_signal_ends_a_run_that_can_go_on(number: int, timeout: str, model: Model, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in", mixed(80)), tmp_path / "out"
    arguments = command(model, source, out, "--max-num-seqs", "4", "--shutdown-timeout", timeout)
    process = start(arguments, tmp_path)
    wait_for_lines(out, 3)
    os.kill(process.pid, number)
    assert process.wait(PATIENCE) == UNFINISHED
    there = len(read(out))
    assert 3 <= there < 80 and out.read_bytes().endswith(b"\n")
    assert start(arguments, tmp_path).wait(PATIENCE) == 0 and len(read(out)) == 80


@pytest.mark.slow
def test_two_ranks_write_one_file(model: Model, tmp_path: Path) -> None:
    """Tensor parallel ranks, which all read the input and a torn output; one of them writes."""
    source, out = write(tmp_path / "in", [*mixed(8), b"{bad"]), tmp_path / "out"
    assert main(command(model, source, tmp_path / "whole")) == 0
    data = (tmp_path / "whole").read_bytes()
    out.write_bytes(data[: len(data) // 2])
    arguments = command(model, source, out, "--tensor-parallel-size", "2")
    said = run_ranks("megatron.dmc.cli", 2, arguments, tmp_path)
    assert said.count("lines completed") == 1 and read(out) == read(tmp_path / "whole")
