"""The HTTP server on the loopback: OpenAI's client and curl, the guide's examples, completions whole and streamed."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from helpers.engines import Model
from helpers.processes import PATIENCE, ROOT, subprocess_env
from helpers.serving import CHAT, COMPLETIONS, GREEDY, IGNORE, Running, client, make_model, samples, until

from megatron.dmc import __version__
from megatron.dmc.cli import build_parser
from megatron.dmc.inference import LLM, SamplingParams
from megatron.dmc.inference.text import load_tokenizer
from megatron.dmc.serving.metrics import HELP
from megatron.dmc.serving.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeRequest,
)


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


def test_turns_of_a_model_that_evicts(tmp_path: Path) -> None:
    """Later turns continue from the cache of earlier ones, and say what a single long prompt does."""
    model = make_model(tmp_path / "m", "adapter")
    with Running(model.path, prefix_cache_min_tokens=8) as running:
        api, messages, rendered = client(running), [], "<s>"
        for turn, text in enumerate(("tell me of pages and of windows", "why is that so?")):
            messages.append({"role": "user", "content": text})
            rendered += f"u:{text};"
            answer = api.chat.completions.create(model="m", messages=messages, **GREEDY, extra_body=IGNORE)
            content = answer.choices[0].message.content
            assert content == text_of(model, rendered + "a:", special=False)
            assert (answer.usage.prompt_tokens_details.cached_tokens > 0) == (turn > 0)
            messages.append({"role": "assistant", "content": content})
            rendered += f"a:{content};"
        running.settle()


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
    told = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=PATIENCE, env=env)
    assert json.loads(told.stdout)["usage"]["completion_tokens"] > 0, told
    exec(compile(program, "docs/serving.md", "exec"), {})
    assert float(capsys.readouterr().out.split()[-1]) > 1


def test_the_guide_names_what_is_there(server: Running) -> None:
    help_text = build_parser("serve").format_help()
    operation = GUIDE[: GUIDE.index("## What it costs")]
    flags = set(re.findall(r"--[a-z][a-z-]+(?![\w_])", operation)) - {"--model", "--tasks", "--help"}  # lm-eval's
    server.json(COMPLETIONS, {}, 400)
    server.json(COMPLETIONS, {"prompt": "a", "max_tokens": 1})
    assert len(flags) > 12 and not [flag for flag in flags if flag not in help_text]
    there = {key.split("[")[0].removeprefix("dmc:") for key in samples(server.ask("/metrics")[2])}
    there |= {"compression_ratio"}  # an idle server has no sample of it
    named = re.findall(r"`(\w+)(?:\{[\w,]+(?:=\"\d+\")?\})?`", GUIDE[GUIDE.index("## Monitor") :])
    named = [name for name in named if "_" in name and name != "model_name"]
    assert len(named) > 15 and not [name for name in named if name not in there and f"{name}_count" not in there]
    parameters = server.json("/openapi.json")["components"]["schemas"]
    known = set().union(*(schema.get("properties", {}) for schema in parameters.values()))
    listed = set(re.findall(r"`(\w+)`", GUIDE[GUIDE.index("### Parameters") : GUIDE.index("Not supported")]))
    # A value, and members of structured_outputs, which the schema has as an object.
    assert listed - known <= {"json_object", "json", "choice", "regex", "grammar"}
    bodies = (CompletionRequest, ChatCompletionRequest, TokenizeRequest, TokenizeChatRequest, DetokenizeRequest)
    assert not set().union(*(body.model_fields for body in bodies)) - listed
    assert not [name for name in HELP if not re.search(rf"`{name}(_total)?[`{{]", GUIDE)]


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(server: Running, model: Model) -> None:
    """As the guide tells it."""
    body = json.dumps({"prompt": "one two", "stream": True} | GREEDY | IGNORE)
    command = ["curl", "-sN", server.url + COMPLETIONS, "-H", "Content-Type: application/json", "-d", body]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text_of(model, "one two")


# -------------------------------------------------------------------------------------------------------- completions


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
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)
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


# ---------------------------------------------------------------------------------------------------- other endpoints


def test_token_ids_do_not_wait_for_the_tokenizer(server: Running) -> None:
    """A prompt of a few token ids is answered while the tokenizer is busy with a text; a wrong one is refused."""
    done = threading.Event()
    try:
        server.service.tokenizing.submit(done.wait, 60)
        body = {"prompt": [5, 9, 33], "max_tokens": 2, **IGNORE}
        assert server.json(COMPLETIONS, body)["usage"]["completion_tokens"] == 2
        assert server.json(COMPLETIONS, {"prompt": [5, 61]}, 400)["error"]["param"] == "prompt"
        with ThreadPoolExecutor(2) as pool:
            waiting = [
                pool.submit(server.json, COMPLETIONS, body | more)
                for more in ({"prompt": "one"}, {"bad_words": ["two"]})
            ]
            until(lambda: server.service.tokenizing._work_queue.qsize() == 2)
            done.set()
            assert [one.result()["usage"]["completion_tokens"] for one in waiting] == [2, 2]
    finally:
        done.set()


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


def test_the_model_says_how_it_compresses(server: Running) -> None:
    (card,) = server.json("/v1/models")["data"]
    assert card["compression"] == {
        "method": "dmc",
        "window": 12,
        "decision_source": "key",
        "decision_about": "previous",
        "decision_per": "head",
        "expected_ratio": 4.0,
    }


def test_operators_paths(server: Running) -> None:
    assert server.json("/health") == {} and server.json("/version") == {"version": __version__}
    schema = server.json("/openapi.json")
    for path in (COMPLETIONS, CHAT, "/tokenize", "/detokenize", "/health", "/metrics", "/version", "/v1/models"):
        assert path in schema["paths"]
    assert not re.search(r'"422"', json.dumps(schema))
    status, headers, text = server.ask("/docs")
    assert status == 200 and "/v1/completions" in text
    status, headers, text = server.ask("/")
    assert status == 200 and headers["content-type"].startswith("text/html")
