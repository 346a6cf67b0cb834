"""What the engine does differently by compression method: what a step's tokens leave in the cache, and what that takes.

A method is an object behind :class:`Method`. Its ops are the kernels', and its pages on the host are counted by
:class:`megatron.dmc.inference.cache.PagedCache` from the shapes of the state.
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from megatron.dmc import kernels
from megatron.dmc.inference.cache import ring_bytes, window_bytes
from megatron.dmc.inference.recent_pages import Window
from megatron.dmc.inference.weights import ModelInfo
from megatron.dmc.kernels.params import NEURON_ALL, NEURON_NONE, NEURON_QUERY
from megatron.dmc.kernels.state import CacheState
from megatron.dmc.ops import decision_logits


class StepTokens(NamedTuple):
    """T tokens of a step in one layer."""

    q: Tensor
    """[T, Hq, D], before the rotation."""
    k: Tensor
    v: Tensor
    """[T, H, D], likewise."""
    cu_seqlens: Tensor
    rows: Tensor
    positions: Tensor
    inv_freq: Tensor
    """See :class:`megatron.dmc.kernels.AppendParams`."""
    decisions: Optional[Tensor]
    """[T, H or 1], what an adapter says of them; None where queries or keys decide, or nothing."""
    partial: bool
    """Whether there are chunks of prompts."""


class Method(ABC):
    """One way to hold the keys and values of a model's tokens."""

    def __init__(self, info: ModelInfo) -> None:
        self.info = info

    @abstractmethod
    def state_options(self) -> dict[str, Any]:
        """Arguments of :func:`megatron.dmc.kernels.make_state` that say what is held of a token."""

    @abstractmethod
    def head_bytes(self, head_dim: int, page_size: int, dtype: torch.dtype) -> int:
        """Bytes that a head of a row takes besides its pages, their table and its length."""

    @abstractmethod
    def most_pages(self, tokens: int, page_size: int) -> int:
        """Most pages that a head holds of a sequence that grows to ``tokens``."""

    @abstractmethod
    def append(self, state: CacheState, layer: int, tokens: StepTokens) -> kernels.Appended:
        """Take a step's tokens into the cache of a layer."""


class Merging(Method):
    """DMC, which merges marked tokens into slots, and plain models, in which every token opens one."""

    def __init__(self, info: ModelInfo) -> None:
        super().__init__(info)
        epsilon = info.dmc.importance_epsilon if info.dmc else 0.0
        self.rule = (info.decision_bias, epsilon, info.window, info.compresses)

    def state_options(self) -> dict[str, Any]:
        return {"window": self.info.window, "compress": self.info.compresses}

    def head_bytes(self, head_dim: int, page_size: int, dtype: torch.dtype) -> int:
        window = self.info.window
        places = 0 if not self.info.compresses else 1 if window is None else window
        return ring_bytes(places, head_dim, torch.float32 if window is None else dtype)

    def most_pages(self, tokens: int, page_size: int) -> int:
        return Window(0, page_size).most_pages(tokens)

    def append(self, state: CacheState, layer: int, tokens: StepTokens) -> kernels.Appended:
        *step, _, partial = tokens
        return kernels.append(state, layer, kernels.AppendParams(*step, *self.rule, partial))


class Evicting(Method):
    """DMS, which gives marked tokens up when they leave a window."""

    def __init__(self, info: ModelInfo) -> None:
        super().__init__(info)
        assert info.dmc is not None and info.dmc.window is not None
        self.dmc, self.window = info.dmc, info.dmc.window
        neuron = {"none": NEURON_NONE, "all": NEURON_ALL, "query": NEURON_QUERY}[info.dmc.neuron]
        self.rule = (info.dmc.decision_about == "self", neuron)

    def state_options(self) -> dict[str, Any]:
        return {"evict_window": self.window}

    def head_bytes(self, head_dim: int, page_size: int, dtype: torch.dtype) -> int:
        return window_bytes(self.window, page_size)

    def most_pages(self, tokens: int, page_size: int) -> int:
        return Window(self.window, page_size).most_pages(tokens)

    def append(self, state: CacheState, layer: int, tokens: StepTokens) -> kernels.Appended:
        q, k, v, *where, _, partial = tokens
        params = kernels.EvictParams(q, k, v, self.decision_logits(tokens), *where, *self.rule, partial)
        return kernels.append_evicting(state, layer, params)

    def decision_logits(self, tokens: StepTokens) -> Tensor:
        """Decision logits of every KV head: fp32 [T, H]."""
        q, k, x = tokens.q, tokens.k, tokens.decisions
        if x is None:
            x = (k if self.dmc.decision_source == "key" else q[:, :: q.size(1) // k.size(1)])[..., -1]
        logits = decision_logits(x, self.info.decision_bias, self.dmc.decision_scale)
        return logits.expand(k.shape[:2]).contiguous()


def method_of(info: ModelInfo) -> Method:
    """The method of a model."""
    return Evicting(info) if info.dmc is not None and info.dmc.evicts else Merging(info)
