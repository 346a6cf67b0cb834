"""Input processor: tokenizes prompts and checks requests, the same for ``LLM``, the server and the batch runner."""

import dataclasses
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, Optional, Self

from megatron.dmc.config.checks import shown
from megatron.dmc.inference.cache import PagedCache
from megatron.dmc.inference.errors import InvalidRequest
from megatron.dmc.inference.grammar import Grammar, GrammarCompiler
from megatron.dmc.inference.request import Request
from megatron.dmc.inference.sampling_params import SamplingParams
from megatron.dmc.inference.structured_outputs import refuse
from megatron.dmc.inference.token_masks import bad_word_ids


@dataclasses.dataclass(frozen=True)
class InputProcessor:
    """Makes requests that the engine can complete. Reads constants only, so threads may each use one.

    Tokenizers are not safe to share between threads: :meth:`with_tokenizer` gives a processor with a copy.
    """

    tokenizer: Optional[Any]
    """As transformers make it; None takes token ids only."""
    vocab_size: int
    max_model_len: int
    cache: PagedCache
    expected_cr: float
    """Compression ratio by which a prompt's pages are estimated."""
    model: str | Path
    """Model directory, for messages."""
    grammars: Optional[GrammarCompiler] = None
    """Compiler of structured outputs, which all copies share."""
    max_logprobs: int = 100
    """Most log-probabilities of other tokens that a request may ask for at each position; -1: no bound."""

    def with_tokenizer(self, tokenizer: Optional[Any]) -> Self:
        return dataclasses.replace(self, tokenizer=tokenizer)

    def process(
        self,
        request_id: str,
        prompt: str | Iterable[int],
        sampling_params: SamplingParams = SamplingParams(),
        *,
        cache_salt: Optional[str] = None,
        report_cache: bool = False,
    ) -> Request:
        """The request of a prompt. Raises :class:`InvalidRequest`."""
        text = prompt if isinstance(prompt, str) else None
        ids = self.tokenize(prompt)
        self.check(ids, sampling_params)
        grammar, bad_words = self.grammar(sampling_params), self._bad_word_ids(sampling_params)
        return Request(request_id, ids, sampling_params, text, cache_salt, report_cache, grammar, bad_words)

    def grammar(self, sampling_params: SamplingParams) -> Optional[Grammar]:
        """The compiled grammar of ``structured_outputs``; None where none is asked for.

        It may take a second for a grammar that was not compiled lately, and does not need the tokenizer's thread.

        Raises:
            InvalidRequest: a constraint that cannot be compiled.
        """
        constraint = sampling_params.structured_outputs
        if constraint is None:
            return None
        if self.grammars is None:
            raise refuse("is not supported: there is no tokenizer")
        return self.grammars.compile(constraint)

    def _bad_word_ids(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        if not params.bad_words:
            return ()
        if self.tokenizer is None:
            raise InvalidRequest(f"bad_words is {list(params.bad_words)}, and there is no tokenizer", "bad_words")
        return bad_word_ids(self.tokenizer, params.bad_words)

    def tokenize(self, prompt: str | Iterable[int], add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, or token ids as they are.

        Args:
            add_special_tokens: what the tokenizer adds to a text, such as BOS.

        Raises:
            InvalidRequest: a text without a tokenizer, one that is no Unicode, or one that is longer in characters than
                the longest tokens could make it; it is not tokenized then.
        """
        if not isinstance(prompt, str):
            return prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)
        tokenizer = self.needed_tokenizer()
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"character {error.start} of the prompt is half of a surrogate pair", "prompt"
            ) from None
        if len(prompt) > self._longest_token * self.max_model_len:
            raise self._too_long(f"{len(prompt)} characters, more than so many tokens can hold")
        return list(tokenizer(prompt, add_special_tokens=add_special_tokens)["input_ids"])

    def _too_long(self, length: str) -> InvalidRequest:
        """Error of a prompt that exceeds the context length. It begins as OpenAI's and vLLM's, by which clients such as
        litellm and inspect-ai know it.
        """
        message = (
            f"This model's maximum context length is {self.max_model_len} tokens. However, your prompt has {length}. "
            "Please reduce the length of the prompt."
        )
        return InvalidRequest(message, "prompt", "context_length_exceeded")

    def needed_tokenizer(self) -> Any:
        """The tokenizer. Raises :class:`InvalidRequest` when there is none."""
        if self.tokenizer is None:
            raise InvalidRequest(f"{self.model} has no tokenizer; give the prompt as token ids", "prompt")
        return self.tokenizer

    @cached_property
    def _longest_token(self) -> int:
        """Number of characters of the tokenizer's longest token."""
        return max(map(len, self.needed_tokenizer().get_vocab()))

    def check(self, ids: list[int], params: SamplingParams) -> None:
        """Raise :class:`InvalidRequest` for a request that can never be completed."""
        if not ids:
            raise InvalidRequest("the prompt is empty; give at least one token", "prompt")
        for at, token in enumerate(ids):
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < self.vocab_size:
                last = self.vocab_size - 1
                message = f"token {at} of the prompt is {shown(token)}; the model has the tokens 0 to {last}"
                raise InvalidRequest(message, "prompt")
        room = 0 if params.max_tokens == 0 else 1
        if len(ids) + room > self.max_model_len:
            raise self._too_long(f"{len(ids)} tokens{', and no room is left for a completion' * room}")
        params.check_vocabulary(self.vocab_size)
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > self.max_logprobs >= 0:
                message = f"{name} is {getattr(params, name)}; it may be at most {self.max_logprobs} (max_logprobs)"
                raise InvalidRequest(message, name)
        if params.stop and self.tokenizer is None:
            message = f"stop is {list(params.stop)}, and there is no tokenizer; use stop_token_ids"
            raise InvalidRequest(message, "stop")
        pages = self.cache.pages_at(len(ids) + 1, self.expected_cr)
        if pages > self.cache.num_pages:
            raise InvalidRequest(
                f"the prompt has {len(ids)} tokens and would take {pages} pages at the model's compression ratio of "
                f"{self.expected_cr:g}; the cache has {self.cache.num_pages}: give it more memory",
                "prompt",
                "context_length_exceeded",
            )
