"""OpenAI's Responses API over chat completions: a request becomes one, and its response or chunks become items."""

import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any, Optional

from megatron.dmc.inference import StepOutput
from megatron.dmc.serving.errors import APIError
from megatron.dmc.serving.protocol.responses_api import (
    Content,
    FunctionCallItem,
    FunctionTool,
    Item,
    MessageItem,
    NamedFunction,
    ResponsesRequest,
)
from megatron.dmc.serving.responses import Chunks


def chat_body(request: ResponsesRequest) -> dict[str, Any]:
    """Body of the chat completion that a request asks for."""
    body: dict[str, Any] = {"messages": list(_messages(request)), "stream": request.stream, "model": request.model}
    for name in ("temperature", "top_p", "parallel_tool_calls"):
        body[name] = getattr(request, name)
    body["max_completion_tokens"] = request.max_output_tokens
    if "message.output_text.logprobs" in (request.include or ()):
        body |= {"logprobs": True, "top_logprobs": request.top_logprobs}
    if request.stream:
        body["stream_options"] = {"include_usage": True}
    if request.tools:
        body["tools"] = [_tool(tool) for tool in request.tools]
        choice = request.tool_choice
        named = isinstance(choice, NamedFunction)
        body["tool_choice"] = {"type": "function", "function": {"name": choice.name}} if named else choice
    if request.text and request.text.format:
        kind, schema = request.text.format.get("type"), dict(request.text.format)
        schema.pop("type", None)
        body["response_format"] = {"type": kind, **({"json_schema": schema} if kind == "json_schema" else schema)}
    return {name: value for name, value in body.items() if value is not None}


def _tool(tool: FunctionTool) -> dict[str, Any]:
    function = tool.model_dump(exclude={"type"}, exclude_none=True)
    return {"type": "function", "function": function}


def _messages(request: ResponsesRequest) -> Iterator[dict[str, Any]]:
    """Messages of the chat. Function calls that follow each other or a text of the assistant are one message."""
    if request.instructions:
        yield {"role": "system", "content": request.instructions}
    if isinstance(request.input, str):
        yield {"role": "user", "content": request.input}
        return
    assistant: Optional[dict[str, Any]] = None
    for item in request.input:
        message = _message(item)
        if isinstance(item, FunctionCallItem) and assistant is not None:
            assistant.setdefault("tool_calls", []).extend(message["tool_calls"])
            continue
        if assistant is not None:
            yield assistant
        assistant = message if message["role"] == "assistant" else None
        if assistant is None:
            yield message
    if assistant is not None:
        yield assistant


def _message(item: Item) -> dict[str, Any]:
    if isinstance(item, MessageItem):
        return {"role": "system" if item.role == "developer" else item.role, "content": _content(item.content)}
    if isinstance(item, FunctionCallItem):
        function = {"name": item.name, "arguments": item.arguments}
        call = {"id": item.call_id, "type": "function", "function": function}
        return {"role": "assistant", "content": "", "tool_calls": [call]}
    return {"role": "tool", "tool_call_id": item.call_id, "content": _content(item.output)}


def _content(content: Content) -> Any:
    if isinstance(content, str):
        return content
    return [{"type": "text", "text": part.text} for part in content]


# ---------------------------------------------------------------------------------------------------- whole responses


def response(request: ResponsesRequest, chat: dict[str, Any]) -> dict[str, Any]:
    """A ``response`` object from the chat completion that was made for the request."""
    choice = chat["choices"][0]
    items = []
    message = choice["message"]
    logprobs = (choice.get("logprobs") or {}).get("content") or []
    if message["content"] or not message.get("tool_calls"):
        items.append(_message_item(new_id("msg"), message["content"] or "", logprobs, _status(choice)))
    items += [_call_item(new_id("fc"), call, "completed") for call in message.get("tool_calls") or ()]
    return _response(request, chat, choice["finish_reason"], items, chat["usage"])


def new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def _status(choice: dict[str, Any]) -> str:
    return "incomplete" if choice["finish_reason"] == "length" else "completed"


def _text_part(text: str, logprobs: list[Any]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _message_item(item_id: str, text: Optional[str], logprobs: list[Any], status: str) -> dict[str, Any]:
    content = [] if text is None else [_text_part(text, logprobs)]
    return {"id": item_id, "type": "message", "role": "assistant", "status": status, "content": content}


def _call_item(item_id: str, call: dict[str, Any], status: str) -> dict[str, Any]:
    function = call["function"]
    item = {"id": item_id, "type": "function_call", "status": status, "call_id": call["id"]}
    return {**item, "name": function["name"], "arguments": function["arguments"]}


def _response(
    request: ResponsesRequest,
    chat: dict[str, Any],
    finish_reason: Optional[str],
    items: list[dict[str, Any]],
    usage: Optional[dict[str, Any]],
) -> dict[str, Any]:
    """A ``response`` object.

    Args:
        chat: any object of the chat completion, for its id, time and model.
        finish_reason, usage: None while the response is being generated.
    """
    cut = finish_reason == "length"
    settings = request.model_dump(by_alias=True, exclude_none=True)
    return {
        "id": "resp_" + chat["id"].removeprefix("chatcmpl-"),
        "object": "response",
        "created_at": chat["created"],
        "status": "in_progress" if finish_reason is None else "incomplete" if cut else "completed",
        "completed_at": None if finish_reason is None else int(time.time()),
        "background": False,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "model": chat["model"],
        "output": items,
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": False,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "text": {"format": {"type": "text"}, **settings.get("text", {})},
        "tool_choice": settings.get("tool_choice", "auto"),
        "tools": settings.get("tools", []),
        "top_logprobs": request.top_logprobs or 0,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "truncation": "disabled",
        "usage": usage and _usage(usage),
        "user": request.user,
    }


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
        "dmc": usage.get("dmc"),
    }


# ------------------------------------------------------------------------------------------------- events of a stream


class Events:
    """Events of one streamed response, from the chunks of the chat completion that was made for the request.

    Every output item is announced, filled and closed before the next one begins, as OpenAI's server does it.
    """

    END = ""

    def __init__(self, request: ResponsesRequest, chunks: Chunks) -> None:
        self.request, self._chunks = request, chunks
        self._items: list[dict[str, Any]] = []
        self._open: Optional[dict[str, Any]] = None
        """Item that is being filled, the last of ``_items``."""
        self._call: Optional[int] = None
        """Number of the tool call that is being filled, in the chat completion's count."""
        self._head: Optional[dict[str, Any]] = None
        self._finish_reason: Optional[str] = None
        self._usage: Optional[dict[str, Any]] = None
        self._sequence = 0

    def first(self) -> list[dict[str, Any]]:
        """Events before any token."""
        return self._of(self._chunks.first())

    def of(self, prompt: int, output: StepOutput) -> list[dict[str, Any]]:
        """Events of one output."""
        return self._of(self._chunks.of(prompt, output))

    def text_frame(self, prompt: int, output: StepOutput) -> Optional[str]:
        """Events are numbered, so they differ in more than their text."""
        return None

    def last(self) -> list[dict[str, Any]]:
        """Events of the end: the open item and the response itself."""
        events = self._of(self._chunks.last())
        if not self._items:
            events += self._begin_text()
        events += self._close()
        response = self._response()
        return [*events, self._event(f"response.{response['status']}", response=response)]

    def failed(self, error: APIError) -> list[dict[str, Any]]:
        """Event of a failure after the first token."""
        cause = {"code": error.code or "server_error", "message": error.message}
        return [self._event("response.failed", response=self._response() | {"status": "failed", "error": cause})]

    def event_name(self, event: dict[str, Any]) -> str:
        """Events are named by their type."""
        return event["type"]

    def _of(self, chunks: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        for chunk in chunks:
            if self._head is None:
                self._head = chunk
                for kind in ("response.created", "response.in_progress"):
                    events.append(self._event(kind, response=self._response()))
            self._usage = chunk.get("usage") or self._usage
            for choice in chunk["choices"]:
                events += self._of_choice(choice)
        return events

    def _of_choice(self, choice: dict[str, Any]) -> Iterator[dict[str, Any]]:
        delta = choice["delta"]
        logprobs = (choice.get("logprobs") or {}).get("content") or []
        self._finish_reason = choice.get("finish_reason") or self._finish_reason
        if text := delta.get("content"):
            if self._open is None or self._open["type"] != "message":
                yield from self._close()
                yield from self._begin_text()
            part = self._open["content"][0]
            part["text"] += text
            part["logprobs"] += logprobs
            yield self._event(
                "response.output_text.delta", **self._here(), content_index=0, delta=text, logprobs=logprobs
            )
        for call in delta.get("tool_calls") or ():
            if self._call != call["index"]:
                yield from self._close()
                yield from self._begin_call(call)
            if arguments := call["function"].get("arguments"):
                self._open["arguments"] += arguments
                yield self._event("response.function_call_arguments.delta", **self._here(), delta=arguments)

    def _begin_text(self) -> Iterator[dict[str, Any]]:
        self._add(_message_item(new_id("msg"), None, [], "in_progress"))
        yield self._item_event("response.output_item.added")
        self._open["content"] = [_text_part("", [])]
        yield self._event("response.content_part.added", **self._here(), content_index=0, part=_text_part("", []))

    def _begin_call(self, call: dict[str, Any]) -> Iterator[dict[str, Any]]:
        function = {"name": call["function"]["name"], "arguments": ""}
        self._call = call["index"]
        self._add(_call_item(new_id("fc"), {"id": call["id"], "function": function}, "in_progress"))
        yield self._item_event("response.output_item.added")

    def _add(self, item: dict[str, Any]) -> None:
        self._open = item
        self._items.append(item)

    def _close(self) -> list[dict[str, Any]]:
        """Events that close the open item, if there is one."""
        if self._open is None:
            return []
        item = self._open
        item["status"] = "incomplete" if self._finish_reason == "length" else "completed"
        if item["type"] == "message":
            part, here = dict(item["content"][0]), {**self._here(), "content_index": 0}
            said = {"text": part["text"], "logprobs": part["logprobs"]}
            events = [
                self._event("response.output_text.done", **here, **said),
                self._event("response.content_part.done", **here, part=part),
            ]
        else:
            said = {"name": item["name"], "arguments": item["arguments"]}
            events = [self._event("response.function_call_arguments.done", **self._here(), **said)]
        events.append(self._item_event("response.output_item.done"))
        self._open = self._call = None
        return events

    def _response(self) -> dict[str, Any]:
        assert self._head is not None
        return _response(self.request, self._head, self._finish_reason, list(self._items), self._usage)

    def _event(self, kind: str, **content: Any) -> dict[str, Any]:
        event = {"type": kind, "sequence_number": self._sequence, **content}
        self._sequence += 1
        return event

    def _here(self) -> dict[str, Any]:
        """Place of the open item in the response."""
        return {"item_id": self._open["id"], "output_index": len(self._items) - 1}

    def _item_event(self, kind: str) -> dict[str, Any]:
        """Event with the open item as it is now."""
        return self._event(kind, output_index=len(self._items) - 1, item=dict(self._open))
