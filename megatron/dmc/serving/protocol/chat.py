"""Bodies of ``/v1/chat/completions``: messages and the parameters of the chat template."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, Optional, Union

from pydantic import Field

from megatron.dmc.inference import SamplingParams, StructuredOutputsParams
from megatron.dmc.serving.errors import invalid
from megatron.dmc.serving.protocol import dialect
from megatron.dmc.serving.protocol.base import Int, RequestModel
from megatron.dmc.serving.protocol.generation import SamplingFields
from megatron.dmc.serving.protocol.tools import ToolCall, ToolChoiceFields, ToolFields


class ContentPart(RequestModel):
    """Part of a message's content."""

    unsupported: ClassVar = dialect.CONTENT_PART

    type: Literal["text"]
    """Must be `text`; images and audio are not supported."""
    text: str
    """Text of the part."""
    prompt_cache_breakpoint: Optional[dict[str, Any]] = None
    """Hint for a prefix cache, which is accepted and ignored."""


class Message(RequestModel):
    """Message of a chat. One that the server has sent may be sent back as it is."""

    unsupported: ClassVar = dialect.MESSAGE

    role: str
    """Role of the author, one that the chat template knows, such as `system`, `user` or `assistant`."""
    content: Union[str, Annotated[list[ContentPart], Field(fail_fast=True)], None] = None
    """Text of the message, or its parts, which are joined."""
    name: Optional[str] = None
    """Name of the author, passed to the chat template."""
    reasoning_content: Optional[str] = None
    """Reasoning before the content of an assistant's message, passed to the chat template."""
    reasoning: Optional[str] = None
    """Newer name of `reasoning_content`, passed to the chat template."""
    annotations: Optional[list[Any]] = None
    """Citations of an assistant's message, which are accepted and ignored."""
    tool_calls: Optional[Annotated[list[ToolCall], Field(fail_fast=True)]] = None
    """Calls of functions in an assistant's message."""
    tool_call_id: Optional[str] = None
    """Name of the call whose result a message of the role `tool` is."""

    @property
    def text(self) -> str:
        """Content as one text, with a newline between its parts, as vLLM joins them."""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content or ())

    def plain(self, lists: bool = False, texts: bool = True) -> dict[str, Any]:
        """Message as a chat template takes it.

        Args:
            lists: the template takes lists of parts.
            texts: it takes texts.
        """
        content: Any = self.text
        if lists and not (texts and isinstance(self.content, (str, type(None)))):
            parts = [content] if isinstance(self.content, str) else [part.text for part in self.content or ()]
            content = [{"type": "text", "text": text} for text in parts]
        more: dict[str, Any] = {
            name: getattr(self, name) for name in ("name", "reasoning_content", "reasoning", "tool_call_id")
        }
        more["tool_calls"] = [call.plain() for call in self.tool_calls or ()]
        return {"role": self.role, "content": content} | {name: value for name, value in more.items() if value}


class ChatFields(ToolFields):
    """Parameters of the chat template."""

    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1)
    """Messages of the chat so far, at least one."""
    add_generation_prompt: Optional[bool] = True
    """End the prompt with what introduces the assistant's message."""
    continue_final_message: Optional[bool] = False
    """Continue the last message instead of starting a new one; needs `add_generation_prompt: false`."""
    add_special_tokens: Optional[bool] = False
    """Let the tokenizer add special tokens such as BOS to what the template writes."""
    chat_template: Optional[str] = None
    """Chat template instead of the model's, only taken by a server with `--trust-request-chat-template`."""
    chat_template_kwargs: Optional[dict[str, Any]] = None
    """Extra variables of the chat template."""
    documents: Optional[list[dict[str, Any]]] = None
    """Documents for the chat template, for generation with retrieval."""

    def _sent_name(self, param: str) -> str:
        return "messages" if param == "prompt" else param


class ChatCompletionRequest(SamplingFields, ToolChoiceFields, ChatFields):
    """Body of ``POST /v1/chat/completions``."""

    max_tokens: Optional[Int] = None
    """Most tokens to generate; older name of `max_completion_tokens`, which wins if both are given."""
    max_completion_tokens: Optional[Int] = None
    """Most tokens to generate; the default is up to the context length."""
    logprobs: Optional[bool] = None
    """Return the log-probability of every sampled token."""
    top_logprobs: Optional[Int] = None
    """Number of most likely tokens, 0 to 100, to return log-probabilities of; only allowed with `logprobs: true`."""
    prompt_cache_options: Optional[dict[str, Any]] = None
    """Hints for a prefix cache, which are accepted and ignored."""

    def sampling_params(self, defaults: Mapping[str, Any] = MappingProxyType({})) -> SamplingParams:
        """Sampling parameters of the request. Raises :class:`APIError` that names a wrong value."""
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs may only be given with logprobs: true", "top_logprobs")
        self.check_tools()
        return super().sampling_params(defaults)

    def constraint(self) -> Optional[StructuredOutputsParams]:
        """What the completion must match; calls that are required come before all else."""
        own = self.tool_constraint()
        return super().constraint() if own is None else own

    def _sent_constraint(self, param: str) -> str:
        return "tools" if self.tool_mode in ("required", "named") else super()._sent_constraint(param)

    def _derived_params(self) -> dict[str, Any]:
        most = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        given = {"max_tokens": most, "logprobs": (self.top_logprobs or 0) if self.logprobs else None}
        if self.tool_mode == "auto":  # what introduces a call may be a special token
            given["skip_special_tokens"] = bool(self.skip_special_tokens)
        return given

    def _sent_name(self, param: str) -> str:
        names = {"prompt": "messages", "logprobs": "top_logprobs"}
        if self.max_completion_tokens is not None:
            names["max_tokens"] = "max_completion_tokens"
        return names.get(param, param)
