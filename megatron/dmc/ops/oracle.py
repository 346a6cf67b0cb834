"""Step-by-step oracles of inference: one token at a time, one head at a time, with Python lists of slots.

They follow arXiv 2403.09636, section 3 (DMC), and arXiv 2506.05345 (DMS), and share nothing with the code that is
tested against them: no pooling, attention or rotation of the other modules, only DMC's decision rule, of which there is
one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Optional

import torch
from torch import Tensor

from megatron.dmc.ops.decisions import decision_logits


def _rotate(x: Tensor, position: int, inv_freq: Tensor, factor: float, neuron_out: bool) -> Tensor:
    """Rotate [D] to ``position``: fp32 [D]. neuron_out: channel D-1 is zero before and after."""
    half = x.numel() // 2
    angle = position * inv_freq.to(x.device)
    x = x.float().clone()
    if neuron_out:
        x[-1] = 0
    turned = torch.complex(x[:half], x[half:]) * torch.polar(torch.full_like(angle, factor), angle)
    out = torch.cat((turned.real, turned.imag))
    if neuron_out:
        out[-1] = 0
    return out


def _as_it_is(x: Tensor) -> Tensor:
    return x


class _Head:
    """Cache of one KV head of one sequence."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []  # rotated, [D]
        self.values: list[Tensor] = []  # [D]
        self.segment: list[tuple[Tensor, Tensor, Tensor]] = []  # (omega, raw key, value) of the open slot


class OracleCache:
    """Compressed cache of one layer for a batch of sequences that start empty."""

    def __init__(
        self,
        batch: int,
        groups: int,
        inv_freq: Tensor,
        *,
        decision_bias: float,
        epsilon: float,
        window: Optional[int],
        factor: float = 1.0,
        stored: Callable[[Tensor], Tensor] = _as_it_is,
    ) -> None:
        """Empty cache.

        Args:
            groups: ng, KV heads.
            inv_freq: fp32 [D / 2].
            window: W, or None for the whole segment.
            factor: YaRN's, on rotated queries and keys.
            stored: what the cache keeps of a slot's key or value, fp32 [D]: rounding, where it is quantized.
        """
        self.heads = [[_Head() for _ in range(groups)] for _ in range(batch)]
        self.inv_freq, self.bias, self.epsilon, self.window = inv_freq, decision_bias, epsilon, window
        self.factor, self.stored = factor, stored
        self.position = 0

    def lengths(self) -> Tensor:
        """Slots in use: int64 [b, ng]."""
        return torch.tensor([[len(h.keys) for h in row] for row in self.heads])

    def _rotate(self, x: Tensor) -> Tensor:
        """Rotate [D] to the current position, neuron zero before and after."""
        return _rotate(x, self.position, self.inv_freq, self.factor, neuron_out=True)

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Take one token, before the rotation: q [b, np, D], k, v [b, ng, D] -> attention output [b, np, D]."""
        b, np_, d = q.shape
        ng = k.size(1)
        g = np_ // ng
        out = torch.empty(b, np_, d, dtype=torch.float32, device=q.device)
        for i in range(b):
            for j in range(ng):
                head, group = self.heads[i][j], q[i, j * g : (j + 1) * g]
                merge = bool(decision_logits(k[i, j, -1], self.bias) > 0) and len(head.keys) > 0
                omega = torch.sigmoid(group[:, -1].float().mean() + self.bias) + self.epsilon
                if not merge:
                    head.segment = []
                    head.keys.append(q.new_empty(0))
                    head.values.append(q.new_empty(0))
                head.segment.append((omega, k[i, j].float(), v[i, j].float()))
                recent = head.segment if self.window is None else head.segment[-self.window :]
                total = sum(w for w, _, _ in recent)
                head.keys[-1] = self.stored(self._rotate(sum(w * key for w, key, _ in recent) / total))
                head.values[-1] = self.stored(sum(w * value for w, _, value in recent) / total)
                keys, values = torch.stack(head.keys), torch.stack(head.values)
                for n, query in enumerate(group):
                    p = torch.softmax(keys @ self._rotate(query) / math.sqrt(d), dim=0)
                    out[i, j * g + n] = p @ values
        self.position += 1
        return out.to(q.dtype)


@dataclass
class _Token:
    """One held token of one KV head."""

    position: int
    key: Tensor
    """fp32 [D], rotated."""
    value: Tensor
    """fp32 [D]"""
    marked: bool = False


class EvictingOracleCache:
    """Cache of one layer under DMS for a batch of sequences that start empty: a marked token is dropped as soon as it
    is more than ``window`` tokens old.
    """

    def __init__(
        self,
        batch: int,
        groups: int,
        inv_freq: Tensor,
        *,
        window: int,
        about_self: bool = False,
        neuron: Literal["none", "all", "query"] = "all",
        factor: float = 1.0,
        stored: Callable[[Tensor], Tensor] = _as_it_is,
    ) -> None:
        """Empty cache.

        Args:
            groups: ng, KV heads.
            inv_freq: fp32 [D / 2].
            window: queries after a token that see it whatever was decided, at least 1.
            about_self: a decision is about the token that it is read from, not the one before.
            neuron: heads whose channel D-1 takes no part in attention (``DMCConfig.neuron``): none, all query and key
                heads, or the first query head of every group.
            factor: YaRN's, on rotated queries and keys.
            stored: what the cache keeps of a key or value, fp32 [D]: rounding, where it is quantized.
        """
        self.held: list[list[list[_Token]]] = [[[] for _ in range(groups)] for _ in range(batch)]
        self.inv_freq, self.window, self.about_self, self.neuron = inv_freq, window, about_self, neuron
        self.factor, self.stored = factor, stored
        self.position = 0

    def lengths(self) -> Tensor:
        """Tokens held, the latest ``window + 1`` included: int64 [b, ng]."""
        return torch.tensor([[len(head) for head in row] for row in self.held])

    def positions(self) -> list[list[list[int]]]:
        """Positions of the tokens held, oldest first: one list for each head of each sequence."""
        return [[[token.position for token in head] for head in row] for row in self.held]

    def _rotate(self, x: Tensor, neuron_out: bool) -> Tensor:
        return _rotate(x, self.position, self.inv_freq, self.factor, neuron_out)

    def step(self, q: Tensor, k: Tensor, v: Tensor, logits: Tensor) -> Tensor:
        """Take one token.

        Args:
            q: [b, np, D], before the rotation.
            k, v: [b, ng, D], before the rotation.
            logits: [b, ng], the decision logits that are read from this token.

        Returns:
            Attention output [b, np, D], in q's dtype.
        """
        (b, heads, d), ng = q.shape, k.size(1)
        g, out = heads // ng, torch.empty(q.shape, dtype=torch.float32, device=q.device)
        for i in range(b):
            for j in range(ng):
                head = self.held[i][j]
                key = self._rotate(k[i, j], self.neuron == "all")
                head.append(_Token(self.position, self.stored(key), self.stored(v[i, j].float())))
                decided = head[-1:] if self.about_self else head[-2:-1]  # nobody, for a sequence's first token
                for token in decided:
                    token.marked = bool(logits[i, j] > 0)
                head[:] = [t for t in head if not t.marked or self.position - t.position <= self.window]
                keys, values = torch.stack([t.key for t in head]), torch.stack([t.value for t in head])
                for n in range(g):
                    neuron_out = self.neuron == "all" or (self.neuron == "query" and n == 0)
                    p = torch.softmax(keys @ self._rotate(q[i, j * g + n], neuron_out) / math.sqrt(d), dim=0)
                    out[i, j * g + n] = p @ values
        self.position += 1
        return out.to(q.dtype)
