"""HTTP responses of the server: JSON, errors, and streams of server-sent events that end when the client leaves."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, Optional, Protocol, TypeVar

from fastapi.responses import JSONResponse, Response

from megatron.dmc.inference import StepOutput
from megatron.dmc.serving import async_engine as engines
from megatron.dmc.serving.bodies import Receive
from megatron.dmc.serving.errors import APIError
from megatron.dmc.serving.middleware import Scope, Send

T = TypeVar("T")

encode = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode
"""Encoder of every JSON response: ASCII, since a text may hold half a surrogate pair, and made once, not per token."""


class Json(JSONResponse):
    """JSON response of :func:`encode`."""

    def render(self, content: Any) -> bytes:
        return encode(content).encode()


def error_response(error: APIError) -> Response:
    """Response with OpenAI's error object."""
    return Json(error.body(), error.status, error.headers)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Receive, work: Awaitable[T]) -> Optional[T]:
    """Result of ``work``, or None if the client leaves first, which cancels it. Raises what ``work`` raises."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()


def frame(event: dict[str, Any], name: str = "") -> str:
    """Server-sent event of a JSON object, with or without a field ``event``."""
    return f"event: {name}\ndata: {encode(event)}\n\n" if name else f"data: {encode(event)}\n\n"


class Form(Protocol):
    """Shape of the events of one streamed response: chunks of a completion, or events of the Responses API."""

    END: str
    """What ends the stream."""

    def first(self) -> list[dict[str, Any]]:
        """Events before any token."""

    def of(self, prompt: int, output: StepOutput) -> list[dict[str, Any]]:
        """Events of one output of prompt number ``prompt``."""

    def text_frame(self, prompt: int, output: StepOutput) -> Optional[str]:
        """Frame of an output's only event, where the one before differs in its text alone; called instead of ``of``,
        which has to be called when this returns None.
        """

    def last(self) -> list[dict[str, Any]]:
        """Events after the last token."""

    def failed(self, error: APIError) -> list[dict[str, Any]]:
        """Events of a failure after the first token."""

    def event_name(self, event: dict[str, Any]) -> str:
        """Value of the field ``event`` of a server-sent event, or an empty text for none."""


class EventStream(Response):
    """Stream of server-sent events. It starts with the first token, so an earlier failure has its own HTTP status.

    Args:
        refused: called with the HTTP status of a failure.
    """

    def __init__(self, form: Form, stream: engines.Stream, refused: Callable[[int], None]) -> None:
        self.form, self.stream, self.refused = form, stream, refused
        self.background, self.status_code, self.body = None, 200, b""
        self.raw_headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),  # nginx passes every event on at once
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._send(scope, receive, send))
        finally:
            self.stream.close()

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        form, stream, begun = self.form, self.stream, False
        try:
            async for updates in stream:
                frames = [] if begun else self._frames(form.first())
                for prompt, output in updates:
                    text = form.text_frame(prompt, output)
                    frames += self._frames(form.of(prompt, output)) if text is None else (text,)
                if stream.ended:
                    frames += (*self._frames(form.last()), form.END)
                if not begun:
                    begun = True
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await send(_body(frames, more=not stream.ended))
        except APIError as error:
            self.refused(error.status)
            if begun:
                await send(_body([*self._frames(form.failed(error)), form.END], more=False))
            else:
                await error_response(error)(scope, receive, send)

    def _frames(self, events: list[dict[str, Any]]) -> list[str]:
        return [frame(event, self.form.event_name(event)) for event in events]


def _body(frames: list[str], more: bool) -> dict[str, Any]:
    return {"type": "http.response.body", "body": "".join(frames).encode(), "more_body": more}
