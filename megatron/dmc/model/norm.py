"""RMSNorm for the local spec and for the end of the decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """RMSNorm over the last axis. Unlike megatron-core's wrapped torch norm it works with sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Each rank sees a slice of the sequence: finalize_model_grads sums the gradients of marked parameters.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class RMSNormBesideCarry(RMSNorm):
    """The decoder's final norm: the last sequence row is the carried count, not a hidden state, and passes through."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((super().forward(x[:-1]), x[-1:]))
