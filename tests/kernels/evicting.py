"""A runner of steps over a cache of a model that evicts, beside the oracle's cache of Python lists."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.dmc.kernels import CacheState, EvictParams, append_evicting, decode_attention, prefill_attention
from megatron.dmc.kernels.params import NEURON_ALL, NEURON_NONE, NEURON_QUERY
from megatron.dmc.ops import EvictingOracleCache, rotary_frequencies

NEURONS = {NEURON_NONE: "none", NEURON_ALL: "all", NEURON_QUERY: "query"}


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
        settings = {"window": state.evict_window, "about_self": about_self, "neuron": NEURONS[neuron]}
        heads = sequences[0].k.size(1)
        self.slow = [EvictingOracleCache(1, heads, self.inv_freq, **settings) for _ in sequences]

    def step(self, counts: list[int], decode: bool = False) -> None:
        """``counts[i]`` tokens of sequence i, sequences without tokens included; ``decode``: by decode_attention."""
        at = [self.slow[i].position for i in range(len(counts))]
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
        want = [
            slow.step(*(getattr(part, name)[t : t + 1] for name in ("q", "k", "v", "logits")))
            for slow, part in zip(self.slow, parts)
            for t in range(len(part))
        ]
        close(out, torch.cat(want), self.bound)
        self.state.check_integrity()

    def check_cache(self) -> None:
        """Kept and recent tokens of every head are the oracle's."""
        for row, slow in zip(self.rows, self.slow):
            for h, held in enumerate(slow.held[0]):
                kept = sum(slow.position - 1 - token.position > slow.window for token in held)
                assert int(self.state.lengths[row, self.layer, h]) == kept
                assert int(self.state.segment[row, self.layer, h]) == slow.position
                if held:
                    assert held[-1].position == slow.position - 1
                    for got, name in zip(held_tokens(self.state, row, self.layer, h), ("key", "value")):
                        close(got, torch.stack([getattr(x, name) for x in held]), self.bound)


def held_tokens(state: CacheState, row: int, layer: int, head: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one head, kept ones and then recent ones: [n, D]."""
    size, kept, seen = state.page_size, *(int(x[row, layer, head]) for x in (state.lengths, state.segment))
    places = [(state.page_table[row, layer, head, i // size], i % size) for i in range(kept)]
    for token in range(max(0, seen - 1 - state.evict_window), seen):
        places.append((state.recent_table[row, layer, head, token // size % state.recent_table.size(3)], token % size))
    return tuple(torch.stack([x[page, place] for page, place in places]) for x in (state.k_pages, state.v_pages))


def close(got: Tensor, want: Tensor, bound: float) -> None:
    error = float((got.float().cpu() - want.float()).abs().max() / want.float().abs().max())
    assert error <= bound, f"{error:.1e}"
