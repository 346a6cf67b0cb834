"""Messages and deltas of chats with tools, from the text that the model writes."""

import hashlib
from typing import Any, Optional

from megatron.dmc.serving.protocol import ChatCompletionRequest
from megatron.dmc.serving.protocol.tools import NamedTool
from megatron.dmc.serving.tool_calls import PARSERS, Event, NamedParser, RequiredParser, ToolParser


class ToolMessages:
    """Tool calls of one choice of a chat completion."""

    def __init__(self, body: ChatCompletionRequest, parser: Optional[str], response_id: str, index: int) -> None:
        """Make the reader of a choice.

        Args:
            body: a request whose ``tool_mode`` is not ``none``.
            parser: name of the format of ``tool_choice: auto``.
            response_id, index: name of the response and number of the choice, of which the ids of calls are made.
        """
        self._parser = _parser_of(body, parser)
        self._named = body.tool_mode == "named"
        self._most = 1 if body.parallel_tool_calls is False else None
        self._seed = f"{response_id} {index}"
        self._id_length = 9 if parser == "mistral" else 24  # Mistral's templates take ids of 9 characters only
        self.num_calls = 0
        """Calls that the model has begun."""
        self._index = -1

    def message(self, text: str) -> dict[str, Any]:
        """Assistant's message of a whole completion."""
        content, calls = "", list[dict[str, Any]]()
        for event in self._kept([*self._parser.feed(text), *self._parser.finish()]):
            if event.kind == "content":
                content += event.text
            elif event.kind == "name":
                calls.append(self._call(event.text))
            else:
                calls[-1]["function"]["arguments"] += event.text
        message = {"role": "assistant", "content": None if calls and not content else content, "refusal": None}
        return {**message, "tool_calls": calls} if calls else message

    def deltas(self, text: str, finished: bool) -> list[dict[str, Any]]:
        """Deltas of the next text of a stream, at least one."""
        events = [*self._parser.feed(text), *(self._parser.finish() if finished else ())]
        return [self._delta(event) for event in self._kept(events)] or [{}]

    def finish_reason(self, reason: Optional[str]) -> Optional[str]:
        """Finish reason of the choice: ``tool_calls`` when it ended with calls that the model chose to make.

        A function that the request named is no choice of the model's: ``stop``, as OpenAI and vLLM have it.
        """
        return "tool_calls" if reason == "stop" and self.num_calls and not self._named else reason

    def _kept(self, events: list[Event]) -> list[Event]:
        """Events without the calls that ``parallel_tool_calls: false`` leaves out."""
        kept = []
        for event in events:
            self.num_calls += event.kind == "name"
            if event.kind == "content" or self._most is None or self.num_calls <= self._most:
                kept.append(event)
        return kept

    def _call(self, name: str) -> dict[str, Any]:
        return {"id": self._id(), "type": "function", "function": {"name": name, "arguments": ""}}

    def _delta(self, event: Event) -> dict[str, Any]:
        if event.kind == "content":
            return {"content": event.text}
        if event.kind == "name":
            return {"tool_calls": [{"index": self._index + 1, **self._call(event.text)}]}
        return {"tool_calls": [{"index": self._index, "function": {"arguments": event.text}}]}

    def _id(self) -> str:
        """Name of the next call: the same for the same response, so that a batch that is run again writes the same."""
        self._index += 1
        digest = hashlib.blake2b(f"{self._seed} {self._index}".encode(), digest_size=12).hexdigest()
        return digest[: self._id_length] if self._id_length < 24 else f"call_{digest}"


def _parser_of(body: ChatCompletionRequest, name: Optional[str]) -> ToolParser:
    if isinstance(body.tool_choice, NamedTool):
        return NamedParser(body.tool_choice.function.name)
    return RequiredParser() if body.tool_mode == "required" else PARSERS[name or "hermes"]()


def tool_messages(
    body: ChatCompletionRequest, parser: Optional[str], response_id: str, index: int
) -> Optional[ToolMessages]:
    """Reader of a choice's tool calls; None where the model may make none."""
    return None if body.tool_mode == "none" else ToolMessages(body, parser, response_id, index)
