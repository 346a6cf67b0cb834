"""``dmc batch``: every line is answered once, whatever is in it and whatever happens to the process."""

from __future__ import annotations

import errno
import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from batch_lines import GREEDY, command, completion, mixed, read, run, strip, write
from helpers.engines import Model, all_back
from helpers.serving import make_model

from megatron.dmc.cli import main
from megatron.dmc.inference import LLM, Engine, EngineConfig, SamplingParams
from megatron.dmc.inference.text import load_tokenizer
from megatron.dmc.serving import batch_files
from megatron.dmc.serving.batch import BatchRunner, Options
from megatron.dmc.serving.batch_files import Input, Output
from megatron.dmc.serving.prompts import Prompts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model(tmp_path_factory.mktemp("batch") / "m")


# ------------------------------------------------------------------------------------------------------------- answers


def test_answers_have_openais_shape_and_are_the_engines_own(model: Model, tmp_path: Path, capsys) -> None:
    chat = {"messages": [{"role": "user", "content": "hello"}], **GREEDY}
    lines = [
        completion("one", logprobs=1),
        {"custom_id": "two", "method": "POST", "url": "/v1/chat/completions", "body": chat},
        {"prompt": [5, 6, 7], **GREEDY},
        completion("four", prompt=["a", "b"], n=2, temperature=1.0, seed=3),
        {"custom_id": "five", **chat},
    ]
    out = tmp_path / "new" / "out.jsonl"
    assert main(command(model, write(tmp_path / "in", lines), out, "--served-model-name", "served")) == 0
    found = read(out)
    assert found.keys() == {"one", "two", "line-3", "four", "five"}
    for entry in found.values():
        assert entry["error"] is None and entry["response"]["status_code"] == 200
        assert entry["response"]["body"]["model"] == "served" and entry["response"]["body"]["usage"]["dmc"]["slots"] > 0
    body = {name: entry["response"]["body"] for name, entry in found.items()}
    llm = LLM(model.path)

    def text(prompt, **params) -> list[str]:
        return [
            c.text for c in llm.generate(prompt, SamplingParams(max_tokens=6, ignore_eos=True, **params))[0].outputs
        ]

    assert [c["text"] for c in body["one"]["choices"]] == text("abc", temperature=0)
    assert len(body["one"]["choices"][0]["logprobs"]["tokens"]) == 6
    assert [c["text"] for c in body["line-3"]["choices"]] == text([5, 6, 7], temperature=0)
    drawn = text("a", seed=3, n=2) + text("b", seed=3, n=2)
    assert [(c["index"], c["text"]) for c in body["four"]["choices"]] == list(enumerate(drawn))
    assert body["two"]["object"] == "chat.completion" and body["two"]["choices"] == body["five"]["choices"]
    said = capsys.readouterr().out
    assert (
        "5 lines completed, 0 with an error; 0 were there before" in said and "CR " in said and "pages in use" in said
    )


BAD = [
    (b"{not json", "invalid_request_error", "the line is not JSON"),
    (b"\xff\xfe{}", "invalid_request_error", "the line is not JSON"),
    (b"[1]", "invalid_request_error", "must hold a JSON object"),
    (b"[" * 100000, "invalid_request_error", "the line is not JSON"),
    (b"{}", "missing_required_parameter", "'prompt'"),
    ({"custom_id": 7, "prompt": "a"}, "invalid_request_error", "custom_id is 7"),
    ({"custom_id": "", "prompt": "a"}, "invalid_request_error", "custom_id is"),
    ({"prompt": []}, "invalid_request_error", "empty"),
    ({"prompt": "a", "temperature": float("nan")}, "invalid_type", "temperature"),
    ({"prompt": "a", "top_p": 2.0}, "invalid_request_error", "top_p is 2.0"),
    ({"prompt": "a", "colour": "red"}, "unknown_parameter", "colour"),
    ({"prompt": [3, 61]}, "invalid_request_error", "token 1 of the prompt is 61"),
    ({"prompt": [3] * 300}, "context_length_exceeded", "300"),
    ({"prompt": ["a"] * 1025}, "too_many_elements", "prompt has 1025 elements; at most 1024"),
    ({"url": "/v1/chat/completions", "body": {"messages": [None] * 4097}}, "too_many_elements", "at most 4096"),
    ({"prompt": "a", "stop": ["x" * 1025]}, "invalid_request_error", "stop has a string of 1025 characters"),
    ({"prompt": "a", "stream": True}, "invalid_request_error", "stream is of no use"),
    ({"prompt": "a", "model": "another"}, "model_not_found", "'another' does not exist"),
    ({"url": "/v1/embeddings", "body": {}}, "invalid_request_error", "/v1/embeddings"),
    ({"url": "/v1/completions", "method": "GET", "body": {"prompt": "a"}}, "invalid_request_error", "method is"),
    ({"url": "/v1/completions", "body": "a"}, "invalid_request_error", "body must be a JSON object"),
    ({"prompt": "a\ud800"}, None, None),
    ({"messages": [{"role": "tool", "content": "x"}]}, None, None),
    (b"x" * 5000, "invalid_request_error", "longer than"),
]


def test_a_bad_line_is_an_error_line_and_stops_nothing(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_files, "MAX_LINE", 150000)
    lines: list = [completion("first")]
    for bad, *_ in BAD:
        lines += [bad, {"custom_id": f"after {len(lines) + 2}", "prompt": "ab", **GREEDY}]
    lines[-2] = b'{"prompt": "' + b"x" * 400000 + b'"}'
    out = tmp_path / "out"
    engine = Engine(model.path, EngineConfig(max_num_seqs=3), load_tokenizer(model.path))
    source = write(tmp_path / "in", lines)
    said = run(engine, source, out)
    all_back(engine)
    assert said.complete and (said.completed, said.errors) == (1 + len(BAD), len(BAD))
    found = read(out)
    assert len(found) == len(lines)
    for n, (_, code, message) in enumerate(BAD):
        entry = found[f"line-{2 * n + 2}"]
        error = entry["error"]
        assert (
            400 <= entry["response"]["status_code"] < 500
            and entry["response"]["body"]["error"]["message"] == error["message"]
        )
        assert (code is None or error["code"] == code) and (message is None or message in error["message"]), (n, error)
    good = {found[f"after {2 * n + 3}"]["response"]["body"]["choices"][0]["text"] for n in range(len(BAD))}
    assert len(good) == 1
    # And all of it is done: another run has nothing to ask.
    assert (
        (again := run(engine, source, out)).complete
        and again.skipped == len(lines)
        and again.completed + again.errors == 0
    )


def test_errors_name_the_parameter_of_the_line(model: Model, tmp_path: Path) -> None:
    """As over HTTP, where tests/serving/test_request_parameters.py walks all of them."""
    message = {"messages": [{"role": "user", "content": "hi"}]}
    wrong = {
        "max_completion_tokens": message | {"max_completion_tokens": -1},
        "max_tokens": {"prompt": "ab", "max_tokens": -1},
        "top_logprobs": message | {"logprobs": True, "top_logprobs": 101},
        "prompt": {"prompt": [99]},
        "messages": {"messages": [{"role": "tool", "content": "x"}]},
        "logit_bias": {"prompt": "ab", "logit_bias": {"61": 1}},
        "n": {"prompt": "ab", "n": 0},
    }
    engine = Engine(model.path, EngineConfig(), load_tokenizer(model.path))
    lines = [{"custom_id": param, **body} for param, body in wrong.items()]
    run(engine, write(tmp_path / "in", lines), tmp_path / "out")
    found = read(tmp_path / "out")
    params = {custom_id: entry["response"]["body"]["error"]["param"] for custom_id, entry in found.items()}
    assert params == {param: param for param in wrong}


def test_ids_that_are_there_twice(model: Model, tmp_path: Path) -> None:
    """The first line has the answer, every later one an error, in this run and in the next."""
    lines = [
        completion("a"),
        completion("b"),
        completion("a"),
        {"prompt": "x", **GREEDY},
        completion("line-4"),
        completion("a"),
    ]
    engine = Engine(model.path, EngineConfig(max_num_seqs=2), load_tokenizer(model.path))
    source, out = write(tmp_path / "in", lines), tmp_path / "out"
    said = run(engine, source, out)
    assert (said.completed, said.errors) == (3, 3)
    entries = [json.loads(line) for line in out.read_text().splitlines()]
    wrong = {(entry["id"], entry["custom_id"], entry["error"]["code"]) for entry in entries if entry["error"]}
    assert wrong == {(f"batch_req_{n}", name, "duplicate_custom_id") for n, name in ((3, "a"), (5, "line-4"), (6, "a"))}
    whole = sorted(out.read_bytes().splitlines())
    for kept in range(len(whole)):  # whatever lines a first run has left
        part = tmp_path / f"part {kept}"
        part.write_bytes(b"".join(line + b"\n" for line in out.read_bytes().splitlines()[:kept]))
        assert run(engine, source, part).skipped == kept
        assert [strip(line) for line in sorted(part.read_bytes().splitlines())] == [strip(line) for line in whole]


def test_requests_that_the_engine_gives_up(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that finds no room alone gets an error line; all its answers end, and the others go on."""
    engine = Engine(model.path, EngineConfig(num_pages=8, max_num_seqs=2), load_tokenizer(model.path))
    long = completion("long", prompt=[1, 2, 3], n=2, max_tokens=200, temperature=1.0)
    lines, left, write_line = [long, completion("short"), completion("other")], [], Output.write

    def watched(self: Output, number: int, *more: object) -> None:
        left.append([name for name in engine.unfinished_requests() if name.startswith(f"{number}-")])
        write_line(self, number, *more)

    monkeypatch.setattr(Output, "write", watched)
    said = run(engine, write(tmp_path / "in", lines), tmp_path / "out")
    all_back(engine)
    found = read(tmp_path / "out")
    assert said.complete and found["long"]["response"]["status_code"] == 500
    assert "cache is full" in found["long"]["error"]["message"]
    assert found["short"]["error"] is None and found["other"]["error"] is None
    assert said.peak_pages == 8 and left == [[]] * 3


# -------------------------------------------------------------------------------------------------------------- inputs


def test_defaults_hold_for_lines_that_do_not_say(model: Model, tmp_path: Path) -> None:
    lines = [
        {"prompt": "ab", "ignore_eos": True},
        {"prompt": "ab", "max_tokens": 2, "ignore_eos": True},
        {"messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 3, "ignore_eos": True},
    ]
    assert (
        main(command(model, write(tmp_path / "in", lines), tmp_path / "out", "--max-tokens", "9", "--temperature", "0"))
        == 0
    )
    found = read(tmp_path / "out")
    assert [found[f"line-{n}"]["response"]["body"]["usage"]["completion_tokens"] for n in (1, 2, 3)] == [9, 2, 3]


def test_gzip_and_shards(model: Model, tmp_path: Path) -> None:
    """Shards have the lines of the whole between them, each once, with the same answers; blank lines have no number's
    place.
    """
    lines = mixed(11)
    lines[4:4] = [b"", b"  "]
    source = write(tmp_path / "in", lines)
    with gzip.open(tmp_path / "in.gz", "wb") as file:
        file.write(source.read_bytes())
    engine = Engine(model.path, EngineConfig(max_num_seqs=4), load_tokenizer(model.path))
    assert run(engine, source, tmp_path / "whole").complete
    whole, parts = read(tmp_path / "whole"), {}
    for i in range(3):
        run(engine, tmp_path / "in.gz", tmp_path / f"part{i}", shard=(i, 3))
        part = read(tmp_path / f"part{i}")
        assert part and not part.keys() & parts.keys()
        parts |= part
    assert parts == whole and len(whole) == 11
    assert [
        min(int(json.loads(line)["id"].split("_")[2]) for line in (tmp_path / f"part{i}").read_text().splitlines())
        for i in range(3)
    ] == [1, 2, 3]


def test_a_damaged_gzip_file_is_answered_as_far_as_it_goes(model: Model, tmp_path: Path, capsys) -> None:
    lines = [{"prompt": [n % 50, *random.Random(n).choices(range(50), k=300)], "max_tokens": 1} for n in range(400)]
    data = gzip.compress(write(tmp_path / "in", lines).read_bytes())
    (tmp_path / "cut.gz").write_bytes(data[: len(data) // 2])
    assert main(command(model, tmp_path / "cut.gz", tmp_path / "out")) == 2
    assert "cannot be read beyond line" in capsys.readouterr().err
    there = len(read(tmp_path / "out"))
    assert 10 < there < 390
    (tmp_path / "cut.gz").write_bytes(data)
    assert main(command(model, tmp_path / "cut.gz", tmp_path / "out")) == 0
    assert len(read(tmp_path / "out")) == 400 and f"{there} were there before" in capsys.readouterr().out


def test_no_more_is_read_than_is_needed(model: Model, tmp_path: Path) -> None:
    """However long the input, only a few lines of it are in memory."""
    engine, ahead = Engine(model.path, EngineConfig(max_num_seqs=2)), []

    class Watched(Input):
        def lines(self, shard=(0, 1)):
            for number, line in super().lines(shard):
                ahead.append(len(engine.unfinished_requests()))
                yield number, line

    source = write(
        tmp_path / "in", [{"prompt": [1, 2], "n": 1 + n % 3, **GREEDY, "temperature": 1.0} for n in range(40)]
    )
    output, prompts = Output(tmp_path / "out"), Prompts(engine.input_processor)
    assert BatchRunner(engine, prompts, output, Options("m", frozenset())).run(Watched(source)).completed == 40
    assert 2 <= max(ahead) <= 4 and ahead[0] == 0
    output.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-i", "{tmp}/none"], "none cannot be read"),
        (["-o", "{tmp}/in"], "in is the input"),
        (["-o", "{tmp}/foreign"], "foreign, line 1 is not a line that dmc batch writes"),
        (["-o", "{tmp}/broken"], "broken, line 2 is not a line that dmc batch writes"),
        (["-o", "{tmp}"], "cannot be opened"),
        (["-o", "{tmp}/pipe"], "pipe cannot be opened: it is no regular file"),
        (["-o", "{tmp}/array"], "array, line 1 has no end and is not a line that dmc batch writes"),
        (["-o", "{tmp}/binary"], "binary, line 1 has no end and is not a line that dmc batch writes"),
        (["-o", "{tmp}/brace"], "brace, line 1 has no end"),
        (["-o", "{tmp}/mixed"], "mixed, line 2 has no end"),
        (["-o", "{tmp}/text"], "text, line 1 is not a line"),
        (["-o", "{tmp}/deep"], "deep, line 1 is not a line"),
        (["-i", "{tmp}/in.zst"], "in.zst is zstd; decompress it first"),
        (["-i", "{tmp}/utf16"], "utf16 is UTF-16; convert it first"),
        (["-i", "{tmp}/utf16le"], "utf16le is UTF-16 or UTF-32"),
        (["-i", "{tmp}/utf16.gz"], "utf16.gz is UTF-16; convert it first"),
        (["-i", "{tmp}/array"], "array is one JSON array; write each element on a line of its own"),
        (["-i", "{tmp}/pretty"], "pretty has no JSON object in its first"),
        (["-i", "{tmp}/deep"], "one JSON array"),
        (["--model", "{tmp}"], "config.json cannot be read"),
    ],
)
def test_what_is_wrong_with_the_files(options: list[str], message: str, model: Model, tmp_path: Path, capsys) -> None:
    """Nothing of a file that is not ours is changed."""
    write(tmp_path / "in", [completion("a")])
    write(tmp_path / "foreign", [{"custom_id": "a", "text": "mine"}])
    good = json.dumps({"id": "batch_req_1", "custom_id": "a", "response": {}, "error": None}).encode()
    write(tmp_path / "broken", [good, b"\0\0\0", good])
    write(tmp_path / "text", [good.replace(b"null", b'"a text"')])
    write(tmp_path / "deep", [b"[" * 100000])
    (tmp_path / "array").write_text(json.dumps([completion("a")]))
    (tmp_path / "pretty").write_text(json.dumps([completion("a")], indent=1)[1:-1])
    (tmp_path / "binary").write_bytes(bytes(range(11, 256)) * 9)
    (tmp_path / "brace").write_bytes(b"{")
    (tmp_path / "mixed").write_bytes(good + b'\n{"id": "another"')
    (tmp_path / "in.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(range(200)))
    (tmp_path / "utf16").write_text('{"prompt": "a"}\n', encoding="utf-16")
    (tmp_path / "utf16le").write_text('{"prompt": "a"}\n', encoding="utf-16-le")
    (tmp_path / "utf16.gz").write_bytes(gzip.compress((tmp_path / "utf16").read_bytes()))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    os.mkfifo(tmp_path / "pipe")
    assert main([*command(model, tmp_path / "in", tmp_path / "out"), *(o.format(tmp=tmp_path) for o in options)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert before == {name: (tmp_path / name).read_bytes() for name in before}


def test_a_disk_that_is_full(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """One line names the file; what is there is whole, and the next run does the rest."""
    source, out, real = write(tmp_path / "in", [completion(f"c{n}") for n in range(4)]), tmp_path / "out", os.write

    def short(fd: int, data: memoryview) -> int:
        """A file may be 2,000 bytes long, which is no whole number of lines."""
        room = 2000 - out.stat().st_size
        if room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data[:room])

    monkeypatch.setattr(batch_files.os, "write", short)
    assert main(command(model, source, out)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and f"{out} cannot be written: No space left" in err and err.count("\n") == 1
    there = read(out)
    assert out.read_bytes().endswith(b"\n") and 0 < len(there) < 4
    monkeypatch.undo()
    assert main(command(model, source, out)) == 0
    assert there.items() <= read(out).items() and len(read(out)) == 4


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_last_word_that_nobody_hears(stream: str) -> None:
    """The exit status is that of the work."""
    code = f"from megatron.dmc import flags; flags.say('done', {stream!r}); flags.say('again', {stream!r})"
    with open("/dev/full", "w") as full:
        assert subprocess.run([sys.executable, "-c", code], **{stream: full}).returncode == 0


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    output = Output(tmp_path / "out")
    with pytest.raises(ValueError, match="is being written by another run"):
        Output(tmp_path / "out")
    output.close()
    Output(tmp_path / "out").close()


@pytest.mark.parametrize("text", ["3/3", "1", "-1/2", "a/b", "1/0", "/2"])
def test_shards_that_are_none(text: str, capsys) -> None:
    assert main(["batch", "-i", "a", "-o", "b", "--model", "m", f"--shard={text}"]) == 2
