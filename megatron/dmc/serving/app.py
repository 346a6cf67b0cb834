"""The web application: OpenAI's paths, and those of an operator. :func:`create_app` puts it together."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, TypeVar, Union

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from megatron.dmc import __version__
from megatron.dmc.inference import SamplingParams
from megatron.dmc.serving import answers
from megatron.dmc.serving import async_engine as engines
from megatron.dmc.serving import protocol as p
from megatron.dmc.serving.errors import APIError, engine_down, of_value_error, shutting_down
from megatron.dmc.serving.metrics import Metrics
from megatron.dmc.serving.middleware import Gate, GateMiddleware, Receive, Scope, Send
from megatron.dmc.serving.prompts import Prompts

T = TypeVar("T")
AnswerRequest = Union[p.CompletionRequest, p.ChatCompletionRequest]
PAGE = Path(__file__).with_name("page.html")
ERRORS: dict[Union[int, str], dict[str, Any]] = {
    400: {"model": p.ErrorResponse, "description": "the request is wrong"},
    401: {"model": p.ErrorResponse, "description": "the API key is missing or wrong"},
    404: {"model": p.ErrorResponse, "description": "there is no such model"},
    413: {"model": p.ErrorResponse, "description": "the body is too large"},
}
ANSWER_ERRORS: dict[Union[int, str], dict[str, Any]] = {
    **ERRORS,
    500: {
        "model": p.ErrorResponse,
        "description": "the engine failed while it answered, or cannot answer this request",
    },
    503: {
        "model": p.ErrorResponse,
        "description": "too much is waiting, the server is shutting down, or the engine has failed",
    },
}


@dataclass
class Service:
    """What the handlers work with."""

    runner: engines.AsyncEngine
    prompts: Prompts
    model_name: str
    root: str
    gate: Gate
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))
    # A thread of its own: long texts take long to tokenize, and streams must go on meanwhile.
    tokenizing: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "dmc-tokenizer"))

    def check_model(self, name: Optional[str]) -> None:
        if name is not None and name != self.model_name:
            raise APIError(
                404,
                f"the model {name[:200]!r} does not exist; this server has {self.model_name!r}",
                param="model",
                code="model_not_found",
            )

    async def tokenize(self, function: Callable[[Any], T], request: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.tokenizing, function, request)

    async def submit(self, request: AnswerRequest) -> tuple[engines.Stream, str]:
        """Checked, admitted, tokenized and handed to the engine; and the response's id."""
        self.check_model(request.model)
        params = request.sampling_params()
        ticket = self.runner.reserve(*_size(request, params))
        try:
            ids = await self.tokenize(lambda r: self._prompts(r, params), request)
        except BaseException:
            self.runner.release(ticket)
            raise
        name = answers.new_id(isinstance(request, p.ChatCompletionRequest))
        watch = request.stream_options is not None and request.stream_options.include_cache
        requests = [engines.Request(f"{name}-{i}", prompt, params, watch) for i, prompt in enumerate(ids)]
        return self.runner.submit(requests, ticket), name

    def _prompts(self, request: AnswerRequest, params: SamplingParams) -> list[list[int]]:
        chat = isinstance(request, p.ChatCompletionRequest)
        found = [self.prompts.of_chat(request)] if chat else self.prompts.of_completion(request)
        for ids in found:
            self.prompts.check_context(ids, params)
            try:
                self.runner.engine.check(ids, params)
            except ValueError as error:
                raise of_value_error(error) from None
        return found

    async def answer(self, request: AnswerRequest, http: Request) -> Response:
        """The response to a completion or a chat, streamed or whole."""
        stream, name = await self.submit(request)
        if request.stream:
            return EventStream(self, request, stream, name)
        try:
            results = await _unless_gone(http.receive, stream.results())
        finally:
            stream.close()
        if results is None:
            return Response(status_code=499)  # nobody will read it
        if isinstance(request, p.ChatCompletionRequest):
            body = answers.chat_body(request, results[0], self.model_name, self.prompts, name)
        else:
            body = answers.completion_body(request, results, self.model_name, self.prompts, name)
        return Json(body)


def _size(request: AnswerRequest, params: SamplingParams) -> tuple[int, int]:
    """(answers, prompt tokens) that a request brings; those of a text are guessed, at four characters each."""
    if isinstance(request, p.ChatCompletionRequest):
        return params.n, params.n * sum(len(message.plain()["content"]) // 4 + 4 for message in request.messages)
    lengths = [len(prompt) // 4 + 1 if isinstance(prompt, str) else len(prompt) for prompt in request.prompts]
    return params.n * len(lengths), params.n * sum(lengths)


# ASCII, so that half a surrogate pair in somebody's text cannot break it. Made once: json.dumps would make one for
# every token.
encode = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


class Json(JSONResponse):
    """See ``encode``."""

    def render(self, content: Any) -> bytes:
        return encode(content).encode()


def _error(error: APIError) -> Response:
    return Json(error.body(), error.status, error.headers)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _unless_gone(receive: Receive, work: Awaitable[T]) -> Optional[T]:
    """The result of ``work``; None, and an end to it, when the client leaves first. Raises what ``work`` raises."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()


class EventStream(Response):
    """A stream of server-sent events. It begins with the first token: what fails before has a status of its own."""

    def __init__(self, service: Service, request: AnswerRequest, stream: engines.Stream, name: str) -> None:
        self.service, self.request, self.stream, self.name = service, request, stream, name
        self.background, self.status_code, self.body = None, 200, b""
        # The last one tells nginx to pass every event on at once.
        self.raw_headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _unless_gone(receive, self._send(scope, receive, send))
        finally:
            self.stream.close()

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def put(*objects: Any) -> None:
            text = "".join(f"data: {encode(o)}\n\n" for o in objects)
            await send({"type": "http.response.body", "body": text.encode(), "more_body": True})

        ids = [request.prompt for request in self.stream.requests]
        chunks = answers.Chunks(self.request, self.service.prompts, ids, self.service.model_name, self.name)
        begun = False
        try:
            async for updates in self.stream:
                found = [chunks.of(update.prompt, update.output, update.use) for update in updates]
                if not begun:
                    begun = True
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    found = [*chunks.first(), *found]
                await put(*found)
            await put(*chunks.last())
        except APIError as error:
            self.service.metrics.refused(error.status)
            if not begun:
                await _error(error)(scope, receive, send)
                return
            await put(error.body())
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


def create_app(service: Service) -> FastAPI:
    """Everything under one roof. Middleware and error shapes are in place, also for what does not exist."""
    app = FastAPI(
        title="megatron.dmc",
        version=__version__,
        description=(
            "OpenAI's API, with vLLM's parameters, over a KV cache that is compressed by Dynamic Memory Compression."
        ),
    )
    app.add_middleware(GateMiddleware, gate=service.gate, refused=service.metrics.refused)
    _add_answers(app, service)
    _add_tokenizer(app, service)
    _add_operation(app, service)
    _add_errors(app, service.metrics)
    _describe(app, bool(service.gate.keys))
    return app


def _documented(model: type) -> dict[Union[int, str], dict[str, Any]]:
    event = {
        "type": "object",
        "properties": {"data": {"type": "string", "description": "a chunk as JSON; at the end [DONE]"}},
    }
    stream = {"text/event-stream": {"schema": event}}
    return {
        200: {"model": model, "content": stream, "description": "the answer; with stream, its chunks"},
        **ANSWER_ERRORS,
    }


def _add_answers(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", response_model=None, responses=_documented(p.CompletionResponse), tags=["OpenAI"])
    async def completions(request: p.CompletionRequest, http: Request) -> Response:
        return await service.answer(request, http)

    @app.post(
        "/v1/chat/completions", response_model=None, responses=_documented(p.ChatCompletionResponse), tags=["OpenAI"]
    )
    async def chat_completions(request: p.ChatCompletionRequest, http: Request) -> Response:
        return await service.answer(request, http)

    def card() -> dict[str, Any]:
        return {
            "id": service.model_name,
            "object": "model",
            "created": service.created,
            "owned_by": "megatron.dmc",
            "root": service.root,
            "max_model_len": service.prompts.max_model_len,
        }

    unauthorized = {status: ERRORS[status] for status in (401, 413)}

    @app.get("/v1/models", responses=unauthorized, tags=["OpenAI"])
    async def models() -> p.ModelList:
        return p.ModelList(object="list", data=[p.ModelCard(**card())])

    @app.get("/v1/models/{name:path}", responses={**unauthorized, 404: ERRORS[404]}, tags=["OpenAI"])
    async def model(name: str) -> p.ModelCard:
        service.check_model(name)
        return p.ModelCard(**card())


def _add_tokenizer(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize", response_model=None, responses={200: {"model": p.TokenizeResponse}, **ERRORS}, tags=["vLLM"])
    async def tokenize(request: p.AnyTokenizeRequest) -> Response:
        service.check_model(request.model)
        prompts = service.prompts

        def work(r: Any) -> list[int]:
            return (
                prompts.of_chat(r)
                if isinstance(r, p.TokenizeChatRequest)
                else prompts.encode(r.prompt, r.add_special_tokens)
            )

        ids = await service.tokenize(work, request)
        return Json(
            {
                "count": len(ids),
                "max_model_len": prompts.max_model_len,
                "tokens": ids,
                "token_strs": prompts.pieces(ids) if request.return_token_strs else None,
            }
        )

    @app.post(
        "/detokenize", response_model=None, responses={200: {"model": p.DetokenizeResponse}, **ERRORS}, tags=["vLLM"]
    )
    async def detokenize(request: p.DetokenizeRequest) -> Response:
        service.check_model(request.model)
        return Json({"prompt": await service.tokenize(service.prompts.decode, request.tokens)})


def _add_operation(app: FastAPI, service: Service) -> None:
    too_large = {413: ERRORS[413]}
    down = {503: {"model": p.ErrorResponse, "description": "the engine has failed, or the server is shutting down"}}

    @app.get(
        "/health",
        response_model=None,
        responses={200: {"description": "requests are answered"}, **down, **too_large},
        tags=["operation"],
    )
    async def health() -> Response:
        if service.runner.failure is not None:
            raise engine_down()
        if service.gate.draining:
            raise shutting_down()
        return Json({})

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}, **too_large},
        tags=["operation"],
    )
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/version", responses=too_large, tags=["operation"])
    async def version() -> p.VersionResponse:
        return p.VersionResponse(version=__version__)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))


def _add_errors(app: FastAPI, metrics: Metrics) -> None:
    @app.exception_handler(APIError)
    async def told(request: Request, error: APIError) -> Response:
        if request.method == "POST":
            metrics.refused(error.status)
        return _error(error)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        return await told(request, p.of_validation(error.errors()))

    @app.exception_handler(HTTPException)
    async def elsewhere(request: Request, error: HTTPException) -> Response:
        messages = {
            404: f"there is nothing at {request.url.path[:200]!r}",
            405: f"{request.method} is not allowed here",
        }
        message = messages.get(error.status_code, "the body is not JSON; send one with Content-Type: application/json")
        return await told(request, APIError(error.status_code, message, headers=error.headers))

    @app.exception_handler(Exception)  # Starlette logs it, with its cause, after this
    async def broken(request: Request, error: Exception) -> Response:
        return _error(APIError(500, "the server has made a mistake; the cause is in its log", type="server_error"))


def _describe(app: FastAPI, keys: bool) -> None:
    made = app.openapi

    def openapi() -> dict[str, Any]:
        """Wrong bodies are answered with 400, not FastAPI's 422; and keys, where they are needed."""
        schema = made()
        if keys:
            schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            schema["security"] = [{"key": []}]
        for operations in schema["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        return schema

    app.openapi = openapi  # type: ignore[method-assign]
