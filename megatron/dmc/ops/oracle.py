"""Step-by-step oracle of inference: one token at a time, one head at a time, with a growing list of slots.

It follows arXiv 2403.09636, section 3, and shares nothing with the code that is tested against it: no pooling,
attention or rotation of the other modules, only the decision rule, of which there is one.
"""

from __future__ import annotations

import math
from typing import Optional

import torch
from torch import Tensor

from megatron.dmc.ops.decisions import decision_logits


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
    ) -> None:
        """Empty cache. groups: ng, KV heads; inv_freq: fp32 [D / 2]; window: W, or None for the whole segment; factor:
        YaRN's, on rotated queries and keys.
        """
        self.heads = [[_Head() for _ in range(groups)] for _ in range(batch)]
        self.inv_freq, self.bias, self.epsilon, self.window = inv_freq, decision_bias, epsilon, window
        self.factor = factor
        self.position = 0

    def lengths(self) -> Tensor:
        """Slots in use: int64 [b, ng]."""
        return torch.tensor([[len(h.keys) for h in row] for row in self.heads])

    def _rotate(self, x: Tensor) -> Tensor:
        """Rotate [D] to the current position, neuron zero before and after."""
        half = x.numel() // 2
        angle = self.position * self.inv_freq.to(x.device)
        x = x.clone()
        x[-1] = 0
        turned = torch.complex(x[:half].float(), x[half:].float()) * torch.polar(
            torch.full_like(angle, self.factor), angle
        )
        out = torch.cat((turned.real, turned.imag))
        out[-1] = 0
        return out

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
                head.keys[-1] = self._rotate(sum(w * key for w, key, _ in recent) / total)
                head.values[-1] = sum(w * value for w, _, value in recent) / total
                keys, values = torch.stack(head.keys), torch.stack(head.values)
                for n, query in enumerate(group):
                    p = torch.softmax(keys @ self._rotate(query) / math.sqrt(d), dim=0)
                    out[i, j * g + n] = p @ values
        self.position += 1
        return out.to(q.dtype)
