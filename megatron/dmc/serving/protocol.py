"""Request and response bodies of OpenAI's API, with vLLM's extra parameters, and the sampling parameters they ask for.

Types are checked here, strictly: a number in quotes, NaN and an unknown parameter are refused. Ranges are checked by
:class:`SamplingParams` and by the engine. Either way the error names the parameter as the client sent it.
"""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Optional, Union, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from megatron.dmc.inference import InvalidRequest, SamplingParams
from megatron.dmc.serving.errors import APIError, invalid, of_invalid_request

Int = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Prompt = Union[str, list[str], list[Int], list[list[Int]]]


class RequestModel(BaseModel):
    """Part of a request body. The docstrings of its fields are their descriptions in the OpenAPI schema."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=(), use_attribute_docstrings=True
    )

    def _sent_name(self, param: str) -> str:
        """Name under which the client sent a parameter of the engine."""
        return param

    def as_sent(self, error: APIError) -> APIError:
        """Error whose ``param`` and message name the parameter as the client sent it."""
        if error.param is not None:
            name = self._sent_name(error.param)
            if error.message.startswith(error.param):
                error.message = name + error.message.removeprefix(error.param)
            elif name not in error.message:
                error.message = f"{name} is wrong: {error.message}"
            error.param = name
        return error


class StreamOptions(RequestModel):
    """Options of a streamed response."""

    include_usage: bool = False
    """Send a last chunk with the usage; all other chunks have `usage: null`."""
    include_cache: bool = False
    """Add a `dmc` object to every chunk: the tokens of the completion and its KV slots by layer and KV head."""


class ResponseFormat(RequestModel):
    """Format of the completion."""

    type: Literal["text"]
    """Must be `text`; JSON formats are not supported."""


class SamplingFields(RequestModel):
    """Parameters that completions and chat completions share."""

    model: Optional[str] = None
    """Name of the served model; it may be left out."""
    n: Optional[Int] = None
    """Number of completions for each prompt, 1 to 128, default 1."""
    temperature: Optional[float] = None
    """Softmax temperature, default 1; 0 means greedy decoding, and top_p, top_k, min_p and seed are ignored."""
    top_p: Optional[float] = None
    """Total probability of the most likely tokens to sample from, above 0 and at most 1, default 1."""
    seed: Optional[Int] = None
    """Seed of the sampler: the same seed samples the same tokens; completion i of a prompt uses seed + i."""
    stop: Union[str, list[str], None] = None
    """String or strings that end the completion, which stops before the first of them."""
    presence_penalty: Optional[float] = None
    """Number from -2 to 2 that is subtracted from the logit of every token of the completion so far, default 0."""
    frequency_penalty: Optional[float] = None
    """Number from -2 to 2 that is subtracted from a token's logit for each time it was generated, default 0."""
    logit_bias: Optional[dict[str, float]] = None
    """Map of token ids to numbers from -100 to 100 that are added to their logits."""
    stream: Optional[bool] = None
    """Send the completion as server-sent events while it is generated."""
    stream_options: Optional[StreamOptions] = None
    """Options of a streamed response; only allowed with `stream: true`."""
    user: Optional[str] = None
    """Name of the end user, which is accepted and ignored."""
    top_k: Optional[Int] = None
    """Number of most likely tokens to sample from; 0 or -1, the default, means all."""
    min_p: Optional[float] = None
    """Least probability of a token to sample, as a fraction of the most likely token's, 0 to 1, default 0."""
    repetition_penalty: Optional[float] = None
    """Factor above 0 that lowers the logits of tokens in the prompt or the completion; 1, the default, means none."""
    min_tokens: Optional[Int] = None
    """Number of tokens to generate before an end-of-sequence or stop token may be sampled, default 0."""
    stop_token_ids: Optional[list[Int]] = None
    """Token ids that end the completion."""
    ignore_eos: Optional[bool] = None
    """Continue after the end-of-sequence token."""
    skip_special_tokens: Optional[bool] = None
    """Leave special tokens out of the text, default true."""
    include_stop_str_in_output: Optional[bool] = None
    """Keep the stop string at the end of the text."""
    return_tokens_as_token_ids: bool = False
    """Name the tokens of log-probabilities `token_id:123` instead of by their text."""
    return_token_ids: bool = False
    """Add `token_ids` and `prompt_token_ids` to the choices."""

    def sampling_params(self) -> SamplingParams:
        """Sampling parameters of the request. Raises :class:`APIError` that names a wrong value."""
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options may only be given with stream: true", "stream_options")
        names = (field.name for field in dataclasses.fields(SamplingParams))
        given = {name: value for name in names if (value := getattr(self, name, None)) is not None}
        given |= self._derived_params()
        if self.logit_bias is not None:
            given["logit_bias"] = _token_ids(self.logit_bias)
        try:
            return SamplingParams(**given)
        except InvalidRequest as error:
            raise self.as_sent(of_invalid_request(error)) from None

    def _derived_params(self) -> dict[str, Any]:
        """Sampling parameters whose name or meaning differs from the request's."""
        raise NotImplementedError


def _token_ids(logit_bias: Mapping[str, float]) -> dict[int, float]:
    """Bias by token id; keys of JSON are strings. Raises :class:`APIError` for a key that is no token id."""
    for key in logit_bias:
        if not (key.isascii() and key.isdigit() and len(key) < 16):
            raise invalid(f"logit_bias has the key {key[:40]!r}; keys must be token ids", "logit_bias")
    return {int(key): value for key, value in logit_bias.items()}


class CompletionRequest(SamplingFields):
    """Body of ``POST /v1/completions``."""

    prompt: Prompt
    """Text, list of texts, token ids of one prompt, or list of such lists."""
    max_tokens: Optional[Int] = 16
    """Most tokens to generate; 0 only prefills the prompt, for `echo`; null means up to the context length."""
    logprobs: Optional[Int] = None
    """Number of most likely tokens, 0 to 100, to return log-probabilities of, besides the sampled token's."""
    echo: Optional[bool] = None
    """Return the prompt before the completion, with its log-probabilities if `logprobs` is set."""
    add_special_tokens: bool = True
    """Let the tokenizer add special tokens such as BOS to a text prompt."""

    def _derived_params(self) -> dict[str, Any]:
        prompt_logprobs = self.logprobs if self.echo else None
        return {"max_tokens": self.max_tokens, "prompt_logprobs": prompt_logprobs}

    def _sent_name(self, param: str) -> str:
        if param in ("n", "max_tokens") and param not in self.model_fields_set:
            return "prompt"  # too long, or too many, for the default
        return "logprobs" if param == "prompt_logprobs" else param

    @property
    def prompts(self) -> list[Union[str, list[int]]]:
        """Prompts of the request, one or many, as a list."""
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class ContentPart(RequestModel):
    """Part of a message's content."""

    type: Literal["text"]
    """Must be `text`; images and audio are not supported."""
    text: str
    """Text of the part."""


class Message(RequestModel):
    """Message of a chat."""

    role: str
    """Role of the author, one that the chat template knows, such as `system`, `user` or `assistant`."""
    content: Union[str, list[ContentPart], None] = None
    """Text of the message, or its parts, which are joined."""
    name: Optional[str] = None
    """Name of the author, passed to the chat template."""

    def plain(self) -> dict[str, str]:
        """Message as chat templates take it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())
        return {"role": self.role, "content": content} | ({} if self.name is None else {"name": self.name})


class ChatFields(RequestModel):
    """Parameters of the chat template."""

    messages: list[Message] = Field(min_length=1)
    """Messages of the chat so far, at least one."""
    add_generation_prompt: bool = True
    """End the prompt with what introduces the assistant's message."""
    continue_final_message: bool = False
    """Continue the last message instead of starting a new one; needs `add_generation_prompt: false`."""
    chat_template_kwargs: Optional[dict[str, Any]] = None
    """Extra variables of the chat template."""

    def _sent_name(self, param: str) -> str:
        return "messages" if param == "prompt" else param


class ChatCompletionRequest(SamplingFields, ChatFields):
    """Body of ``POST /v1/chat/completions``."""

    max_tokens: Optional[Int] = None
    """Most tokens to generate; older name of `max_completion_tokens`, which wins if both are given."""
    max_completion_tokens: Optional[Int] = None
    """Most tokens to generate; the default is up to the context length."""
    logprobs: Optional[bool] = None
    """Return the log-probability of every sampled token."""
    top_logprobs: Optional[Int] = None
    """Number of most likely tokens, 0 to 100, to return log-probabilities of; only allowed with `logprobs: true`."""
    response_format: Optional[ResponseFormat] = None
    """Format of the completion, which can only be text."""

    def sampling_params(self) -> SamplingParams:
        """Sampling parameters of the request. Raises :class:`APIError` that names a wrong value."""
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs may only be given with logprobs: true", "top_logprobs")
        return super().sampling_params()

    def _derived_params(self) -> dict[str, Any]:
        most = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return {"max_tokens": most, "logprobs": (self.top_logprobs or 0) if self.logprobs else None}

    def _sent_name(self, param: str) -> str:
        names = {"prompt": "messages", "logprobs": "top_logprobs"}
        if self.max_completion_tokens is not None:
            names["max_tokens"] = "max_completion_tokens"
        return names.get(param, param)


GenerationRequest = Union[CompletionRequest, ChatCompletionRequest]


class TokenizeRequest(RequestModel):
    """Body of ``POST /tokenize`` for a text."""

    model: Optional[str] = None
    """Name of the served model; it may be left out."""
    prompt: str
    """Text to tokenize."""
    add_special_tokens: bool = True
    """Let the tokenizer add special tokens such as BOS."""
    return_token_strs: bool = False
    """Return the text of every token, too."""


class TokenizeChatRequest(ChatFields):
    """Body of ``POST /tokenize`` for the messages of a chat."""

    model: Optional[str] = None
    """Name of the served model; it may be left out."""
    return_token_strs: bool = False
    """Return the text of every token, too."""


def _tokenize_kind(body: Any) -> str:
    return "chat" if isinstance(body, TokenizeChatRequest) or isinstance(body, dict) and "messages" in body else "text"


AnyTokenizeRequest = Annotated[
    Union[Annotated[TokenizeRequest, Tag("text")], Annotated[TokenizeChatRequest, Tag("chat")]],
    Discriminator(_tokenize_kind),
]


class DetokenizeRequest(RequestModel):
    """Body of ``POST /detokenize``."""

    model: Optional[str] = None
    """Name of the served model; it may be left out."""
    tokens: list[Int]
    """Token ids to decode."""

    def _sent_name(self, param: str) -> str:
        return "tokens" if param == "prompt" else param


# --------------------------------------------------------------------------------------------------- wrong requests


def _models_in(annotation: Any) -> list[type[RequestModel]]:
    """Request models that a field's type is made of."""
    if isinstance(annotation, type) and issubclass(annotation, RequestModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _tree(*models: type[RequestModel]) -> dict[str, Any]:
    """Names of the models' fields, each with the tree of its own fields."""
    fields = {name: field for model in models for name, field in model.model_fields.items()}
    return {name: _tree(*_models_in(field.annotation)) for name, field in fields.items()}


PARAMETERS = _tree(CompletionRequest, ChatCompletionRequest, TokenizeRequest, TokenizeChatRequest, DetokenizeRequest)


def parse(model: type[BaseModel], body: Any) -> Any:
    """Request from decoded JSON. Raises :class:`APIError` (400)."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise of_validation(error.errors(include_url=False, include_context=False)) from None


def of_validation(errors: Sequence[Any]) -> APIError:
    """HTTP 400 for the first of pydantic's errors about a body. An unknown parameter comes before all others."""
    found = [(_parameter(error), error) for error in errors]
    param, first = next((pair for pair in found if pair[1]["type"] == "extra_forbidden"), found[0])
    if first["type"] == "json_invalid" or param is None:
        return invalid("the body is not a JSON object; send one with Content-Type: application/json")
    # A value that may have several types has an error for each; the one that goes deepest has the intended type.
    below = (f"{param}.", f"{param}[")
    within = [(path, error) for path, error in found if path is not None and (path == param or path.startswith(below))]
    param, first = max(within, key=lambda pair: pair[0].count("."))
    if first["type"] == "extra_forbidden":
        return invalid(f"unknown parameter: {param[:200]!r}", param[:100], "unknown_parameter")
    if first["type"] == "missing":
        return invalid(f"missing parameter: {param!r}", param, "missing_required_parameter")
    wanted = "; or: ".join(dict.fromkeys(error["msg"] for path, error in within if path == param))
    return invalid(f"{param} is {reprlib.repr(first['input'])}: {wanted[:400]}", param, "invalid_type")


def _parameter(error: Any) -> Optional[str]:
    """Parameter that an error is about, such as ``messages[0].content``. Elements of lists and maps have no name.

    None: the body as a whole. The name of an unknown parameter may be empty.
    """
    path, index, fields = None, "", PARAMETERS
    unknown = len(error["loc"]) - 1 if error["type"] == "extra_forbidden" else None
    for at, part in enumerate(error["loc"]):
        if isinstance(part, int):
            index = f"[{part}]"
        elif part in fields or at == unknown:  # otherwise "body", or the name of a type
            path = part if path is None else f"{path}{index}.{part}"
            index, fields = "", fields.get(part, {})
    return path


# -------------------------------------------------------------------------------------------------------- responses


class Error(BaseModel):
    message: str
    type: str
    param: Optional[str]
    code: Optional[str]


class ErrorResponse(BaseModel):
    error: Error


class PromptTokensDetails(BaseModel):
    cached_tokens: int = Field(description="Number of prompt tokens found in the prefix cache.")


class CacheUsage(BaseModel):
    """Share of the KV cache that the completions took."""

    slots: int = Field(description="Number of KV slots, over all layers and KV heads.")
    compression_ratio: float = Field(description="Slots of an uncompressed cache divided by slots.")


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    dmc: CacheUsage


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[Optional[float]]
    top_logprobs: list[Optional[dict[str, float]]]
    text_offset: list[int]


class Choice(BaseModel):
    """Fields of every completion of a response."""

    index: int
    stop_reason: Union[int, str, None] = Field(description="Stop token or string that ended the completion.")
    token_ids: list[int] = Field([], description="Token ids of the completion, with return_token_ids.")
    prompt_token_ids: list[int] = Field([], description="Token ids of the prompt, with return_token_ids.")


class CompletionChoice(Choice):
    text: str
    logprobs: Optional[CompletionLogprobs]
    finish_reason: Optional[Literal["stop", "length"]]


class CompletionResponse(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: Optional[list[int]]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Choice):
    message: ChatMessage
    logprobs: Optional[ChatLogprobs]
    finish_reason: Literal["stop", "length"]


class ChatCompletionResponse(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: Optional[list[str]]


class DetokenizeResponse(BaseModel):
    prompt: str


class VersionResponse(BaseModel):
    version: str
