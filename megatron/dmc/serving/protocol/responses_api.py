"""Body of ``/v1/responses``, OpenAI's newer API: what needs no store on the server, and function tools.

A request is carried out as a chat completion (:func:`~megatron.dmc.serving.responses_api.chat_body`). Source of names
and shapes: ``openai/types/responses`` of openai-python 3.52.0.
"""

from typing import Annotated, Any, ClassVar, Literal, Optional, Union

from pydantic import Discriminator, Field, Tag

from megatron.dmc.serving.protocol import dialect
from megatron.dmc.serving.protocol.base import Int, ModelField, RequestModel
from megatron.dmc.serving.protocol.dialect import FALSE, NULL, Unsupported

_STATELESS = "send the whole conversation as input: this server stores nothing"
_BODY: dict[str, Unsupported] = {
    "access_programs": NULL,
    "background": Unsupported((False,), instead=_STATELESS),
    "context_management": NULL,
    "conversation": Unsupported(instead=_STATELESS),
    "image": NULL,
    "max_tool_calls": NULL,
    "moderation": NULL,
    "previous_response_id": Unsupported(instead=_STATELESS),
    "prompt": Unsupported(instead="send the text as input and instructions"),
    "prompt_cache_retention": Unsupported(("in_memory",)),
    "service_tier": Unsupported(("auto", "default")),
    "store": Unsupported((False,), instead=_STATELESS),
    "stream_options": Unsupported(({"include_obfuscation": False},)),
    "truncation": Unsupported(("disabled",)),
}
_CONTENT = dialect.CONTENT_PART | {
    "type": Unsupported(values=("input_image", "input_file", "input_audio", "refusal"), instead="send text only")
}


class TextPart(RequestModel):
    """Text of a message, of the user or as the server has sent it."""

    unsupported: ClassVar = _CONTENT

    type: Literal["input_text", "output_text", "text"]
    """Kind of part; only texts are supported."""
    text: str
    """Text of the part."""
    annotations: Optional[list[Any]] = None
    """Citations in a text of the assistant, which are accepted and ignored."""
    logprobs: Optional[list[Any]] = None
    """Log-probabilities of a text of the assistant, which are accepted and ignored."""


Content = Union[str, Annotated[list[TextPart], Field(fail_fast=True)]]


class ConversationItem(RequestModel):
    """Part of the conversation so far."""

    unsupported: ClassVar = {"phase": NULL, "namespace": NULL, "caller": NULL, "async": FALSE}

    id: Optional[str] = None
    """Name of the item, which is accepted and ignored."""
    status: Optional[str] = None
    """State of the item, which is accepted and ignored."""


class MessageItem(ConversationItem):
    """Message of the conversation."""

    type: Optional[Literal["message"]] = "message"
    """Kind of item."""
    role: str
    """Role of the author: `user`, `assistant`, `system` or `developer`, which is the system too."""
    content: Content
    """Text of the message, or its parts."""


class FunctionCallItem(ConversationItem):
    """Call of a function, as the model has made it."""

    type: Literal["function_call"]
    """Kind of item."""
    call_id: str
    """Name of the call, which its output repeats."""
    name: str
    """Name of the function."""
    arguments: str
    """Arguments of the call, as JSON."""


class FunctionOutputItem(ConversationItem):
    """Result of a function call."""

    type: Literal["function_call_output"]
    """Kind of item."""
    call_id: str
    """Name of the call."""
    output: Content
    """Result, as text or parts."""


_ITEMS = {"message": MessageItem, "function_call": FunctionCallItem, "function_call_output": FunctionOutputItem}


def _item_kind(value: Any) -> Optional[str]:
    """Tag of the one type that an item is checked against."""
    kind = value.get("type") or "message" if isinstance(value, dict) else None
    return kind if kind in _ITEMS else None


Item = Annotated[
    Union[
        Annotated[MessageItem, Tag("message")],
        Annotated[FunctionCallItem, Tag("function_call")],
        Annotated[FunctionOutputItem, Tag("function_call_output")],
    ],
    Discriminator(
        _item_kind,
        custom_error_type="item_type",
        custom_error_message="Input should be an item of type message, function_call or function_call_output",
    ),
]


class FunctionTool(RequestModel):
    """Function that the model may call."""

    unsupported: ClassVar = {
        "type": Unsupported(
            values=("web_search", "web_search_preview", "file_search", "code_interpreter", "image_generation", "mcp"),
            instead="offer functions only",
        ),
        "defer_loading": FALSE,
        "allowed_callers": NULL,
        "output_schema": NULL,
        "async": FALSE,
    }

    type: Literal["function"]
    """Kind of tool; only functions are supported."""
    name: str
    """Name of the function."""
    description: Optional[str] = None
    """What the function does, for the model."""
    parameters: Optional[dict[str, Any]] = None
    """JSON schema of the arguments."""
    strict: Optional[bool] = None
    """Keep the arguments to the schema."""


class NamedFunction(RequestModel):
    """The one function that must be called."""

    type: Literal["function"]
    """Kind of tool; only functions are supported."""
    name: str
    """Name of the function."""


class TextConfig(RequestModel):
    """Settings of the text."""

    unsupported: ClassVar = {"verbosity": Unsupported(("medium",))}

    format: Optional[dict[str, Any]] = None
    """Format of the text: `{"type": "text"}`, `json_object`, or `json_schema` with `name` and `schema`."""


class Reasoning(RequestModel):
    """Settings of reasoning models."""

    unsupported: ClassVar = {
        "effort": Unsupported(("none",)),
        "summary": Unsupported(("auto",)),
        "generate_summary": NULL,
        "context": NULL,
        "mode": NULL,
    }


Includable = Literal["message.output_text.logprobs", "reasoning.encrypted_content"]


class ResponsesRequest(ModelField):
    """Body of ``POST /v1/responses``."""

    unsupported: ClassVar = _BODY

    input: Union[str, Annotated[list[Item], Field(fail_fast=True, min_length=1)]]
    """Text of the user, or the items of the conversation so far: messages, function calls and their outputs."""
    instructions: Optional[str] = None
    """System message that comes first."""
    max_output_tokens: Optional[Int] = None
    """Most tokens to generate; the default is up to the context length."""
    temperature: Optional[float] = None
    """Softmax temperature, default 1; 0 means greedy decoding."""
    top_p: Optional[float] = None
    """Total probability of the most likely tokens to sample from, above 0 and at most 1, default 1."""
    stream: Optional[bool] = None
    """Send the response as server-sent events while it is generated."""
    text: Optional[TextConfig] = None
    """Settings of the text, such as a JSON schema."""
    tools: Optional[list[FunctionTool]] = None
    """Functions that the model may call."""
    tool_choice: Union[Literal["none", "auto", "required"], NamedFunction, None] = None
    """Whether functions may (`auto`), must (`required`) or must not (`none`) be called, or the one that must."""
    parallel_tool_calls: Optional[bool] = None
    """Permission to call several functions at once, default true."""
    include: Optional[list[Includable]] = None
    """`message.output_text.logprobs` asks for log-probabilities; `reasoning.encrypted_content` for nothing here."""
    top_logprobs: Optional[Int] = None
    """Number of most likely tokens, 0 to 20, to return log-probabilities of, with `include`."""
    reasoning: Optional[Reasoning] = None
    """Settings of reasoning models, which ask for nothing here."""
    metadata: Optional[dict[str, str]] = None
    """Notes of the client, which are sent back."""
    user: Optional[str] = None
    """Name of the end user, which is accepted and ignored."""
    safety_identifier: Optional[str] = None
    """Name of the end user for abuse detection, which is accepted and ignored."""
    prompt_cache_key: Optional[str] = None
    """Hint for a router of requests, which is accepted and ignored: the prefix cache finds every shared prefix."""
    prompt_cache_options: Optional[dict[str, Any]] = None
    """Hints for a prefix cache, which are accepted and ignored."""

    _NAMES: ClassVar = {
        "messages": "input",
        "prompt": "input",
        "max_tokens": "max_output_tokens",
        "max_completion_tokens": "max_output_tokens",
        "response_format": "text.format",
    }

    def _sent_name(self, param: str) -> str:
        """Name of a parameter of the chat completion that stands for this request."""
        head = param.split(".")[0].split("[")[0]
        return self._NAMES.get(head, head)
