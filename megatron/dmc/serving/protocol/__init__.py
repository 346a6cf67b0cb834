"""Request and response bodies of OpenAI's API, with vLLM's extra parameters, and the sampling parameters they ask for.

Types are checked here, strictly: a number in quotes, NaN and an unknown parameter are refused. ``dialect`` has the
parameters that are known and not implemented. Ranges are checked by :class:`SamplingParams` and by the engine. Either
way the error names the parameter as the client sent it.
"""

from typing import Union

from megatron.dmc.serving.protocol.base import Int, RequestModel, TokenIds
from megatron.dmc.serving.protocol.chat import ChatCompletionRequest, ChatFields, ContentPart, Message
from megatron.dmc.serving.protocol.generation import CompletionRequest, SamplingFields, StreamOptions
from megatron.dmc.serving.protocol.response_models import (
    ChatCompletionResponse,
    CompletionResponse,
    Compression,
    DetokenizeResponse,
    ErrorResponse,
    ModelCard,
    ModelList,
    ResponsesResponse,
    TokenizeResponse,
    VersionResponse,
)
from megatron.dmc.serving.protocol.responses_api import ResponsesRequest
from megatron.dmc.serving.protocol.structured import ResponseFormat, StructuredFields
from megatron.dmc.serving.protocol.tokenizer import (
    AnyTokenizeRequest,
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeRequest,
)
from megatron.dmc.serving.protocol.validation import models_in, of_validation, parse

GenerationRequest = Union[CompletionRequest, ChatCompletionRequest]
