"""Parameters of a request: how its tokens are chosen and when it ends. Names and meanings are vLLM's."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Optional

from megatron.dmc.config.checks import shown
from megatron.dmc.inference.errors import InvalidRequest
from megatron.dmc.inference.structured_outputs import StructuredOutputsParams

GREEDY = 1e-5
"""Temperatures below this mean greedy decoding."""


def _require(condition: bool, param: str, message: str) -> None:
    if not condition:
        raise InvalidRequest(message, param)


def _number(
    param: str, value: object, low: float, high: float = math.inf, *, open_low: bool = False, name: Optional[str] = None
) -> None:
    real = isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf
    inside = real and (low < value if open_low else low <= value) and value <= high
    limits = f"{'above' if open_low else 'at least'} {low:g}" + (f" and at most {high:g}" if high < math.inf else "")
    _require(inside, param, f"{name or param} is {shown(value)}; it must be a number {limits}")


def _integer(param: str, value: object, low: int, high: Optional[int] = None) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    limits = f"at least {low}" + (f" and at most {high}" if high is not None else "")
    inside = whole and low <= value and (high is None or value <= high)
    _require(inside, param, f"{param} is {shown(value)}; it must be an integer, {limits}")


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of one request. Raises :class:`InvalidRequest` naming the parameter that is wrong."""

    n: int = 1
    """Number of completions of the prompt; completion i samples with ``seed + i``."""
    temperature: float = 1.0
    """Divisor of the logits. 0 means greedy decoding; top_p, top_k, min_p and seed are ignored."""
    top_p: float = 1.0
    """Probability mass to sample from: the smallest set of most likely tokens that reaches it. 1 means all tokens."""
    top_k: int = 0
    """Number of most likely tokens to sample from. 0 or -1 means all tokens."""
    min_p: float = 0.0
    """Lowest probability of a token to sample, as a share of the most likely token's."""
    seed: Optional[int] = None
    """Seed of this request's random numbers: the same seed samples the same tokens, whatever else is being served.
    -1 means none."""
    repetition_penalty: float = 1.0
    """Factor by which logits of tokens in the prompt or the completion shrink: positive ones are divided by it,
    negative ones multiplied. 1 means no penalty."""
    presence_penalty: float = 0.0
    """Amount subtracted from the logit of every token that the completion already holds."""
    frequency_penalty: float = 0.0
    """Amount subtracted from a token's logit for each time that the completion holds it."""
    logit_bias: Optional[Mapping[int, float]] = None
    """Values added to logits, by token id, each from -100 to 100."""
    max_tokens: Optional[int] = 16
    """Most tokens to generate per completion. 0 computes the prompt's log-probabilities and generates nothing.
    In Python, None means up to the context length."""
    min_tokens: int = 0
    """Fewest tokens to generate before an end-of-sequence token or one of ``stop_token_ids`` may be sampled."""
    stop: Sequence[str] = ()
    """Strings that end a completion, which is cut before the first of them."""
    stop_token_ids: Sequence[int] = ()
    """Token ids that end a completion."""
    bad_words: Sequence[str] = ()
    """Words that a completion does not hold: their last token is not sampled behind the others."""
    allowed_token_ids: Optional[Sequence[int]] = None
    """Token ids of which a completion consists, the end-of-sequence token among them if it is to end. None and an empty
    list allow all."""
    ignore_eos: bool = False
    """Whether to go on after an end-of-sequence token."""
    logprobs: Optional[int] = None
    """Number of most likely tokens whose log-probabilities are returned beside the sampled token's. 0 returns the
    sampled token's alone; None returns none."""
    prompt_logprobs: Optional[int] = None
    """Number of most likely tokens whose log-probabilities are returned at each position of the prompt but the first,
    beside the prompt token's. None returns none."""
    skip_special_tokens: bool = True
    """Whether special tokens are left out of the text."""
    include_stop_str_in_output: bool = False
    """Whether the text keeps the stop string that ended it."""
    structured_outputs: Optional[StructuredOutputsParams] = None
    """What the completion must match: a JSON schema, a regular expression, one of several texts, or a grammar. It ends
    where nothing may follow, whatever ``min_tokens`` and ``ignore_eos`` say."""

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        object.__setattr__(self, "bad_words", tuple(self.bad_words or ()))
        object.__setattr__(self, "allowed_token_ids", tuple(self.allowed_token_ids or ()) or None)
        if self.seed == -1:
            object.__setattr__(self, "seed", None)
        _integer("n", self.n, 1, 128)
        _number("temperature", self.temperature, 0)
        _number("top_p", self.top_p, 0, 1, open_low=True)
        _integer("top_k", self.top_k, -1, 2**31 - 1)
        _number("min_p", self.min_p, 0, 1)
        _number("repetition_penalty", self.repetition_penalty, 0, open_low=True)
        _number("presence_penalty", self.presence_penalty, -2, 2)
        _number("frequency_penalty", self.frequency_penalty, -2, 2)
        self._check_lengths()
        self._check_tokens()
        constraint = self.structured_outputs
        known = constraint is None or isinstance(constraint, StructuredOutputsParams)
        message = f"structured_outputs is {type(constraint).__name__}; it must be StructuredOutputsParams"
        _require(known, "structured_outputs", message)

    def _check_lengths(self) -> None:
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**63 - 1)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 0)
        _integer("min_tokens", self.min_tokens, 0)
        enough = self.max_tokens is None or self.min_tokens <= self.max_tokens
        _require(
            enough,
            "min_tokens",
            f"min_tokens is {shown(self.min_tokens)}, more than max_tokens {shown(self.max_tokens)}",
        )
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0)

    def _check_tokens(self) -> None:
        for text in self.stop:
            nonempty = isinstance(text, str) and text != ""
            _require(nonempty, "stop", f"stop holds {shown(text)}; it must hold strings that are not empty")
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0)
        for token in self.allowed_token_ids or ():
            _integer("allowed_token_ids", token, 0)
        for word in self.bad_words:
            nonempty = isinstance(word, str) and word.strip() != ""
            _require(nonempty, "bad_words", f"bad_words holds {shown(word)}; it must hold strings that are not empty")
        for token, value in (self.logit_bias or {}).items():
            _integer("logit_bias", token, 0)
            _number("logit_bias", value, -100, 100, name=f"logit_bias[{shown(token)}]")

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY

    @property
    def penalized(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    def check_vocabulary(self, size: int) -> None:
        """Raise :class:`InvalidRequest` for a token id that a model of ``size`` tokens does not have."""
        for name, ids in (
            ("stop_token_ids", self.stop_token_ids),
            ("allowed_token_ids", self.allowed_token_ids or ()),
            ("logit_bias", self.logit_bias or ()),
        ):
            for token in ids:
                _require(token < size, name, f"{name} holds token {shown(token)}; the model has {size} tokens")
