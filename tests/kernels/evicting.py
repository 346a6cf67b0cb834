"""Eviction in the plainest way: Python lists, one token and one head at a time; and a runner of steps over a cache."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.dmc.kernels import CacheState, EvictParams, append_evicting, decode_attention, prefill_attention
from megatron.dmc.kernels.params import NEURON_ALL, NEURON_QUERY
from megatron.dmc.ops import rotary_frequencies


@dataclass
class Sequence:
    """Projections of one sequence of n tokens, before the rotation, and its decision logits."""

    q: Tensor
    """[n, Hq, D]"""
    k: Tensor
    v: Tensor
    """[n, H, D]"""
    logits: Tensor
    """[n, H]"""

    def __getitem__(self, index) -> Sequence:
        return Sequence(self.q[index], self.k[index], self.v[index], self.logits[index])

    def __len__(self) -> int:
        return self.q.size(0)


def sequence(n: int, g: int, kv: int, d: int, marked: float = 0.6, seed: int = 0, dtype=torch.float32) -> Sequence:
    """Random tokens as views of one fused projection; about a share ``marked`` of them is marked."""
    generator = torch.Generator().manual_seed(seed)
    fused = torch.randn(n, (g + 2) * kv, d, generator=generator).to(dtype)
    logits = marked - torch.rand(n, kv, generator=generator)
    return Sequence(*fused.split((g * kv, kv, kv), dim=1), logits)


def _rotated(x: Tensor, position: int, inv_freq: Tensor, neuron_out: bool) -> Tensor:
    x, half = x.double().clone(), x.numel() // 2
    if neuron_out:
        x[-1] = 0
    angle = position * inv_freq.double()
    turned = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angle), angle)
    x = torch.cat((turned.real, turned.imag))
    if neuron_out:
        x[-1] = 0
    return x


@dataclass
class _Token:
    index: int
    key: Tensor
    value: Tensor
    marked: bool = False


class SlowHeads:
    """All KV heads of a layer for one sequence."""

    def __init__(self, heads: int, window: int, about_self: bool, neuron: int, inv_freq: Tensor) -> None:
        self.heads: list[list[_Token]] = [[] for _ in range(heads)]
        self.window, self.about_self, self.neuron, self.inv_freq = window, about_self, neuron, inv_freq
        self.count = 0

    def step(self, token: Sequence) -> Tensor:
        """Attention of the next token: fp64 [Hq, D]. ``token`` is of one."""
        g, d = token.q.size(1) // len(self.heads), token.q.size(2)
        out = torch.empty(token.q.size(1), d, dtype=torch.float64)
        for h, held in enumerate(self.heads):
            key = _rotated(token.k[0, h], self.count, self.inv_freq, self.neuron == NEURON_ALL)
            held.append(_Token(self.count, key, token.v[0, h].double()))
            about = held[-1] if self.about_self else held[-2] if len(held) > 1 else None
            if about is not None:
                about.marked = bool(token.logits[0, h] > 0)
            held[:] = [x for x in held if self.count - x.index <= self.window or not x.marked]
            keys, values = (torch.stack([getattr(x, name) for x in held]) for name in ("key", "value"))
            for i in range(g):
                neuron_out = self.neuron == NEURON_ALL or (self.neuron == NEURON_QUERY and i == 0)
                query = _rotated(token.q[0, h * g + i], self.count, self.inv_freq, neuron_out)
                out[h * g + i] = torch.softmax(keys @ query / math.sqrt(d), dim=0) @ values
        self.count += 1
        return out

    def kept(self) -> list[list[_Token]]:
        """Those beyond the window, by head."""
        return [[x for x in held if self.count - 1 - x.index > self.window] for held in self.heads]


class Run:
    """Feeds sequences through one layer of a cache, in steps of any composition, and the oracle beside it."""

    def __init__(
        self,
        sequences: list[Sequence],
        rows: list[int],
        state: CacheState,
        *,
        about_self: bool,
        neuron: int,
        layer: int = 1,
        device: str = "cpu",
        bound: float = 1e-5,
    ) -> None:
        self.sequences, self.rows, self.state, self.layer, self.device = sequences, rows, state, layer, device
        self.rule, self.bound = {"about_self": about_self, "neuron": neuron}, bound
        self.inv_freq = rotary_frequencies(sequences[0].q.size(-1), 1e4)
        heads = sequences[0].k.size(1)
        self.slow = [SlowHeads(heads, state.evict_window, about_self, neuron, self.inv_freq) for _ in sequences]

    def step(self, counts: list[int], decode: bool = False) -> None:
        """``counts[i]`` tokens of sequence i, sequences without tokens included; ``decode``: by decode_attention."""
        at = [self.slow[i].count for i in range(len(counts))]
        parts = [self.sequences[i][at[i] : at[i] + n] for i, n in enumerate(counts)]
        assert [len(part) for part in parts] == counts

        def ints(values) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=self.device)

        cu, rows = ints([0, *torch.tensor(counts).cumsum(0).tolist()]), ints(self.rows)
        positions = ints([p for i, n in enumerate(counts) for p in range(at[i], at[i] + n)])
        q, k, v, logits = (
            torch.cat([getattr(x, name) for x in parts]).to(self.device) for name in ("q", "k", "v", "logits")
        )
        params = EvictParams(
            q, k, v, logits, cu, rows, positions, self.inv_freq.to(self.device), **self.rule, partial=not decode
        )
        done = append_evicting(self.state, self.layer, params)
        scale = q.size(-1) ** -0.5
        if decode:
            assert set(counts) == {1} and done.k_part.numel() == 0
            out = decode_attention(self.state, self.layer, done.q_rot, rows, scale)
        else:
            out = prefill_attention(self.state, self.layer, done, cu, rows, scale)
        assert out.dtype == q.dtype and out.shape == q.shape
        want = [slow.step(part[t : t + 1]) for slow, part in zip(self.slow, parts) for t in range(len(part))]
        close(out, torch.stack(want), self.bound)
        self.state.check_integrity()

    def check_cache(self) -> None:
        """Kept and recent tokens of every head are the oracle's."""
        for row, slow in zip(self.rows, self.slow):
            kept = slow.kept()
            for h, held in enumerate(slow.heads):
                assert int(self.state.lengths[row, self.layer, h]) == len(kept[h])
                assert int(self.state.segment[row, self.layer, h]) == slow.count
                recent = held[len(kept[h]) :]
                assert recent == [] or recent[-1].index == slow.count - 1
                tokens = [*kept[h], *recent]
                if tokens:
                    for got, name in zip(held_tokens(self.state, row, self.layer, h), ("key", "value")):
                        close(got, torch.stack([getattr(x, name) for x in tokens]), self.bound)


def held_tokens(state: CacheState, row: int, layer: int, head: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one head, kept ones and then recent ones: [n, D]."""
    size, kept, seen = state.page_size, *(int(x[row, layer, head]) for x in (state.lengths, state.segment))
    places = [(state.page_table[row, layer, head, i // size], i % size) for i in range(kept)]
    for token in range(max(0, seen - 1 - state.evict_window), seen):
        places.append((state.recent_table[row, layer, head, token // size % state.recent_table.size(3)], token % size))
    return tuple(torch.stack([x[page, place] for page, place in places]) for x in (state.k_pages, state.v_pages))


def close(got: Tensor, want: Tensor, bound: float) -> None:
    error = float((got.double().cpu() - want).abs().max() / want.abs().max())
    assert error <= bound, f"{error:.1e}"
