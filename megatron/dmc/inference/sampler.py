"""Sampler: the next token of every sequence of a step at once, by each sequence's own parameters.

Order of operations: the mask of a grammar; log-probabilities are those of the model's logits under it; then
``logit_bias``, ``min_tokens``, ``allowed_token_ids`` and ``bad_words``, penalties, temperature, ``min_p``, ``top_k``,
``top_p``, and the random choice.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Optional, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.dmc.inference.device_queue import to_device, to_host
from megatron.dmc.inference.sampling_params import SamplingParams
from megatron.dmc.inference.token_masks import TokenMask

BLOCK = 128  # tokens of which a CPU takes the maximum, or the sum, before it looks at them one by one
CANDIDATES = 256  # tokens among which a CPU looks for those that top_k and top_p leave, before it sorts all


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities at one position (natural logarithms): of the chosen token and of the most likely ones."""

    token: int
    logprob: float
    rank: int
    """Rank of the chosen token; 1 is the most likely."""
    top: tuple[tuple[int, float], ...] = ()
    """Pairs (token, log-probability), most likely first."""


@dataclass
class SamplerState:
    """Sampling state of one sequence: its generator, and token counts where its parameters need them."""

    params: SamplingParams
    stop_ids: Tensor
    """Token ids that ``min_tokens`` forbids at first: int64."""
    generator: Optional[torch.Generator] = None
    """Random numbers of a sequence with a seed; None uses the engine's generator."""
    in_prompt: Optional[Tensor] = None
    """Tokens of the prompt: bool [vocabulary]; None without penalties."""
    counts: Optional[Tensor] = None
    """Occurrences of each token in the completion: fp32 [vocabulary]; None without penalties."""
    num_generated: int = 0
    bias: Optional[tuple[Tensor, Tensor]] = None
    """Token ids (int64) and values (fp32) of ``logit_bias``."""
    mask: Optional[TokenMask] = None
    """Tokens that ``allowed_token_ids`` and ``bad_words`` leave; None where all are."""
    greedy: bool = field(init=False)
    constrained: bool = field(init=False)
    """Whether the next token's logits have to be changed before sampling."""

    def __post_init__(self) -> None:
        self.greedy = self.params.greedy
        self._update()

    def _update(self) -> None:
        forbids = self.num_generated < self.params.min_tokens
        self.constrained = forbids or any(part is not None for part in (self.bias, self.counts, self.mask))

    @classmethod
    def start(
        cls,
        params: SamplingParams,
        prompt: Sequence[int],
        stop_ids: Sequence[int],
        vocabulary: int,
        index: int = 0,
        device: torch.device | str = "cpu",
        bad_word_ids: Sequence[Sequence[int]] = (),
    ) -> Self:
        """State before the first token of completion ``index`` of a request."""
        stop = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
        generator = in_prompt = counts = bias = None
        if params.seed is not None:
            generator = torch.Generator(device)
            generator.manual_seed((params.seed + index) % 2**63)
        if params.penalized:
            in_prompt = torch.zeros(vocabulary, dtype=torch.bool, device=device)
            in_prompt[torch.tensor(prompt, dtype=torch.long, device=device)] = True
            counts = torch.zeros(vocabulary, device=device)
        if params.logit_bias:
            ids, values = zip(*params.logit_bias.items())
            bias = (torch.tensor(ids, device=device), torch.tensor(values, dtype=torch.float32, device=device))
        masks = params.allowed_token_ids is not None or bool(bad_word_ids)
        mask = TokenMask(params.allowed_token_ids or (), bad_word_ids, device) if masks else None
        return cls(params, stop, generator, in_prompt, counts, bias=bias, mask=mask)

    @property
    def follows_tokens(self) -> bool:
        """Whether the next token's logits depend on the tokens before, by :meth:`record`."""
        if not self.constrained:
            return False
        by_mask = self.mask is not None and bool(self.mask.sequences)
        return by_mask or self.counts is not None or self.num_generated < self.params.min_tokens

    def record(self, token: int) -> None:
        """Count a token of the completion."""
        self.num_generated += 1
        if self.counts is not None:
            self.counts[token] += 1
        if self.mask is not None:
            self.mask.record(token)
        self._update()


class Sampler:
    """Samples the next token of every row. A row's token does not depend on the other rows."""

    def __init__(self, device: torch.device | str = "cpu", seed: int = 0) -> None:
        """``seed``: of the generator that serves all sequences without a seed of their own."""
        self.device = torch.device(device)
        self.generator = torch.Generator(self.device)
        self.generator.manual_seed(seed)

    def __call__(self, logits: Tensor, states: Sequence[SamplerState]) -> Tensor:
        """Next tokens: int64 [n].

        Args:
            logits: fp32 [n, vocabulary]; not modified.
            states: of the n sequences.
        """
        logits = constrain(logits, states)
        random = [row for row, state in enumerate(states) if not state.greedy]
        if len(random) == len(states):
            return self._sample(logits, states)
        tokens = argmax(logits)
        if random:
            rows = to_device(random, torch.long, logits.device)
            tokens[rows] = self._sample(logits[rows], [states[row] for row in random])
        return tokens

    def _sample(self, logits: Tensor, states: Sequence[SamplerState]) -> Tensor:
        temperature = _column([state.params.temperature for state in states], self.device)
        # Scaled after the maximum is taken off, so that a tiny temperature cannot overflow.
        logits = (logits - logits.amax(dim=-1, keepdim=True)).div_(temperature)
        p = truncate(logits, [state.params for state in states])
        return self._by_sum(p, states) if self.device.type == "cpu" else self._by_noise(p, states)

    def _by_sum(self, p: Tensor, states: Sequence[SamplerState]) -> Tensor:
        """Inverse transform sampling: the first token at which the cumulative sum of p exceeds a uniform number.

        It takes one random number per row, where a CPU needs 20 ms to make a million of Exp(1). Sums are those of
        blocks of tokens first, and then of the tokens of the block that exceeds the number: only the former take all of
        p. A token whose p is 0 does not add to a sum, so it is never chosen.
        """
        size = p.size(-1)
        if size % BLOCK:
            p = F.pad(p, (0, -size % BLOCK))
        blocks = p.unflatten(-1, (-1, BLOCK))
        totals = blocks.sum(-1)
        sums = totals.cumsum(-1, dtype=torch.float64)
        target = self._uniform(states) * sums[:, -1:]
        block = torch.searchsorted(sums, target, right=True).clamp_max_(sums.size(-1) - 1)
        inside = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0].cumsum(-1, dtype=torch.float64)
        # A share of the block's sum, since the sum of its tokens in another order is rounded otherwise.
        total = totals.gather(1, block)
        share = ((target - sums.gather(1, block) + total) / total).clamp_(0, 1 - 2**-53)
        return block[:, 0] * BLOCK + torch.searchsorted(inside, share * inside[:, -1:], right=True)[:, 0]

    def _by_noise(self, p: Tensor, states: Sequence[SamplerState]) -> Tensor:
        """Exponential race, argmax of p / Exp(1): needs no sum over the vocabulary and no host sync, for GPUs."""
        return (p / self._noise(p, states)).argmax(dim=-1)

    def _uniform(self, states: Sequence[SamplerState]) -> Tensor:
        """Uniform numbers in [0, 1) from each row's own generator where it has one: fp64 [n, 1]."""
        shared = [row for row, state in enumerate(states) if state.generator is None]
        # On a CPU n numbers at once are the n numbers that would be made one by one.
        numbers = torch.rand(len(shared), dtype=torch.float64, generator=self.generator)
        if len(shared) < len(states):
            own = [
                torch.rand((), dtype=torch.float64, generator=state.generator) for state in states if state.generator
            ]
            seeded = [row for row, state in enumerate(states) if state.generator is not None]
            ordered = torch.empty(len(states), dtype=torch.float64)
            ordered[shared], ordered[seeded] = numbers, torch.stack(own)
            numbers = ordered
        return numbers[:, None]

    def _noise(self, p: Tensor, states: Sequence[SamplerState]) -> Tensor:
        """Exp(1) noise from each row's own generator where it has one: [n, vocabulary]."""
        noise = torch.empty_like(p)
        if any(state.generator is None for state in states):
            noise.exponential_(generator=self.generator)
        for row, state in enumerate(states):
            if state.generator is not None:
                noise[row].exponential_(generator=state.generator)
        return noise.clamp_min_(torch.finfo(noise.dtype).tiny)


def argmax(logits: Tensor) -> Tensor:
    """Index of the first maximum of each row: [n, vocabulary] -> int64 [n].

    On a CPU torch's argmax compares one number after the other: 0.43 ms of a core of an AMD EPYC for 16 rows of 49,152.
    By maxima of blocks it takes 0.08 ms; for a single row the calls cost as much as they save.
    """
    rows, size = logits.shape
    if logits.device.type != "cpu" or rows == 1 or size < 2 * BLOCK:
        return logits.argmax(dim=-1)
    whole = size // BLOCK * BLOCK
    tops = logits[:, :whole].unflatten(1, (-1, BLOCK)).amax(2)
    if whole < size:
        tops = torch.cat([tops, logits[:, whole:].amax(1, keepdim=True)], dim=1)
    # [n] -> [n, BLOCK]; past the end the last one again, which is no first maximum
    ids = (tops.argmax(1, keepdim=True) * BLOCK + torch.arange(BLOCK)).clamp_max_(size - 1)
    return ids.gather(1, logits.gather(1, ids).argmax(1, keepdim=True))[:, 0]


def _column(values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return to_device(values, dtype, device)[:, None]


def constrain(logits: Tensor, states: Sequence[SamplerState]) -> Tensor:
    """Logits after ``logit_bias``, ``min_tokens``, masks and penalties, copied where there are any: [n, vocabulary]."""
    rows = [row for row, state in enumerate(states) if state.constrained]
    if not rows:
        return logits
    logits = logits.clone()
    for row in rows:
        state, x = states[row], logits[row]
        if state.bias is not None:
            x.index_add_(0, *state.bias)
        if state.num_generated < state.params.min_tokens:
            _forbid(x, state)
        if state.mask is not None:
            state.mask.apply(x)
    _penalize(logits, [row for row in rows if states[row].counts is not None], states)
    return logits


def _forbid(x: Tensor, state: SamplerState) -> None:
    """Forbid the stop tokens in place, unless a grammar allows nothing else."""
    kept = x[state.stop_ids]
    x[state.stop_ids] = -math.inf
    if state.params.structured_outputs is not None and not bool((x > -math.inf).any()):
        x[state.stop_ids] = kept


def _penalize(logits: Tensor, rows: Sequence[int], states: Sequence[SamplerState]) -> None:
    """Apply repetition, presence and frequency penalties in place."""
    if not rows:
        return
    chosen = [states[row] for row in rows]

    def column(name: str) -> Tensor:
        return _column([getattr(state.params, name) for state in chosen], logits.device)

    x = logits[rows]
    counts = torch.stack([state.counts for state in chosen])
    seen = torch.stack([state.in_prompt for state in chosen]) | (counts > 0)
    repetition = column("repetition_penalty")
    x = torch.where(seen, torch.where(x > 0, x / repetition, x * repetition), x)
    logits[rows] = x - column("frequency_penalty") * counts - column("presence_penalty") * (counts > 0)


def truncate(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Unnormalized probabilities, those that ``min_p``, ``top_k`` or ``top_p`` exclude set to 0: fp32 [n, vocabulary].

    Args:
        logits: fp32 [n, vocabulary].
        params: of the n rows.
    """
    device = logits.device
    if any(p.min_p > 0 for p in params):
        floor = logits.amax(-1, keepdim=True) + torch.log(_column([p.min_p for p in params], device))
        logits = logits.masked_fill(logits < floor, -math.inf)
    probability = torch.softmax(logits, dim=-1)
    size = logits.size(-1)
    cut = [row for row, p in enumerate(params) if p.top_k > 0 or p.top_p < 1]
    if cut:  # only these: a row must not be rounded otherwise because of its neighbours
        top_k = _column([params[row].top_k if params[row].top_k > 0 else size for row in cut], device, torch.long)
        top_p = _column([params[row].top_p if params[row].top_p < 1 else math.inf for row in cut], device)
        probability[cut] = _top(logits[cut], probability[cut], top_k, top_p)
    return probability


def _top(logits: Tensor, probability: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Probabilities [n, vocabulary] that ``top_k`` and then ``top_p`` ([n, 1] each) leave.

    A core of an AMD EPYC takes 54 ms to sort 16 rows of 49,152, and 2 to find the most likely candidates. Rows that
    need more are sorted; whether one does depends on it alone.
    """
    if logits.device.type != "cpu" or logits.size(-1) <= CANDIDATES:
        return _top_sorted(logits, top_k, top_p)
    p, complete = _top_candidates(logits, probability, top_k, top_p)
    rows = (~complete).nonzero()[:, 0]
    if rows.numel():
        p[rows] = _top_sorted(logits[rows], top_k[rows], top_p[rows])
    return p


def _top_candidates(logits: Tensor, probability: Tensor, top_k: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """The result of :func:`_top_sorted` by the most likely candidates, and of which rows it is: bool [n].

    Args:
        probability: softmax of the logits.
    """
    # The first of equally likely tokens first, as by a stable sort of all.
    ids = logits.topk(CANDIDATES, dim=-1).indices.sort(dim=-1).values
    ordered, order = logits.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    ids, rank = ids.gather(1, order), torch.arange(CANDIDATES)
    within = rank < top_k
    p = torch.softmax(ordered.masked_fill(~within, -math.inf), dim=-1)
    p = torch.where(top_k < logits.size(-1), p, probability.gather(1, ids))
    kept = (within & (p.cumsum(-1) - p < top_p)) | (rank == 0)
    # The last candidate is less likely than all that are kept, and so are those that are none.
    complete = ordered[:, -1] < ordered.masked_fill(~kept, math.inf).amin(1)
    complete &= ((top_k <= CANDIDATES) | (top_k == logits.size(-1)))[:, 0]  # else p is not of all that count
    return torch.zeros_like(logits).scatter_(-1, ids, p * kept), complete


def _top_sorted(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Probabilities [n, vocabulary] that ``top_k`` and then ``top_p`` ([n, 1] each) leave, by a sort of all."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.size(-1), device=logits.device)
    p = torch.softmax(ordered.masked_fill(rank >= top_k, -math.inf), dim=-1)
    before = p.cumsum(-1) - p
    kept = (before < top_p) | (rank == 0)
    return torch.zeros_like(logits).scatter_(-1, order, p * kept)


class LogprobsTensors(NamedTuple):
    """Log-probabilities at n positions, on their way to the host."""

    tokens: Tensor
    logprobs: Tensor
    ranks: Tensor
    """[n] each: the chosen tokens, their log-probabilities and ranks."""
    top_ids: Tensor
    top_logprobs: Tensor
    """[n, most]: the most likely tokens, as many as any of the positions wants."""
    counts: Sequence[int]
    """Number of most likely tokens wanted at each position."""

    def entries(self) -> list[Logprobs]:
        """The same as records. The device must have been waited for."""
        *tensors, counts = self
        rows = zip(*(x.tolist() for x in tensors), counts)
        return [Logprobs(t, lp, rank, tuple(zip(i[:k], v[:k]))) for t, lp, rank, i, v, k in rows]


def logprobs(logits: Tensor, tokens: Tensor, counts: Sequence[int]) -> LogprobsTensors:
    """Log-probabilities of ``tokens`` and of the ``counts[i]`` most likely tokens of each row.

    Args:
        logits: fp32 [n, vocabulary], as the model gives them, or under the masks of grammars.
        tokens: int64 [n].
        counts: number of most likely tokens wanted at each row.
    """
    scores = torch.log_softmax(logits, dim=-1)
    chosen = scores.gather(-1, tokens[:, None])
    ranks = (scores > chosen).sum(-1) + 1
    values, ids = scores.topk(min(max(counts), scores.size(-1)), dim=-1)
    return LogprobsTensors(*map(to_host, (tokens, chosen[:, 0], ranks, ids, values)), counts)
