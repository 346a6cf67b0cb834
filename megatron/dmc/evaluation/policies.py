"""Cache policies behind one interface: the slots that a query attends to, and how many are held after each token.

A policy is a pure function of one layer's projections of whole sequences. Where the next decision needs the last one's
outcome (H2O, TOVA) it goes token by token, all heads and sequences at once; the others have a closed form. Either way
the result is that of decoding one token at a time (``tests/evaluation/test_policies.py`` compares with exactly that).

One convention for all: token t attends to the slots that were held after token t - 1 and to itself; then the policy
drops what exceeds its budget. ``slots`` counts the slots that are held between two tokens: a budget limits these.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Optional, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.dmc.config import DMCConfig
from megatron.dmc.ops import compress, prefill_attention, rotate, rotate_and_split_neuron
from megatron.dmc.ops.rotary import cos_sin

ROWS = 64  # queries of a block: scores of so many at once


@dataclass(frozen=True)
class Projections:
    """Queries, keys and values of one layer for whole sequences, before the rotation."""

    q: Tensor
    """[b, np, s, D]"""
    k: Tensor
    v: Tensor
    """[b, ng, s, D]"""
    inv_freq: Tensor
    """fp32 [D / 2]"""
    neuron: Literal["none", "all", "query"] = "none"
    """Heads whose channel D-1 takes no part in attention: none, all query and key heads, or the first query head of
    every group (``DMCConfig.neuron``)."""
    factor: float = 1.0
    """Factor on rotated queries and keys (YaRN's)."""
    logits: Optional[Tensor] = None
    """Decision logits that are read from each token: fp32 [b, ng, s]; None for a model that does not decide."""

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of integer ``positions`` [s]: fp32 [s, D / 2] each."""
        return cos_sin(self.inv_freq, positions, self.factor)

    def rotated_queries(self, q: Tensor, positions: Tensor) -> Tensor:
        """Rotate queries [b, np, s, D] to integer ``positions`` [s]."""
        tables = self.tables(positions)
        if self.neuron == "all":
            return rotate_and_split_neuron(q, *tables, 0.0)[0]
        out = rotate(q, *tables)
        if self.neuron == "query":
            first = slice(None, None, q.size(1) // self.k.size(1))
            out[:, first] = rotate_and_split_neuron(q[:, first], *tables, 0.0)[0]
        return out

    def rotated_keys(self) -> Tensor:
        """Keys, rotated to their tokens' positions: [b, ng, s, D]."""
        tables = self.tables(self.positions())
        return rotate_and_split_neuron(self.k, *tables, 0.0)[0] if self.neuron == "all" else rotate(self.k, *tables)

    def positions(self) -> Tensor:
        return torch.arange(self.k.size(2), device=self.k.device)


class Attended(NamedTuple):
    """One layer's attention under a policy."""

    out: Tensor
    """[b, np, s, D], in the dtype of q."""
    slots: Tensor
    """int64 [b, ng, s], slots held after each token."""


@dataclass(frozen=True)
class Budget:
    """Slots that a head may hold, from a compression ratio.

    - fixed: a share of the whole sequence's length, from the first token on, as in the public code of H2O (a share of
      the prompt) and TOVA (a cache size). Nothing is dropped until it is full, so the ratio holds at the end only.
    - growing: a share of the tokens seen so far, so that the ratio holds after every token, as it does for DMC.
    """

    ratio: float
    kind: Literal["fixed", "growing"] = "fixed"
    minimum: int = 8
    """Least budget in slots: room for the sinks or heavy hitters of short sequences."""

    def __post_init__(self) -> None:
        if not self.ratio >= 1:
            raise ValueError(f"the compression ratio is {self.ratio}; it is at least 1")
        if self.kind not in ("fixed", "growing"):
            raise ValueError(f"the kind of budget is {self.kind!r}; use fixed or growing")
        if self.minimum < 1:
            raise ValueError(f"the minimum is {self.minimum} slots; use at least 1")

    def slots(self, length: int) -> list[int]:
        """Budget after 0, 1, ... ``length`` tokens of a sequence. It grows by at most one slot per token."""
        counts = range(length + 1) if self.kind == "growing" else [length] * (length + 1)
        return [max(self.minimum, math.ceil(count / self.ratio)) for count in counts]


@dataclass(frozen=True)
class SlotTable:
    """Slots that a head may hold after each token, given one by one: those that another method was seen to hold."""

    after: tuple[int, ...]
    """Budget after 1, 2, ... tokens; it grows by at most one slot per token."""
    minimum: int = 8
    """Least budget in slots, as in :class:`Budget`."""

    def slots(self, length: int) -> list[int]:
        """Budget after 0, 1, ... ``length`` tokens. Raises ``ValueError`` for more tokens than the table has."""
        if length > len(self.after):
            raise ValueError(f"the table of budgets ends after {len(self.after)} tokens; the sequence has {length}")
        return [self.minimum, *(max(self.minimum, count) for count in self.after[:length])]

    @classmethod
    def following(cls, by_position: Sequence[float]) -> Self:
        """The mean number of slots of a cache whose compression ratio after each token was ``by_position``
        (``Compression.by_position``), rounded up: the same ratio at every position.
        """
        return cls(tuple(math.ceil(n / ratio - 1e-6) for n, ratio in enumerate(by_position, start=1)))

    @classmethod
    def after_context(cls, context: int, ratio: float, more: int) -> Self:
        """``context`` tokens in ``context / ratio`` slots, and a slot for each of ``more`` tokens after them."""
        kept = math.ceil(context / ratio)
        return cls((*[kept] * context, *range(kept + 1, kept + more + 1)))


class CachePolicy(ABC):
    """Rule that decides which slots of a cache are kept. It has no state between calls of :meth:`attend`."""

    name: str

    @abstractmethod
    def attend(self, x: Projections) -> Attended:
        """Attention of every token over the slots that the policy has kept.

        Raises:
            ValueError: the policy does not fit the model.
        """

    def __str__(self) -> str:
        return self.name


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _by_group(q: Tensor, groups: int) -> Tensor:
    """[b, np, s, D] -> [b, ng, g, s, D]"""
    b, heads, s, d = q.shape
    return q.view(b, groups, heads // groups, s, d)


class FullCache(CachePolicy):
    """The ordinary cache: every token has a slot."""

    name = "full"

    def attend(self, x: Projections) -> Attended:
        b, ng, s, _ = x.k.shape
        at, g = x.positions(), x.q.size(1) // ng
        k, v = (y.repeat_interleave(g, dim=1) for y in (x.rotated_keys(), x.v))
        out = F.scaled_dot_product_attention(x.rotated_queries(x.q, at), k, v, is_causal=True)
        return Attended(out, (at + 1).expand(b, ng, s))


class DMC(CachePolicy):
    """Dynamic Memory Compression (arXiv 2403.09636) with hard decisions: compress, then attend."""

    name = "DMC"

    def __init__(self, dmc: DMCConfig) -> None:
        self.dmc = dmc

    def attend(self, x: Projections) -> Attended:
        if x.neuron != "all":
            raise ValueError(
                f"policy {self} reads a decision from every key, which this model does not have: retrofit it first"
            )
        dmc, s = self.dmc, x.k.size(2)
        tables = x.tables(x.positions())
        settings = dict(decision_bias=dmc.decision_bias, epsilon=dmc.importance_epsilon, window=dmc.window)
        c = compress(x.q, x.k, x.v, *tables, **settings)
        parts = []
        for rows in (slice(start, start + ROWS) for start in range(0, s, ROWS)):
            own = {name: getattr(c, name)[:, :, rows] for name in ("q", "slot", "k_own", "v_own")}
            parts.append(prefill_attention(c._replace(**{name: y.contiguous() for name, y in own.items()})))
        return Attended(torch.cat(parts, dim=2), c.slot + 1)


class _Masked(CachePolicy):
    """A policy whose pattern is known without the attention weights."""

    def _attend(self, x: Projections, slots: Tensor) -> Attended:
        at = x.positions()
        (b, ng, s, d), scale = x.k.shape, 1 / math.sqrt(x.k.size(-1))
        q, k = _by_group(x.rotated_queries(x.q, at), ng), x.rotated_keys()
        out = torch.empty_like(q)
        for start in range(0, s, ROWS):
            stop = min(start + ROWS, s)
            # [b, ng, g, rows, D] x [b, ng, 1, D, stop] -> [b, ng, g, rows, stop]
            scores = _wide(q[:, :, :, start:stop] @ k[:, :, None, :stop].transpose(-1, -2)) * scale
            self._adjust(scores, x, k, start, stop)
            age = at[start:stop, None] - at[:stop]
            seen = (age >= 0) & self._visible(x, age, start, stop)
            p = scores.masked_fill_(~seen, float("-inf")).softmax(dim=-1).to(q.dtype)
            out[:, :, :, start:stop] = p @ x.v[:, :, None, :stop]
        return Attended(out.view(b, -1, s, d), slots)

    def _adjust(self, scores: Tensor, x: Projections, k: Tensor, start: int, stop: int) -> None:
        """Change scores [b, ng, g, rows, stop] of queries start...stop in place."""

    @abstractmethod
    def _visible(self, x: Projections, age: Tensor, start: int, stop: int) -> Tensor:
        """Keys that each query sees: bool, broadcast to [b, ng, g, rows, stop].

        Args:
            age: int64 [rows, stop], tokens from the key to the query.
        """


class StreamingLLM(_Masked):
    """Attention sinks and a window (Xiao et al. 2023, arXiv 2309.17453): the first tokens and the latest ones.

    Positions are those in the cache, not in the text (section 3.2 there): the gap behind the sinks is closed.
    """

    name = "StreamingLLM"

    def __init__(self, budget: Budget | SlotTable, sinks: int = 4) -> None:
        if budget.minimum <= sinks:
            raise ValueError(
                f"a budget of {budget.minimum} slots leaves no window beside {sinks} sinks; raise the minimum"
            )
        self.budget, self.sinks = budget, sinks

    def attend(self, x: Projections) -> Attended:
        at, budget = x.positions(), self._budget(x)
        return self._attend(x, torch.minimum(at + 1, budget[1:]).expand(*x.k.shape[:3]))

    def _budget(self, x: Projections) -> Tensor:
        return torch.tensor(self.budget.slots(x.k.size(2)), device=x.k.device)

    def _adjust(self, scores: Tensor, x: Projections, k: Tensor, start: int, stop: int) -> None:
        at = x.positions()
        rows = at[start:stop]
        held = torch.minimum(rows, self._budget(x)[start:stop])  # before the query: its position in the cache
        if x.neuron != "none":
            # The query neuron's partner is not rotated but scaled by a cosine, so its part of a score, with the partner
            # and (where keys are whole) the neuron of the key, depends on both positions.
            n, angle, d = k.size(-1) // 2 - 1, x.inv_freq[-1], k.size(-1)
            decides = slice(None) if x.neuron == "all" else slice(1)  # query heads of a group
            q = _wide(_by_group(x.q[:, :, start:stop, n : n + 1], k.size(1))[:, :, decides])
            places = held[:, None] - (rows[:, None] - at[:stop])
            here, there = (held * angle).cos()[:, None], (rows * angle).cos()[:, None]
            turned = here * (places * angle).cos() - there * (at[:stop] * angle).cos()
            changed = _wide(x.k[:, :, None, None, :stop, n]) * turned
            if x.neuron == "query":
                turned = here * (places * angle).sin() - there * (at[:stop] * angle).sin()
                changed = changed - _wide(x.k[:, :, None, None, :stop, d - 1]) * turned
            scores[:, :, decides] += q * changed * x.factor**2 / math.sqrt(d)
        q = _by_group(x.rotated_queries(x.q[:, :, start:stop], held), k.size(1))
        n = min(self.sinks, stop)
        scores[..., :n] = _wide(q @ k[:, :, None, :n].transpose(-1, -2)) / math.sqrt(k.size(-1))

    def _visible(self, x: Projections, age: Tensor, start: int, stop: int) -> Tensor:
        window = self._budget(x)[start:stop] - self.sinks
        return (age <= window[:, None]) | (x.positions()[:stop] < self.sinks)


class DMS(_Masked):
    """Dynamic Memory Sparsification (arXiv 2506.05345) with hard decisions: marked tokens are evicted, ``window``
    tokens later.

    A marked token is seen by the ``window`` queries after it, and by none after those. It leaves the cache when the
    first of these comes: the latest ``window + 1`` tokens are always held.
    """

    name = "DMS"

    def __init__(self, window: int, about: Literal["previous", "self"] = "previous") -> None:
        """window: at least 1; about: the token that a decision is about, ``DMCConfig.decision_about``."""
        if window < 1:
            raise ValueError(f"window is {window}; a token is marked by the next one, so it stays for 1 query at least")
        self.window, self.about = window, about

    def _kept(self, x: Projections) -> Tensor:
        """bool [b, ng, s]: tokens that are not marked. Nobody has decided about the last one, or itself only."""
        if x.logits is None:
            raise ValueError(f"policy {self} needs decisions, which this model does not make: retrofit it first")
        kept = x.logits <= 0
        return kept if self.about == "self" else F.pad(kept[..., 1:], (0, 1), value=True)

    def attend(self, x: Projections) -> Attended:
        recent = self.window + 1
        older = F.pad(self._kept(x).cumsum(dim=-1), (recent, 0))[..., : x.k.size(2)]
        return self._attend(x, older + (x.positions() + 1).clamp_max(recent))

    def _visible(self, x: Projections, age: Tensor, start: int, stop: int) -> Tensor:
        return (age <= self.window) | self._kept(x)[:, :, None, None, :stop]


class _Scored(CachePolicy):
    """A policy that drops the held token with the lowest score whenever the budget is exceeded."""

    def __init__(self, budget: Budget | SlotTable) -> None:
        self.budget = budget

    @abstractmethod
    def _scores(self, scores: Tensor, p: Tensor) -> Tensor:
        """New scores of the held tokens [b, ng, m], from the old ones and the last query's weights p [b, ng, g, m]."""

    @abstractmethod
    def _protected(self, budget: int) -> int:
        """Number of latest tokens that are never dropped."""

    def attend(self, x: Projections) -> Attended:
        (b, ng, s, d), at, scale = x.k.shape, x.positions(), 1 / math.sqrt(x.k.size(-1))
        q, k, budget = _by_group(x.rotated_queries(x.q, at), ng), x.rotated_keys(), self.budget.slots(s)
        out, counts, count = torch.empty_like(q), [], 0
        position = at.new_empty(b, ng, 0)  # of the held tokens, ascending
        score = _wide(k.new_empty(b, ng, 0))
        for start in range(0, s, ROWS):
            stop, before = min(start + ROWS, s), count
            # What is held, and the block's own tokens, which come alive one by one.
            position = torch.cat((position, at[start:stop].expand(b, ng, -1)), dim=-1)
            score = F.pad(score, (0, stop - start))
            alive = (position < start).contiguous()
            index = position[..., None].expand(b, ng, -1, d)
            keys, values = (y.gather(2, index).unsqueeze(2) for y in (k, x.v))
            # [b, ng, g, rows, D] x [b, ng, 1, D, m] -> [rows, b, ng, g, m]: one row after the other in memory
            rows = (_wide(q[:, :, :, start:stop] @ keys.transpose(-1, -2)) * scale).permute(3, 0, 1, 2, 4).contiguous()
            for t, row in enumerate(rows, start=start):
                alive[..., before + t - start] = True
                row.masked_fill_(~alive.unsqueeze(2), float("-inf"))
                torch.softmax(row, dim=-1, out=row)
                score = self._scores(score, row)
                allowed = budget[t + 1]
                if count == allowed:
                    free = alive & (position <= t - self._protected(allowed))
                    # Of equal scores the oldest: argmin takes the first.
                    alive.scatter_(-1, score.masked_fill(~free, float("inf")).argmin(dim=-1, keepdim=True), False)
                else:
                    count += 1
                counts.append(count)
            # [rows, b, ng, g, m] -> [b, ng, g, rows, m]
            out[:, :, :, start:stop] = rows.permute(1, 2, 3, 0, 4).to(q.dtype) @ values
            position, score = (y[alive].view(b, ng, count) for y in (position, score))  # every head holds as many
        return Attended(out.view(b, -1, s, d), torch.tensor(counts, device=k.device).expand(b, ng, s))


class H2O(_Scored):
    """Heavy-Hitter Oracle (Zhang et al. 2023, arXiv 2306.14048, algorithm 1).

    A token's score is the attention that it has received since it came, summed over queries; each head drops the token
    with the lowest sum. As in its experiments, half of the budget is for the latest tokens and the other half for heavy
    hitters. Query heads that share a KV head add up.
    """

    name = "H2O"

    def _scores(self, scores: Tensor, p: Tensor) -> Tensor:
        return scores.add_(p.sum(dim=2))

    def _protected(self, budget: int) -> int:
        return budget // 2


class TOVA(_Scored):
    """Token Omission Via Attention (Oren et al. 2024, arXiv 2401.06104).

    The token to which the last query attends least is dropped, by the mean over all query heads of the layer: its heads
    hold the same tokens. The newest token may be it.
    """

    name = "TOVA"

    def _scores(self, scores: Tensor, p: Tensor) -> Tensor:
        return p.mean(dim=(1, 2))[:, None].expand_as(scores)

    def _protected(self, budget: int) -> int:
        return 0
