"""Cache policies in the plainest way: Python lists, one token, one sequence, one head at a time, by the papers' rules.

Written to share nothing with ``megatron.dmc.evaluation.policies``. Each has :class:`OracleCache`'s ``step`` and
``lengths``. (DMC's and DMS' slow caches are the oracles of ``megatron.dmc.ops``.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Token:
    """One held token of one head."""

    def __init__(self, position: int, key: Tensor, value: Tensor) -> None:
        self.position, self.key, self.value = position, key, value
        self.score = 0.0


class SlowCache:
    """Holds every token. budget: entry n is what may be held after n tokens."""

    def __init__(
        self,
        batch: int,
        groups: int,
        inv_freq: Tensor,
        budget: list[int] | None = None,
        neuron: str = "none",
        factor: float = 1.0,
    ) -> None:
        self.held: list[list[list[Token]]] = [[[] for _ in range(groups)] for _ in range(batch)]
        self.inv_freq, self.budget, self.neuron, self.position = inv_freq, budget, neuron, 0
        self.factor = factor

    def lengths(self) -> Tensor:
        return torch.tensor([[len(head) for head in row] for row in self.held])

    def positions(self) -> list[list[list[int]]]:
        return [[[token.position for token in head] for head in row] for row in self.held]

    def rotate(self, x: Tensor, position: int, neuron_out: bool) -> Tensor:
        x, half = x.clone(), x.numel() // 2
        if neuron_out:
            x[-1] = 0
        angle = (position * self.inv_freq).to(x.dtype)
        turned = torch.complex(x[:half], x[half:]) * torch.polar(torch.full_like(angle, self.factor), angle)
        out = torch.cat((turned.real, turned.imag))
        if neuron_out:
            out[-1] = 0
        return out

    def places(self, head: list[Token]) -> list[int]:
        """The position that each held token is rotated at; the last is the query's own."""
        return [token.position for token in head]

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """raw q [b, np, D], k, v [b, ng, D] -> [b, np, D]"""
        out, g, d = torch.empty_like(q), q.size(1) // k.size(1), q.size(-1)
        for i, row in enumerate(self.held):
            weights = []  # [head of the layer][query head of the group][held token]
            for j, head in enumerate(row):
                head.append(Token(self.position, k[i, j], v[i, j]))
                places = self.places(head)
                out_of_keys = self.neuron == "all"
                keys = torch.stack([self.rotate(token.key, place, out_of_keys) for token, place in zip(head, places)])
                weights.append([])
                for n in range(j * g, (j + 1) * g):
                    query = self.rotate(q[i, n], places[-1], out_of_keys or (self.neuron == "query" and n == j * g))
                    p = torch.softmax(keys @ query / math.sqrt(d), dim=0)
                    out[i, n] = p @ torch.stack([token.value for token in head])
                    weights[-1].append(p.tolist())
            self.after(row, weights)
        self.position += 1
        return out

    def after(self, row: list[list[Token]], weights: list) -> None:
        pass

    def now(self) -> int:
        return self.budget[self.position + 1]


class SlowH2O(SlowCache):
    def after(self, row, weights):
        for head, of_head in zip(row, weights):
            for n, token in enumerate(head):
                token.score += sum(p[n] for p in of_head)
            if len(head) > self.now():
                recent = self.now() // 2
                heavy = self.now() - recent
                old, new = (head[:-recent], head[-recent:]) if recent else (head, [])
                best = sorted(old, key=lambda token: token.score, reverse=True)[:heavy]
                head[:] = sorted(best, key=lambda token: token.position) + new


class SlowTOVA(SlowCache):
    def after(self, row, weights):
        if len(row[0]) > self.now():
            queries = [p for of_head in weights for p in of_head]
            mean = [sum(p[n] for p in queries) / len(queries) for n in range(len(row[0]))]
            lowest = mean.index(min(mean))
            for head in row:
                del head[lowest]


class SlowStreaming(SlowCache):
    sinks = 4

    def places(self, head):
        return list(range(len(head)))

    def after(self, row, weights):
        for head in row:
            if len(head) > self.now():
                del head[self.sinks]
