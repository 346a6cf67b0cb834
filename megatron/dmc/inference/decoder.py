"""The layers between the token embeddings and the final norm, over an attention that is handed in: the engine's own
model has them, and so has this package's plugin for vLLM.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Optional

import torch.nn.functional as F
from torch import Tensor

from megatron.dmc import kernels
from megatron.dmc.inference.linear import Linear, PanelLinear
from megatron.dmc.kernels.cpu_tuning import linear

FEW_TOKENS = 64  # of a step, for which calls count beside what they compute

Attend = Callable[[Tensor, Tensor, Tensor, Optional[Tensor], int], Tensor]
"""Attention of a layer, by its number: queries [T, Hq, D], keys and values [T, H, D] before the rotation, and the
decisions of an adapter -> [T, Hq, D]."""


class Adapter(NamedTuple):
    """Layer of its own that decides: linear, after an RMSNorm of the hidden state."""

    norm: Tensor
    """[h]"""
    weight: Tensor
    """[H, h], or [1, h] where all heads of a layer decide alike."""

    def __call__(self, hidden: Tensor, epsilon: float) -> Tensor:
        """Decisions of hidden states before the layer's input norm: [T, h] -> [T, H or 1]."""
        return linear(kernels.rms_norm(hidden, self.norm, epsilon), self.weight)


@dataclass(frozen=True)
class Layer:
    """Weights of one layer: this tensor-parallel rank's part."""

    input_norm: Tensor
    qkv: Linear
    """[h] -> [(Hq + 2 H) D]: queries, keys, values."""
    q_norm: Tensor | None
    k_norm: Tensor | None
    """[D]"""
    adapter: Adapter | None
    """DMS adapter that marks tokens for eviction; None where a channel of keys or queries decides."""
    out: Linear
    """[Hq D] -> [h]"""
    mlp_norm: Tensor
    gate_up: Linear
    """[h] -> [F]: silu(gates) * ups"""
    down: Linear
    """[F] -> [h]"""

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.qkv, self.out, self.gate_up, self.down

    @property
    def nbytes(self) -> int:
        norms = (self.input_norm, self.q_norm, self.k_norm, self.mlp_norm, *(self.adapter or ()))
        return sum(x.nbytes for x in (*self.linears, *norms) if x is not None)


class Decoder:
    """All layers of a model, of one tensor-parallel rank. Holds no state of sequences."""

    def __init__(
        self,
        layers: Sequence[Layer],
        heads: int,
        kv_heads: int,
        head_dim: int,
        epsilon: float,
        total: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """
        Args:
            heads, kv_heads: query and KV heads of this rank.
            epsilon: of all norms.
            total: sum over the ranks, which may write its argument; None: there is one rank.
        """
        self.layers, self.heads, self.kv_heads, self.head_dim = layers, heads, kv_heads, head_dim
        self.epsilon, self.total = epsilon, total
        # The last layer has no next one.
        self.fused = [*(self._fuse(*pair) for pair in zip(layers, layers[1:])), None]

    def _fuse(self, layer: Layer, following: Layer) -> kernels.BetweenAttention | None:
        """Weights between the attention of two layers as one call takes them; None where there are several calls: ranks
        that sum up in between, weights that are not in panels.
        """
        weights = [
            x.packed for x in (layer.out, layer.gate_up, layer.down, following.qkv) if isinstance(x, PanelLinear)
        ]
        if self.total is not None or len(weights) < 4:
            return None
        out, gate_up, down, qkv = weights
        norms = layer.mlp_norm, following.input_norm
        return kernels.BetweenAttention(out, norms[0], gate_up, down, norms[1], qkv, self.epsilon)

    def begin(self, x: Tensor) -> Tensor:
        """Queries, keys and values of the first layer: embeddings [T, h] -> [T, (Hq + 2 H) D]."""
        first = self.layers[0]
        return first.qkv(kernels.rms_norm(x, first.input_norm, self.epsilon))

    def step(
        self, n: int, x: Tensor, qkv: Tensor, attend: Attend, wanted: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attention of layer ``n`` and what follows it, up to the next attention.

        Args:
            x: the residual stream before the layer's input norm [T, h].
            qkv: queries, keys and values of the layer [T, (Hq + 2 H) D].
            wanted: the tokens that count behind the last attention, int64 [m]; None: all T.

        Returns:
            The residual stream after the layer [T, h], and queries, keys and values of the next layer. After the last
            layer: the residual stream but for the MLP's output, and that output [m, h].
        """
        layer, fused = self.layers[n], self.fused[n]
        decisions = layer.adapter and layer.adapter(x, self.epsilon)
        # [T, Hq, D] -> [T, Hq D]
        mixed = attend(*self.split(layer, qkv), decisions, n).flatten(1)
        if fused is not None and x.size(0) <= FEW_TOKENS:
            return kernels.between_attention(fused, mixed, x)
        last = n + 1 == len(self.layers)
        if last and wanted is not None:
            mixed, x = mixed[wanted], x[wanted]
        x, y = kernels.add_rms_norm(x, self._sum(layer.out(mixed)), layer.mlp_norm, self.epsilon)
        delta = self._sum(layer.down(layer.gate_up(y)))
        if last:
            return x, delta
        following = self.layers[n + 1]
        x, y = kernels.add_rms_norm(x, delta, following.input_norm, self.epsilon)
        return x, following.qkv(y)

    def _sum(self, x: Tensor) -> Tensor:
        return x if self.total is None else self.total(x)

    def split(self, layer: Layer, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, Hq, D], keys and values [T, H, D], before the rotation."""
        heads = qkv.view(qkv.size(0), -1, self.head_dim)
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:  # the neuron is read after the norm
            q, k = (F.rms_norm(y, w.shape, w, self.epsilon) for y, w in ((q, layer.q_norm), (k, layer.k_norm)))
        return q, k, v
