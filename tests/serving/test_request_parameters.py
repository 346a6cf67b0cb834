"""Every parameter of every request: it has a description, and each wrong value gets a 400 that names it.

The parameters come from the request models, so a new one is tested as soon as it is there: with values of every JSON
type that it does not have, and with those of ``WRONG_VALUES``, where it must be listed.
"""

from __future__ import annotations

import copy
import json
import re
import reprlib
import typing
from collections.abc import Iterator
from typing import Any

import pytest
from helpers.engines import Model
from helpers.serving import CHAT, COMPLETIONS, Running
from pydantic import BaseModel, ValidationError

from megatron.dmc.serving import protocol
from megatron.dmc.serving.async_engine import Limits
from megatron.dmc.serving.errors import APIError
from megatron.dmc.serving.prompts import PromptSettings

MESSAGE = {"role": "user", "content": [{"type": "text", "text": "hi"}], "name": "me"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}, "index": 0}
CALLING = MESSAGE | {"tool_calls": [CALL], "tool_call_id": "1"}
FUNCTION = {"name": "f", "description": "Does it.", "parameters": {}, "strict": True}
TOOLS = {"tools": [{"type": "function", "function": FUNCTION}]}
OPTIONS = {"stream": True, "stream_options": {"include_usage": True, "include_cache": True}}
REQUESTS: dict[str, tuple[str, type[BaseModel], dict[str, Any]]] = {
    "completion": (
        COMPLETIONS,
        protocol.CompletionRequest,
        {"prompt": "hi", "max_tokens": 2, "echo": True, "response_format": {"type": "text"}} | OPTIONS,
    ),
    "chat": (
        CHAT,
        protocol.ChatCompletionRequest,
        {"messages": [CALLING], "logprobs": True, "response_format": {"type": "text"}, "tool_choice": "none"}
        | OPTIONS
        | TOOLS,
    ),
    "tokenize": ("/tokenize", protocol.TokenizeRequest, {"prompt": "hi"}),
    "tokenize a chat": ("/tokenize", protocol.TokenizeChatRequest, {"messages": [CALLING]} | TOOLS),
    "detokenize": ("/detokenize", protocol.DetokenizeRequest, {"tokens": [1]}),
}
CANDIDATES = ["x", 7, -7, 1.5, 10**30, True, None, [], {}, ["x"], [1.5], [[1], "x"], {"x": "y"}, [{"x": 1}]]
"""Values of every JSON type, some of which are wrong for any parameter."""
LONG = "a" * 5000
WRONG_VALUES: dict[str, list[Any]] = {
    "model": ["another"],
    "n": [0, -1, 129],
    "temperature": [-0.1, -(10**20)],
    "top_p": [0, -0.1, 1.1],
    "top_k": [-2, 2**31],
    "min_p": [-0.1, 1.1],
    "presence_penalty": [-2.1, 2.1],
    "frequency_penalty": [-2.1, 2.1],
    "repetition_penalty": [0, -1],
    "logit_bias": [{"x": 1}, {"-1": 1}, {"1.5": 1}, {"61": 1}, {"1": 101}, {"1": -101}, {"9" * 30: 1}],
    "stop": [[""], ["a", ""]],
    "stop_token_ids": [[-1], [61]],
    "min_tokens": [-1, 3],
    "max_tokens": [-1],
    "max_completion_tokens": [-1],
    "bad_words": [[""], [" "]],
    "allowed_token_ids": [[61], [-1], [0, 61]],
    "prompt_logprobs": [1, 101, -1],
    "truncate_prompt_tokens": [0, -2],
    "cache_salt": ["x" * 1025],
    "chat_template": ["{{ 1 }}"],
    "logprobs": [-1, 101],
    "top_logprobs": [-1, 101],
    "prompt": [[], [[]], [61], [-1], [[1], [61]], LONG, "\ud800", [1] * 300],
    "tokens": [[61], [-1]],
    "structured_outputs": [{"regex": "a", "choice": ["b"]}],
    "guided_json": [{"not": {}}, "{"],
    "guided_regex": ["("],
    "guided_grammar": ["("],
    "tool_choice": ["any"],
    "tools[0].function.name": ["", "a b", "a" * 129],
    "messages": [[MESSAGE | {"content": LONG}], [MESSAGE | {"content": "\ud800"}], [MESSAGE | {"role": "nobody"}]],
    "continue_final_message": [True],
    "chat_template_kwargs": [{"tokenize": True}, {"chat_template": "x"}],
}
"""Values of the right type that are wrong, on a model of 61 tokens and a context length of 256."""
ANY_VALUE = {"seed", "user", "stream_options", "response_format", "messages[0].content", "messages[0].content[0].text"}
ANY_VALUE |= {"messages[0].role", "messages[0].name", "messages[0].content[0].type", "response_format.type"}
ANY_VALUE |= {"messages[0].reasoning_content", "messages[0].reasoning", "messages[0].annotations"}
ANY_VALUE |= {"messages[0].content[0].prompt_cache_breakpoint", "metadata", "safety_identifier", "prompt_cache_key"}
ANY_VALUE |= {"guided_choice", "guided_whitespace_pattern", "response_format.json_schema"}
ANY_VALUE |= {f"tools[0].{name}" for name in ("type", "function", "function.description", "function.parameters")}
ANY_VALUE |= {
    f"messages[0].{name}" for name in ("tool_calls", "tool_call_id", "tool_calls[0].id", "tool_calls[0].type")
}
ANY_VALUE |= {
    f"messages[0].tool_calls[0].{name}" for name in ("index", "function", "function.name", "function.arguments")
}
ANY_VALUE |= {"tools"}
ANY_VALUE |= {"request_id", "session_id", "prompt_cache_options", "documents", "truncation_side"}
"""Parameters that take every value of their type, as booleans do, or fail with the whole prompt."""


def nested(annotation: Any) -> tuple[str, type[BaseModel] | None]:
    """(index, model) of the request model inside a field's type."""
    models = protocol.models_in(annotation) if "NamedTool" not in str(annotation) else []
    return ("[0]" if "list[" in str(annotation) else ""), (models[0] if models else None)


def parameters(model: type[BaseModel], before: str = "") -> Iterator[tuple[str, Any]]:
    """(path, field) of every parameter, such as ``messages[0].content[0].text``."""
    for name, field in model.model_fields.items():
        yield before + name, field
        index, inner = nested(field.annotation)
        if inner is not None:
            yield from parameters(inner, f"{before}{name}{index}.")


def change(body: dict[str, Any], path: str, value: Any = None, remove: bool = False) -> dict[str, Any]:
    """A copy of the body with another value at a path, or none."""
    body = copy.deepcopy(body)
    *outer, last = re.findall(r"\w+", path)
    inner: Any = body
    for part in outer:
        inner = inner[int(part) if part.isdigit() else part]
    if remove:
        del inner[last]
    else:
        inner[last] = value
    return body


def is_wrong(model: type[BaseModel], body: dict[str, Any]) -> bool:
    try:
        model.model_validate(body)
    except ValidationError:
        return True
    return False


def refused(server: Running, path: str, body: dict[str, Any], param: str, status: int = 400) -> None:
    error = server.json(path, body, status)["error"]
    told = f"{str(body)[:300]}: {error}"
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error", told
    assert error["param"] == param and param in error["message"] and len(error["message"]) < 1000, told


def wanted_param(path: str, value: Any) -> str:
    """Parameter that is wrong when ``value`` stands at a path that does not take its type."""
    objects = {"stream_options": None, "response_format": "type", "tool_choice": "type"}
    objects |= {"tools[0].function": "name", "messages[0].tool_calls[0].function": "name"}
    if isinstance(value, dict):
        member = next(iter(value), objects.get(path))
        return path if path not in objects or member is None else f"{path}.{member}"
    if value == [{"x": 1}] and path in ("messages", "messages[0].content", "tools", "messages[0].tool_calls"):
        return path + "[0].x"
    return path


@pytest.mark.parametrize("kind", REQUESTS)
def test_a_value_of_the_wrong_type(server: Running, kind: str) -> None:
    path, model, good = REQUESTS[kind]
    assert not is_wrong(model, good)
    for name, _ in parameters(model):
        wrong = [value for value in CANDIDATES if is_wrong(model, change(good, name, value))]
        assert wrong, f"{name} takes anything"
        for value in wrong:
            refused(server, path, change(good, name, value), wanted_param(name, value))


@pytest.mark.parametrize("kind", REQUESTS)
def test_a_wrong_value_of_the_right_type(server: Running, kind: str) -> None:
    path, model, good = REQUESTS[kind]
    for name, field in parameters(model):
        values = WRONG_VALUES.get(name)
        if "bool" in str(field.annotation) and (name != "continue_final_message"):
            continue
        if values is None:
            assert name in ANY_VALUE, f"{name} is new: give WRONG_VALUES of it"
            continue
        if kind == "tokenize" and name == "prompt":
            values = [LONG, "\ud800"]
        for value in values:
            more = {"min_tokens": {"max_tokens": 2}, "top_logprobs": {"logprobs": True}}.get(name, {})
            refused(server, path, change(good | more, name, value), name, 404 if name == "model" else 400)


@pytest.mark.parametrize("kind", REQUESTS)
def test_an_unknown_and_a_missing_parameter(server: Running, kind: str) -> None:
    path, model, good = REQUESTS[kind]
    names = [name for name, _ in parameters(model) if nested(_.annotation)[1]]
    for before in ("", *(name + nested(dict(parameters(model))[name].annotation)[0] + "." for name in names)):
        refused(server, path, change(good, before + "colour", 1), before + "colour")
    for name, field in parameters(model):
        if field.is_required() and name != "messages":  # a body without messages is another request for /tokenize
            refused(server, path, change(good, name, remove=True), name)


NOT_EMPTY = [("response_format", {}), ("guided_json", {})]
"""Empty values that ask for something: an object of no type, and any JSON."""


@pytest.mark.parametrize("kind", REQUESTS)
def test_null_and_empty_values_ask_for_nothing(brief: Running, kind: str) -> None:
    """The response is that of the request without the parameter, but for what differs in all responses."""
    path, model, good = REQUESTS[kind]
    good = {name: value for name, value in good.items() if name not in OPTIONS}
    good |= {"max_tokens": 1, "temperature": 0} if "max_tokens" in model.model_fields else {}

    def answer(body: dict[str, Any]) -> Any:
        found = brief.json(path, body)
        return found.get("choices", found)

    for name, field in parameters(model):
        if field.is_required() or "." in name or name in ("max_tokens", "temperature", "messages"):
            continue
        wanted = answer({key: value for key, value in good.items() if key != name})
        for value in (None, "", [], {}):
            if (name, value) not in NOT_EMPTY and not is_wrong(model, change(good, name, value)):
                assert answer(change(good, name, value)) == wanted, (name, value)


@pytest.mark.parametrize("kind", REQUESTS)
def test_null_stands_for_a_parameter_that_is_left_out(kind: str) -> None:
    _, model, good = REQUESTS[kind]
    for name, field in parameters(model):
        assert is_wrong(model, change(good, name)) == field.is_required(), name


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": [value]}
    return value


EXTREMES = [
    *(2**63 - 1, -(2**63), 2**63, 10**400, 1e308, -0.0, 16.0, "\0", "\ud800", "a" * 20000, [""], ["\0"] * 60),
    *([0] * 5000, [[0]] * 500, [None] * 5000, [{}] * 500, deep(40), [deep(40)], {str(n): n for n in range(2000)}),
]
"""Values at the ends of what JSON can say, of which a parameter may take some."""
PYDANTIC = re.compile(r"Input should|function-|\blist\[|constrained|union|validation|\bbody\.|\bstr\b|\bNone\b")
"""Words and paths of the library that checks types."""


@pytest.fixture(scope="module")
def brief(model: Model) -> Iterator[Running]:
    """A server whose longest completion takes no time."""
    with Running(model.path, max_model_len=24, prompt_settings=PromptSettings(tool_call_parser="hermes")) as running:
        yield running


RESPONSES = ("/v1/responses", protocol.ResponsesRequest, {"input": "hi", "max_output_tokens": 1})
"""Its items are those of tests/serving/test_responses_api.py; only the outermost parameters are walked here."""


@pytest.mark.parametrize("kind", [*REQUESTS, "responses"])
def test_extremes(brief: Running, kind: str) -> None:
    """Each is taken, or refused by the name of the parameter and in plain words, and the server goes on."""
    path, model, good = REQUESTS.get(kind, RESPONSES)
    good = {name: value for name, value in good.items() if name not in OPTIONS}
    good |= {"max_tokens": 1} if "max_tokens" in model.model_fields else {}
    names = [name for name, _ in parameters(model) if kind in REQUESTS or "." not in name]
    for name in names:
        for value in EXTREMES if not name.startswith("stream") else ():
            body = change(good, name, value)
            if is_wrong(model, body):  # over HTTP it is in test_a_value_of_the_wrong_type
                with pytest.raises(APIError) as refusal:
                    protocol.parse(model, body)
                status, error = refusal.value.status, refusal.value.body()["error"]
            else:
                status, _, text = brief.ask(path, body)
                error = json.loads(text).get("error")
            told = f"{name} {reprlib.repr(value)}: {error}"
            assert status in (200, 400) or (name, status) == ("model", 404), told
            if status != 200:
                outermost = {re.split(r"[.\[]", name)[0]} | ({"input"} if name == "instructions" else set())
                assert re.split(r"[.\[]", error["param"])[0] in outermost, told
                assert len(error["message"]) < 1500 and not PYDANTIC.search(error["message"]), told
    brief.json(path, good)


def test_every_parameter_of_openais_client_is_known() -> None:
    """Those of the pinned release: implemented, ignored as notes, or in the table of what is not supported."""
    from openai.types import chat, completion_create_params
    from openai.types.chat import completion_create_params as chat_create_params

    def hints(*types: Any) -> set[str]:
        return {name for kind in types for name in typing.get_type_hints(kind)}

    roles = [getattr(chat, name) for name in vars(chat) if re.fullmatch(r"ChatCompletion[A-Z][a-z]+MessageParam", name)]
    parts = [getattr(chat, name) for name in vars(chat) if re.fullmatch(r"ChatCompletionContentPart\w+Param", name)]
    assert len(roles) == 6 and len(parts) > 3
    for model, names in (
        (protocol.ChatCompletionRequest, hints(chat_create_params.CompletionCreateParamsStreaming)),
        (protocol.CompletionRequest, hints(completion_create_params.CompletionCreateParamsStreaming)),
        (protocol.StreamOptions, hints(chat.ChatCompletionStreamOptionsParam)),
        (protocol.Message, hints(*roles)),
        (protocol.Message, set(chat.ChatCompletionMessage.model_fields)),
        (protocol.ContentPart, hints(*(part for part in parts if "Union" not in str(part)))),
    ):
        assert names and not names - set(model.model_fields) - set(model.unsupported), model


PLACES = [""] + ["stream_options.", "response_format.", "messages[0].", "messages[0].content[0]."]
ASKS = ["x", 7, -7, True, False, ["x"], {"x": "y"}]
"""Values of which each parameter that is not supported takes some at most."""


def unsupported(model: type[BaseModel]) -> Iterator[tuple[str, protocol.dialect.Unsupported]]:
    """(path, entry) of every parameter of other servers that a request may hold, at every depth."""
    fields = dict(parameters(model))
    for before in PLACES:
        outer = before.removesuffix(".").removesuffix("[0]")
        at = model if not before else nested(fields[outer].annotation)[1] if outer in fields else None
        names = (set(at.unsupported) - set(at.model_fields)) if at is not None else ()
        yield from ((before + name, at.unsupported[name]) for name in sorted(names))


@pytest.mark.parametrize("kind", ["completion", "chat", "tokenize a chat"])
def test_a_parameter_of_another_server(kind: str) -> None:
    """Taken where it asks for nothing; refused by name, as not supported, where it asks for something."""
    _, model, good = REQUESTS[kind]
    found = list(unsupported(model))
    assert found
    for path, entry in found:
        for value in [None, *entry.neutral, *(["", [], {}] if entry.empty else [])]:
            assert not is_wrong(model, change(good, path, value)), (path, value)
        asks = [value for value in ASKS if not entry.asks_for_nothing(value)]
        assert len(asks) >= 5, path
        for value in asks:
            with pytest.raises(APIError) as refusal:
                protocol.parse(model, change(good, path, value))
            error = refusal.value
            assert (error.status, error.param, error.code) == (400, path, "unsupported_parameter"), error.message
            assert error.message.startswith(f"{path} is not supported"), error.message


def test_a_value_that_only_other_servers_take(server: Running) -> None:
    for kind, path in (("chat", "messages[0].content[0].type"), ("chat", "response_format.type")):
        url, _, good = REQUESTS[kind]
        entry = (protocol.ResponseFormat if "format" in path else protocol.ContentPart).unsupported["type"]
        for value in entry.values:
            refused(server, url, change(good, path, value), path)
            assert "not supported" in server.json(url, change(good, path, value), 400)["error"]["message"]
        refused(server, url, change(good, path, "x"), path)


@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_all_that_asks_for_nothing_at_once(server: Running, kind: str) -> None:
    """The response is that of the request without it."""
    path, model, _ = REQUESTS[kind]
    body = {"max_tokens": 2, "temperature": 0} | ({"prompt": "hi"} if kind == "completion" else {"messages": [MESSAGE]})
    more = {name: next(iter(entry.neutral), None) for name, entry in unsupported(model) if "." not in name}
    more |= {"user": "", "metadata": {}, "seed": None, "stream_options": {"include_usage": False}, "stream": False}
    more |= {"max_tokens": 2.0, "n": 1.0, "logprobs": None, "return_token_ids": None, "response_format": None}
    more |= {"logprobs": False, "top_logprobs": 0, "parallel_tool_calls": True} if kind == "chat" else {}
    plain, full = server.json(path, body), server.json(path, body | more)
    assert plain["choices"] == full["choices"]


def test_an_assistant_message_comes_back_as_the_server_sent_it(server: Running) -> None:
    body = {"messages": [MESSAGE], "max_tokens": 4, "temperature": 0}
    sent = server.json(CHAT, body)["choices"][0]["message"]
    clients = {"annotations": [], "tool_calls": None, "function_call": None, "audio": None, "reasoning_content": None}
    plain = [MESSAGE, {"role": "assistant", "content": sent["content"]}, MESSAGE]
    wanted = server.json(CHAT, body | {"messages": plain})["choices"]
    for message in (sent, sent | clients, sent | clients | {"tool_calls": []}):
        assert server.json(CHAT, body | {"messages": [MESSAGE, message, MESSAGE]})["choices"] == wanted


def test_parameters_that_need_another(server: Running) -> None:
    chat = {"messages": [MESSAGE]}
    refused(server, COMPLETIONS, {"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options")
    refused(server, CHAT, chat | {"top_logprobs": 2}, "top_logprobs")
    refused(server, CHAT, chat | {"max_completion_tokens": 2, "max_tokens": 9, "min_tokens": 3}, "min_tokens")
    refused(server, COMPLETIONS, {"prompt": "a" * 256}, "prompt")
    refused(server, CHAT, {"messages": [MESSAGE | {"content": "a" * 256}]}, "messages")
    refused(server, CHAT, chat | {"max_completion_tokens": -1, "max_tokens": 1}, "max_completion_tokens")
    refused(server, COMPLETIONS, {"prompt": "a", "prompt_logprobs": 1, "stream": True}, "prompt_logprobs")


def test_more_completions_than_may_wait(model: Model) -> None:
    with Running(model.path, limits=Limits(2, None)) as server:
        refused(server, COMPLETIONS, {"prompt": "a", "n": 3}, "n")
        refused(server, COMPLETIONS, {"prompt": ["a", "b", "c"]}, "prompt")
        refused(server, CHAT, {"messages": [MESSAGE], "n": 3}, "n")


@pytest.mark.parametrize("kind", REQUESTS)
def test_every_parameter_is_described(server: Running, kind: str) -> None:
    """The OpenAPI schema has a sentence for each that stands alone."""
    _, model, _ = REQUESTS[kind]
    schemas = server.json("/openapi.json")["components"]["schemas"]
    models = {model} | {inner for _, field in parameters(model) if (inner := nested(field.annotation)[1])}
    for found in models:
        schema = schemas[found.__name__]
        assert schema["description"] and set(schema["properties"]) == set(found.model_fields)
        for name, entry in schema["properties"].items():
            text = entry.get("description", "")
            assert re.fullmatch(r"[A-Z].{10,}\.", text), (name, text)
            assert not re.match(r"(Of|Those|That|What|Which|By|In|On|From|Behind|Beside|The same|Whether)\b", text)
            assert not re.search(r"\b(answers?|draws?|window|is read)\b", text), (name, text)
