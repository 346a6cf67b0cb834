"""Tools over HTTP: calls that are required, named or the model's own choice, streamed or whole, and their way back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.serving import CHAT, COMPLETIONS, Running, client
from helpers.structured import make_model

from megatron.dmc.cli import main
from megatron.dmc.serving.config import ServerConfig
from megatron.dmc.serving.prompts import PromptSettings

pytest.importorskip("llguidance")
TEMPLATE = (
    "{{ bos_token }}{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{% for m in messages %}{{ m.role }}:"
    "{{ m.content }}{% for c in m.tool_calls or [] %}({{ c.function.name }} {{ c.function.arguments.a }}){% endfor %}"
    "{% if m.tool_call_id %}#{{ m.tool_call_id }}{% endif %};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
SMALL = {"$defs": {"x": {"enum": [1, 2]}}, "type": "object", "properties": {"a": {"$ref": "#/$defs/x"}}}
SMALL |= {"required": ["a"], "additionalProperties": False}
OTHER = {**SMALL, "$defs": {"x": {"enum": ["ab", "the"]}}}
TOOLS = [
    {"type": "function", "function": {"name": "get", "description": "Gets.", "parameters": SMALL, "strict": True}},
    {"type": "function", "function": {"name": "put", "parameters": OTHER}},
    {"type": "function", "function": {"name": "stop-it"}},
]
BODY = {"messages": [{"role": "user", "content": "ab"}], "tools": TOOLS, "seed": 1, "max_tokens": 200}
NAMED = {"type": "function", "function": {"name": "put"}}
VALUES = {"get": (1, 2), "put": ("ab", "the")}
WRITTEN = 'I look. <tool_call>\n{"name": "get", "arguments": {"a": 2}}\n</tool_call>'
TWICE = WRITTEN + '\n<tool_call>{"name": "stop-it", "arguments": {}}</tool_call>'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return SimpleNamespace(path=make_model(tmp_path_factory.mktemp("server") / "m", template=TEMPLATE))


@pytest.fixture(scope="module")
def server(model: SimpleNamespace) -> Iterator[Running]:
    with Running(model.path, load_format="dummy") as running:
        running.service.prompts.settings = PromptSettings(tool_call_parser="hermes")
        yield running


def written(text: str, **more: object) -> dict:
    """A request whose completion is ``text``."""
    return BODY | {"structured_outputs": {"choice": [text]}, **more}


def streamed(server: Running, body: dict) -> dict:
    """The choice that the chunks of a stream add up to."""
    content, calls, reason = "", [], None
    for chunk in server.events(CHAT, body):
        (choice,) = chunk["choices"]
        content += choice["delta"].get("content") or ""
        for call in choice["delta"].get("tool_calls") or ():
            if call["index"] == len(calls):
                calls.append({"id": call["id"], "type": call["type"], "function": {"name": "", "arguments": ""}})
            for key, piece in call["function"].items():
                calls[call["index"]]["function"][key] += piece
        reason = choice["finish_reason"] or reason
    return {"content": content, "calls": calls, "finish_reason": reason}


def check_call(call: dict) -> None:
    name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
    assert call["id"].startswith("call_") and call["type"] == "function"
    assert arguments == {} if name == "stop-it" else arguments["a"] in VALUES[name]


@pytest.mark.parametrize("parallel", [None, False])
def test_required(server: Running, parallel: bool | None) -> None:
    """Calls of the given tools only, whose arguments follow their schemas; each schema has its own $defs."""
    body = BODY | {"tool_choice": "required", "parallel_tool_calls": parallel, "max_tokens": 300}
    found = [c for seed in (0, 3) for c in server.json(CHAT, body | {"seed": seed, "n": 3})["choices"]]
    ended = [choice for choice in found if choice["finish_reason"] == "tool_calls"]
    assert len(ended) >= 3 and {choice["finish_reason"] for choice in found} <= {"tool_calls", "length"}
    calls = [choice["message"]["tool_calls"] for choice in ended]
    assert all(choice["message"]["content"] is None for choice in ended)
    for call in (call for several in calls for call in several):
        check_call(call)
    assert len({call["id"] for several in calls for call in several}) == sum(map(len, calls))
    assert max(map(len, calls)) == 1 if parallel is False else max(map(len, calls)) >= 1


def test_a_named_function(server: Running) -> None:
    body = BODY | {"tool_choice": NAMED}
    choice = server.json(CHAT, body)["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "put" and choice["finish_reason"] == "stop"
    check_call(call)


@pytest.mark.parametrize("choice", ["required", NAMED, "auto", None])
def test_a_stream_is_the_whole_response(server: Running, choice: object) -> None:
    body = BODY if choice not in ("auto", None) else written(TWICE)
    body = body | {"tool_choice": choice, "logprobs": True}
    whole, parts = server.json(CHAT, body)["choices"][0], streamed(server, body)
    wanted = whole["message"]
    assert parts["content"] == (wanted["content"] or "") and parts["finish_reason"] == whole["finish_reason"]
    assert [c["function"] for c in parts["calls"]] == [c["function"] for c in wanted["tool_calls"]] != []


def test_auto(server: Running) -> None:
    """Calls that the model writes among text; only the first one with parallel_tool_calls: false."""
    choice = server.json(CHAT, written(TWICE))["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "I look. "
    functions = [call["function"] for call in choice["message"]["tool_calls"]]
    assert functions == [{"name": "get", "arguments": '{"a": 2}'}, {"name": "stop-it", "arguments": "{}"}]
    one = server.json(CHAT, written(TWICE, parallel_tool_calls=False))["choices"][0]["message"]["tool_calls"]
    assert [call["function"] for call in one] == functions[:1]
    assert len(streamed(server, written(TWICE, parallel_tool_calls=False))["calls"]) == 1
    plain = server.json(CHAT, written("the cat"))["choices"][0]
    assert plain["message"] == {"role": "assistant", "content": "the cat", "refusal": None}
    assert plain["finish_reason"] == "stop"
    cut = server.json(CHAT, written(WRITTEN, max_tokens=40))["choices"][0]
    assert cut["finish_reason"] == "length" and cut["message"]["tool_calls"][0]["function"]["name"] == "get"


def test_none_calls_nothing(server: Running) -> None:
    choice = server.json(CHAT, written(WRITTEN, tool_choice="none"))["choices"][0]
    assert choice["message"]["content"] == WRITTEN and "tool_calls" not in choice["message"]


def prompt_of(server: Running, body: dict) -> str:
    tokens = server.json("/tokenize", {key: body[key] for key in ("messages", "tools") if key in body})["tokens"]
    return server.json("/detokenize", {"tokens": tokens})["prompt"]


def test_the_chat_template_sees_tools_calls_and_results(server: Running) -> None:
    assert prompt_of(server, BODY) == "<s>[get][put][stop-it]user:ab;a:"
    sent = server.json(CHAT, written(WRITTEN))["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": sent["tool_calls"][0]["id"], "content": "sun"}
    messages = [*BODY["messages"], sent, result]
    wanted = f"user:ab;assistant:I look. (get 2);tool:sun#{result['tool_call_id']};a:"
    assert prompt_of(server, BODY | {"messages": messages}) == "<s>[get][put][stop-it]" + wanted
    assert prompt_of(server, {"messages": messages}) == "<s>" + wanted
    usage = server.json(CHAT, BODY | {"messages": messages, "tool_choice": "none"})["usage"]
    assert usage["prompt_tokens"] == server.json("/tokenize", {"messages": messages})["count"]
    odd = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{no"}}]}
    assert "(f )" in prompt_of(server, {"messages": [*BODY["messages"], odd]})


def test_openai_client_round_trip(server: Running) -> None:
    openai, asked = client(server), {key: BODY[key] for key in ("tools", "seed", "max_tokens")}
    messages: list = list(BODY["messages"])
    more = {"structured_outputs": {"choice": [WRITTEN]}}
    made = openai.chat.completions.create(model="m", messages=messages, extra_body=more, **asked)
    (call,) = made.choices[0].message.tool_calls
    messages += [made.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "sun"}]
    with openai.chat.completions.stream(model="m", messages=messages, tool_choice=NAMED, **asked) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "stop"
    assert json.loads(final.message.tool_calls[0].function.arguments)["a"] in VALUES["put"]


def without(**changes: object) -> list:
    function = {**TOOLS[0]["function"], **changes}
    return [{"type": "function", "function": {key: value for key, value in function.items() if value is not ...}}]


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice.function.name"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tools": None, "tool_choice": NAMED}, "tool_choice.function.name"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": without(name=...)}, "tools[0].function.name"),
        ({"tools": without(name="a b")}, "tools[0].function.name"),
        ({"tools": without(x=1)}, "tools[0].function.x"),
        ({"tools": without(parameters={"not": {}}), "tool_choice": "required"}, "tools"),
        ({"tools": TOOLS * 50}, "tools"),
    ],
)
def test_refusals(server: Running, more: dict, param: str) -> None:
    error = server.json(CHAT, BODY | more, 400)["error"]
    assert error["param"] == param and param in error["message"], error


def test_completions_have_no_tools(server: Running) -> None:
    error = server.json(COMPLETIONS, {"prompt": "ab", "tools": TOOLS}, 400)["error"]
    assert error["param"] == "tools" and error["code"] == "unsupported_parameter"


def test_auto_needs_its_flags(server: Running) -> None:
    settings = server.service.prompts.settings
    server.service.prompts.settings = PromptSettings()
    try:
        for body in (BODY, BODY | {"tool_choice": "auto"}):
            error = server.json(CHAT, body, 400)["error"]
            assert error["param"] == "tool_choice" and "--enable-auto-tool-choice" in error["message"]
        assert server.json(CHAT, BODY | {"tool_choice": NAMED})["choices"][0]["message"]["tool_calls"]
    finally:
        server.service.prompts.settings = settings
    with pytest.raises(ValueError, match="--enable-auto-tool-choice needs --tool-call-parser"):
        ServerConfig("m", enable_auto_tool_choice=True).auto_tool_call_parser()
    assert ServerConfig("m", tool_call_parser="mistral").auto_tool_call_parser() is None


def test_batch(model: SimpleNamespace, tmp_path: Path) -> None:
    """The same line gets the same calls, with the same ids."""
    lines = [written(WRITTEN), BODY | {"tool_choice": NAMED}]
    (tmp_path / "in").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = []
    for name in ("one", "two"):
        arguments = ["-i", str(tmp_path / "in"), "-o", str(tmp_path / name), "--model", model.path, "--disable-tqdm"]
        flags = ["--load-format", "dummy", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
        assert main(["batch", *arguments, *flags]) == 0
        rows = sorted(map(json.loads, (tmp_path / name).read_text().splitlines()), key=lambda row: row["custom_id"])
        found.append([row["response"]["body"]["choices"][0]["message"]["tool_calls"] for row in rows])
    assert found[0] == found[1] and [calls[0]["function"]["name"] for calls in found[0]] == ["get", "put"]
