"""Tool calls in completions: parsers of the formats in which models write them, for texts that come in pieces.

A parser gets the text as it is generated and returns events: text of the message, the name of a function that is
called, and its arguments as JSON, each as soon as it is certain. The pieces of a stream add up to the whole response,
which is parsed the same way.

Formats, by the names of vLLM's ``--tool-call-parser``:
hermes      Nous Hermes 2 Pro, Qwen 2.5 and 3: <tool_call>{"name": ..., "arguments": {...}}</tool_call>, repeated
llama3_json Llama 3.1 to 3.3: {"name": ..., "parameters": {...}}, several separated by ; or ,
mistral     Mistral: [TOOL_CALLS][{"name": ..., "arguments": {...}}], since tokenizer v11 [TOOL_CALLS]name{...}, also
            with [ARGS] between name and arguments
"""

import json
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, Optional

ARGUMENTS = ("arguments", "parameters")
"""Names of the member with the arguments of a call."""
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class Event:
    """Something certain about a completion."""

    kind: Literal["content", "name", "arguments"]
    """Text of the message; the function of a new call; a piece of the arguments of the last call."""
    text: str


class JSONScanner:
    """Follows one JSON value of an object, array, string or other kind, character by character."""

    def __init__(self) -> None:
        self._depth, self._string, self._escaped = 0, False, False
        self._begun = self.done = False

    def feed(self, text: str, start: int) -> int:
        """Index behind the last character of the value in ``text`` from ``start`` on; sets ``done`` at its end."""
        for at in range(start, len(text)):
            character = text[at]
            if self._string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._string = False
                    self.done = self._depth == 0
            elif character == '"':
                self._string = self._begun = True
            elif character in "{[":
                self._depth += 1
                self._begun = True
            elif character in "}],":
                if self._depth == 0:  # the end of a number or a word, which the character is no part of
                    self.done = True
                    return at
                self._depth -= character != ","
                self.done = self._depth == 0
            if self.done:
                return at + 1
        return len(text)


class CallObject:
    """One call as a JSON object with a name and arguments, in any order of its members."""

    def __init__(self) -> None:
        self.text, self.events = "", list[Event]()
        self.name: Optional[str] = None
        self.done = self.failed = False
        self.at, self._key = 1, None  # behind the brace
        self._value: Optional[JSONScanner] = None
        self._from = 0
        self.arguments: Optional[tuple[int, int]] = None
        self._sent = 0

    def feed(self, text: str) -> int:
        """Take the next text; returns how much of it belongs to the object."""
        before = len(self.text)
        self.text += text
        while not (self.done or self.failed) and self._step():
            pass
        end = self.at if self.done else len(self.text)
        self.text = self.text[:end]
        return end - before

    def take(self) -> list[Event]:
        """Events since the last call."""
        events, self.events = self.events, []
        if self.name is not None and self.arguments is not None:
            start, stop = self.arguments
            piece = self.text[start + self._sent : stop]
            if piece and self.text[start] == '"':  # some models write the arguments as a string
                piece = _decoded(self.text[start:stop]) if self._value is None or self._key not in ARGUMENTS else ""
                self._sent = stop - start if piece else self._sent
            else:
                self._sent += len(piece)
            if piece:
                events.append(Event("arguments", piece))
        return events

    def _step(self) -> bool:
        """One member's key or value; False when more text is needed."""
        if self._value is None:
            return self._read_key()
        end = self._value.feed(self.text, self.at)
        if self._key in ARGUMENTS:
            self.arguments = self._from, end
        self.at = end
        if not self._value.done:
            return False
        if self._key == "name":
            name = _decoded(self.text[self._from : end])
            self.failed = not name
            if name and self.name is None:
                self.name = name
                self.events.append(Event("name", name))
        if self._key in ARGUMENTS:
            stop = self._from + len(self.text[self._from : end].rstrip())
            self.arguments = self._from, stop
        self._value = None
        return True

    def _read_key(self) -> bool:
        """A key with its colon, or the end of the object."""
        match = re.compile(r'[\s,]*(?:(\})|("(?:[^"\\]|\\.)*")\s*:\s*(?=\S))').match(self.text, self.at)
        if match is None:
            # What cannot become a key any more is no JSON.
            rest = self.text[self.at :].lstrip(" \t\r\n,")
            self.failed = bool(rest) and rest[0] not in '"}'
            return False
        self.at = match.end()
        if match[1]:
            self.done = True
        else:
            self._key, self._value, self._from = _decoded(match[2]), JSONScanner(), match.end()
        return True


def _decoded(text: str) -> str:
    """Text of a JSON string; empty for what is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return ""
    return value if isinstance(value, str) else ""


class ToolParser(ABC):
    """Parser of one completion."""

    skips_special_tokens = True
    """Whether the format is read from a text without special tokens."""

    def __init__(self) -> None:
        self._buffer = ""
        self._call: Optional[CallObject] = None
        self._ended = self._calls = False

    def feed(self, text: str) -> list[Event]:
        """Events of the next text."""
        self._buffer += text
        events: list[Event] = []
        while self._buffer and (found := self._parse()) is not None:
            events += found
        self._calls = self._calls or any(event.kind == "name" for event in events)
        return _merged(events)

    def finish(self) -> list[Event]:
        """Events of what was held back at the end of the completion."""
        self._ended = True
        events = self.feed("")
        if self._call is not None and self._call.name is None:
            events.append(Event("content", self._call.text))
        if self._buffer.strip() or not self._calls:
            events.append(Event("content", self._buffer))
        self._buffer, self._call = "", None
        return _merged(events)

    @abstractmethod
    def _parse(self) -> Optional[list[Event]]:
        """Take something from the buffer; None when more text is needed."""

    def _begin_call(self) -> list[Event]:
        """Begin a call at the brace that the buffer begins with."""
        self._call, self._buffer = CallObject(), self._buffer[1:]
        self._call.text = "{"
        return []

    def _continue_call(self) -> list[Event]:
        """Read on in a call. One that is no JSON, or has no name, is text of the message."""
        call = self._call
        assert call is not None
        taken = call.feed(self._buffer)
        self._buffer = self._buffer[taken:]
        events = call.take()
        if not (call.failed or call.done):
            return events
        self._call = None
        if call.name is None:
            end = len(call.text) if call.done else 1  # what follows a brace may still be anything
            self._buffer = call.text[end:] + self._buffer
            return [Event("content", self._no_call() + call.text[:end])]
        if call.failed:
            self._buffer = call.text[call.at :] + self._buffer
        elif call.arguments is None:
            events.append(Event("arguments", "{}"))
        return events

    def _no_call(self) -> str:
        """Text that was taken for the beginning of a call; the parser goes on with text of the message."""
        return ""

    def _until(self, tag: str) -> tuple[list[Event], bool]:
        """Content before a tag, and whether the tag came; what may become one is held back."""
        at = self._buffer.find(tag)
        if at >= 0:
            text, self._buffer = self._buffer[:at], self._buffer[at + len(tag) :]
            return [Event("content", text)] if text else [], True
        held = 0 if self._ended else _overlap(self._buffer, tag)
        text = self._buffer[: len(self._buffer) - held]
        self._buffer = self._buffer[len(text) :]
        return [Event("content", text)] if text else [], False


def _overlap(text: str, tag: str) -> int:
    """Characters at the end of a text that the tag begins with."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:n])), 0)


def _merged(events: list[Event]) -> list[Event]:
    """Events of which pieces of the same thing are one."""
    merged: list[Event] = []
    for event in events:
        if merged and merged[-1].kind == event.kind != "name":
            merged[-1] = Event(event.kind, merged[-1].text + event.text)
        elif event.text:
            merged.append(event)
    return merged


class HermesParser(ToolParser):
    """``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``"""

    skips_special_tokens = False

    def __init__(self) -> None:
        super().__init__()
        self._inside = self._has_call = self._said = False

    def _parse(self) -> Optional[list[Event]]:
        if self._call is not None:
            return self._continue_call() if self._buffer else None
        if self._inside:
            return self._within()
        tag = "<tool_call>"
        begins = self._buffer[: len(self._buffer) - _overlap(self._buffer, tag)]
        if not (self._said or begins.strip()) and tag not in self._buffer:
            return None  # blanks around calls are no content
        before = self._buffer
        events, self._inside = self._until(tag)
        if self._inside:
            self._has_call = False
            return [event for event in events if self._said or event.text.strip()]
        self._said = self._said or bool(events)
        return events if self._buffer != before else None

    def _within(self) -> Optional[list[Event]]:
        """Between the tags: an object, or what is none and therefore text."""
        text = self._buffer.lstrip()
        if self._has_call:
            before = self._buffer
            _, closed = self._until("</tool_call>")
            self._inside, self._said = not closed, False
            return [] if closed or self._buffer != before else None
        if not text:
            return None
        self._buffer = text
        if text[0] != "{":
            return [Event("content", self._no_call())]
        self._has_call = True
        return self._begin_call()

    def _no_call(self) -> str:
        self._inside, self._said = False, True
        return "<tool_call>"


class LlamaParser(ToolParser):
    """``{"name": ..., "parameters": {...}}``, for completions that begin so."""

    skips_special_tokens = False
    TAG = "<|python_tag|>"

    def __init__(self) -> None:
        super().__init__()
        self._plain: Optional[bool] = None
        """Whether the completion is text; None before that is known."""

    def _parse(self) -> Optional[list[Event]]:
        if self._call is not None:
            return self._continue_call() if self._buffer else None
        if self._plain:
            text, self._buffer = self._buffer, ""
            return [Event("content", text)]
        text = self._buffer.lstrip()
        if self._plain is False:
            text = text.lstrip("; ,\n\t\r")
        if text.startswith(self.TAG):
            text = text[len(self.TAG) :].lstrip()
        elif self.TAG.startswith(text) and not self._ended:
            return None
        if not text:
            return None
        if text[0] == "{":
            self._plain, self._buffer = False, text
            return self._begin_call()
        self._plain = True
        return []

    def _no_call(self) -> str:
        self._plain = True
        return ""


class MistralParser(ToolParser):
    """``[TOOL_CALLS]`` before a list of objects, or before names that arguments follow."""

    skips_special_tokens = False
    TAG = "[TOOL_CALLS]"

    def __init__(self) -> None:
        super().__init__()
        self._inside = self._has_call = False
        self._arguments: Optional[JSONScanner] = None

    def _parse(self) -> Optional[list[Event]]:
        if self._call is not None:
            return self._continue_call() if self._buffer else None
        if self._arguments is not None:
            end = self._arguments.feed(self._buffer, 0)
            piece, self._buffer = self._buffer[:end], self._buffer[end:]
            if self._arguments.done:
                self._arguments = None
            return [Event("arguments", piece)] if piece else None
        if self._inside:
            return self._next_call()
        before = self._buffer
        events, self._inside = self._until(self.TAG)
        self._has_call = False
        return events if self._inside or self._buffer != before else None

    def _next_call(self) -> Optional[list[Event]]:
        """Behind the tag: brackets and commas of a list, the tag again, an object, or a name with arguments."""
        text = self._buffer.lstrip(",] \n\t\r")
        self._buffer = text
        if not text or (self.TAG.startswith(text) and not self._ended):
            return None
        if text[0] == "[":
            self._buffer = text.removeprefix(self.TAG) if text.startswith(self.TAG) else text[1:]
            return []
        if text[0] == "{":
            self._has_call = True
            return self._begin_call()
        brace = text.find("{", 0, 300)
        if brace < 0 and len(text) < 300 and not self._ended:
            return None
        named = _NAME.fullmatch(text[: max(brace, 0)])
        if named is None:
            return [Event("content", self._no_call())]
        self._has_call = True
        self._buffer, self._arguments = text[brace:], JSONScanner()
        return [Event("name", named[1])]

    def _no_call(self) -> str:
        self._inside = False
        return "" if self._has_call else self.TAG


_NAME = re.compile(r"([a-zA-Z0-9_.-]{1,128})(?:\[CALL_ID\][a-zA-Z0-9]*)?(?:\[ARGS\])?\s*")
"""Name of a function before its arguments, in Mistral's format."""


class RequiredParser(ToolParser):
    """A JSON array of calls, which a mask has made of ``tool_choice: required``."""

    _plain = False

    def _parse(self) -> Optional[list[Event]]:
        if self._call is not None:
            return self._continue_call() if self._buffer else None
        text = self._buffer if self._plain else self._buffer.lstrip("[], \n\t\r")
        self._buffer = text
        if not text:
            return None
        if text[0] == "{" and not self._plain:
            return self._begin_call()
        self._plain, self._buffer = True, ""
        return [Event("content", text)]

    def _no_call(self) -> str:
        self._plain = True
        return ""


class NamedParser(ToolParser):
    """The arguments of one function, which a mask has made of a named ``tool_choice``."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name: Optional[str] = name

    def _parse(self) -> Optional[list[Event]]:
        events = [Event("name", self._name)] if self._name is not None else []
        events.append(Event("arguments", self._buffer))
        self._name, self._buffer = None, ""
        return events


PARSERS: dict[str, type[ToolParser]] = {"hermes": HermesParser, "llama3_json": LlamaParser, "mistral": MistralParser}
"""Parsers by the name of ``--tool-call-parser``."""
