"""Parameters of OpenAI's API and of vLLM's that this server knows by name and does not implement, as one table.

The rule for them: null, an empty value, or the value that asks for nothing is taken; any other value is refused by name
as not supported. A name that is in no table and no request model is refused as unknown. Parameters that only annotate
a request (``user``, ``metadata``) are fields of the request models, with their types, and are ignored.

Sources: the request types of openai-python 3.57.0 (``openai/types/chat/completion_create_params.py``,
``openai/types/completion_create_params.py``), and of vLLM as of November 2026 (``ChatCompletionRequest``,
``CompletionRequest``, ``StreamOptions``) with names that earlier releases had (``guided_json``, ``logits_processors``).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Unsupported:
    """A parameter that another server has and this one has not."""

    neutral: tuple[Any, ...] = ()
    """Values that ask for nothing, besides null and empty ones."""
    empty: bool = True
    """Whether an empty text, list or object asks for nothing."""
    values: tuple[Any, ...] = ()
    """Values that other servers take, for a parameter of which this one takes some values only."""
    instead: str = "leave it out"
    """What to do, for the error message."""

    def asks_for_nothing(self, value: Any) -> bool:
        if value is None or (self.empty and value in ("", [], {})):
            return True
        return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in self.neutral)


NULL = Unsupported()
FALSE = Unsupported((False,))
EITHER = Unsupported((False, True))
"""A switch of something that this server never does."""

GENERATION: dict[str, Unsupported] = {
    # vLLM
    "best_of": Unsupported((1,), instead="use n"),
    "early_stopping": FALSE,
    "ec_transfer_params": NULL,
    "guided_decoding_backend": NULL,
    "include_reasoning": EITHER,
    "kv_transfer_params": NULL,
    "length_penalty": Unsupported((1,)),
    "logits_processors": NULL,
    "logprob_token_ids": NULL,
    "priority": Unsupported((0,)),
    "repetition_detection": NULL,
    "return_mm_kwargs": EITHER,
    "return_token_offsets": FALSE,
    "routed_experts_prompt_start": Unsupported((0,)),
    "spaces_between_special_tokens": Unsupported((True,)),
    "stream_interval": Unsupported((1,)),
    "thinking_token_budget": Unsupported((-1,)),
    "use_beam_search": FALSE,
    "vllm_xargs": NULL,
    "watermarking": FALSE,
    "echo": FALSE,
    "media_io_kwargs": NULL,
    "mm_processor_kwargs": NULL,
    "prompt_embeds": NULL,
    "return_prompt_text": FALSE,
    # OpenAI
    "audio": NULL,
    "function_call": Unsupported(("none", "auto")),
    "functions": NULL,
    "modalities": Unsupported((["text"],)),
    "moderation": NULL,
    "prediction": NULL,
    "prompt_cache_retention": Unsupported(("in_memory",)),
    "reasoning_effort": Unsupported(("none",), instead="set the template's own variable with chat_template_kwargs"),
    "tool_choice": Unsupported(("none", "auto")),
    "tools": NULL,
    "verbosity": Unsupported(("medium",)),
    "service_tier": Unsupported(("auto", "default")),
    "store": FALSE,
    "suffix": NULL,
    "web_search_options": Unsupported(empty=False),
}
"""Parameters of completions and of chat completions. Clients send those of one to the other, so there is one table."""

TOKENIZE_CHAT: dict[str, Unsupported] = {"media_io_kwargs": NULL, "mm_processor_kwargs": NULL}

STREAM_OPTIONS: dict[str, Unsupported] = {"include_obfuscation": FALSE}

RESPONSE_FORMAT: dict[str, Unsupported] = {
    "type": Unsupported(values=("structural_tag",), instead="use text, json_object or json_schema")
}

STRUCTURED_OUTPUTS: dict[str, Unsupported] = {
    "disable_additional_properties": Unsupported((False,), instead="write additionalProperties: false in the schema"),
    "disable_fallback": EITHER,
    "structural_tag": NULL,
}

MESSAGE: dict[str, Unsupported] = {"audio": NULL, "function_call": NULL, "refusal": NULL}

CONTENT_PART: dict[str, Unsupported] = {
    "audio_url": NULL,
    "file": NULL,
    "image_url": NULL,
    "input_audio": NULL,
    "refusal": NULL,
    "video_url": NULL,
    "type": Unsupported(
        values=("audio_url", "file", "image_url", "input_audio", "refusal", "video_url"), instead="send text only"
    ),
}

NONE: Mapping[str, Unsupported] = {}
