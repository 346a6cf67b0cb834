"""From a request body to requests for the engine, and from tokens to their text: the server's side of a tokenizer."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Optional

from megatron.dmc.inference import InvalidRequest, Request, SamplingParams
from megatron.dmc.inference.generation_config import default_sampling_params
from megatron.dmc.inference.input_processor import InputProcessor
from megatron.dmc.inference.text import decode
from megatron.dmc.serving.chat_template import load_chat_template, reserved_variables, wants_parts
from megatron.dmc.serving.errors import invalid, of_invalid_request
from megatron.dmc.serving.protocol import ChatCompletionRequest, ChatFields, CompletionRequest, GenerationRequest
from megatron.dmc.serving.text_offsets import TextOffsets, bytes_of, special_ids

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptSettings:
    """What turns a request body into a request, besides tokenizer and model."""

    chat_template: Optional[str] = None
    """Chat template; None is the tokenizer's."""
    default_sampling_params: Mapping[str, Any] = field(default_factory=dict)
    """Sampling parameters of requests that do not give them."""
    trust_request_chat_template: bool = False
    """Take templates that requests bring along."""
    tool_call_parser: Optional[str] = None
    """Format of tool calls, one of ``tool_calls.PARSERS``; None takes no ``tool_choice: auto``."""

    @classmethod
    def read(
        cls,
        model: str,
        chat_template: Optional[str],
        generation_config: str,
        override: Mapping[str, Any],
        trust_request_chat_template: bool = False,
        tool_call_parser: Optional[str] = None,
    ) -> PromptSettings:
        """Settings from the files and values of a command's flags. Raises ``ValueError`` that names a wrong one."""
        defaults = default_sampling_params(model, generation_config, override)
        if defaults:
            log.info("default sampling parameters: %s; --generation-config vllm takes OpenAI's", json.dumps(defaults))
        template = None if chat_template is None else load_chat_template(chat_template)
        return cls(template, defaults, trust_request_chat_template, tool_call_parser)


class Prompts:
    """Prompts and texts of requests. Without a tokenizer, prompts are token ids and completions have no text.

    May be used by several threads while the engine detokenizes in another, given a processor with its own tokenizer.
    """

    def __init__(self, processor: InputProcessor, settings: PromptSettings | None = None) -> None:
        """``processor``: of the engine, with a tokenizer for the thread that uses this."""
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.settings = settings or PromptSettings()
        self.vocab_size, self.max_model_len = processor.vocab_size, processor.max_model_len
        self._texts: dict[int, str] = {}
        self._encoding = threading.Lock()  # a tokenizer of transformers sets itself up anew for every text
        self._anchor = self._find_anchor()

    # ------------------------------------------------------------------------------------------------ to token ids

    def of_completion(self, request: CompletionRequest) -> list[list[int]]:
        """Raises :class:`APIError` for a text without a tokenizer, or no prompt at all."""
        if not request.prompts:
            raise invalid("prompt is an empty list; give at least one", "prompt")
        return [self.encode(p, request.add_special_tokens) if isinstance(p, str) else list(p) for p in request.prompts]

    def of_chat(self, request: ChatFields) -> list[int]:
        """Messages as the chat template writes them. Raises :class:`APIError` when they do not fit it."""
        if request.continue_final_message and request.add_generation_prompt:
            raise invalid(
                "continue_final_message and add_generation_prompt exclude each other; set one to false",
                "continue_final_message",
            )
        tokenizer = self._needed()
        template = self._template(request, tokenizer)
        extra = request.chat_template_kwargs or {}
        if taken := sorted(reserved_variables(tokenizer) & extra.keys()):
            raise invalid(
                f"chat_template_kwargs holds {taken[0]!r}, which is no variable of a template", "chat_template_kwargs"
            )
        lists, texts = wants_parts(template)
        try:
            text = tokenizer.apply_chat_template(
                [message.plain(lists, texts) for message in request.messages],
                documents=request.documents,
                tools=request.template_tools(),
                chat_template=template,
                tokenize=False,
                add_generation_prompt=bool(request.add_generation_prompt),
                continue_final_message=bool(request.continue_final_message),
                **extra,
            )
        except Exception as error:  # templates raise what they like
            raise invalid(
                f"the messages do not fit the chat template: {' '.join(str(error).split())[:200]}", "messages"
            ) from None
        # The template writes BOS itself.
        return self.encode(text, add_special_tokens=bool(request.add_special_tokens))

    def _template(self, request: ChatFields, tokenizer: Any) -> str:
        """Template of a chat. Raises :class:`APIError` when there is none, or the request's is not trusted."""
        if request.chat_template:
            if not self.settings.trust_request_chat_template:
                message = "chat_template is not supported: the server runs without --trust-request-chat-template"
                raise invalid(message, "chat_template", "unsupported_parameter")
            return request.chat_template
        if self.settings.chat_template is not None:
            return self.settings.chat_template
        try:
            return tokenizer.get_chat_template(tools=request.template_tools())
        except ValueError:
            raise invalid("the tokenizer has no chat template; use /v1/completions", "messages") from None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Raises :class:`APIError`."""
        try:
            with self._encoding:
                return self.processor.tokenize(text, add_special_tokens)
        except InvalidRequest as error:
            raise of_invalid_request(error) from None

    def requests(
        self, body: GenerationRequest, params: SamplingParams, request_id: str, report_cache: bool = False
    ) -> list[Request]:
        """Requests for the engine, one per prompt of the body, with ids ``request_id-0``, ``request_id-1``, ...

        Raises:
            APIError: a prompt that the engine cannot take; none of the body's prompts is to be queued then.
        """
        is_chat = isinstance(body, ChatCompletionRequest)
        if is_chat and body.tool_mode == "auto" and self.settings.tool_call_parser is None:
            message = "is 'auto', which needs a server with --enable-auto-tool-choice and --tool-call-parser"
            raise invalid(f"tool_choice {message}; use none, required or a function", "tool_choice")
        prompts = [self.of_chat(body)] if is_chat else self.of_completion(body)
        more: dict[str, Any] = {"cache_salt": body.cache_salt or None, "report_cache": report_cache}
        kept = [self._truncate(ids, body, params) for ids in prompts]
        try:
            with self._encoding if params.bad_words else contextlib.nullcontext():  # words are tokenized, too
                return [self.processor.process(f"{request_id}-{i}", ids, params, **more) for i, ids in enumerate(kept)]
        except InvalidRequest as error:
            raise of_invalid_request(error) from None

    def _truncate(self, ids: list[int], body: GenerationRequest, params: SamplingParams) -> list[int]:
        """Tokens of a prompt that ``truncate_prompt_tokens`` keeps."""
        kept = body.truncate_prompt_tokens
        if kept is None:
            return ids
        if kept == -1:
            room = 1 if params.max_tokens is None else params.max_tokens
            kept = max(1, self.max_model_len - room)
        return ids[:kept] if body.truncation_side == "right" else ids[-kept:]

    def _needed(self) -> Any:
        try:
            return self.processor.needed_tokenizer()
        except InvalidRequest as error:
            raise of_invalid_request(error) from None

    # ----------------------------------------------------------------------------------------------------- to text

    def decode(self, ids: Sequence[int]) -> str:
        """Raises :class:`APIError` for an id that the model does not have."""
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise invalid(f"token {token} is not one of the model's, 0 to {self.vocab_size - 1}", "tokens")
        return decode(self._needed(), ids)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text that each token adds, so that their sum is the text of all (but for characters in
        several tokens).
        """
        return [self.piece(token) for token in ids]

    def piece(self, token: int) -> str:
        """Text of one token inside a text: with the space before it that decoding it alone would drop."""
        found = self._texts.get(token)
        if found is None:
            found = self._texts[token] = self._piece(token)
        return found

    def _piece(self, token: int) -> str:
        if self.tokenizer is None:
            return f"token_id:{token}"
        if self._anchor is None:
            return decode(self.tokenizer, [token])
        anchor, text = self._anchor
        both = decode(self.tokenizer, [anchor, token])
        return both[len(text) :] if both.startswith(text) else decode(self.tokenizer, [token])

    def token_bytes(self, token: int) -> Optional[bytes]:
        """Bytes of one token inside a text; None for a part of a character in a form that is not known."""
        text = self.piece(token)
        if "\ufffd" not in text:
            return text.encode()
        return bytes_of(self.tokenizer.convert_ids_to_tokens(token))

    def offsets(self, skip_special_tokens: bool = True) -> TextOffsets:
        """Counter of offsets for one choice."""
        special = self.special_ids if skip_special_tokens else ()
        return TextOffsets(lambda token: self.token_bytes(token) or self.piece(token).encode(), special)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the tokens that ``skip_special_tokens`` leaves out of a text."""
        return frozenset() if self.tokenizer is None else special_ids(self.tokenizer)

    def _find_anchor(self) -> Optional[tuple[int, str]]:
        """A token with a text of its own, to decode others behind."""
        if self.tokenizer is None:
            return None
        for character in "aeto0":
            ids = self.tokenizer(character, add_special_tokens=False)["input_ids"]
            if ids and "\ufffd" not in (text := decode(self.tokenizer, ids[-1:])) and text:
                return ids[-1], text
        return None


def token_strings(prompts: Prompts, ids: Sequence[int], as_ids: bool) -> list[str]:
    return [f"token_id:{token}" for token in ids] if as_ids else prompts.pieces(ids)
