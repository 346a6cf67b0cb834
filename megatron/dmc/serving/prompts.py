"""From a request's prompt to token ids, and from tokens to their text: what the server needs of a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

from megatron.dmc.inference import SamplingParams
from megatron.dmc.serving.errors import invalid
from megatron.dmc.serving.protocol import ChatFields, CompletionRequest


class Prompts:
    """A tokenizer's side of the requests. ``tokenizer`` may be None: prompts are token ids then, and answers have no
    text.

    May be used by one thread while the engine decodes with the tokenizer in another; hand in a copy where that is not
    safe.
    """

    def __init__(self, tokenizer: Optional[Any], vocab_size: int, max_model_len: int) -> None:
        self.tokenizer, self.vocab_size, self.max_model_len = tokenizer, vocab_size, max_model_len
        self._texts: dict[int, str] = {}
        self._longest = max(map(len, tokenizer.get_vocab())) if tokenizer is not None else 0  # characters of a token
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
        """Raises :class:`APIError` for a text that is too long whatever its tokens are, before they are made."""
        tokenizer = self._needed()
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise invalid(f"character {error.start} of the prompt is half of a surrogate pair", "prompt") from None
        if len(text) > self._longest * self.max_model_len:
            raise invalid(
                f"the prompt has {len(text)} characters, more than {self.max_model_len} tokens (max_model_len) can "
                "hold",
                "prompt",
                "context_length_exceeded",
            )
        return list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

    def check_context(self, ids: Sequence[int], params: SamplingParams) -> None:
        """Raises :class:`APIError` when prompt and ``max_tokens`` do not fit the window together, as
        OpenAI's API does.
        """
        total = len(ids) + (params.max_tokens or 0)
        if total > self.max_model_len:
            raise invalid(
                f"the prompt has {len(ids)} tokens and max_tokens is {params.max_tokens or 0}; together they may be "
                f"{self.max_model_len} (max_model_len)",
                "max_tokens" if params.max_tokens and len(ids) < self.max_model_len else "prompt",
                "context_length_exceeded",
            )

    def _needed(self) -> Any:
        if self.tokenizer is None:
            raise invalid("the model has no tokenizer; give the prompt as token ids", "prompt")
        return self.tokenizer

    # ----------------------------------------------------------------------------------------------------- to text

    def decode(self, ids: Sequence[int]) -> str:
        """Raises :class:`APIError` for an id that the model does not have."""
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise invalid(f"token {token} is not one of the model's, 0 to {self.vocab_size - 1}", "tokens")
        return self._needed().decode(list(ids), skip_special_tokens=False)

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
            return self.tokenizer.decode([token], skip_special_tokens=False)
        anchor, text = self._anchor
        both = self.tokenizer.decode([anchor, token], skip_special_tokens=False)
        return both[len(text) :] if both.startswith(text) else self.tokenizer.decode([token], skip_special_tokens=False)

    def _find_anchor(self) -> Optional[tuple[int, str]]:
        """A token with a text of its own, to decode others behind."""
        if self.tokenizer is None:
            return None
        for character in "aeto0":
            ids = self.tokenizer(character, add_special_tokens=False)["input_ids"]
            if ids and "\ufffd" not in (text := self.tokenizer.decode(ids[-1:], skip_special_tokens=False)) and text:
                return ids[-1], text
        return None


def token_strings(prompts: Prompts, ids: Sequence[int], as_ids: bool) -> list[str]:
    return [f"token_id:{token}" for token in ids] if as_ids else prompts.pieces(ids)
