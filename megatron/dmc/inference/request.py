"""A request's answers while they are being made, and what a step reports of them."""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Optional

from torch import Tensor

from megatron.dmc.inference.cache import CacheUse
from megatron.dmc.inference.sampler import Logprobs, SamplerState
from megatron.dmc.inference.sampling_params import SamplingParams
from megatron.dmc.inference.text import Detokenizer

if TYPE_CHECKING:
    from megatron.dmc.inference.prefix import Node

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(eq=False)
class Sequence:
    """One answer: its tokens, how far the cache has read them, and what it still needs to go on."""

    request_id: str
    index: int
    """Which of the request's ``n`` answers."""
    ticket: int
    """Order of arrival; a pre-empted sequence keeps it."""
    tokens: list[int]
    """Prompt and answer."""
    prompt_length: int
    params: SamplingParams
    sampler: SamplerState
    stop_ids: frozenset[int]
    limit: int
    """Tokens at which it ends, prompt counted."""
    text: Optional[Detokenizer] = None
    """None without a tokenizer."""
    row: Optional[int] = None
    """Of the cache; None while it waits."""
    computed: int = 0
    """Tokens that the cache has read."""
    cache_salt: Optional[str] = None
    """Prefixes are shared among requests with the same one."""
    node: Optional[Node] = None
    """Of the prefix cache, at the end of the prompt."""
    num_cached_tokens: Optional[int] = None
    """Of the prompt, when it was first given a row."""
    logits: Optional[Tensor] = None
    """[vocabulary], after the last token, when a snapshot had them: the next token is drawn without reading anything.
    """
    prompt_logprobs: list[Logprobs] = field(default_factory=list)
    """The same list for all answers of a request."""
    arrived: float = field(default_factory=time.monotonic)
    started: Optional[float] = None
    """When it was first given a row."""
    first_token: Optional[float] = None
    preemptions: int = 0

    @property
    def remaining(self) -> int:
        """Tokens that the cache has to read before the next one can be drawn."""
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    def wanted_logits(self, count: int) -> int:
        """Of how many of the next ``count`` tokens, the last ones."""
        if self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < self.prompt_length - 1:
            return count
        return int(count == self.remaining)


@dataclass(frozen=True)
class Timing:
    """Seconds since the request arrived; None for what did not happen."""

    queued: Optional[float]
    first_token: Optional[float]
    total: float
    preemptions: int


@dataclass(frozen=True)
class StepOutput:
    """What is new of one answer after a step."""

    request_id: str
    index: int
    tokens: tuple[int, ...] = ()
    text: str = ""
    """New text; half characters and what may become a stop string come later."""
    logprobs: tuple[Logprobs, ...] = ()
    """Of ``tokens``, when asked for."""
    prompt_logprobs: tuple[Logprobs, ...] = ()
    """With the first token (or the end, when there is none), when asked for."""
    num_cached_tokens: int = 0
    """Tokens of the prompt that were found in the prefix cache."""
    finish_reason: Optional[FinishReason] = None
    stop_reason: int | str | None = None
    """The stop token or string; None for the end-of-sequence token."""
    error: Optional[str] = None
    cache: Optional[CacheUse] = None
    """At the end: what the answer had in the cache."""
    timing: Optional[Timing] = None
    """At the end."""

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class Completion:
    """One answer of a finished request."""

    index: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: Optional[list[Logprobs]] = None
    finish_reason: Optional[FinishReason] = None
    stop_reason: int | str | None = None
    cache: Optional[CacheUse] = None
    timing: Optional[Timing] = None


@dataclass
class RequestOutput:
    """A prompt and its answers. ``error`` says why a request failed;
    its answers then hold what there was until then.
    """

    request_id: str
    prompt: Optional[str]
    prompt_token_ids: Seq[int]
    outputs: list[Completion]
    prompt_logprobs: Optional[list[Logprobs]] = None
    error: Optional[str] = None
    num_cached_tokens: int = 0
    """Tokens of the prompt that the first answer found in the prefix cache."""

    def add(self, step: StepOutput) -> None:
        """Take in one step's output."""
        completion = self.outputs[step.index]
        completion.token_ids += step.tokens
        completion.text += step.text
        if completion.logprobs is not None:
            completion.logprobs += step.logprobs
        if self.prompt_logprobs is not None and step.index == 0:
            self.prompt_logprobs += step.prompt_logprobs
        if step.index == 0:
            self.num_cached_tokens = step.num_cached_tokens
        if step.finished:
            completion.finish_reason, completion.stop_reason = step.finish_reason, step.stop_reason
            completion.cache, completion.timing = step.cache, step.timing
            self.error = self.error or step.error

    @property
    def finished(self) -> bool:
        return all(completion.finish_reason is not None for completion in self.outputs)
