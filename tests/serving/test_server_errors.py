"""HTTP requests that are refused: malformed bodies, keys, sizes, a full queue; and a client that leaves."""

from __future__ import annotations

import json
import logging
import socket
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from helpers.engines import Model
from helpers.processes import PATIENCE
from helpers.serving import CHAT, COMPLETIONS, IGNORE, Running, client, until

from megatron.dmc.serving.async_engine import Limits

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
        {"prompt": "a" * 256, "max_tokens": 8},
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
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\n"
        head += "Authorization: Bearer sk-first\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head.encode() + b"3e8\r\n" + b" " * 1000 + b"\r\n" + b"5dc\r\n" + b" " * 1500 + b"\r\n")
        assert b" 413 " in connection.recv(1000).split(b"\r\n")[0]
        connection.close()
        server.settle()
        assert 'requests_refused_total{engine="0",model_name="m",status="413"} 2.0' in server.ask("/metrics")[2]
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
    aborted = 'dmc:request_success_total{engine="0",finished_reason="abort",model_name="m"} '
    before = float(server.ask("/metrics")[2].split(aborted)[1].split()[0])
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)
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


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "a", "stop": ["x"] * 65}, "stop"),
        ({"prompt": "a", "stop": ["x" * 1025]}, "stop"),
        ({"prompt": "a", "stop": [None] * 65}, "stop"),
        ({"prompt": "a", "logit_bias": {str(n): "x" for n in range(1025)}}, "logit_bias"),
        ({"prompt": "a", "stop_token_ids": [None] * 1025}, "stop_token_ids"),
        ({"prompt": [None] * 1025}, "prompt"),
        ({"prompt": ["a"] * 1025}, "prompt"),
        ({"prompt": [[1]] * 1025}, "prompt"),
        ({"prompt": "a"} | {f"x{n}": 1 for n in range(256)}, None),
        ({"messages": [None] * 4097}, "messages"),
        ({"messages": [{"role": "user"} | {f"x{n}": 1 for n in range(256)}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [None] * 1025}]}, "messages[0].content"),
    ],
)
def test_more_elements_than_a_parameter_may_have(server: Running, body: dict, param: str | None) -> None:
    """Refused by their number, before any of them is looked at: each wrong one costs an error object."""
    error = server.json(CHAT if "messages" in body else COMPLETIONS, body, 400)["error"]
    assert error["param"] == param and (error["code"] == "too_many_elements" or "1025 characters" in error["message"])


def test_one_error_for_a_list_of_wrong_elements(server: Running) -> None:
    """Lists within their limits stop at their first wrong element."""
    for body in ({"prompt": [None] * 1000}, {"messages": [None] * 4000}, {"prompt": [1, *[None] * 200]}):
        error = server.json(CHAT if "messages" in body else COMPLETIONS, body, 400)["error"]
        assert error["code"] == "invalid_type" and len(error["message"]) < 300, error


def test_detokenize_takes_a_context(server: Running) -> None:
    most = server.service.prompts.max_model_len
    assert server.json("/detokenize", {"tokens": [0] * most})["prompt"] == "a" * most
    error = server.json("/detokenize", {"tokens": [0] * (most + 1)}, 400)["error"]
    assert (error["param"], error["code"]) == ("tokens", "context_length_exceeded")
