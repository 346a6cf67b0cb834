"""OpenAI's requests, with vLLM's additions, and what they ask of the engine.

Types are checked here, strictly: a number in quotes, NaN or a parameter that is not listed is refused. Ranges are
checked by :class:`SamplingParams`, which is the one place that knows them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Optional, Union

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from megatron.dmc.inference import SamplingParams
from megatron.dmc.serving.errors import APIError, invalid, of_value_error

Int = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Prompt = Union[str, list[str], list[Int], list[list[Int]]]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class StreamOptions(Strict):
    include_usage: bool = Field(False, description="a last chunk with the usage, and `usage: null` in the others")
    include_cache: bool = Field(False, description="`dmc` in every chunk: tokens, and slots by layer and KV head")


class ResponseFormat(Strict):
    type: Literal["text"]


class SamplingFields(Strict):
    """What completions and chat have in common."""

    model: Optional[str] = Field(None, description="name of the served model; may be left out")
    n: Optional[Int] = Field(None, description="answers to each prompt")
    temperature: Optional[float] = Field(None, description="0 is greedy; default 1")
    top_p: Optional[float] = None
    seed: Optional[Int] = Field(None, description="the same seed draws the same tokens; answer i has seed + i")
    stop: Union[str, list[str], None] = Field(None, description="the answer ends before the first of these strings")
    presence_penalty: Optional[float] = None
    frequency_penalty: Optional[float] = None
    logit_bias: Optional[dict[str, float]] = Field(
        None, description="token id -> what is added to its logit, -100 to 100"
    )
    stream: Optional[bool] = None
    stream_options: Optional[StreamOptions] = None
    user: Optional[str] = Field(None, description="taken, and not used")
    top_k: Optional[Int] = Field(None, description="0 or -1: all tokens")
    min_p: Optional[float] = None
    repetition_penalty: Optional[float] = None
    min_tokens: Optional[Int] = None
    stop_token_ids: Optional[list[Int]] = None
    ignore_eos: Optional[bool] = None
    skip_special_tokens: Optional[bool] = None
    include_stop_str_in_output: Optional[bool] = None
    return_tokens_as_token_ids: bool = Field(False, description="log-probabilities name tokens as `token_id:123`")

    return_token_ids: bool = Field(False, description="choices have `token_ids` and `prompt_token_ids`")

    def _sampling(self, **more: Any) -> SamplingParams:
        """What is given; for the rest the engine's defaults. Raises :class:`APIError` that names a wrong value."""
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options may only be given with stream", "stream_options")
        given = {name: value for name in SAMPLING if (value := getattr(self, name)) is not None}
        if self.logit_bias is not None:
            given["logit_bias"] = _logit_bias(self.logit_bias)
        try:
            return SamplingParams(**given, **more)
        except ValueError as error:
            raise of_value_error(error) from None


SAMPLING = (
    "n",
    "temperature",
    "top_p",
    "seed",
    "stop",
    "presence_penalty",
    "frequency_penalty",
    "top_k",
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "stop_token_ids",
    "ignore_eos",
    "skip_special_tokens",
    "include_stop_str_in_output",
)


def _logit_bias(given: dict[str, float]) -> dict[int, float]:
    out: dict[int, float] = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdigit() and len(key) < 16):
            raise invalid(f"logit_bias has the key {key[:40]!r}; keys must be token ids", "logit_bias")
        out[int(key)] = value
    return out


class CompletionRequest(SamplingFields):
    """``POST /v1/completions``"""

    prompt: Prompt = Field(description="a text, texts, token ids, or lists of token ids")
    max_tokens: Optional[Int] = Field(16, description="0: the prompt is only read, for `echo`; null: up to the window")
    logprobs: Optional[Int] = Field(
        None, description="log-probabilities of so many most likely tokens beside the chosen one's"
    )
    echo: Optional[bool] = Field(None, description="the prompt comes first in the answer, with `logprobs` too")
    add_special_tokens: bool = Field(True, description="tokens that the tokenizer adds to a text, such as BOS")

    def sampling_params(self) -> SamplingParams:
        """Raises :class:`APIError` that names a wrong value."""
        prompt_logprobs = self.logprobs if self.echo else None
        return self._sampling(max_tokens=self.max_tokens, logprobs=self.logprobs, prompt_logprobs=prompt_logprobs)

    @property
    def prompts(self) -> list[Union[str, list[int]]]:
        """One or many, as a list."""
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class ContentPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    role: str
    content: Union[str, list[ContentPart], None] = None
    name: Optional[str] = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())
        return {"role": self.role, "content": content} | ({} if self.name is None else {"name": self.name})


class ChatFields(Strict):
    """What the chat template takes."""

    messages: list[Message] = Field(min_length=1)
    add_generation_prompt: bool = True
    continue_final_message: bool = Field(False, description="the answer goes on where the last message ends")
    chat_template_kwargs: Optional[dict[str, Any]] = Field(None, description="variables of the chat template")


class ChatCompletionRequest(SamplingFields, ChatFields):
    """``POST /v1/chat/completions``"""

    max_tokens: Optional[Int] = Field(None, description="older name of max_completion_tokens")
    max_completion_tokens: Optional[Int] = Field(None, description="longest answer; default: up to the window")
    logprobs: Optional[bool] = None
    top_logprobs: Optional[Int] = None
    response_format: Optional[ResponseFormat] = None

    def sampling_params(self) -> SamplingParams:
        """Raises :class:`APIError` that names a wrong value."""
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs may only be given with logprobs: true", "top_logprobs")
        most = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return self._sampling(max_tokens=most, logprobs=(self.top_logprobs or 0) if self.logprobs else None)


class TokenizeRequest(Strict):
    """``POST /tokenize`` of a text."""

    model: Optional[str] = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChatRequest(ChatFields):
    """``POST /tokenize`` of messages."""

    model: Optional[str] = None
    return_token_strs: bool = False


def _tokenize_kind(body: Any) -> str:
    return "chat" if isinstance(body, TokenizeChatRequest) or isinstance(body, dict) and "messages" in body else "text"


AnyTokenizeRequest = Annotated[
    Union[Annotated[TokenizeRequest, Tag("text")], Annotated[TokenizeChatRequest, Tag("chat")]],
    Discriminator(_tokenize_kind),
]


class DetokenizeRequest(Strict):
    """``POST /detokenize``"""

    model: Optional[str] = None
    tokens: list[Int]


def parse(model: type[BaseModel], body: Any) -> Any:
    """A request from decoded JSON. Raises :class:`APIError` (400)."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise of_validation(error.errors(include_url=False, include_input=False, include_context=False)) from None


def of_validation(errors: Any) -> APIError:
    """400 from pydantic's list of errors, of which the first is told."""
    unknown = next((e for e in errors if e["type"] == "extra_forbidden"), None)
    first = unknown or errors[0]
    path = _path(first)
    param = path[0][:100] if path else None
    if first["type"] == "json_invalid" or not path:
        return invalid("the body is not a JSON object; send one with Content-Type: application/json")
    if unknown:
        return invalid(f"unknown parameter: {'.'.join(path)[:200]!r}", param, "unknown_parameter")
    if first["type"] == "missing":
        return invalid(f"missing parameter: {'.'.join(path)[:200]!r}", param, "missing_required_parameter")
    wanted = dict.fromkeys(e["msg"] for e in errors if _path(e)[:1] == path[:1])
    return invalid(f"{param or 'the body'} is wrong: {'; or: '.join(wanted)[:400]}", param, "invalid_type")


def _path(error: Any) -> list[str]:
    """Names and indices that lead to the wrong value, without the words that FastAPI and the tagged union put before
    them.
    """
    path = [str(part) for part in error["loc"]]
    while path and path[0] in ("body", "text", "chat"):
        del path[0]
    return path


# ---------------------------------------------------------------------------------------------------------- responses


class Error(BaseModel):
    message: str
    type: str
    param: Optional[str]
    code: Optional[str]


class ErrorResponse(BaseModel):
    error: Error


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class CacheUsage(BaseModel):
    slots: int = Field(description="cache slots that the answers took, over all layers and KV heads")
    compression_ratio: float = Field(description="what an uncompressed cache would have taken, divided by slots")


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


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: Optional[CompletionLogprobs]
    finish_reason: Optional[Literal["stop", "length"]]
    stop_reason: Union[int, str, None] = Field(description="the stop token or string")
    token_ids: list[int] = Field([], description="with return_token_ids")
    prompt_token_ids: list[int] = Field([], description="with return_token_ids")


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


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: Optional[ChatLogprobs]
    finish_reason: Literal["stop", "length"]
    stop_reason: Union[int, str, None]
    token_ids: list[int] = Field([], description="with return_token_ids")
    prompt_token_ids: list[int] = Field([], description="with return_token_ids")


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
