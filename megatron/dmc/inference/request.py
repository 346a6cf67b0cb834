"""A request, its sequences while they run, and the outputs that a user gets."""

import time
from dataclasses import dataclass, field
from typing import Literal, Optional, Self

from torch import Tensor

from megatron.dmc.inference.cache import CacheUse
from megatron.dmc.inference.grammar import Grammar, GrammarState
from megatron.dmc.inference.sampler import Logprobs, SamplerState
from megatron.dmc.inference.sampling_params import SamplingParams
from megatron.dmc.inference.text import Detokenizer

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class Request:
    """One prompt as token ids that were checked, with its sampling parameters; see :class:`InputProcessor`."""

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams = SamplingParams()
    prompt: Optional[str] = None
    """Text of the prompt, where it was given as text."""
    cache_salt: Optional[str] = None
    """Requests share cached prefixes with requests of the same salt only."""
    report_cache: bool = False
    """Whether every output carries the cache usage of its sequence."""
    grammar: Optional[Grammar] = field(default=None, compare=False, repr=False)
    """Compiled ``structured_outputs``; None on the ranks that do not sample."""
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    """Token sequences of ``bad_words``."""


@dataclass(eq=False, slots=True)
class Sequence:
    """One completion of a request while it waits or runs: its tokens, its state in the cache, its timestamps."""

    request: Request
    index: int
    """Number of the completion within its request, 0 to n - 1."""
    arrival_order: int
    """Place in the order of arrival, which decides who is preempted; kept after preemption."""
    token_ids: list[int]
    """Tokens of prompt and completion."""
    sampler_state: SamplerState
    stop_token_ids: frozenset[int]
    """Tokens that end the completion, end-of-sequence tokens included unless ``ignore_eos``."""
    max_length: int
    """Length in tokens, prompt included, at which the completion ends."""
    detokenizer: Optional[Detokenizer] = None
    """None without a tokenizer."""
    grammar: Optional[GrammarState] = None
    """Place of the completion in its grammar, where it has one and this rank samples."""
    prompt_logprobs: list[Logprobs] = field(default_factory=list)
    """Log-probabilities of the prompt so far; one list shared by all completions of a request."""
    prompt_length: int = 0
    row: Optional[int] = None
    """Row of the cache; None while waiting."""
    num_computed_tokens: int = 0
    """Tokens whose keys and values are in the cache, or will be after the steps in flight."""
    num_output_placeholders: int = 0
    """Tokens that steps in flight sample, whose ids the host does not know yet."""
    snapshot_in_flight: bool = False
    """Whether the prefix cache wants the state after a step in flight."""
    ended: bool = False
    """Whether the completion has ended; what a step in flight samples for it is thrown away."""
    num_cached_tokens: Optional[int] = None
    """Prompt tokens found in the prefix cache when the sequence was first scheduled; None before."""
    cached_logits: Optional[Tensor] = None
    """Logits after the last token, [vocabulary], when the whole prompt was in the prefix cache."""
    arrival_time: float = field(default_factory=time.monotonic)
    first_scheduled_time: Optional[float] = None
    first_token_time: Optional[float] = None
    num_preemptions: int = 0

    def __post_init__(self) -> None:
        self.prompt_length = len(self.request.prompt_token_ids)

    @property
    def id(self) -> tuple[str, int]:
        """Request id and index: unique among unfinished sequences."""
        return self.request.request_id, self.index

    @property
    def params(self) -> SamplingParams:
        return self.request.sampling_params

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return len(self.token_ids) + self.num_output_placeholders - self.num_computed_tokens

    @property
    def in_prefill(self) -> bool:
        """Whether the prompt is not computed yet, or a snapshot after it still to be taken."""
        return self.num_computed_tokens - self.snapshot_in_flight < self.prompt_length

    @property
    def ends_in_flight(self) -> bool:
        """Whether a step in flight samples the last token that the length allows."""
        reached = len(self.token_ids) + self.num_output_placeholders >= self.max_length
        return self.num_output_placeholders > 0 and reached

    @property
    def num_generated_tokens(self) -> int:
        return len(self.token_ids) - self.prompt_length

    @property
    def needs_sampled_ids(self) -> bool:
        """Whether the next token can only be sampled once the host knows the one before: for a grammar, penalties,
        ``bad_words`` or ``min_tokens``.
        """
        return self.params.structured_outputs is not None or self.sampler_state.follows_tokens

    @property
    def needs_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of prompt tokens were asked for and some are missing still."""
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < self.prompt_length - 1

    @property
    def timing(self) -> "Timing":
        """Durations up to now."""
        queued, first = (
            None if moment is None else moment - self.arrival_time
            for moment in (self.first_scheduled_time, self.first_token_time)
        )
        return Timing(queued, first, time.monotonic() - self.arrival_time, self.num_preemptions)


@dataclass(frozen=True)
class Timing:
    """Durations of one completion in seconds since the request arrived; None for what did not happen."""

    queued: Optional[float]
    """Until the sequence was first scheduled."""
    first_token: Optional[float]
    """Until the first token was sampled."""
    total: float
    """Until the end."""
    preemptions: int
    """Number of preemptions."""


@dataclass(slots=True)
class StepOutput:
    """News of one completion after a step: new tokens, the end, or (empty) that it was scheduled for the first time."""

    request_id: str
    index: int
    tokens: tuple[int, ...] = ()
    text: str = ""
    """New text. Parts of a character, and what may become a stop string, are held back."""
    logprobs: tuple[Logprobs, ...] = ()
    """Log-probabilities of ``tokens``, when asked for."""
    prompt_logprobs: tuple[Logprobs, ...] = ()
    """Log-probabilities of the prompt, when asked for: with the first token, or at the end when there is none."""
    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache."""
    finish_reason: Optional[FinishReason] = None
    stop_reason: int | str | None = None
    """Stop token or stop string that ended the completion; None for an end-of-sequence token."""
    error: Optional[str] = None
    """Reason of a failure, with finish_reason ``error``."""
    cache: Optional[CacheUse] = None
    """Cache usage of the sequence: at the end, and after every step of requests with ``report_cache``."""
    timing: Optional[Timing] = None
    """Durations, at the end."""

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class Completion:
    """One completion of a request, as far as it has been generated."""

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
    """A prompt and its completions. ``error`` is the reason when the request failed; completions end there then."""

    request_id: str
    prompt: Optional[str]
    prompt_token_ids: list[int]
    outputs: list[Completion]
    prompt_logprobs: Optional[list[Logprobs]] = None
    error: Optional[str] = None
    num_cached_tokens: int = 0
    """Prompt tokens that the first completion found in the prefix cache."""

    @classmethod
    def start(cls, request: Request) -> Self:
        """Output of a request before its first step, to be filled by :meth:`add`."""
        params = request.sampling_params
        completions = [Completion(i, logprobs=None if params.logprobs is None else []) for i in range(params.n)]
        prompt_logprobs: Optional[list[Logprobs]] = None if params.prompt_logprobs is None else []
        return cls(request.request_id, request.prompt, request.prompt_token_ids, completions, prompt_logprobs)

    def add(self, step: StepOutput) -> None:
        """Append one step's output."""
        completion = self.outputs[step.index]
        completion.token_ids += step.tokens
        completion.text += step.text
        if completion.logprobs is not None:
            completion.logprobs += step.logprobs
        if step.index == 0:
            self.num_cached_tokens = step.num_cached_tokens
            if self.prompt_logprobs is not None:
                self.prompt_logprobs += step.prompt_logprobs
        if step.finished:
            completion.finish_reason, completion.stop_reason = step.finish_reason, step.stop_reason
            completion.cache, completion.timing = step.cache, step.timing
            self.error = self.error or step.error

    @property
    def finished(self) -> bool:
        return all(completion.finish_reason is not None for completion in self.outputs)
