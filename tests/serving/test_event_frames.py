"""Frames of a stream: the short way to a token's frame gives the bytes of the long one."""

from __future__ import annotations

import itertools
from typing import Any

import h11
import pytest

from megatron.dmc.inference import Logprobs, StepOutput
from megatron.dmc.inference.cache import CacheUse
from megatron.dmc.inference.input_processor import InputProcessor
from megatron.dmc.serving import protocol as p
from megatron.dmc.serving.connection import ServerConnection
from megatron.dmc.serving.event_stream import frame
from megatron.dmc.serving.prompts import Prompts
from megatron.dmc.serving.responses import Chunks

TEXTS = ["a", "", 'quotes " and \\', "\ud83d half of a pair", "漢\n\0text\0", "the end"]
MORE: list[dict[str, Any]] = [
    {},
    {"n": 2},
    {"return_token_ids": True},
    {"stream_options": {"include_usage": True}},
    {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    {"stream_options": {"include_cache": True}},
]
BODIES: list[tuple[type, dict[str, Any]]] = [
    (p.CompletionRequest, {"prompt": [1, 2]}),
    (p.CompletionRequest, {"prompt": [[1, 2], [3]]}),
    (p.CompletionRequest, {"prompt": [1, 2], "echo": True}),
    (p.CompletionRequest, {"prompt": [1, 2], "logprobs": 1}),
    (p.ChatCompletionRequest, {"messages": [{"role": "user", "content": "x"}]}),
    (p.ChatCompletionRequest, {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 1}),
]


def outputs(request: p.GenerationRequest) -> list[tuple[int, StepOutput]]:
    """Outputs of all choices in turns: one token after the other, then two, then the end."""
    options = request.stream_options
    use = CacheUse(3, ((2,),), 1, 16, 64) if options is not None and options.include_cache else None
    prompts = len(request.prompts) if isinstance(request, p.CompletionRequest) else 1
    found = []
    for number, text in enumerate(TEXTS):
        last = number == len(TEXTS) - 1
        tokens = (5, 6) if number == 3 else (5,)
        logprobs = tuple(Logprobs(token, -0.5, 1, ((token, -0.5),)) for token in tokens)
        for prompt, index in itertools.product(range(prompts), range(request.n or 1)):
            output = StepOutput("r", index, tokens, text, logprobs if request.logprobs else (), cache=use)
            output.finish_reason = "stop" if last else None
            found.append((prompt, output))
    return found


@pytest.mark.parametrize("kind, body", BODIES, ids=lambda x: getattr(x, "__name__", None) or "-".join(x))
@pytest.mark.parametrize("more", MORE, ids=lambda x: "-".join(x) or "plain")
def test_the_short_way_gives_the_same_frames(kind: type, body: dict[str, Any], more: dict[str, Any]) -> None:
    request = p.parse(kind, body | more | {"stream": True})
    prompts = Prompts(InputProcessor(None, 100, 64, None, 1.0, "m"))
    short, long = (Chunks(request, prompts, [[1, 2], [3]], "m", "id") for _ in range(2))
    short.head["created"] = long.head["created"] = 1
    taken = 0
    for prompt, output in outputs(request):
        wanted = "".join(map(frame, long.of(prompt, output)))
        found = short.text_frame(prompt, output)
        taken += found is not None
        assert (found or "".join(map(frame, short.of(prompt, output)))) == wanted
    assert short.usage == long.usage
    options = request.stream_options
    always_of = request.logprobs or request.return_token_ids or (options and options.continuous_usage_stats)
    assert (taken == 0) == bool(always_of or (options and options.include_cache))


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("headers", [[], [("Content-Length", "12")]], ids=["chunks", "length"])
def test_chunks_are_those_of_h11(version: str, headers: list[tuple[str, str]]) -> None:
    sent = []
    for connection in (ServerConnection(h11.SERVER), h11.Connection(h11.SERVER)):
        connection.receive_data(f"GET / HTTP/{version}\r\nHost: m\r\n\r\n".encode())
        while type(connection.next_event()) is not h11.EndOfMessage:
            pass
        events = [h11.Response(status_code=200, headers=headers), *(h11.Data(data=b"a" * n) for n in (1, 0, 11))]
        sent.append(b"".join(connection.send(event) for event in (*events, h11.EndOfMessage())))
    assert sent[0] == sent[1]
