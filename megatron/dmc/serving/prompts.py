"""From a request body to requests for the engine, and from tokens to their text: the server's side of a tokenizer."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Optional

from megatron.dmc.inference import InvalidRequest, Request, SamplingParams
from megatron.dmc.inference.input_processor import InputProcessor
from megatron.dmc.inference.text import decode
from megatron.dmc.serving.errors import invalid, of_invalid_request
from megatron.dmc.serving.protocol import ChatCompletionRequest, ChatFields, CompletionRequest, GenerationRequest


class Prompts:
    """Prompts and texts of requests. Without a tokenizer, prompts are token ids and completions have no text.

    May be used by several threads while the engine detokenizes in another, given a processor with its own tokenizer.
    """

    def __init__(self, processor: InputProcessor) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
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
        if not getattr(tokenizer, "chat_template", None):
            raise invalid("the tokenizer has no chat template; use /v1/completions", "messages")
        reserved = {
            "tokenize",
            "add_generation_prompt",
            "continue_final_message",
            "chat_template",
            "return_dict",
            "conversation",
        }
        extra = request.chat_template_kwargs or {}
        if taken := sorted(reserved & extra.keys()):
            raise invalid(
                f"chat_template_kwargs holds {taken[0]!r}, which is no variable of a template", "chat_template_kwargs"
            )
        try:
            text = tokenizer.apply_chat_template(
                [message.plain() for message in request.messages],
                tokenize=False,
                add_generation_prompt=request.add_generation_prompt,
                continue_final_message=request.continue_final_message,
                **extra,
            )
        except Exception as error:  # templates raise what they like
            raise invalid(
                f"the messages do not fit the chat template: {' '.join(str(error).split())[:200]}", "messages"
            ) from None
        return self.encode(text, add_special_tokens=False)  # the template writes BOS itself

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
        prompts = [self.of_chat(body)] if is_chat else self.of_completion(body)
        for ids in prompts:
            self._check_context(ids, params)
        try:
            return [
                self.processor.process(f"{request_id}-{i}", ids, params, report_cache=report_cache)
                for i, ids in enumerate(prompts)
            ]
        except InvalidRequest as error:
            raise of_invalid_request(error) from None

    def _check_context(self, ids: Sequence[int], params: SamplingParams) -> None:
        """Raise :class:`APIError` when prompt and ``max_tokens`` exceed the context length together, as OpenAI does."""
        total = len(ids) + (params.max_tokens or 0)
        if total > self.max_model_len:
            raise invalid(
                f"the prompt has {len(ids)} tokens and the completion may have {params.max_tokens or 0}; together they "
                f"may have {self.max_model_len} (max_model_len)",
                "max_tokens" if params.max_tokens and len(ids) < self.max_model_len else "prompt",
                "context_length_exceeded",
            )

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
