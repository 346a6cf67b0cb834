"""The Responses API: openai-python's own client over a chat completion, and the translation either way."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from helpers.serving import Running, client

from megatron.dmc.serving import protocol, responses_api
from megatron.dmc.serving.errors import APIError
from megatron.dmc.serving.protocol import ResponsesRequest

ASK: dict[str, Any] = {"model": "m", "input": "hello", "max_output_tokens": 8, "temperature": 0}

BRIEF = "be brief and say what is so and no more than that, and say it once, in plain words that all know " * 2
"""Long enough to be found in the prefix cache."""


def request(**values: Any) -> ResponsesRequest:
    return protocol.parse(ResponsesRequest, {"input": "hello", **values})


def chat(server: Running, **values: Any) -> Any:
    """The chat completion that should stand behind ``ASK``."""
    messages = values.pop("messages", [{"role": "user", "content": "hello"}])
    return client(server).chat.completions.create(model="m", messages=messages, temperature=0, max_tokens=8, **values)


def test_a_response_is_that_of_the_chat(server: Running) -> None:
    expected = chat(server)
    found = client(server).responses.create(**ASK)
    assert found.output_text == expected.choices[0].message.content != ""
    assert (found.status, found.output[0].status) == ("completed", "completed")
    assert expected.choices[0].finish_reason == "stop" and found.incomplete_details is None
    assert found.usage.input_tokens == expected.usage.prompt_tokens
    assert found.usage.output_tokens == expected.usage.completion_tokens
    assert found.usage.total_tokens == expected.usage.total_tokens
    assert (found.store, found.previous_response_id, found.error) == (False, None, None)


def test_a_response_cut_short(server: Running) -> None:
    found = client(server).responses.create(**ASK | {"max_output_tokens": 1})
    assert (found.status, found.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert found.output[0].status == "incomplete" and found.usage.output_tokens == 1
    with client(server).responses.stream(**ASK | {"max_output_tokens": 1}) as stream:
        assert list(stream)[-1].type == "response.incomplete"


def test_a_stream_has_the_events_of_openais_server(server: Running) -> None:
    whole = client(server).responses.create(**ASK)
    with client(server).responses.stream(**ASK) as stream:
        events = list(stream)
        final = stream.get_final_response()
    kinds = list(dict.fromkeys(event.type for event in events))
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert final.output_text == whole.output_text and final.usage.output_tokens == whole.usage.output_tokens
    assert final.output[0].id == events[2].item.id


def test_turns_and_log_probabilities(server: Running) -> None:
    """What the server has sent comes back as it is; instructions come first; parts are texts."""
    first = client(server).responses.create(**ASK, instructions=BRIEF, include=["message.output_text.logprobs"])
    logprobs = first.output[0].content[0].logprobs
    assert logprobs and all(entry.logprob <= 0 for entry in logprobs)
    turns = [{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}, *first.output]
    turns.append({"role": "developer", "content": "now"})
    second = client(server).responses.create(**ASK | {"input": turns}, instructions=BRIEF)
    messages = [
        {"role": "system", "content": BRIEF},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": first.output_text},
        {"role": "system", "content": "now"},
    ]
    assert second.output_text == chat(server, messages=messages).choices[0].message.content
    assert second.usage.input_tokens_details.cached_tokens > 0


@pytest.mark.parametrize(
    "more, param",
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"store": True}, "store"),
        ({"truncation": "auto"}, "truncation"),
        ({"max_output_tokens": -1}, "max_output_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_logprobs": 200, "include": ["message.output_text.logprobs"]}, "top_logprobs"),
        ({"input": "x" * 3000}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "nobody", "content": "x"}]}, "input"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, None),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"tools": [{"type": "web_search"}]}, None),
        ({"nonsense": 1}, "nonsense"),
        ({"model": "another"}, "model"),
    ],
)
def test_what_is_not_had_is_refused_by_name(server: Running, more: dict, param: str | None) -> None:
    with pytest.raises(openai.APIStatusError) as error:
        client(server).post("/responses", body=ASK | more, cast_to=object)
    assert error.value.status_code in (400, 404)
    if param is not None:
        assert error.value.param == param
    assert "pydantic" not in str(error.value) and "response_format" not in str(error.value)


def test_what_asks_for_nothing_is_taken(server: Running) -> None:
    """What the Agents SDK and the Vercel AI SDK send with every request."""
    neutral = {
        "store": False,
        "previous_response_id": None,
        "background": False,
        "truncation": "disabled",
        "service_tier": "auto",
        "include": ["reasoning.encrypted_content"],
        "reasoning": {"effort": None},
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "metadata": {"a": "b"},
        "max_tool_calls": None,
        "user": "me",
    }
    found = client(server).responses.create(**ASK, **neutral)
    assert found.metadata == {"a": "b"} and found.output_text == client(server).responses.create(**ASK).output_text


def test_function_calls_become_messages_of_a_chat() -> None:
    items = [
        {"role": "user", "content": "weather?"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "2", "name": "g", "arguments": '{"x":1}'},
        {"type": "function_call_output", "call_id": "1", "output": "sun"},
        {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "rain"}]},
    ]
    tool = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}
    choice = {"type": "function", "name": "f"}
    schema = {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}
    body = responses_api.chat_body(
        request(input=items, tools=[tool], tool_choice=choice, text={"format": schema}, stream=True)
    )
    calls = [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}},
        {"id": "2", "type": "function", "function": {"name": "g", "arguments": '{"x":1}'}},
    ]
    assert body["messages"] == [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": [{"type": "text", "text": "I look."}], "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "content": "sun"},
        {"role": "tool", "tool_call_id": "2", "content": [{"type": "text", "text": "rain"}]},
    ]
    assert body["tools"] == [
        {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, "strict": True}}
    ]
    assert body["tool_choice"] == {"type": "function", "function": {"name": "f"}}
    given = {"name": "n", "schema": {"type": "object"}, "strict": True}
    assert body["response_format"] == {"type": "json_schema", "json_schema": given}
    assert body["stream_options"] == {"include_usage": True}


class Chunks:
    """Chunks of a chat completion in which a text is followed by two calls."""

    def __init__(self) -> None:
        self.head = {"id": "chatcmpl-1", "created": 1, "model": "m"}

    def first(self) -> list[dict]:
        return [self._chunk({"role": "assistant", "content": ""})]

    def of(self, prompt: int, output: Any) -> list[dict]:
        return [self._chunk(delta, end) for delta, end in output]

    def last(self) -> list[dict]:
        usage = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
        return [{**self.head, "choices": [], "usage": usage}]

    def _chunk(self, delta: dict, end: str | None = None) -> dict:
        return {**self.head, "choices": [{"index": 0, "delta": delta, "finish_reason": end}]}


def test_events_of_function_calls() -> None:
    """Every call is an item of its own, announced, filled and closed in turn; the final response holds them all."""
    from openai.types.responses import Response

    def call(index: int, **content: Any) -> dict:
        return {"tool_calls": [{"index": index, "type": "function", **content}]}

    events = responses_api.Events(request(stream=True), Chunks())  # type: ignore[arg-type]
    found = events.first()
    for delta in (
        {"content": "I look."},
        call(0, id="1", function={"name": "f", "arguments": ""}),
        call(0, function={"arguments": '{"x":'}),
        call(0, function={"arguments": "1}"}),
        call(1, id="2", function={"name": "g", "arguments": "{}"}),
    ):
        found += events.of(0, [(delta, None)])
    found += events.of(0, [({}, "tool_calls")]) + events.last()
    kinds = [event["type"].removeprefix("response.") for event in found]
    assert kinds == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done"),
        "completed",
    ]
    final = Response.model_validate(found[-1]["response"])
    assert [item.type for item in final.output] == ["message", "function_call", "function_call"]
    assert [(c.call_id, c.name, json.loads(c.arguments)) for c in final.output[1:]] == [
        ("1", "f", {"x": 1}),
        ("2", "g", {}),
    ]
    assert final.usage.output_tokens == 5 and final.status == "completed"
    assert [event["output_index"] for event in found if "output_index" in event][-1] == 2


def test_a_failure_in_the_middle_is_an_event() -> None:
    events = responses_api.Events(request(stream=True), Chunks())  # type: ignore[arg-type]
    events.first()
    (failed,) = events.failed(APIError(500, "the engine has failed", code="engine_failed"))
    assert failed["type"] == "response.failed" and failed["response"]["status"] == "failed"
    assert failed["response"]["error"] == {"code": "engine_failed", "message": "the engine has failed"}
