"""Bodies of responses, for the OpenAPI schema."""

from typing import Any, Literal, Optional, Union

from pydantic import BaseModel, Field


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
    bytes_per_token: float = Field(description="Bytes of the KV slots per token in the cache, over all layers.")


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


class PromptLogprob(BaseModel):
    logprob: float
    rank: int = Field(description="Rank of the token; 1 is the most likely.")
    decoded_token: str


class Choice(BaseModel):
    """Fields of every completion of a response."""

    index: int
    stop_reason: Union[int, str, None] = Field(description="Stop token or string that ended the completion.")
    token_ids: list[int] = Field([], description="Token ids of the completion, with return_token_ids.")
    prompt_token_ids: list[int] = Field([], description="Token ids of the prompt, with return_token_ids.")


PromptLogprobs = list[Optional[dict[str, PromptLogprob]]]


class CompletionChoice(Choice):
    prompt_logprobs: PromptLogprobs = Field([], description="By token id, for every token of the prompt but the first.")
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


class FunctionOutput(BaseModel):
    name: str
    arguments: str = Field(description="Arguments as JSON, as the model wrote them.")


class ToolCallOutput(BaseModel):
    id: str
    type: Literal["function"]
    function: FunctionOutput


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: Optional[str]
    refusal: None
    tool_calls: list[ToolCallOutput] = Field([], description="Calls of tools; left out when there are none.")


class ChatChoice(Choice):
    message: ChatMessage
    logprobs: Optional[ChatLogprobs]
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletionResponse(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs = Field([], description="By token id, for every token of the prompt but the first.")


class ResponsesUsage(BaseModel):
    input_tokens: int
    input_tokens_details: dict[str, int] = Field(description="Number of input tokens found in the prefix cache.")
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int
    dmc: CacheUsage


class ResponsesResponse(BaseModel):
    """Response of the Responses API; settings of the request are repeated in it."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: Optional[int]
    status: Literal["completed", "incomplete", "failed", "in_progress"]
    error: Optional[dict[str, str]]
    incomplete_details: Optional[dict[str, str]]
    model: str
    output: list[dict[str, Any]] = Field(description="Messages and function calls.")
    usage: Optional[ResponsesUsage]


class Compression(BaseModel):
    """How a model compresses its KV cache."""

    method: Literal["dmc", "dms"] = Field(description="dmc merges tokens, dms evicts them.")
    window: Optional[int] = Field(
        description="dmc: tokens that a slot averages over, null for all; dms: tokens from a mark to the eviction."
    )
    decision_source: Literal["key", "query", "adapter"] = Field(description="What decisions are read from.")
    decision_about: Literal["previous", "self"] = Field(description="Token that a decision is about.")
    decision_per: Literal["head", "layer"] = Field(description="Who decides: every KV head, or a layer for all.")
    expected_ratio: float = Field(description="Compression ratio that was measured, or trained for.")


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int
    compression: Optional[Compression] = Field(description="null for a model that does not compress.")
    quantization: Optional[str] = Field(
        description="int8 or int4, type of the weights; or compressed-tensors, gptq, awq or gguf, format of quantized "
        "files; null: the type of activations."
    )


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
