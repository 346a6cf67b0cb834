"""The HTTP server on the loopback: OpenAI's client and curl, streams, errors, limits, keys, disconnects, failures, the
end.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from helpers.engines import Model
from helpers.processes import ROOT, subprocess_env
from helpers.serving import Running, make_model, until
from prometheus_client.parser import text_string_to_metric_families

from megatron.dmc import __version__
from megatron.dmc.cli import build_parser
from megatron.dmc.inference import LLM, SamplingParams
from megatron.dmc.inference.text import load_tokenizer
from megatron.dmc.serving.async_engine import Limits

GREEDY = {"temperature": 0, "max_tokens": 12}
IGNORE = {"ignore_eos": True}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model(tmp_path_factory.mktemp("server") / "m")


@pytest.fixture(scope="module")
def server(model: Model) -> Iterator[Running]:
    with Running(model.path) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test on the shared server all pages are free and nobody waits."""
    yield
    if "server" in request.fixturenames:
        request.getfixturevalue("server").settle()


def text_of(model: Model, prompt: str, more: int = 12, special: bool = True) -> str:
    """The engine's own greedy answer."""
    tokenizer = load_tokenizer(model.path)
    ids = tokenizer(prompt, add_special_tokens=special)["input_ids"]
    return tokenizer.decode(model.answer(tuple(ids), more), skip_special_tokens=True)


def paid(usage: dict) -> dict:
    """Without what depends on who asked before."""
    assert 0 <= usage["prompt_tokens_details"]["cached_tokens"] <= usage["prompt_tokens"]
    return {key: value for key, value in usage.items() if key != "prompt_tokens_details"}


# ------------------------------------------------------------------------------------------------------------ clients


def client(server: Running, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key=key, max_retries=0)


def test_openai_completions(server: Running, model: Model) -> None:
    api = client(server)
    answer = api.completions.create(model="m", prompt="one two", **GREEDY, extra_body=IGNORE)
    wanted = text_of(model, "one two")
    assert answer.choices[0].text == wanted and answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (8, 12, 20)
    assert answer.usage.dmc["slots"] > 0 and answer.usage.dmc["compression_ratio"] > 1
    pieces = list(
        api.completions.create(
            model="m",
            prompt="one two",
            **GREEDY,
            extra_body=IGNORE,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(chunk.choices[0].text for chunk in pieces[:-1]) == wanted and len(pieces) == 13
    assert pieces[-1].choices == [] and paid(pieces[-1].usage.model_dump()) == paid(answer.usage.model_dump())
    many = api.completions.create(
        model="m", prompt=["a", "b"], n=2, seed=5, max_tokens=6, extra_body=IGNORE, logprobs=1
    )
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3] and len(
        {choice.text for choice in many.choices}
    ) > 1
    assert all(len(choice.logprobs.token_logprobs) == 6 for choice in many.choices)
    again = api.completions.create(
        model="m", prompt=["a", "b"], n=2, seed=5, max_tokens=6, extra_body=IGNORE, logprobs=1
    )
    assert [choice.text for choice in again.choices] == [choice.text for choice in many.choices]


def test_openai_chat(server: Running, model: Model) -> None:
    api = client(server)
    messages = [{"role": "system", "content": "be short"}, {"role": "user", "content": "hi"}]
    answer = api.chat.completions.create(
        model="m", messages=messages, temperature=0, max_completion_tokens=12, extra_body=IGNORE
    )
    wanted = text_of(model, "<s>s:be short;u:hi;a:", special=False)
    assert answer.choices[0].message.content == wanted and answer.choices[0].message.role == "assistant"
    pieces = list(
        api.chat.completions.create(
            model="m", messages=messages, **GREEDY, extra_body=IGNORE, stream=True, logprobs=True, top_logprobs=2
        )
    )
    assert pieces[0].choices[0].delta.role == "assistant" and pieces[-1].choices[0].finish_reason == "length"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == wanted
    assert sum(len(chunk.choices[0].logprobs.content) for chunk in pieces if chunk.choices[0].logprobs) == 12


def test_openai_models_and_errors(server: Running) -> None:
    api = client(server)
    assert [card.id for card in api.models.list()] == ["m"] and api.models.retrieve("m").max_model_len == 256
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        api.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match="unknown parameter: 'beams'") as caught:
        api.completions.create(model="m", prompt="a", extra_body={"beams": 3})
    assert caught.value.param == "beams" and caught.value.code == "unknown_parameter"
    with pytest.raises(openai.NotFoundError):
        api.embeddings.create(model="m", input="a")


GUIDE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_examples_of_the_guide(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = dict(re.findall(r"<!-- tested: tests/serving/test_server.py -->\n```(\w+)\n(.*?)```", GUIDE, re.DOTALL))
    assert set(blocks) == {"bash", "python"}
    script, program = (blocks[name].replace("http://localhost:8000", server.url) for name in ("bash", "python"))
    env = subprocess_env({"DMC_API_KEY": "x"})
    told = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, env=env)
    assert json.loads(told.stdout)["usage"]["completion_tokens"] > 0, told
    exec(compile(program, "docs/serving.md", "exec"), {})
    assert float(capsys.readouterr().out.split()[-1]) > 1


def test_the_guide_names_what_is_there(server: Running) -> None:
    help_text = build_parser("serve").format_help()
    operation = GUIDE[: GUIDE.index("## What it costs")]
    flags = set(re.findall(r"--[a-z][a-z-]+(?![\w_])", operation)) - {"--model", "--tasks", "--help"}  # lm-eval's
    server.json(COMPLETIONS, {}, 400)
    assert len(flags) > 12 and not [flag for flag in flags if flag not in help_text]
    there = {key.split("[")[0].removeprefix("dmc:") for key in samples(server.ask("/metrics")[2])}
    named = re.findall(r"`(\w+)(?:\{[\w,]+(?:=\"\d+\")?\})?`", GUIDE[GUIDE.index("## Watch it") :])
    named = [name for name in named if "_" in name and name != "model_name"]
    assert len(named) > 15 and not [name for name in named if name not in there and f"{name}_count" not in there]
    parameters = server.json("/openapi.json")["components"]["schemas"]
    known = set().union(*(schema.get("properties", {}) for schema in parameters.values()))
    listed = GUIDE[GUIDE.index("Besides OpenAI's") : GUIDE.index("A parameter that is not known")]
    assert not set(re.findall(r"`(\w+)`", listed)) - known


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(server: Running, model: Model) -> None:
    """As the guide tells it."""
    body = json.dumps({"prompt": "one two", "stream": True} | GREEDY | IGNORE)
    command = ["curl", "-sN", server.url + COMPLETIONS, "-H", "Content-Type: application/json", "-d", body]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text_of(model, "one two")


# ------------------------------------------------------------------------------------------------------------ answers


def test_prompts_in_all_forms(server: Running, model: Model) -> None:
    tokenizer = load_tokenizer(model.path)
    texts = ["one", "two three"]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    wanted = [text_of(model, text) for text in texts]
    for prompt, found in ((texts[0], wanted[:1]), (texts, wanted), (ids[0], wanted[:1]), (ids, wanted)):
        body = server.json(COMPLETIONS, {"prompt": prompt} | GREEDY | IGNORE)
        assert [choice["text"] for choice in body["choices"]] == found


@pytest.mark.parametrize(
    "more",
    [
        {"prompt": ["one", "two"], "n": 2, "seed": 3, "max_tokens": 9},
        {"prompt": "one", "stop": ["a", "b"], "temperature": 0},
        {"prompt": "one two", "echo": True, "logprobs": 3, "temperature": 0},
        {"prompt": "x", "logprobs": 0, "max_tokens": 3, "top_k": 2},
        {"prompt": "x", "max_tokens": 0, "echo": True, "logprobs": 1},
        {"prompt": [1, 2, 3], "return_token_ids": True, "seed": 1},
    ],
)
def test_streaming_equals_whole(server: Running, more: dict) -> None:
    more = {"seed": 1, "ignore_eos": True} | more
    whole = server.json(COMPLETIONS, more)
    events = server.events(COMPLETIONS, more | {"stream_options": {"include_usage": True}})
    assert events[-1]["choices"] == [] and paid(events[-1]["usage"]) == paid(whole["usage"])
    assert all(event["usage"] is None for event in events[:-1])
    for choice in whole["choices"]:
        parts = [event["choices"][0] for event in events[:-1] if event["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [parts[-1][key] for key in ("finish_reason", "stop_reason")] == [
            choice[key] for key in ("finish_reason", "stop_reason")
        ]
        assert all(part["finish_reason"] is None for part in parts[:-1])
        for key, values in (choice["logprobs"] or {}).items():
            joined = [x for part in parts for x in part["logprobs"][key]]
            assert len(joined) == len(values) and (key == "token_logprobs" or key == "top_logprobs" or joined == values)
            if key == "token_logprobs":
                assert [x for x in joined if x is not None] == pytest.approx(
                    [x for x in values if x is not None], abs=1e-4
                )
        if "token_ids" in choice:
            assert [x for part in parts for x in part["token_ids"]] == choice[
                "token_ids"
            ] and "prompt_token_ids" in parts[0]


def test_chat_streaming_equals_whole(server: Running) -> None:
    body = {"messages": [{"role": "user", "content": "tell me"}], "n": 2, "seed": 4, "max_tokens": 10} | IGNORE
    whole, events = server.json(CHAT, body), server.events(CHAT, body)
    for choice in whole["choices"]:
        parts = [event["choices"][0] for event in events if event["choices"][0]["index"] == choice["index"]]
        assert "".join(part["delta"].get("content", "") for part in parts) == choice["message"]["content"]


def test_a_stream_comes_token_by_token(server: Running) -> None:
    """The first event is there long before the last token is."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    body = json.dumps({"prompt": "a", "stream": True, "max_tokens": 200, **IGNORE}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    received = b""
    while received.count(b"data: ") < 3:
        received += connection.recv(300)
    running = server.call(lambda engine: engine.stats().running)
    connection.close()
    assert running == 1 and b"[DONE]" not in received


def test_a_prompt_that_begins_like_another(model: Model) -> None:
    """What the prefix cache had is in the usage and the metrics; the answer is the same."""
    with Running(model.path) as server:
        body = {"prompt": "one two three " * 5} | GREEDY | IGNORE
        first = server.json(COMPLETIONS, body)
        again = server.json(COMPLETIONS, body)
        stream = server.events(COMPLETIONS, body | {"stream_options": {"include_usage": True}})[-1]["usage"]
        cached = again["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0 < 32 <= cached <= 71
        assert (
            stream == again["usage"] and again["choices"] == first["choices"] and paid(stream) == paid(first["usage"])
        )
        found = samples(server.ask("/metrics")[2])
        assert found["dmc:prefix_cache_hits_total[('model_name', 'm')]"] == 2 * cached
        assert found["dmc:prefix_cache_queries_total[('model_name', 'm')]"] == 3 * 71
        assert found["dmc:num_pages_cached[('model_name', 'm')]"] > 0
        server.settle()


def test_a_stream_shows_the_cache(server: Running) -> None:
    events = server.events(
        COMPLETIONS, {"prompt": "one two three", "stream_options": {"include_cache": True}} | GREEDY | IGNORE
    )
    seen = [event["dmc"] for event in events if "dmc" in event]
    assert [use["tokens"] for use in seen] == list(range(14, 14 + len(seen))) and len(seen) == 11
    layers, heads = server.engine.cache.shape
    assert all(len(use["slots"]) == layers and {len(row) for row in use["slots"]} == {heads} for use in seen)
    assert all(
        use["compression_ratio"] == pytest.approx(use["tokens"] * layers * heads / sum(map(sum, use["slots"])))
        for use in seen
    )


def test_without_a_tokenizer(tmp_path: Path) -> None:
    """Token ids in and out; what needs text is refused."""
    bare = Model(tmp_path / "m", "half")
    with Running(bare.path) as server:
        prompt = list(bare.prompt(9))
        body = {"prompt": prompt, "return_token_ids": True, "logprobs": 1, "echo": True} | GREEDY
        choice = server.json(COMPLETIONS, body)["choices"][0]
        assert tuple(choice["token_ids"]) == bare.answer(tuple(prompt), 12) and choice["text"] == ""
        assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in [*prompt, *choice["token_ids"]]]
        assert [x for event in server.events(COMPLETIONS, body) for x in event["choices"][0]["token_ids"]] == choice[
            "token_ids"
        ]
        messages = [{"role": "user", "content": "a"}]
        for path, wrong in (
            (COMPLETIONS, {"prompt": "a"}),
            (CHAT, {"messages": messages}),
            ("/tokenize", {"prompt": "a"}),
            ("/detokenize", {"tokens": [1]}),
            (COMPLETIONS, {"prompt": [1], "stop": "a"}),
        ):
            assert "tokenizer" in server.json(path, wrong, 400)["error"]["message"]
        server.settle()


def test_tokenize_and_back(server: Running) -> None:
    body = server.json("/tokenize", {"prompt": "one two", "return_token_strs": True})
    assert (
        body["count"] == 8 == len(body["tokens"])
        and body["max_model_len"] == 256
        and body["token_strs"][:2] == ["<s>", "o"]
    )
    assert server.json("/detokenize", {"tokens": body["tokens"]}) == {"prompt": "<s>one two"}
    chat = server.json("/tokenize", {"messages": [{"role": "user", "content": "hi"}]})
    assert (
        server.json("/detokenize", {"tokens": chat["tokens"]})["prompt"] == "<s>u:hi;a:" and chat["token_strs"] is None
    )
    assert server.json("/tokenize", {"prompt": 3}, 400)["error"]["param"] == "prompt"
    assert server.json("/tokenize", {"messages": []}, 400)["error"]["param"] == "messages"
    assert server.json("/detokenize", {"tokens": [61]}, 400)["error"]["param"] == "tokens"


def test_operators_paths(server: Running) -> None:
    assert server.json("/health") == {} and server.json("/version") == {"version": __version__}
    schema = server.json("/openapi.json")
    for path in (COMPLETIONS, CHAT, "/tokenize", "/detokenize", "/health", "/metrics", "/version", "/v1/models"):
        assert path in schema["paths"]
    assert not re.search(r'"422"', json.dumps(schema))
    status, headers, text = server.ask("/docs")
    assert status == 200 and "swagger" in text
    status, headers, text = server.ask("/")
    assert status == 200 and headers["content-type"].startswith("text/html")


# ------------------------------------------------------------------------------------------------------------- errors

WRONG = [
    ("not JSON", b"{", {}),
    ("not an object", b"[]", {}),
    ("nothing", b"", {}),
    ("invalid UTF-8", b'{"prompt": "\xff\xfe"}', {}),
    ("NaN", b'{"prompt": "a", "temperature": NaN}', {}),
    ("infinity", b'{"prompt": "a", "temperature": 1e999}', {}),
    ("an integer of 5000 digits", b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}", {}),
    ("an integer of 30 digits", b'{"prompt": "a", "top_k": ' + b"9" * 30 + b"}", {}),
    ("nested", b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", {}),
    ("a surrogate", b'{"prompt": "\\ud800"}', {}),
    ("an unknown surrogate", b'{"prompt": "a", "\\ud800": 1}', {}),
    ("a wrong type", b'{"prompt": "a", "n": "1"}', {}),
    ("a huge token", b'{"prompt": [99999999999999999999]}', {}),
    ("an unknown token", b'{"prompt": [61]}', {}),
    ("a negative token", b'{"prompt": [-1]}', {}),
    ("an empty prompt", b'{"prompt": []}', {}),
    ("empty ids", b'{"prompt": [[]]}', {}),
    ("another type", b'{"prompt": "a"}', {"Content-Type": "text/plain"}),
    ("mixed", b'{"prompt": ["a", 1]}', {}),
    ("a huge n", b'{"prompt": "a", "n": 100000}', {}),
    ("a null", b'{"prompt": null}', {}),
    ("a huge penalty", b'{"prompt": "a", "presence_penalty": 1e30}', {}),
    ("another model", b'{"prompt": "a", "model": "\\udfff"}', {}),
    ("a bias of no token", b'{"prompt": "a", "logit_bias": {"61": 1}}', {}),
    ("a huge bias", b'{"prompt": "a", "logit_bias": {"99999999999999999999999": 1}}', {}),
]


@pytest.mark.parametrize(("body", "headers"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_a_wrong_body(server: Running, body: bytes, headers: dict) -> None:
    for stream in (False, True):
        raw = body.replace(b'{"prompt"', b'{"stream": true, "prompt"', 1) if stream else body
        status, _, text = server.ask(COMPLETIONS, raw=raw, headers=headers)
        error = json.loads(text)["error"]
        assert 400 <= status < 500 and set(error) == {"message", "type", "param", "code"}, text
        assert error["message"] and error["type"] == "invalid_request_error" and len(error["message"]) < 1000


def test_a_prompt_that_does_not_fit(server: Running) -> None:
    for body in (
        {"prompt": "a" * 300},
        {"prompt": "a" * 250, "max_tokens": 8},
        {"prompt": [1] * 257, "max_tokens": 0},
        {"prompt": "a" * 9999},
    ):
        error = server.json(COMPLETIONS, body, 400)["error"]
        assert error["code"] == "context_length_exceeded", error


def test_nothing_there(server: Running) -> None:
    for path, method, wanted in (("/v1/nothing", "GET", 404), (COMPLETIONS, "GET", 405), ("/health", "POST", 405)):
        status, _, text = server.ask(path, method=method)
        assert status == wanted and set(json.loads(text)["error"]) == {"message", "type", "param", "code"}


def test_keys_and_sizes(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with Running(model.path, keys=("sk-first", "sk-second"), max_body_bytes=2000) as server:
        right = {"Authorization": "Bearer sk-second"}
        assert server.ask("/v1/models", headers=right)[0] == 200
        for headers in (
            {},
            {"Authorization": "Bearer sk-thir"},
            {"Authorization": "sk-first"},
            {"Authorization": "Basic sk-first"},
            {"Authorization": "Bearer sk-first sk-second"},
            {"Authorization": "Bearer "},
        ):
            for path in ("/v1/models", "/tokenize", "/nothing"):
                status, found, text = server.ask(path, headers=headers)
                assert (
                    status == 401
                    and json.loads(text)["error"]["code"] == "invalid_api_key"
                    and found["www-authenticate"] == "Bearer"
                )
        for path in ("/", "/health", "/metrics", "/version", "/docs", "/openapi.json"):
            assert server.ask(path)[0] == 200
        assert server.json("/openapi.json")["security"] == [{"key": []}]
        with pytest.raises(openai.AuthenticationError):
            client(server, "wrong").models.list()
        assert client(server, "sk-first").completions.create(model="m", prompt="a", max_tokens=1).choices
        status, _, text = server.ask(COMPLETIONS, raw=b" " * 2001, headers=right)
        assert status == 413 and json.loads(text)["error"]["code"] == "request_too_large"
        # A length that is not told.
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\n"
        head += "Authorization: Bearer sk-first\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head.encode() + b"3e8\r\n" + b" " * 1000 + b"\r\n" + b"5dc\r\n" + b" " * 1500 + b"\r\n")
        assert b" 413 " in connection.recv(1000).split(b"\r\n")[0]
        connection.close()
        server.settle()
        assert 'requests_refused_total{model_name="m",status="413"} 2.0' in server.ask("/metrics")[2]
    assert not any("sk-" in record.getMessage() for record in caplog.records)


def test_a_full_queue(model: Model) -> None:
    with Running(model.path, limits=Limits(2, None), max_num_seqs=1) as server:
        body = {"prompt": "a", "max_tokens": 240, "temperature": 0} | IGNORE
        with ThreadPoolExecutor(12) as pool:
            found = list(pool.map(lambda _: server.ask(COMPLETIONS, body), range(12)))
        assert {status for status, _, _ in found} == {200, 503} and sum(status == 200 for status, _, _ in found) >= 2
        for status, headers, text in found:
            if status == 503:
                assert headers["retry-after"] == "1" and json.loads(text)["error"]["code"] == "overloaded"
        assert len({json.loads(text)["choices"][0]["text"] for status, _, text in found if status == 200}) == 1
        server.settle()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_pages(server: Running, stream: bool) -> None:
    aborted = 'dmc:request_success_total{finished_reason="abort",model_name="m"} '
    before = float(server.ask("/metrics")[2].split(aborted)[1].split()[0])
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    body = json.dumps({"prompt": ["a", "b"], "stream": stream, "max_tokens": 254 - 10, **IGNORE}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    if stream:
        connection.recv(300)
    else:
        until(lambda: server.call(lambda engine: engine.stats().running))
    generated = server.call(lambda engine: engine.stats().generation_tokens)
    connection.close()
    server.settle()
    assert server.call(lambda engine: engine.stats().generation_tokens) - generated < 2 * 244
    assert float(server.ask("/metrics")[2].split(aborted)[1].split()[0]) == before + 2


# ------------------------------------------------------------------------------------------------------------ metrics

# What vLLM's own Grafana dashboards ask for (examples/online_serving of vLLM, late 2025).
DASHBOARD = """
num_requests_running num_requests_waiting num_requests_swapped gpu_cache_usage_perc kv_cache_usage_perc
prompt_tokens_total generation_tokens_total request_success_total num_preemptions_total
e2e_request_latency_seconds_bucket time_per_output_token_seconds_sum inter_token_latency_seconds_bucket
time_to_first_token_seconds_count request_prompt_tokens_bucket request_generation_tokens_bucket
request_queue_time_seconds_sum request_prefill_time_seconds_sum request_decode_time_seconds_sum
request_inference_time_seconds_sum request_max_num_generation_tokens_sum
""".split()


def samples(text: str) -> dict[str, float]:
    return {
        f"{s.name}{sorted(s.labels.items())}": s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def test_metrics(model: Model) -> None:
    with Running(model.path, metrics_prefix="vllm") as server:
        body = {"prompt": ["one two", "three"], "n": 2, "max_tokens": 5, "seed": 1} | IGNORE
        usage = server.json(COMPLETIONS, body)["usage"]
        server.json(COMPLETIONS, {"prompt": "a", "temperature": "x"}, 400)
        server.json(COMPLETIONS, {"prompt": "abc", "max_tokens": 0})
        found = samples(server.ask("/metrics")[2])
        names = {key.split("[")[0] for key in found}
        assert not [name for name in DASHBOARD if f"vllm:{name}" not in names]

        def value(name: str, **labels: str) -> float:
            return found[f"vllm:{name}{sorted((labels | {'model_name': 'm'}).items())}"]

        assert (
            value("prompt_tokens_total") == 8 + 6 + 4
            and value("generation_tokens_total") == 20 == usage["completion_tokens"]
        )
        assert value("request_success_total", finished_reason="length") == 5 and value("num_requests_running") == 0
        assert value("time_to_first_token_seconds_count") == 4 and value("inter_token_latency_seconds_count") == 16
        assert value("e2e_request_latency_seconds_count") == 5 and value("request_prompt_tokens_sum") == 2 * (8 + 6) + 4
        assert value("request_generation_tokens_sum") == 20 and value("requests_refused_total", status="400") == 1
        layers, heads = server.engine.cache.shape
        states = [value("cache_token_states_total", layer=str(n)) for n in range(layers)]
        slots = [value("cache_slots_total", layer=str(n)) for n in range(layers)]
        assert states == [heads * (2 * (12 + 10) + 4)] * layers and sum(slots) < sum(states)
        assert (
            value("num_pages_free") == value("num_pages") == server.engine.cache.num_pages and value("engine_up") == 1
        )
        assert value("compression_ratio", layer="0") == 1 and value("page_waste_perc") == 0
        server.settle()


def test_metrics_of_what_runs(server: Running) -> None:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    body = json.dumps({"prompt": "a" * 100, "stream": True, "max_tokens": 150, **IGNORE}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    connection.recv(300)
    stats = server.call(lambda engine: engine.stats())
    connection.close()
    assert stats.running == 1 and len(stats.layer_compression_ratios) == server.engine.cache.shape[0]
    assert stats.compression_ratio == pytest.approx(
        len(stats.layer_compression_ratios) / sum(1 / r for r in stats.layer_compression_ratios)
    )


def test_the_dashboard_asks_for_metrics_that_exist(server: Running) -> None:
    text = (ROOT / "examples" / "dmc" / "grafana.json").read_text()
    server.json(COMPLETIONS, {"prompt": "a"})
    asked = set(re.findall(r"(?:\$\{prefix\}|dmc):(\w+)", text))
    there = {key.split("[")[0].removeprefix("dmc:") for key in samples(server.ask("/metrics")[2])}
    assert len(asked) > 20 and not asked - there
    ids = [panel["id"] for panel in json.loads(text)["panels"]]
    assert len(ids) == len(set(ids))


def test_server_equals_offline(server: Running, model: Model) -> None:
    """With sampling too: a seed draws the same text here and there."""
    params = dict(
        max_tokens=20,
        temperature=0.9,
        top_p=0.9,
        top_k=20,
        min_p=0.01,
        seed=11,
        repetition_penalty=1.2,
        ignore_eos=True,
    )
    offline = LLM(model.path).generate("one two", SamplingParams(**params))[0].outputs[0].text
    assert server.json(COMPLETIONS, {"prompt": "one two"} | params)["choices"][0]["text"] == offline
