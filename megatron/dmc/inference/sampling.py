"""What a request may ask of sampling, and the sampler: all rows of a step at once.

Names and meanings are vLLM's. The order of operations: log-probabilities are those of the model's own logits; then
``logit_bias`` and ``min_tokens``, penalties, temperature, ``min_p``, ``top_k``, ``top_p``, and the draw.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Optional

import torch
from torch import Tensor

GREEDY = 1e-5
"""A temperature below this takes the most likely token."""
MAX_LOGPROBS = 100


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _number(name: str, value: object, low: float, high: float = math.inf, open_low: bool = False) -> None:
    real = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    inside = real and (low < value if open_low else low <= value) and value <= high
    limits = f"{'above' if open_low else 'at least'} {low:g}" + (f" and at most {high:g}" if high < math.inf else "")
    _require(inside, f"{name} is {value!r}; it must be a number {limits}")


def _integer(name: str, value: object, low: int, high: Optional[int] = None) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    limits = f"at least {low}" + (f" and at most {high}" if high is not None else "")
    _require(
        whole and low <= value and (high is None or value <= high),
        f"{name} is {value!r}; it must be an integer, {limits}",
    )


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of a request are chosen and when it ends. Raises ``ValueError`` that names a wrong value."""

    n: int = 1
    """Answers to the prompt; answer i uses ``seed + i``."""
    temperature: float = 1.0
    """0 is greedy: the most likely token, whatever the next four say."""
    top_p: float = 1.0
    """Of the most likely tokens, those before which less than this probability lies."""
    top_k: int = 0
    """Of the most likely tokens, so many; 0 or -1: all."""
    min_p: float = 0.0
    """Only tokens with this share of the most likely one's probability."""
    seed: Optional[int] = None
    """The same seed draws the same tokens, whatever else the engine does at the time."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens of the prompt or the answer."""
    presence_penalty: float = 0.0
    """Taken from the logit of every token of the answer."""
    frequency_penalty: float = 0.0
    """Taken as often as the token is in the answer."""
    logit_bias: Optional[Mapping[int, float]] = None
    """Token id -> what is added to its logit."""
    max_tokens: Optional[int] = 16
    """None: up to the model's window. 0: the prompt is read, for its log-probabilities, and nothing is drawn."""
    min_tokens: int = 0
    """No end-of-sequence and no ``stop_token_ids`` before so many."""
    stop: Sequence[str] = ()
    """The answer ends before the first of these strings."""
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: Optional[int] = None
    """Log-probabilities of so many most likely tokens beside the chosen one's; 0: the chosen one's only."""
    prompt_logprobs: Optional[int] = None
    """The same for the tokens of the prompt, all but the first."""
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
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

    def _check_lengths(self) -> None:
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**63 - 1)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 0)
        _integer("min_tokens", self.min_tokens, 0)
        _require(
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            f"min_tokens is {self.min_tokens}, more than max_tokens {self.max_tokens}",
        )
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MAX_LOGPROBS)

    def _check_tokens(self) -> None:
        for text in self.stop:
            _require(
                isinstance(text, str) and text != "", f"stop holds {text!r}; it must hold strings that are not empty"
            )
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0)
        for token, value in (self.logit_bias or {}).items():
            _integer("logit_bias", token, 0)
            _number(f"logit_bias[{token}]", value, -100, 100)

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY

    @property
    def penalized(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    def check_vocabulary(self, size: int) -> None:
        """Raise ``ValueError`` for a token id that a model of ``size`` tokens does not have."""
        for name, ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", self.logit_bias or ())):
            for token in ids:
                _require(token < size, f"{name} holds token {token}; the model has {size} tokens")


@dataclass(frozen=True)
class Logprobs:
    """Of one position: the chosen token's and the most likely tokens', natural logarithms."""

    token: int
    logprob: float
    rank: int
    """1: it was the most likely."""
    top: tuple[tuple[int, float], ...] = ()
    """(token, log-probability), most likely first."""


@dataclass
class SamplerState:
    """What the sampler keeps of one sequence: its noise, and its tokens where penalties need them."""

    params: SamplingParams
    stop_ids: Tensor
    """int64, what ``min_tokens`` forbids."""
    generator: Optional[torch.Generator] = None
    """None: the engine's."""
    in_prompt: Optional[Tensor] = None
    """bool [vocabulary], with penalties only."""
    counts: Optional[Tensor] = None
    """fp32 [vocabulary], tokens of the answer, with penalties only."""
    generated: int = 0
    bias: Optional[tuple[Tensor, Tensor]] = field(default=None)
    """(ids int64, values fp32) of ``logit_bias``."""

    @classmethod
    def start(
        cls,
        params: SamplingParams,
        prompt: Sequence[int],
        stop_ids: Sequence[int],
        vocabulary: int,
        index: int = 0,
        device: torch.device | str = "cpu",
    ) -> SamplerState:
        """State before the first token. ``index``: which of ``n`` answers this is."""
        state = cls(params, torch.tensor(sorted(stop_ids), dtype=torch.long, device=device))
        if params.seed is not None:
            state.generator = torch.Generator(device)
            state.generator.manual_seed((params.seed + index) % 2**63)
        if params.penalized:
            state.in_prompt = torch.zeros(vocabulary, dtype=torch.bool, device=device)
            state.in_prompt[torch.tensor(prompt, dtype=torch.long, device=device)] = True
            state.counts = torch.zeros(vocabulary, device=device)
        if params.logit_bias:
            ids, values = zip(*params.logit_bias.items())
            state.bias = (torch.tensor(ids, device=device), torch.tensor(values, dtype=torch.float32, device=device))
        return state

    def take(self, token: int) -> None:
        """Count a token of the answer."""
        self.generated += 1
        if self.counts is not None:
            self.counts[token] += 1


class Sampler:
    """Draws the next token of every row. Rows are independent: a row's token does not depend on its neighbours."""

    def __init__(self, device: torch.device | str = "cpu", seed: int = 0) -> None:
        self.device = torch.device(device)
        self.generator = torch.Generator(self.device)
        self.generator.manual_seed(seed)

    def __call__(self, logits: Tensor, states: Sequence[SamplerState]) -> Tensor:
        """Next tokens: int64 [n].

        Args:
            logits: fp32 [n, vocabulary]; left as they are.
            states: of the n sequences.
        """
        logits = constrain(logits, states)
        random = [row for row, state in enumerate(states) if not state.params.greedy]
        if len(random) == len(states):
            return self._draw(logits, states)
        tokens = logits.argmax(dim=-1)
        if random:
            rows = torch.tensor(random, device=logits.device)
            tokens[rows] = self._draw(logits[rows], [states[row] for row in random])
        return tokens

    def _draw(self, logits: Tensor, states: Sequence[SamplerState]) -> Tensor:
        temperature = self._column([state.params.temperature for state in states])
        # Scaled after the maximum is taken off, so that a tiny temperature cannot overflow.
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
        p = truncate(logits, [state.params for state in states])
        return self._by_sum(p, states) if self.device.type == "cpu" else self._by_noise(p, states)

    def _by_sum(self, p: Tensor, states: Sequence[SamplerState]) -> Tensor:
        """The first token at which the sum of p is above a uniform number: one number a row, where a CPU takes 20 ms to
        draw a million of Exp(1). A token whose p is 0 does not add to the sum, so it is never that one.
        """
        sums = p.cumsum(dim=-1, dtype=torch.float64)
        return torch.searchsorted(sums, self._uniform(states) * sums[:, -1:], right=True)[:, 0].clamp_max_(
            p.size(-1) - 1
        )

    def _by_noise(self, p: Tensor, states: Sequence[SamplerState]) -> Tensor:
        """argmax of p / Exp(1): a draw from p without a sum over the vocabulary or a question to the host, for GPUs."""
        return (p / self._noise(p, states)).argmax(dim=-1)

    def _uniform(self, states: Sequence[SamplerState]) -> Tensor:
        """fp64 in [0, 1), [n, 1]: a row's own generator's where it has one."""
        return torch.stack(
            [torch.rand(1, dtype=torch.float64, generator=state.generator or self.generator) for state in states]
        )

    def _column(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device)[:, None]

    def _noise(self, p: Tensor, states: Sequence[SamplerState]) -> Tensor:
        """Exp(1), [n, vocabulary]: a row's own generator's where it has one."""
        noise = torch.empty_like(p)
        if any(state.generator is None for state in states):
            noise.exponential_(generator=self.generator)
        for row, state in enumerate(states):
            if state.generator is not None:
                noise[row].exponential_(generator=state.generator)
        return noise.clamp_min_(torch.finfo(noise.dtype).tiny)


def constrain(logits: Tensor, states: Sequence[SamplerState]) -> Tensor:
    """Logits after bias, ``min_tokens`` and penalties; a copy when a row has any. fp32 [n, vocabulary]."""
    changed = [
        row
        for row, state in enumerate(states)
        if state.bias is not None or state.counts is not None or state.generated < state.params.min_tokens
    ]
    if not changed:
        return logits
    logits = logits.clone()
    for row in changed:
        state, x = states[row], logits[row]
        if state.bias is not None:
            x.index_add_(0, *state.bias)
        if state.generated < state.params.min_tokens:
            x[state.stop_ids] = -math.inf
    _penalize(logits, [row for row in changed if states[row].counts is not None], states)
    return logits


def _penalize(logits: Tensor, rows: Sequence[int], states: Sequence[SamplerState]) -> None:
    """Repetition, presence and frequency penalties, in place."""
    if not rows:
        return
    chosen = [states[row] for row in rows]

    def column(name: str) -> Tensor:
        return torch.tensor([getattr(state.params, name) for state in chosen], device=logits.device)[:, None]

    x = logits[rows]
    counts = torch.stack([state.counts for state in chosen])
    seen = torch.stack([state.in_prompt for state in chosen]) | (counts > 0)
    repetition = column("repetition_penalty")
    x = torch.where(seen, torch.where(x > 0, x / repetition, x * repetition), x)
    logits[rows] = x - column("frequency_penalty") * counts - column("presence_penalty") * (counts > 0)


def truncate(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Probabilities with those beyond ``min_p``, ``top_k`` and ``top_p`` set to 0 (not normalised): fp32 [n,
    vocabulary].
    """

    def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=logits.device)[:, None]

    if any(p.min_p > 0 for p in params):
        floor = logits.amax(-1, keepdim=True) + torch.log(column([p.min_p for p in params]))
        logits = logits.masked_fill(logits < floor, -math.inf)
    probability = torch.softmax(logits, dim=-1)
    size = logits.size(-1)
    cut = [row for row, p in enumerate(params) if p.top_k > 0 or p.top_p < 1]
    if cut:  # only these: a row must not be rounded otherwise because of its neighbours
        top_k = column([params[row].top_k if params[row].top_k > 0 else size for row in cut], torch.long)
        top_p = column([params[row].top_p if params[row].top_p < 1 else math.inf for row in cut])
        probability[cut] = _top(logits[cut], top_k, top_p)
    return probability


def _top(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Probabilities of what ``top_k`` and then ``top_p`` ([n, 1]) leave of [n, vocabulary]."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.size(-1), device=logits.device)
    p = torch.softmax(ordered.masked_fill(rank >= top_k, -math.inf), dim=-1)
    before = p.cumsum(-1) - p
    kept = (before < top_p) | (rank == 0)
    return torch.zeros_like(logits).scatter_(-1, order, p * kept)


def logprobs(logits: Tensor, tokens: Tensor, counts: Sequence[int]) -> list[Logprobs]:
    """Log-probabilities of ``tokens`` and of the ``counts[i]`` most likely ones at each row.

    Args:
        logits: fp32 [n, vocabulary], the model's own.
        tokens: int64 [n].
    """
    scores = torch.log_softmax(logits, dim=-1)
    chosen = scores.gather(-1, tokens[:, None])
    ranks = (scores > chosen).sum(-1) + 1
    values, ids = scores.topk(min(max(counts), scores.size(-1)), dim=-1)
    rows = zip(tokens.tolist(), chosen[:, 0].tolist(), ranks.tolist(), ids.tolist(), values.tolist(), counts)
    return [Logprobs(t, lp, rank, tuple(zip(i[:k], v[:k]))) for t, lp, rank, i, v, k in rows]
