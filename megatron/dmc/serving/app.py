"""Web application of the server: endpoints of OpenAI's API, of vLLM's tokenizer API, and for operators."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, TypeVar, Union

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from megatron.dmc import __version__
from megatron.dmc.inference import InvalidRequest, SamplingParams
from megatron.dmc.serving import async_engine as engines
from megatron.dmc.serving import openapi, responses, responses_api
from megatron.dmc.serving import protocol as p
from megatron.dmc.serving.bounded_route import BoundedRoute
from megatron.dmc.serving.errors import APIError, engine_down, of_invalid_request, shutting_down
from megatron.dmc.serving.event_stream import EventStream, Json, error_response, unless_gone
from megatron.dmc.serving.http_config import HTTPConfig
from megatron.dmc.serving.metrics import Metrics
from megatron.dmc.serving.middleware import Gate, GateMiddleware
from megatron.dmc.serving.prompts import Prompts

T = TypeVar("T")
Responses = dict[Union[int, str], dict[str, Any]]
"""Responses of an endpoint in the OpenAPI schema, by HTTP status."""
QUICK = 2048
"""Most token ids of a prompt that the event loop checks itself: it takes no longer than another thread to wake up."""
PAGE = Path(__file__).with_name("page.html")


def _errors(descriptions: dict[int, str]) -> Responses:
    return {status: {"model": p.ErrorResponse, "description": text} for status, text in descriptions.items()}


REQUEST_ERRORS = _errors(
    {
        400: "The request is invalid; param names the parameter.",
        401: "The API key is missing or wrong.",
        404: "The model does not exist.",
        413: "The body is too large.",
    }
)
GENERATION_ERRORS = REQUEST_ERRORS | _errors(
    {
        500: "The engine failed during the request, or cannot complete it.",
        503: "Too many requests are waiting, the server is shutting down, or the engine has failed.",
    }
)


@dataclass
class Service:
    """State that the endpoints share."""

    runner: engines.AsyncEngine
    prompts: Prompts
    model_name: str
    root: str
    gate: Gate
    metrics: Metrics
    aliases: tuple[str, ...] = ()
    """Further names of the model that requests may give."""
    compression: Optional[p.Compression] = None
    """How the model compresses its cache; None for one that does not."""
    quantization: Optional[str] = None
    """Type that the weights are quantized to at load, or format of quantized files; None for none."""
    created: int = field(default_factory=lambda: int(time.time()))
    # A thread of its own, so that streams go on while a long text is tokenized.
    tokenizing: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "dmc-tokenizer"))
    # Another one, so that prompts do not wait for a chat template that takes its time.
    templating: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "dmc-chats"))
    compiling: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "dmc-grammars"))

    def close(self) -> None:
        """Let the threads end; one that hangs is not waited for."""
        for executor in (self.tokenizing, self.templating, self.compiling):
            executor.shutdown(wait=False, cancel_futures=True)

    def check_model(self, name: Optional[str]) -> None:
        if name and name not in (self.model_name, *self.aliases):
            raise APIError(
                404,
                f"the model {name[:200]!r} does not exist; this server has {self.model_name!r}",
                param="model",
                code="model_not_found",
            )

    async def tokenize(self, function: Callable[[Any], T], request: Any, quick: bool = False) -> T:
        """Run ``function(request)`` on the tokenizer's thread, or on that of chats; ``quick``: at once."""
        executor = self.templating if isinstance(request, p.ChatFields) else self.tokenizing
        try:
            if quick:
                return function(request)
            return await asyncio.get_running_loop().run_in_executor(executor, function, request)
        except APIError as error:
            raise request.as_sent(error) from None

    async def compile(self, request: p.GenerationRequest, params: SamplingParams) -> None:
        """Compile the grammar of a request where it takes the time of no prompt and of no step."""
        if params.structured_outputs is None:
            return
        try:
            await asyncio.get_running_loop().run_in_executor(self.compiling, self.prompts.processor.grammar, params)
        except InvalidRequest as error:
            raise request.as_sent(of_invalid_request(error)) from None

    async def submit(self, request: p.GenerationRequest) -> tuple[engines.Stream, str]:
        """Check, admit and tokenize a request and hand it to the engine. Returns its outputs and the response's id."""
        self.check_model(request.model)
        params = request.sampling_params(self.prompts.settings.default_sampling_params)
        try:
            place = self.runner.reserve(*_size(request, params))
        except APIError as error:
            raise request.as_sent(error) from None
        name = responses.new_id(isinstance(request, p.ChatCompletionRequest))
        report = request.stream_options is not None and request.stream_options.include_cache
        try:
            await self.compile(request, params)
            quick = _is_quickly_checked(request, params)
            requests = await self.tokenize(lambda r: self.prompts.requests(r, params, name, report), request, quick)
        except BaseException:
            self.runner.release(place)
            raise
        return self.runner.submit(requests, place), name

    async def generate(self, request: p.GenerationRequest, http: Request) -> Response:
        """Response to a completion or chat completion request, streamed or whole."""
        stream, name = await self.submit(request)
        if request.stream:
            return EventStream(self._chunks(request, stream, name), stream, self.metrics.refused)
        whole = await self._whole(request, http, stream, name)
        return Response(status_code=499) if whole is None else Json(whole)  # 499: the client has left

    async def respond(self, request: p.ResponsesRequest, http: Request) -> Response:
        """Response of the Responses API, streamed or whole: that of a chat completion in another form."""
        try:
            chat = p.parse(p.ChatCompletionRequest, responses_api.chat_body(request))
            stream, name = await self.submit(chat)
        except APIError as error:
            raise request.as_sent(error) from None
        if request.stream:
            events = responses_api.Events(request, self._chunks(chat, stream, name))
            return EventStream(events, stream, self.metrics.refused)
        whole = await self._whole(chat, http, stream, name)
        return Response(status_code=499) if whole is None else Json(responses_api.response(request, whole))

    def _chunks(self, request: p.GenerationRequest, stream: engines.Stream, name: str) -> responses.Chunks:
        ids = [one.prompt_token_ids for one in stream.requests]
        return responses.Chunks(request, self.prompts, ids, self.model_name, name)

    async def _whole(
        self, request: p.GenerationRequest, http: Request, stream: engines.Stream, name: str
    ) -> Optional[dict[str, Any]]:
        """Whole response; None if the client leaves before it is there."""
        try:
            results = await unless_gone(http.receive, stream.results())
        finally:
            stream.close()
        return results and responses.response(request, results, self.model_name, self.prompts, name)


def _size(request: p.GenerationRequest, params: SamplingParams) -> tuple[int, int]:
    """(completions, prompt tokens) of a request; the tokens of a text are estimated at four characters each."""
    if isinstance(request, p.ChatCompletionRequest):
        return params.n, params.n * sum(len(message.text) // 4 + 4 for message in request.messages)
    lengths = [len(prompt) // 4 + 1 if isinstance(prompt, str) else len(prompt) for prompt in request.prompts]
    return params.n * len(lengths), params.n * sum(lengths)


def _is_quickly_checked(request: p.GenerationRequest, params: SamplingParams) -> bool:
    """Whether a request is one prompt of a few token ids, and nothing of it needs the tokenizer or a compiler."""
    if isinstance(request, p.ChatCompletionRequest) or params.bad_words or params.structured_outputs is not None:
        return False
    prompt = request.prompt
    return 0 < len(prompt) <= QUICK and isinstance(prompt[0], int)


def create_app(service: Service, http: HTTPConfig = HTTPConfig()) -> FastAPI:
    """Application with its endpoints, its middleware, and OpenAI's error shape for every path and method."""
    app = FastAPI(
        title="megatron.dmc",
        version=__version__,
        description="OpenAI's API with vLLM's parameters, over a KV cache that DMC or DMS compresses.",
        docs_url=None,  # FastAPI's pages load scripts from elsewhere, which a closed network has not
        redoc_url=None,
    )
    app.state.max_model_len = service.prompts.max_model_len
    app.router.route_class = BoundedRoute
    app.add_middleware(
        GateMiddleware, gate=service.gate, refused=service.metrics.refused, answered=service.metrics.answered
    )
    if http.allowed_origins:  # outside the gate: a browser asks for leave without a key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=http.allowed_origins,
            allow_methods=http.allowed_methods,
            allow_headers=http.allowed_headers,
            allow_credentials=http.allow_credentials,
            expose_headers=["x-request-id"],
        )
    _add_generation(app, service)
    _add_tokenizer(app, service)
    _add_operator(app, service)
    _add_errors(app, service.metrics)
    openapi.correct(app, keys=bool(service.gate.keys), max_logprobs=service.prompts.processor.max_logprobs)
    return app


def _generation_responses(model: type) -> Responses:
    data = {"type": "string", "description": "A chunk of the response as JSON, or [DONE] at the end."}
    stream = {"text/event-stream": {"schema": {"type": "object", "properties": {"data": data}}}}
    description = "The response, or with stream: true its chunks."
    return {200: {"model": model, "content": stream, "description": description}, **GENERATION_ERRORS}


def _add_generation(app: FastAPI, service: Service) -> None:
    whole, chat = _generation_responses(p.CompletionResponse), _generation_responses(p.ChatCompletionResponse)

    @app.post("/v1/completions", response_model=None, responses=whole, tags=["OpenAI"])
    async def completions(request: p.CompletionRequest, http: Request) -> Response:
        return await service.generate(request, http)

    @app.post("/v1/chat/completions", response_model=None, responses=chat, tags=["OpenAI"])
    async def chat_completions(request: p.ChatCompletionRequest, http: Request) -> Response:
        return await service.generate(request, http)

    newer = _generation_responses(p.ResponsesResponse)

    @app.post("/v1/responses", response_model=None, responses=newer, tags=["OpenAI"])
    async def respond(request: p.ResponsesRequest, http: Request) -> Response:
        return await service.respond(request, http)

    def card(name: str) -> p.ModelCard:
        return p.ModelCard(
            id=name,
            object="model",
            created=service.created,
            owned_by="megatron.dmc",
            root=service.root,
            max_model_len=service.prompts.max_model_len,
            compression=service.compression,
            quantization=service.quantization,
        )

    refused = {status: REQUEST_ERRORS[status] for status in (401, 404, 413)}

    @app.get("/v1/models", responses={401: refused[401], 413: refused[413]}, tags=["OpenAI"])
    async def models() -> p.ModelList:
        return p.ModelList(object="list", data=[card(name) for name in (service.model_name, *service.aliases)])

    @app.get("/v1/models/{name:path}", responses=refused, tags=["OpenAI"])
    async def model(name: str) -> p.ModelCard:
        service.check_model(name)
        return card(name)


def _add_tokenizer(app: FastAPI, service: Service) -> None:
    prompts = service.prompts
    tokens: Responses = {200: {"model": p.TokenizeResponse}, **REQUEST_ERRORS}
    text: Responses = {200: {"model": p.DetokenizeResponse}, **REQUEST_ERRORS}

    def ids_of(request: Any) -> list[int]:
        if isinstance(request, p.TokenizeChatRequest):
            return prompts.of_chat(request)
        return prompts.encode(request.prompt, request.add_special_tokens)

    @app.post("/tokenize", response_model=None, responses=tokens, tags=["vLLM"])
    async def tokenize(request: p.AnyTokenizeRequest) -> Response:
        service.check_model(request.model)
        ids = await service.tokenize(ids_of, request)
        pieces = prompts.pieces(ids) if request.return_token_strs else None
        head = {"count": len(ids), "max_model_len": prompts.max_model_len}
        return Json({**head, "tokens": ids, "token_strs": pieces})

    @app.post("/detokenize", response_model=None, responses=text, tags=["vLLM"])
    async def detokenize(request: p.DetokenizeRequest) -> Response:
        service.check_model(request.model)
        return Json({"prompt": await service.tokenize(lambda r: prompts.decode(r.tokens), request)})


def _add_operator(app: FastAPI, service: Service) -> None:
    too_large = {413: REQUEST_ERRORS[413]}
    healthy: Responses = {200: {"description": "The server accepts requests."}}
    healthy |= _errors({503: "The engine has failed, or the server is shutting down."}) | too_large
    text: Responses = {200: {"content": {"text/plain": {}}}, **too_large}

    @app.get("/health", response_model=None, responses=healthy, tags=["operation"])
    async def health() -> Response:
        if service.runner.failure is not None:
            raise engine_down()
        if service.gate.draining:
            raise shutting_down()
        return Json({})

    @app.get("/metrics", response_class=Response, responses=text, tags=["operation"])
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/version", responses=too_large, tags=["operation"])
    async def version() -> p.VersionResponse:
        return p.VersionResponse(version=__version__)

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(openapi.page(app.openapi()))

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))


def _add_errors(app: FastAPI, metrics: Metrics) -> None:
    @app.exception_handler(APIError)
    async def refused(request: Request, error: APIError) -> Response:
        if request.method == "POST":
            metrics.refused(error.status)
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        return await refused(request, p.of_validation(error.errors()))

    @app.exception_handler(HTTPException)
    async def elsewhere(request: Request, error: HTTPException) -> Response:
        messages = {
            404: f"there is nothing at {request.url.path[:200]!r}",
            405: f"{request.method} is not allowed here",
        }
        message = messages.get(error.status_code, "the body is not JSON; send one with Content-Type: application/json")
        return await refused(request, APIError(error.status_code, message, headers=error.headers))

    @app.exception_handler(Exception)  # Starlette logs it, with its cause, after this
    async def broken(request: Request, error: Exception) -> Response:
        return error_response(
            APIError(500, "the server has made a mistake; the cause is in its log", type="server_error")
        )
