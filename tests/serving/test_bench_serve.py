"""``dmc bench serve``: what is counted, from made-up times; the client on streams that are cut anywhere; the real
server.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import numpy as np
import pytest
from helpers.engines import Model
from helpers.serving import Running, make_model

from megatron.dmc.cli import main
from megatron.dmc.serving.load import Timed, arrivals, ask, block, details, drive, figures, peak_requests, peak_tokens

# ------------------------------------------------------------------------------------------------------------- the
# client


def chunk(text: str | None = None, chat: bool = False, **more: object) -> dict:
    choice = {"index": 0, "finish_reason": None, **({"delta": {"content": text}} if chat else {"text": text})}
    return {"choices": [choice | more]} if text is not None else {"choices": []}


def sse(chunks: list, newline: str = "\n") -> bytes:
    lines = [
        f"data: {json.dumps(c, ensure_ascii=False) if isinstance(c, dict) else c}{newline}{newline}" for c in chunks
    ]
    return "".join([f": hello{newline}{newline}", *lines]).encode()


USAGE = {
    "choices": [],
    "usage": {"prompt_tokens": 7, "completion_tokens": 4, "dmc": {"slots": 10, "compression_ratio": 2.5}},
}
COMPLETION = [chunk("Grü"), chunk("ße, "), chunk("世界"), chunk(" 🙂", finish_reason="length"), USAGE, "[DONE]"]
CHAT = [
    {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]},
    chunk("Grüße, ", chat=True),
    chunk("", chat=True),
    chunk("世界", chat=True),
    chunk(" 🙂", chat=True, finish_reason="stop"),
    USAGE,
    "[DONE]",
]


def answer(pieces: list[bytes], status: int = 200, kind: str = "text/event-stream") -> Timed:
    """What the client makes of a response whose body comes in these pieces."""

    async def body() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    async def run() -> Timed:
        transport = httpx2.MockTransport(
            lambda request: httpx2.Response(status, headers={"Content-Type": kind}, content=body())
        )
        async with httpx2.AsyncClient(transport=transport, base_url="http://x") as client:
            return await ask(client, "/v1/completions", b"{}", 3)

    return asyncio.run(run())


@pytest.mark.parametrize("chunks", [COMPLETION, CHAT], ids=["completion", "chat"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 10**6])
def test_streams_cut_anywhere(chunks: list, newline: str, size: int) -> None:
    """In the middle of a character, of a line end or of an event; or all events at once."""
    data = sse(chunks, newline)
    found = answer([data[i : i + size] for i in range(0, len(data), size)])
    assert found.success and not found.error and found.text == "Grüße, 世界 🙂"
    assert (found.prompt_len, found.output_tokens, found.slots, found.states) == (7, 4, 10, 25.0)
    assert len(found.itl) == 3 and all(t >= 0 for t in found.itl) and found.ttft > 0
    assert found.latency == pytest.approx(found.ttft + sum(found.itl))


@pytest.mark.parametrize(
    ("pieces", "status", "kind", "message"),
    [
        ([b'{"error": {"message": "full"}}'], 503, "application/json", '503: {"error": {"message": "full"}}'),
        ([sse(COMPLETION[:2])], 200, "text/event-stream", "the stream ended before the completion did"),
        ([sse(["[DONE]"])], 200, "text/event-stream", "the completion has no tokens"),
        ([sse([COMPLETION[0], {"error": {"message": "engine failed"}}])], 200, "text/event-stream", "engine failed"),
        ([sse([COMPLETION[0], "{nonsense"])], 200, "text/event-stream", "JSONDecodeError"),
        ([sse(["[1, 2]"])], 200, "text/event-stream", "AttributeError"),
        ([b"{}"], 200, "application/json", "text/event-stream"),
    ],
)
def test_answers_that_fail(pieces: list[bytes], status: int, kind: str, message: str) -> None:
    found = answer(pieces, status, kind)
    assert not found.success and message in found.error


def test_without_usage_the_events_count() -> None:
    found = answer([sse([c for c in COMPLETION if c is not USAGE])])
    assert found.success and found.output_tokens == 4 and found.prompt_len == 3


# ----------------------------------------------------------------------------------------------------------- the
# traffic


def test_arrivals() -> None:
    made = {shape: arrivals(4000, 8.0, shape, np.random.default_rng(0)) for shape in (0.25, 1.0, 4.0, math.inf)}
    for shape, times in made.items():
        gaps = np.diff([0.0, *times])
        assert times[-1] == pytest.approx(4000 / 8) and (gaps >= 0).all()
        # A gamma distribution of shape k has the coefficient of variation 1 / sqrt(k).
        assert gaps.std() / gaps.mean() == pytest.approx(shape**-0.5, rel=0.1, abs=1e-9)
    assert arrivals(3, math.inf, 1.0, np.random.default_rng(0)) == [0.0] * 3
    assert arrivals(9, 2.0, 1.0, np.random.default_rng(5)) == arrivals(9, 2.0, 1.0, np.random.default_rng(5))
    for rate, shape in ((0.0, 1.0), (-1.0, 1.0), (1.0, 0.0), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="must be above 0"):
            arrivals(3, rate, shape, np.random.default_rng(0))


@pytest.mark.parametrize("most", [None, 3])
def test_drive(most: int | None) -> None:
    """All are sent once; with a limit no more than that are under way at a time, and the others wait in the client."""
    state = {"now": 0, "peak": 0}

    async def send(i: int) -> Timed:
        found = Timed(i, asyncio.get_running_loop().time())
        state["now"] += 1
        state["peak"] = max(state["peak"], state["now"])
        await asyncio.sleep(0.001)
        state["now"] -= 1
        return found

    ended = []
    outputs = asyncio.run(drive(send, [0.0] * 20, most, lambda: ended.append(1)))
    assert [output.prompt_len for output in outputs] == list(range(20)) and len(ended) == 20
    assert state["peak"] == (most or 20) and all(output.queue_time >= 0 for output in outputs)


# ----------------------------------------------------------------------------------------------------------- the
# figures


def timed(start: float, times: list[float], prompt: int = 10, tokens: int | None = None, success: bool = True) -> Timed:
    """A request from ``start`` whose tokens came at these moments."""
    found = Timed(prompt, start, usage_tokens=tokens, success=success)
    for moment in times:
        found.token("x", moment)
    return found


RUN = [
    timed(100.0, [100.1, 100.2, 100.4]),
    timed(100.5, [100.8, 101.6], prompt=20, tokens=5),
    timed(101.6, [101.7], prompt=30),
    timed(101.0, [101.1], success=False),
]


def test_figures_of_made_up_times() -> None:
    found = figures(RUN, 2.0, [50, 99], {})
    assert (found["completed"], found["failed"]) == (3, 1)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (60, 3 + 5 + 1)
    assert (
        found["request_throughput"] == 1.5
        and found["output_throughput"] == 4.5
        and found["total_token_throughput"] == 34.5
    )
    assert found["mean_ttft_ms"] == pytest.approx((100 + 300 + 100) / 3) and found["median_ttft_ms"] == pytest.approx(
        100
    )
    # After the first token: 300 ms for two more, 800 ms for four more; the answer of one token has none.
    assert found["mean_tpot_ms"] == pytest.approx((150 + 200) / 2) and found["p50_tpot_ms"] == pytest.approx(175)
    assert found["mean_itl_ms"] == pytest.approx((100 + 200 + 800) / 3)
    assert found["mean_e2el_ms"] == pytest.approx((400 + 1100 + 100) / 3)
    assert found["p99_e2el_ms"] == pytest.approx(np.percentile([400, 1100, 100], 99))
    assert found["std_ttft_ms"] == pytest.approx(np.std([100, 300, 100]))
    assert found["request_goodput"] is None and found["compression_ratio"] is None
    assert details(RUN)["output_lens"] == [3, 5, 1, 0] and details(RUN)["itls"][0] == pytest.approx([0.1, 0.2])


@pytest.mark.parametrize(
    ("bounds", "good"),
    [
        ({"ttft": 100.5}, 2),
        ({"ttft": 99}, 0),
        ({"tpot": 150.5}, 2),
        ({"tpot": 1}, 1),
        ({"e2el": 1100.5}, 3),
        ({"ttft": 1000, "tpot": 180, "e2el": 300}, 1),
    ],
)
def test_goodput(bounds: dict[str, float], good: int) -> None:
    """Requests that keep all bounds; an answer of one token keeps any bound on the tokens after it."""
    assert figures(RUN, 2.0, [99], bounds)["request_goodput"] == good / 2


def test_peaks() -> None:
    good = RUN[:3]
    # Tokens at 0.1, 0.2, 0.4, 0.8 s; 1.6, 1.7 s.
    assert peak_tokens(good) == 4 and peak_requests(good) == 1  # the third starts as the second ends
    assert peak_requests([*good, timed(100.3, [101.65]), timed(100.35, [100.38])]) == 3
    assert peak_requests([]) == 0 and peak_tokens([]) == 0


def test_the_block() -> None:
    found = figures(
        [*RUN[:3], Timed(success=True, ttft=0.1, latency=0.1, slots=10, states=35.0)], 2.0, [99], {"ttft": 100.5}
    )
    lines = block(found, [99], ["ttft", "e2el"], 3.5, 16).splitlines()
    assert lines[0] == "============ Serving Benchmark Result ============" and lines[-1] == "=" * 50
    names = [
        "Successful requests",
        "Failed requests",
        "Maximum request concurrency",
        "Request rate configured (RPS)",
        "Benchmark duration (s)",
        "Total input tokens",
        "Total generated tokens",
        "Request throughput (req/s)",
        "Request goodput (req/s)",
        "Output token throughput (tok/s)",
        "Peak output token throughput (tok/s)",
        "Peak concurrent requests",
        "Total token throughput (tok/s)",
        "Mean TTFT (ms)",
        "Median TTFT (ms)",
        "P99 TTFT (ms)",
        "Mean E2EL (ms)",
        "Median E2EL (ms)",
        "P99 E2EL (ms)",
        "Compression ratio",
    ]
    told = {line.split(":")[0]: line.split(":")[1].strip() for line in lines if ":" in line}
    assert list(told) == names and all(line[40] == " " for line in lines if ":" in line)
    assert (told["Successful requests"], told["Benchmark duration (s)"], told["Compression ratio"]) == (
        "4",
        "2.00",
        "3.50",
    )
    assert "---------------Time to First Token----------------" in lines


# ------------------------------------------------------------------------------------------------------- the real
# server


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model(tmp_path_factory.mktemp("bench") / "m")


@pytest.fixture(scope="module")
def server(model: Model):
    with Running(model.path, max_num_seqs=6) as running:
        yield running


@pytest.mark.parametrize(
    ("backend", "more"),
    [
        (
            "openai",
            ["--request-rate", "200", "--burstiness", "0.5", "--goodput", "ttft:1e6", "e2el:1e6", "--num-warmups", "2"],
        ),
        ("openai-chat", ["--max-concurrency", "3", "--ready-check-timeout-sec", "5", "--metadata", "run=7"]),
    ],
)
def test_against_the_server(backend: str, more: list[str], server: Running, tmp_path: Path, capsys) -> None:
    assert (
        main(
            [
                "bench",
                "serve",
                "--base-url",
                server.url,
                "--backend",
                backend,
                "--num-prompts",
                "12",
                "--input-len",
                "20",
                "--output-len",
                "8",
                "--ignore-eos",
                "--temperature",
                "0",
                "--random-range-ratio",
                "0.25",
                "--disable-tqdm",
                "--save-result",
                "--save-detailed",
                "--result-dir",
                str(tmp_path),
                *more,
            ]
        )
        == 0
    )
    text = capsys.readouterr().out
    (file,) = tmp_path.iterdir()
    found = json.loads(file.read_text())
    assert file.name.startswith(f"{backend}-{found['request_rate']}qps") and file.name.endswith(
        "-m-" + found["date"] + ".json"
    )
    assert (found["completed"], found["failed"], found["errors"]) == (12, 0, [""] * 12)
    assert all(6 <= n <= 10 for n in found["output_lens"]) and sum(found["output_lens"]) == found["total_output_tokens"]
    assert len(set(found["output_lens"])) > 1
    if backend == "openai":  # token ids, with no token more
        assert (
            all(15 <= n <= 25 for n in found["input_lens"]) and found["request_goodput"] == found["request_throughput"]
        )
    else:
        assert found["max_concurrent_requests"] <= 3 and found["run"] == "7" and found["max_concurrency"] == 3
    assert [1 + len(itl) for itl in found["itls"]] == found["output_lens"]  # every token came by itself
    assert found["compression_ratio"] > 1.2 and "Compression ratio" in text and "P99 E2EL (ms)" in text
    server.settle()


def test_prompts_of_a_file_and_of_a_tokenizer(model: Model, server: Running, tmp_path: Path) -> None:
    (tmp_path / "p").write_text('{"prompt": "abc"}\n{"prompt": [1, 2, 3, 4, 5, 6, 7]}\n')
    options = [
        "bench",
        "serve",
        "--base-url",
        server.url,
        "--num-prompts",
        "4",
        "--input-len",
        "9",
        "--output-len",
        "3",
        "--disable-tqdm",
        "--ignore-eos",
        "--append-result",
        "--save-detailed",
        "--result-filename",
        str(tmp_path / "r"),
    ]
    assert main([*options, "--dataset-path", str(tmp_path / "p")]) == main([*options, "--tokenizer", model.path]) == 0
    one, two = (json.loads(line) for line in (tmp_path / "r").read_text().splitlines())
    assert one["input_lens"] == [4, 7, 4, 7] and two["input_lens"] == [9] * 4  # "abc" and BOS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--base-url", "http://127.0.0.1:1"], "is the server there?"),
        (["--base-url", "http://127.0.0.1:1", "--ready-check-timeout-sec", "0.1"], "for 0.1 s"),
        (["--dataset-name", "custom"], "--dataset-name custom needs --dataset-path"),
        (["--extra-body", "[1]"], "--extra-body is [1]"),
        (["--tokenizer", "{tmp}"], "has no tokenizer files"),
        (["--model", "another"], "tokenize: 404"),
        (["--model", "another", "--dataset-path", "{tmp}/ids"], "none of 2 requests was completed; the first one: 404"),
        (["--extra-body", '{"colour": 1}'], "unknown parameter"),
        (["--backend", "openai-chat", "--dataset-path", "{tmp}/ids"], "a chat takes no token ids"),
    ],
)
def test_bench_serve_says_what_is_wrong(
    options: list[str], message: str, server: Running, tmp_path: Path, capsys
) -> None:
    (tmp_path / "ids").write_text('{"prompt": [1, 2]}\n')
    assert (
        main(
            [
                "bench",
                "serve",
                "--base-url",
                server.url,
                "--num-prompts",
                "2",
                "--input-len",
                "5",
                "--disable-tqdm",
                *(option.format(tmp=tmp_path) if "{tmp}" in option else option for option in options),
            ]
        )
        == 2
    )
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "options",
    [
        ["--goodput", "itl:5"],
        ["--goodput", "ttft"],
        ["--request-rate", "0"],
        ["--max-concurrency", "0"],
        ["--metadata", "x"],
        ["--metric-percentiles", "101"],
        ["--percentile-metrics", "ttft,speed"],
        ["--extra-body", "{"],
    ],
)
def test_bench_serve_refuses(options: list[str]) -> None:
    assert main(["bench", "serve", *options]) == 2
